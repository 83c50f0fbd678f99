"""ProjectedOptimizer and attach() around what people really run. Most tests take ``wrapping`` and cover both."""

import copy
import inspect
import types

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

import gradproj
from gradproj.directions import step_memory as found_out
from gradproj.kernels.backends import Backend
from training import (
    assert_same,
    closure,
    descend,
    direction,
    loss,
    parameters,
    project_by_hand,
    protect,
    protecting,
    stored,
    train,
    train_by_hand,
    twins,
    wrapped,
)

CLASSES = {n: c for n, c in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(c, Optimizer)}
# LBFGS takes a closure: test_closures. SparseAdam takes sparse gradients only, which protect() refuses.
STEPPED = sorted(CLASSES.keys() - {"Optimizer", "LBFGS", "SparseAdam"})


@pytest.mark.parametrize("name", STEPPED)
def test_every_torch_optimizer(name, wrapping):
    """Equal to projecting by hand in front of the plain optimizer."""
    model, twin, batches = twins()
    if name == "Muon":  # takes matrices only
        for m in (model, twin):
            m[0].bias = m[2].bias = None
    settings = {"momentum": 0.9} if name == "SGD" else {}
    inner, plain = (CLASSES[name](m.parameters(), **settings) for m in (model, twin))
    assert_same(train(model, *wrapping(inner), batches), train_by_hand(twin, plain, batches))


def test_several_optimizers_in_one_run(wrapping):
    """Each with a protection of its own protects and steps its own parameters."""
    model, twin, x = twins()
    (first, p), (second, q) = (wrapping(model[i]) for i in (0, 2))
    with p.protect(), q.protect():
        loss(model, x[0], 1.0).backward()
    loss(model, x[1]).backward()
    first.step()
    second.step()
    d = direction(twin, x[0])
    by_hand = lambda: (project_by_hand(twin[0], d[:2]), project_by_hand(twin[2], d[2:]))
    descend(twin, torch.optim.SGD(twin.parameters(), lr=0.1), x[1], then=by_hand)
    assert_same(parameters(model), parameters(twin))


class Nesting(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_its_base_s_step(wrapping):
    """torch then has hooks on both: what does not give the same when applied twice was applied twice."""
    model, twin, x = twins()
    results = []
    for m, cls in ((model, torch.optim.SGD), (twin, Nesting)):
        opt, protected = wrapping(cls(m.parameters(), lr=0.1), 1, "pcgrad")
        results.append(train(m, opt, protected, x))
    assert_same(*results)


def test_after_a_step_that_raised(wrapping):
    """An interrupted step must not count as one that projected."""
    model, twin, x = twins()

    def interrupt(*_):
        raise KeyboardInterrupt

    for m in (model, twin):
        opt, protected = wrapping(m)
        protect(m, protected, x[0])
        if m is model:
            model[0].weight.data.mul_(2.0)
            hook = opt.register_step_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                descend(m, opt, x[1])
            hook.remove()
            m.load_state_dict(twin.state_dict())
            opt.zero_grad(set_to_none=False)
        loss(m, x[2]).backward()
        opt.step()
        assert protected.last.applied
    assert_same(parameters(model), parameters(twin))


# fmt: off
SCHEDULERS = {
    "StepLR": (2,), "MultiStepLR": ([1, 3],), "LambdaLR": (lambda e: 0.9**e,), "MultiplicativeLR": (lambda e: 0.9,),
    "ConstantLR": (0.5, 2), "LinearLR": (), "ExponentialLR": (0.9,), "PolynomialLR": (5,), "CosineAnnealingLR": (5,),
    "CosineAnnealingWarmRestarts": (3,), "CyclicLR": (0.01, 0.1, 2), "OneCycleLR": (0.1, 8),
    "ReduceLROnPlateau": ("min", 0.1, 0),
    "SequentialLR": ([2],), "ChainedScheduler": (), "SWALR": (0.01, 3),
}
# fmt: on


def schedule(name, optimizer):
    """What has a step()."""
    lead = [optimizer]
    if name in ("SequentialLR", "ChainedScheduler"):
        parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        lead = [optimizer, parts] if name == "SequentialLR" else [parts]
    made = getattr(torch.optim.swa_utils if name == "SWALR" else lr_scheduler, name)(*lead, *SCHEDULERS[name])
    return types.SimpleNamespace(step=lambda: made.step(1.0)) if name == "ReduceLROnPlateau" else made


def test_every_scheduler_of_torch_is_listed():
    """A scheduler that a later torch adds has to be tried."""
    found = inspect.getmembers(lr_scheduler, inspect.isclass)
    public = {n for n, c in found if issubclass(c, lr_scheduler.LRScheduler) and not n.startswith("_")}
    assert public <= {"LRScheduler", *SCHEDULERS}


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_see_the_wrapped_groups(name, wrapping):
    """With the wrapper and by hand, rates and momenta (OneCycle's, Cyclic's) are the same in every step."""
    model, twin, batches = twins()
    inner, plain = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.8) for m in (model, twin))
    opt, protected = wrapping(inner)
    schedules = []
    for m, o, p in ((model, opt, protected), (twin, plain, None)):
        seen, groups = [], o.param_groups
        train(m, o, p, batches, schedule(name, o), lambda g=groups, s=seen: s.append((g[0]["lr"], g[0]["momentum"])))
        schedules.append(seen)
    assert schedules[0] == schedules[1] and len(set(schedules[0])) > 1
    assert protected.last is not None and protected.last.applied


