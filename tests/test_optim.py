"""ProjectedOptimizer and attach() around what people really run. Most tests take ``wrapping`` and cover both."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

import gradproj
from training import (
    WRAPPINGS,
    assert_same,
    loss,
    model_and_batches,
    parameters,
    protect,
    train,
    train_by_hand,
    twins,
)

EXTRA = {"SGD": {"momentum": 0.9}, "LBFGS": {"max_iter": 3}}
CLASSES = [
    c for _, c in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(c, Optimizer) and c is not Optimizer
]


# --- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_torch_optimizer(cls, wrapping):
    """Equal to projecting by hand in front of the plain optimizer."""
    if cls is torch.optim.SparseAdam:
        pytest.skip("takes sparse gradients only, which protect() refuses")
    if cls is torch.optim.LBFGS:
        pytest.skip("takes a closure: test_lbfgs")
    model, twin, batches = twins()
    if cls.__name__ == "Muon":  # takes matrices only
        for m in (model, twin):
            m[0].bias = m[2].bias = None
    settings = EXTRA.get(cls.__name__, {})
    result = train(model, *wrapping(cls(model.parameters(), **settings)), batches)
    assert_same(result, train_by_hand(twin, cls(twin.parameters(), **settings), batches))


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_attached_equals_wrapped(space):
    model, twin, batches = twins()
    results, weights = [], []
    for m, wrap in zip((model, twin), WRAPPINGS.values(), strict=True):
        opt, projector = wrap(torch.optim.AdamW(m.parameters(), lr=0.01), space=space)
        results.append(train(m, opt, projector, batches))
        weights.append(projector.last.weights)
    assert_same(*results)
    assert torch.equal(*weights)


def test_several_optimizers_in_one_run(wrapping):
    """Two on one model, two on two models: each protects and steps its own parameters."""
    model, twin, batches = twins()
    halves = [list(model[0].parameters()), list(model[2].parameters())]
    (first, p), (second, q) = (wrapping(torch.optim.SGD(half, lr=0.1)) for half in halves)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x, y in zip(batches[::2], batches[1::2], strict=True):
        first.zero_grad()
        second.zero_grad()
        with p.protect(), q.protect():
            loss(model, x, 1.0).backward()
        loss(model, y).backward()
        first.step()
        second.step()

        direction = torch.autograd.grad(loss(twin, x, 1.0), list(twin.parameters()))
        plain.zero_grad()
        loss(twin, y).backward()
        grads = [w.grad for w in twin.parameters()]
        for part in (slice(0, 2), slice(2, 4)):
            gradproj.project_(grads[part], direction[part])
        plain.step()
    assert_same(parameters(model), parameters(twin))


# --- schedules ------------------------------------------------------------------------------------------------------

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
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_listed():
    """A scheduler that a later torch adds has to be tried."""
    known = {"LRScheduler", "ReduceLROnPlateau", *SCHEDULERS}
    assert {
        name
        for name, c in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(c, lr_scheduler.LRScheduler) and not name.startswith("_")
    } <= known


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_the_wrapped_groups(name, wrapping):
    """With the wrapper and by hand, rates and momenta (OneCycle's, Cyclic's) are the same in every step."""
    model, twin, batches = twins()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8))
    plain = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.8)
    schedules = []
    for m, o, p in ((model, opt, projector), (twin, plain, None)):
        seen = []
        groups = o.param_groups
        train(m, o, p, batches, SCHEDULERS[name](o), lambda g=groups, s=seen: s.append((g[0]["lr"], g[0]["momentum"])))
        schedules.append(seen)
    assert schedules[0] == schedules[1] and len(set(schedules[0])) > 1
    assert projector.last is not None and projector.last.applied


def test_reduce_on_plateau(wrapping):
    model, _ = model_and_batches()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    opt, _ = wrapping(inner)
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert inner.param_groups[0]["lr"] < 1.0


# --- clipping, accumulation, closures -------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_clipping(when, wrapping):
    """Before the step: of the gradient that is projected then. After project(): of the projected one, which stays so."""
    model, twin, x = twins()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    protect(model, projector, x[0])
    direction = torch.autograd.grad(loss(twin, x[0], 1.0), list(twin.parameters()))
    loss(model, x[1]).backward()
    loss(twin, x[1]).backward()
    if when == "after":
        projector.project()
        gradproj.project_([p.grad for p in twin.parameters()], direction)
    for m in (model, twin):
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.05)
    if when == "before":
        gradproj.project_([p.grad for p in twin.parameters()], direction)
    opt.step()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_same(parameters(model), parameters(twin))
    assert projector.last.applied


def test_gradient_accumulation(wrapping):
    """Backward passes add up inside protect(), and outside, and protect() between two of those disturbs neither."""
    model, twin, x = twins()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    loss(model, x[2]).backward()
    with projector.protect():
        loss(model, x[0], 1.0).backward()
        loss(model, x[1], 1.0).backward()
    loss(model, x[3]).backward()
    opt.step()
    capability = loss(twin, x[0], 1.0) + loss(twin, x[1], 1.0)
    direction = torch.autograd.grad(capability, list(twin.parameters()))
    (loss(twin, x[2]) + loss(twin, x[3])).backward()
    gradproj.project_([p.grad for p in twin.parameters()], direction)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_same(parameters(model), parameters(twin), rtol=1e-5, atol=1e-7)


def test_lbfgs(wrapping):
    """Every evaluation of the closure is projected."""
    model, twin, x = twins()
    results = []
    for m, by_hand in ((model, False), (twin, True)):
        opt = torch.optim.LBFGS(m.parameters(), max_iter=3)
        direction = torch.autograd.grad(loss(m, x[0], 1.0), list(m.parameters()))
        if not by_hand:
            opt, projector = wrapping(opt)
            protect(m, projector, x[0])

        def closure(m=m, opt=opt, by_hand=by_hand, direction=direction):
            opt.zero_grad()
            value = loss(m, x[1])
            value.backward()
            if by_hand:
                gradproj.project_([p.grad for p in m.parameters()], direction)
            return value

        opt.step(closure)
        results.append(parameters(m))
    assert_same(*results)


@pytest.mark.parametrize("space", ["gradient", "update"])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_closure_is_projected_where_it_makes_its_gradients(by_keyword, space, wrapping):
    """Lightning calls step(closure) with the backward inside: what projects in front of it is too early."""
    model, x = model_and_batches()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1), space=space)
    protect(model, projector, x[0])

    def closure():
        opt.zero_grad()
        value = loss(model, x[1])
        value.backward()
        return value

    assert opt.step(closure=closure) if by_keyword else opt.step(closure)
    assert projector.last.applied


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_protect_in_a_closure_is_refused(space, wrapping):
    """LBFGS evaluates its closure many times: each would replace the direction that the step is projected against."""
    model, x = model_and_batches()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1), space=space)

    def closure():
        protect(model, projector, x[0])

    with pytest.raises(RuntimeError, match=r"protect\(\) inside the closure of step\(\).*protect before step\(\)"):
        opt.step(closure)
    protect(model, projector, x[0])  # and the flag is down again
    loss(model, x[1]).backward()
    opt.step()


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_a_step_during_backward_is_refused(space, wrapping):
    """Optimizer-in-backward: the first parameter's hook comes when the others have no gradient yet."""
    model, x = model_and_batches()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1), space=space)
    protect(model, projector, x[0])
    model[0].weight.register_post_accumulate_grad_hook(lambda p: opt.step())
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"during a backward pass.*call step\(\) after backward\(\)"):
        loss(model, x[1]).backward()
    assert_same(before, parameters(model))


