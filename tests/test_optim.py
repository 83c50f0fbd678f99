"""ProjectedOptimizer around what people really use."""

import copy
import inspect
import io

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

import gradproj

EXTRA = {"SGD": {"momentum": 0.9}, "LBFGS": {"max_iter": 3}, "Muon": {"lr": 0.01}}
CLASSES = [
    c for _, c in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(c, Optimizer) and c is not Optimizer
]


def model_and_batches(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Tanh(), torch.nn.Linear(6, 3, bias=False))
    return model, [torch.randn(5, 4) for _ in range(12)]


def loss(model, x, target=0.0):
    return (model(x) - target).square().mean()


def train(model, opt, batches, protect=True, scheduler=None):
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        if protect:
            with opt.protect():
                loss(model, x, 1.0).backward()
        opt.zero_grad()
        if isinstance(getattr(opt, "optimizer", opt), torch.optim.LBFGS):

            def closure(y=y):
                opt.zero_grad()
                value = loss(model, y)
                value.backward()
                return value

            opt.step(closure)
        else:
            loss(model, y).backward()
            opt.step()
        if scheduler:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_torch_optimizer(cls):
    """Equal to projecting by hand in front of the plain optimizer."""
    if cls is torch.optim.SparseAdam:
        pytest.skip("takes sparse gradients only, which a projection refuses")
    model, batches = model_and_batches()
    twin = copy.deepcopy(model)
    settings = EXTRA.get(cls.__name__, {})
    result = train(model, gradproj.ProjectedOptimizer(cls(model.parameters(), **settings)), batches)

    plain = cls(twin.parameters(), **settings)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        d = torch.autograd.grad(loss(twin, x, 1.0), list(twin.parameters()))

        def closure(y=y, d=d):
            plain.zero_grad()
            value = loss(twin, y)
            value.backward()
            gradproj.project_([p.grad for p in twin.parameters()], d)
            return value

        plain.step(closure)
    assert_same(result, list(twin.parameters()))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_the_wrapped_groups(name):
    """The wrapper's schedule and the plain optimizer's are the same, OneCycle's momentum included."""
    model, batches = model_and_batches()
    twin = copy.deepcopy(model)
    wrapped = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8))
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.8)
    a = train(model, wrapped, batches, protect=False, scheduler=SCHEDULERS[name](wrapped))
    b = train(twin, plain, batches, protect=False, scheduler=SCHEDULERS[name](plain))
    assert_same(a, b)
    assert wrapped.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert wrapped.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]


def test_reduce_on_plateau():
    model, _ = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert opt.optimizer.param_groups[0]["lr"] < 1.0


def test_state_dict_is_the_wrapped_ones_and_resumes_in_mid_run():
    model, batches = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, opt, batches[:4])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    expected = train(model, opt, batches[4:])

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, _ = model_and_batches(seed=1)
    resumed = gradproj.ProjectedOptimizer(torch.optim.AdamW(twin.parameters(), lr=1.0))
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    assert_same(expected, train(twin, resumed, batches[4:]))
    plain = torch.optim.AdamW(twin.parameters())
    plain.load_state_dict(opt.state_dict())  # a checkpoint works with and without the wrapper