@pytest.mark.parametrize("when", ["before", "after"])
def test_clipping(when, wrapping):
    """Before the step it clips the gradient, which is then projected; after project() the projected gradient."""
    model, twin, x = twins()
    opt, protected = wrapping(model)
    protect(model, protected, x[0])
    d = direction(twin, x[0])
    for m in (model, twin):
        loss(m, x[1]).backward()
    if when == "after":
        first = protected.project()
        project_by_hand(twin, d)
    for m in (model, twin):
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.05)
    if when == "before":
        project_by_hand(twin, d)
    opt.step()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_same(parameters(model), parameters(twin))
    assert protected.last.applied and (when == "before" or protected.last is first)


AFTER_PROJECT = ["backward", "backward of another parameter", "protect", "zero_grad to None", "zero_grad in place"]


@pytest.mark.parametrize("method", ["orthogonal", "conflict", "pcgrad", ("mix", 0.5)], ids=str)
@pytest.mark.parametrize("what", AFTER_PROJECT)
def test_what_comes_after_project(what, method, wrapping):
    """A backward pass that added to the projected gradients was stepped unprojected, and nothing was said. After
    zero_grad() they are new ones: a step that was skipped must not leave the next one unprotected."""
    model, twin, x = twins()
    opt, protected = wrapping(model, 1, method)
    protect(model, protected, x[0])
    bias = model[2].bias.requires_grad_(what != "backward of another parameter")
    loss(model, x[1]).backward()
    first = protected.project()
    if what == "protect":
        protect(model, protected, x[2])
    elif what.startswith("zero_grad"):
        opt.zero_grad(set_to_none="None" in what)
    if what != "protect":
        (loss(model, x[2]) if bias.requires_grad else bias.requires_grad_().sum()).backward()
    if method not in ("orthogonal", "conflict") and what != "zero_grad to None":
        before = parameters(model)
        with pytest.raises(RuntimeError, match=r"since project\(\).*call project\(\) after the last backward\(\)"):
            opt.step()
        assert_same(before, parameters(model))
        closure(model, opt, x[3])()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    opt.step()
    project_by_hand(twin, list(stored(protected)[0].values()), method=method)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_same(parameters(model), parameters(twin), rtol=1e-6, atol=1e-7)
    assert protected.last is not first
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_gradient_accumulation(wrapping):
    """Backward passes add up inside protect(), and outside, and protect() between two of those disturbs neither."""
    model, twin, x = twins()
    opt, protected = wrapping(model)
    loss(model, x[2]).backward()
    with protected.protect():
        loss(model, x[0], 1.0).backward()
        loss(model, x[1], 1.0).backward()
    loss(model, x[3]).backward()
    opt.step()
    d = [a + b for a, b in zip(direction(twin, x[0]), direction(twin, x[1]), strict=True)]
    (loss(twin, x[2]) + loss(twin, x[3])).backward()
    project_by_hand(twin, d)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_same(parameters(model), parameters(twin), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["positional", "keyword", "project() inside"])