# --- state ----------------------------------------------------------------------------------------------------------


def test_state_dict_is_the_wrapped_ones_and_resumes_in_mid_run(wrapping):
    model, batches = model_and_batches()
    opt, projector = wrapping(torch.optim.AdamW(model.parameters(), lr=0.01))
    train(model, opt, projector, batches[:4])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    expected = train(model, opt, projector, batches[4:])

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, _ = model_and_batches(seed=1)
    resumed, resumed_projector = wrapping(torch.optim.AdamW(twin.parameters(), lr=1.0))
    train(twin, resumed, resumed_projector, batches[:2])  # in mid-run: state and groups are replaced under the wrapper
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    assert_same(expected, train(twin, resumed, resumed_projector, batches[4:]))
    plain = torch.optim.AdamW(twin.parameters())
    plain.load_state_dict(opt.state_dict())  # a checkpoint works with and without the wrapper


def test_groups_added_later(wrapping):
    model, batches = model_and_batches()
    inner = torch.optim.SGD(model[0].parameters(), lr=0.1)
    opt, projector = wrapping(inner)
    with projector.protect():
        loss(model, batches[0], 1.0).backward()
    model.zero_grad()
    opt.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    assert len(opt.param_groups) == len(inner.param_groups) == 2
    loss(model, batches[1]).backward()
    opt.step()
    assert projector.last.applied
    protect(model, projector, batches[2])
    opt.step()
    assert projector.last.applied


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, wrapping):
    model, batches = model_and_batches()
    opt, _ = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
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


