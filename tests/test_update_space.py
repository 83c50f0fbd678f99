"""Update space: what an optimizer's step did to the parameters keeps off the protected directions."""

import copy

import pytest
import torch

import gradproj

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "muon": lambda p: torch.optim.Muon([t for t in p if t.dim() == 2], lr=0.02, weight_decay=0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    if request.param == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon")
    return OPTIMIZERS[request.param]


def model_and_batches(dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
    return model, [torch.randn(6, 5, dtype=dtype) for _ in range(12)]


def loss(model, x, target=0.0):
    return (model(x) - target).square().mean()


def copies(model):
    return {p: p.detach().clone() for p in model.parameters()}


def inner(a, b):
    return sum(float((a[p].double() * b[p].double()).sum()) for p in a if p in b)


def size(a, b):
    return sum(float((a[p].double() * b[p].double()).abs().sum()) for p in a if p in b)


def step_and_descent(model, opt, run):
    """What ``run`` took off the parameters: ``{parameter: before - after}``."""
    before = copies(model)
    run()
    return {p: before[p] - p.detach() for p in opt.projector.parameters()}


@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_update_keeps_off_the_directions(build, method, per):
    """Momentum and weight decay undo the orthogonality of a gradient; here it is the update that is orthogonal."""
    model, x = model_and_batches()
    opt = gradproj.ProjectedOptimizer(build(model.parameters()), method=method, directions=2, space="update", per=per)
    applied = False
    for i in range(8):
        with opt.protect():
            loss(model, x[i], 1.0).backward()
        opt.zero_grad()
        loss(model, x[i + 1], -1.0).backward()
        descent = step_and_descent(model, opt, opt.step)
        for d in opt.projector._directions._stored:
            for p in [None, *descent] if per == "tensor" else [None]:
                u = descent if p is None else {p: descent[p]}
                product, scale = inner(u, d), (inner(u, u) * inner({q: d[q] for q in u}, d)) ** 0.5
                # the parameters are of size 1 and rounded to 1e-16, the update is of size 0.01
                assert abs(product) <= 1e-6 * scale if method == "orthogonal" else product >= -1e-6 * scale
        applied |= bool(opt.last.applied)
    assert applied


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_in_float32_only_rounding_is_left(build, method):
    """A parameter p after the step is off by eps / 2 |p|, and the update's own arithmetic by a few eps of its terms."""
    model, x = model_and_batches(torch.float32)
    opt = gradproj.ProjectedOptimizer(build(model.parameters()), method=method, space="update")
    eps = torch.finfo(torch.float32).eps
    for i in range(8):
        with opt.protect():
            loss(model, x[i], 1.0).backward()
        opt.zero_grad()
        loss(model, x[i + 1], -1.0).backward()
        descent = step_and_descent(model, opt, opt.step)
        (d,) = opt.projector._directions._stored
        w = float(opt.last.weights[1])
        terms = size(descent, d) + 2 * abs(w) * size(d, {p: d[p] for p in descent})
        bound = eps / 2 * size({p: p.detach() for p in descent}, d) + 4 * eps * terms
        product = inner(descent, d)
        assert abs(product) <= bound if method == "orthogonal" else product >= -bound


def test_unprotected_parts_of_the_model_are_left_as_the_optimizer_left_them():
    """No gradient: no copy, no change. A frozen parameter that changes otherwise is not written back."""
    model, x = model_and_batches()
    model[0].weight.requires_grad_(False)
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), space="update")
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for i in range(4):
        with opt.protect():
            loss(model, x[i], 1.0).backward()
        for m, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            loss(m, x[i + 1], -1.0).backward()
            m[2].bias.grad = None
            o.step()
        assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[2].bias, twin[2].bias)
        assert opt.last.applied
    kept = opt.projector._before
    assert set(kept) == {model[0].bias, model[2].weight}


def test_the_copys_memory_is_that_of_the_last_step():
    model, x = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), space="update")
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    seen = set()
    for i in range(3):
        opt.zero_grad()
        loss(model, x[i]).backward()
        opt.step()
        seen.add(tuple(t.data_ptr() for t in opt.projector._before.values()))
    assert len(seen) == 1
    opt.unprotect()
    assert not opt.projector._before


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.SGD])
def test_closures(cls):
    """The gradients may come into being inside the step, after the parameters were copied."""
    model, x = model_and_batches()
    opt = gradproj.ProjectedOptimizer(cls(model.parameters(), lr=0.1), space="update")
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    opt.zero_grad()

    def closure():
        opt.zero_grad()
        value = loss(model, x[1], -1.0)
        value.backward()
        return value

    descent = step_and_descent(model, opt, lambda: opt.step(closure))
    (d,) = opt.projector._directions._stored
    assert abs(inner(descent, d)) <= 1e-9 * (inner(descent, descent) * inner(d, d)) ** 0.5
    assert inner(descent, descent) > 0


def test_complex_parameters():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.complex128))
    x = torch.randn(4, 3, dtype=torch.complex128)
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW([p], lr=0.01), space="update")
    for _ in range(3):
        with opt.protect():
            (p @ x).abs().sum().backward()
        opt.zero_grad()
        (p @ x).real.square().sum().backward()
        before = p.detach().clone()
        opt.step()
        update = torch.view_as_real(before - p.detach())
        d = torch.view_as_real(opt.projector._directions._stored[0][p])
        assert abs(float((update * d).sum())) <= 1e-9 * float(update.norm() * d.norm())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused):
    """A fused optimizer is called all the same and finds the inf itself: the update is zero, and must stay it."""
    model, x = model_and_batches(torch.float32)
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), space="update")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with opt.protect():
        scaler.scale(loss(model, x[0], 1.0)).backward()
    for i in range(3):
        opt.zero_grad()
        scaler.scale(loss(model, x[i], -1.0)).backward()
        if i == 1:
            model[0].weight.grad[0, 0] = float("inf")
        before = copies(model)
        scaler.step(opt)
        scaler.update()
        same = [torch.equal(p, b) for p, b in before.items()]
        assert all(same) if i == 1 else not any(same)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_that_is_not_finite_is_left_as_it_is():
    model, x = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), space="update")
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    loss(model, x[1]).backward()
    model[0].bias.grad[0] = float("nan")
    twin = {p: p.detach() - 0.1 * p.grad for p in model.parameters()}
    opt.step()
    assert not opt.last.applied and not opt.last.finite
    for p, expected in twin.items():
        torch.testing.assert_close(p.detach(), expected, equal_nan=True)


def test_attached():
    model, x = model_and_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    projector = gradproj.attach(optimizer, space="update", method="conflict")
    for i in range(4):
        with projector.protect():
            loss(model, x[i], 1.0).backward()
        optimizer.zero_grad()
        loss(model, x[i], -1.0).backward()
        before = copies(model)
        optimizer.step()
        descent = {p: b - p.detach() for p, b in before.items()}
        (d,) = projector._directions._stored
        assert inner(descent, d) >= -1e-9 * (inner(descent, descent) * inner(d, d)) ** 0.5
    assert projector.last.applied