def test_groups_added_later():
    model, batches = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1))
    with opt.protect():
        loss(model, batches[0], 1.0).backward()
    model.zero_grad()
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    assert len(opt.param_groups) == len(opt.optimizer.param_groups) == 2
    loss(model, batches[1]).backward()
    opt.step()
    assert opt.last.applied
    assert_same(train(model, opt, batches), list(model.parameters()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model, batches = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loss(model, batches[0]).backward()
    opt.zero_grad(set_to_none=set_to_none)
    for p in model.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()


def test_is_an_optimizer_and_says_what_it_does():
    model, _ = model_and_batches()
    inner = torch.optim.AdamW(model.parameters())
    opt = gradproj.ProjectedOptimizer(inner, method="conflict")
    assert isinstance(opt, Optimizer)
    assert opt.state is inner.state and opt.param_groups is inner.param_groups and opt.defaults is inner.defaults
    assert "conflict" in repr(opt) and "AdamW" in repr(opt)
    with pytest.raises(TypeError, match=r"takes a torch.optim.Optimizer, got list"):
        gradproj.ProjectedOptimizer([1])


def test_hooks_on_the_wrapper_run():
    model, batches = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    loss(model, batches[0]).backward()
    opt.step()
    assert seen == ["before", "after"]


def test_grad_scaler():
    """A scaler marks the object that it is given: the mark must reach the optimizer that unscales."""
    model, batches = model_and_batches()
    twin = copy.deepcopy(model)
    results = []
    for m, scaled in ((model, True), (twin, False)):
        opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(m.parameters(), lr=0.01, fused=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        for x, y in zip(batches[::2], batches[1::2], strict=True):
            with opt.protect():
                scaler.scale(loss(m, x, 1.0)).backward()
            opt.zero_grad()
            scaler.scale(loss(m, y)).backward()
            scaler.step(opt)
            scaler.update()
        results.append(list(m.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    plain = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert not getattr(plain, "_step_supports_amp_scaling", False)


@pytest.mark.filterwarnings("ignore")
def test_compiled_step_equals_eager(inductor):
    model, batches = model_and_batches()
    twin = copy.deepcopy(model)
    eager = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    compiled = gradproj.ProjectedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.1))
    step = torch.compile(compiled.step)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        for m, opt, run in ((model, eager, eager.step), (twin, compiled, step)):
            with opt.protect():
                loss(m, x, 1.0).backward()
            opt.zero_grad()
            loss(m, y).backward()
            run()
            assert opt.last.applied
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# --- attach ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_attached_equals_wrapped(space):
    model, batches = model_and_batches()
    twin = copy.deepcopy(model)
    wrapped = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), space=space)
    expected = train(model, wrapped, batches)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    projector = gradproj.attach(optimizer, space=space)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        with projector.protect():
            loss(twin, x, 1.0).backward()
        optimizer.zero_grad()
        loss(twin, y).backward()
        optimizer.step()
    assert_same(expected, list(twin.parameters()))
    assert torch.equal(projector.last.weights, wrapped.last.weights)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_attached_closure_is_projected_where_it_makes_its_gradients(by_keyword):
    """Lightning calls step(closure) with the backward inside: a hook that projects in front of it is too early."""
    model, batches = model_and_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector = gradproj.attach(optimizer)
    with projector.protect():
        loss(model, batches[0], 1.0).backward()

    def closure():
        optimizer.zero_grad()
        value = loss(model, batches[1])
        value.backward()
        return value

    assert optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert projector.last.applied


@pytest.mark.filterwarnings("ignore")
def test_attached_survives_compile(inductor):
    """Dynamo unwraps an optimizer's step to leave a profiling hook out: the projection must not go with it."""
    model, batches = model_and_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector = gradproj.attach(optimizer)
    torch.compile(lambda x: x + 1)(torch.ones(2))
    with projector.protect():
        loss(model, batches[0], 1.0).backward()
    optimizer.zero_grad()
    loss(model, batches[1]).backward()
    torch.compile(optimizer.step)()
    assert projector.last is not None and projector.last.applied


def test_attach_refuses_what_projects_already():
    model, _ = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="projects already"):
        gradproj.attach(opt)
    with pytest.raises(TypeError, match=r"takes a torch.optim.Optimizer, got int"):
        gradproj.attach(3)


def test_copy_of_an_attached_optimizer_has_lost_its_hook():
    """Torch drops hooks on deepcopy: the projector that captured directions for it must not stay silent."""
    model, batches = model_and_batches()
    projector = gradproj.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with projector.protect():
        loss(model, batches[0]).backward()
    with pytest.warns(RuntimeWarning, match="attach\\(\\) again"):
        copy.deepcopy(projector)