def test_hooks_on_the_wrapper_run(wrapping):
    model, batches = model_and_batches()
    opt, _ = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    loss(model, batches[0]).backward()
    opt.step()
    assert seen == ["before", "after"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alone_also_under_a_scheduler(how):
    """A scheduler replaces step() on the object by a function of its own, which cannot be pickled, and copied steps the original."""
    model, batches = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01))
    scheduler = lr_scheduler.StepLR(opt, 2)
    train(model, opt, opt, batches[:4], scheduler)
    original = (model, opt)
    twin, twin_opt = copy.deepcopy(original) if how == "deepcopy" else pickle.loads(pickle.dumps(original))
    before = parameters(model)
    result = train(twin, twin_opt, twin_opt, batches[4:8])
    assert_same(before, parameters(model))
    assert_same(result, train(model, opt, opt, batches[4:8]))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_an_attached_optimizer_has_lost_its_hooks(how):
    """The copy stepped without protection, and nothing said so."""
    model, x = model_and_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    projector = gradproj.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        COPIES[how](optimizer)  # without directions nothing is lost
    protect(model, projector, x[0])
    for part in (optimizer, projector, (model, optimizer, projector)):
        with pytest.warns(RuntimeWarning, match=r"1 protected directions until attach\(\) is called again"):
            lost = COPIES[how](part)
    twin, twin_optimizer, twin_projector = lost
    with pytest.raises(RuntimeError, match=r"call gradproj.attach\(\) again"):
        twin_projector.parameters()
    again = gradproj.attach(twin_optimizer)
    protect(twin, again, x[0])
    for m, opt in ((model, optimizer), (twin, twin_optimizer)):
        opt.zero_grad()
        loss(m, x[1]).backward()
        opt.step()
    assert_same(parameters(model), parameters(twin))


# --- compile --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("k", [1, 3])
def test_compiled_step_equals_eager_and_is_compiled_once(k, inductor, wrapping):
    """Traced, the wrapper's own decisions would compile the step anew with every direction."""
    model, twin, batches = twins()
    eager, compiled = (wrapping(torch.optim.SGD(m.parameters(), lr=0.1), directions=k) for m in (model, twin))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for (m, (opt, projector)), run in (
        ((model, eager), eager[0].step),
        ((twin, compiled), torch.compile(compiled[0].step)),
    ):
        for x, y in zip(batches[::2], batches[1::2], strict=True):
            protect(m, projector, x)
            opt.zero_grad()
            loss(m, y).backward()
            run()
            assert projector.last.applied
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert_same(parameters(model), parameters(twin), rtol=1e-6, atol=1e-7)
    assert graphs[-1] == graphs[len(graphs) // 2] >= 1


@pytest.mark.filterwarnings("ignore")
def test_functions_are_traced_without_a_graph_break():
    """functools.cached_property and the choice of the backend each broke the graph."""
    if not gradproj.backends()["cpu"].available:
        pytest.skip("the torch backend compares addresses before it writes, which cannot be traced")

    def step(params, grads, direction):
        info = gradproj.project_(grads, direction, method="conflict")
        products = gradproj.gram(grads, direction)
        gradproj.combine_(grads, [direction], info.weights)
        torch._foreach_add_(params, grads, alpha=-0.1)
        return info.cosine, products

    torch.manual_seed(0)
    rows = [[torch.randn(3, 4), torch.randn(5)] for _ in range(3)]
    traced = copy.deepcopy(rows)
    expected = step(*rows)
    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(*traced), expected)
    for a, b in zip(traced, rows, strict=True):
        assert_same(a, b)


# --- refused --------------------------------------------------------------------------------------------------------


def test_what_is_not_an_optimizer_is_refused():
    model, _ = model_and_batches()
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="projects already"):
        gradproj.attach(opt)
    with pytest.raises(TypeError, match=r"attach takes a torch.optim.Optimizer, got int"):
        gradproj.attach(3)
    with pytest.raises(TypeError, match=r"ProjectedOptimizer takes a torch.optim.Optimizer, got list"):
        gradproj.ProjectedOptimizer([1])


@pytest.mark.parametrize("wrap", [gradproj.ProjectedOptimizer, gradproj.attach])
@pytest.mark.parametrize("base", [object, torch.optim.SGD])
def test_deepspeed_is_refused(base, wrap):
    """Known by the module of its classes, of which DeepSpeed need not be installed."""
    engine = type("DeepSpeedZeroOptimizer", (base,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    optimizer = engine.__new__(engine)
    with pytest.raises(NotImplementedError, match=r"deepspeed.runtime.zero.stage_1_and_2.*fully_shard"):
        wrap(optimizer)