@pytest.mark.parametrize("inner", [torch.optim.LBFGS, torch.optim.SGD], ids=lambda c: c.__name__)
def test_closures(inner, form, wrapping):
    """Every evaluation is projected once, where it makes its gradients: Lightning runs the backward pass inside."""
    model, twin, x = twins()
    opt, protected = wrapping(inner(model.parameters(), lr=0.1), 1, "pcgrad")
    protect(model, protected, x[0])
    run = closure(model, opt, x[1], 2.0, protected.project if form == "project() inside" else lambda: None)
    value = opt.step(closure=run) if form == "keyword" else opt.step(run)
    plain, d = inner(twin.parameters(), lr=0.1), direction(twin, x[0])
    expected = plain.step(closure(twin, plain, x[1], 2.0, lambda: project_by_hand(twin, d, method="pcgrad")))
    assert value == expected and protected.last.applied
    assert_same(parameters(model), parameters(twin))


def test_protect_in_a_closure_is_refused(wrapping):
    """LBFGS evaluates its closure many times: each would replace the direction that the step is projected against."""
    model, x, opt, protected = protecting(wrapping, blocks=0)
    with pytest.raises(RuntimeError, match=r"protect\(\) inside the closure of step\(\).*protect before step\(\)"):
        opt.step(lambda: protect(model, protected, x[0]))
    train(model, opt, protected, x[:2])  # and the flag is down again


def test_a_step_during_backward_is_refused(wrapping):
    """Optimizer-in-backward: the first parameter's hook comes when the others have no gradient yet."""
    model, x, opt, _ = protecting(wrapping)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: opt.step())
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"during a backward pass.*call step\(\) after backward\(\)"):
        loss(model, x[1]).backward()
    assert_same(before, parameters(model))


def test_six_frames_from_the_step_to_the_op(monkeypatch):
    """Of which one is torch's, which runs the hooks."""
    model, x, opt, _ = protecting(wrapped)
    loss(model, x[1]).backward()
    monkeypatch.setattr(Backend, "op", lambda self, name: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        opt.step()
    _, *frames, _ = [entry.name for entry in caught.traceback]
    assert frames == ["step", "wrapper", "_before_step", "before_step", "project_rows", "run"]


def test_a_step_reads_nothing_from_the_device(monkeypatch, wrapping):
    """Each way from a tensor to the host is counted, as on a GPU, where none of them is free."""
    reads = []

    def counted(name):
        original = getattr(torch.Tensor, name)
        return lambda self, *args, **kwargs: (reads.append(name), original(self, *args, **kwargs))[1]

    model, x, opt, protected = protecting(wrapping, 2)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    monkeypatch.setattr(found_out.OnHost, "read", lambda self: [])  # reads on the CPU, where it is free
    for batch in x:
        descend(model, opt, batch)
    assert reads == [] and protected.last.applied and reads == ["__bool__"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("k", [1, 3])
def test_compiled_step_equals_eager_and_is_compiled_once(k, inductor, wrapping):
    """Traced, the wrapper's own decisions would compile the step anew with every direction."""
    model, twin, batches = twins()
    eager, compiled = (wrapping(m, k) for m in (model, twin))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for m, (opt, protected), run in (model, eager, eager[0].step), (twin, compiled, torch.compile(compiled[0].step)):
        for x, y in zip(batches[::2], batches[1::2], strict=True):
            protect(m, protected, x)
            closure(m, opt, y)()
            run()
            assert protected.last.applied
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
