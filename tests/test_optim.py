"""ProjectedOptimizer and attach() around what people really run. Most tests take ``wrapping`` and cover both."""

import copy
import gc
import inspect
import io
import pickle
import sys
import types
import warnings
import weakref

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

import gradproj
from gradproj.backends import Backend
from training import (
    WRAPPINGS,
    assert_same,
    closure,
    descend,
    direction,
    loss,
    model_and_batches,
    parameters,
    project_by_hand,
    projected,
    protect,
    stored,
    train,
    train_by_hand,
    twins,
)

EXTRA = {"SGD": {"momentum": 0.9}, "LBFGS": {"max_iter": 3}}
CLASSES = [
    c for _, c in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(c, Optimizer) and c is not Optimizer
]
in_both_spaces = pytest.mark.parametrize("space", ["gradient", "update"])


# --- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_torch_optimizer(cls, wrapping):
    """Equal to projecting by hand in front of the plain optimizer."""
    if cls is torch.optim.SparseAdam:
        pytest.skip("takes sparse gradients only, which protect() refuses")
    if cls is torch.optim.LBFGS:
        pytest.skip("takes a closure: test_closures")
    model, twin, batches = twins()
    if cls.__name__ == "Muon":  # takes matrices only
        for m in (model, twin):
            m[0].bias = m[2].bias = None
    settings = EXTRA.get(cls.__name__, {})
    result = train(model, *wrapping(cls(model.parameters(), **settings)), batches)
    assert_same(result, train_by_hand(twin, cls(twin.parameters(), **settings), batches))


def test_several_optimizers_in_one_run(wrapping):
    """Each with a protection of its own protects and steps its own parameters."""
    model, twin, x = twins()
    (first, p), (second, q) = (wrapping(model[i]) for i in (0, 2))
    with p.protect(), q.protect():
        loss(model, x[0], 1.0).backward()
    loss(model, x[1]).backward()
    first.step()
    second.step()

    def by_hand():
        project_by_hand(twin[0], d[:2])
        project_by_hand(twin[2], d[2:])

    d = direction(twin, x[0])
    descend(twin, torch.optim.SGD(twin.parameters(), lr=0.1), x[1], then=by_hand)
    assert_same(parameters(model), parameters(twin))


class Nesting(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@in_both_spaces
def test_a_step_that_calls_its_base_s_step(space, wrapping):
    """torch then has hooks on both: what does not give the same when applied twice was applied twice."""
    model, twin, x = twins()
    results = []
    for m, cls in ((model, torch.optim.SGD), (twin, Nesting)):
        opt, protected = wrapping(cls(m.parameters(), lr=0.1), 1, "pcgrad", space=space)
        results.append(train(m, opt, protected, x))
    assert_same(*results)


@in_both_spaces
def test_after_a_step_that_raised(space, wrapping):
    """An interrupted step must neither count as one that projected, nor its copy as the state before the next step."""
    model, twin, x = twins()

    def interrupt(*_):
        raise KeyboardInterrupt

    for m in (model, twin):
        opt, protected = wrapping(m, space=space)
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


# --- schedules ------------------------------------------------------------------------------------------------------


# fmt: off
SCHEDULERS = {
    "StepLR": (2,), "MultiStepLR": ([1, 3],), "LambdaLR": (lambda e: 0.9**e,), "MultiplicativeLR": (lambda e: 0.9,),
    "ConstantLR": (0.5, 2), "LinearLR": (), "ExponentialLR": (0.9,), "PolynomialLR": (5,), "CosineAnnealingLR": (5,),
    "CosineAnnealingWarmRestarts": (3,), "CyclicLR": (0.01, 0.1, 2), "OneCycleLR": (0.1, 8), "ReduceLROnPlateau": ("min", 0.1, 0),
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


# --- clipping, accumulation, closures -------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_clipping(when, wrapping):
    """Before the step: of the gradient that is projected then. After project(): of the projected one, which stays so."""
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
    """A backward pass that added to the projected gradients was stepped unprojected, and nothing was said. After zero_grad()
    they are new ones: a step that was skipped must not leave the next one unprotected."""
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
    """Every evaluation is projected, once, where it makes its gradients: Lightning has the whole backward pass inside."""
    model, twin, x = twins()
    opt, protected = wrapping(inner(model.parameters(), lr=0.1), 1, "pcgrad")
    protect(model, protected, x[0])
    run = closure(model, opt, x[1], 2.0, protected.project if form == "project() inside" else lambda: None)
    value = opt.step(closure=run) if form == "keyword" else opt.step(run)
    plain, d = inner(twin.parameters(), lr=0.1), direction(twin, x[0])
    expected = plain.step(closure(twin, plain, x[1], 2.0, lambda: project_by_hand(twin, d, method="pcgrad")))
    assert value == expected and protected.last.applied
    assert_same(parameters(model), parameters(twin))


@in_both_spaces
def test_protect_in_a_closure_is_refused(space, wrapping):
    """LBFGS evaluates its closure many times: each would replace the direction that the step is projected against."""
    model, x = model_and_batches()
    opt, protected = wrapping(model, space=space)
    with pytest.raises(RuntimeError, match=r"protect\(\) inside the closure of step\(\).*protect before step\(\)"):
        opt.step(lambda: protect(model, protected, x[0]))
    train(model, opt, protected, x[:2])  # and the flag is down again


@in_both_spaces
def test_a_step_during_backward_is_refused(space, wrapping):
    """Optimizer-in-backward: the first parameter's hook comes when the others have no gradient yet."""
    model, x = model_and_batches()
    opt, protected = wrapping(model, space=space)
    protect(model, protected, x[0])
    model[0].weight.register_post_accumulate_grad_hook(lambda p: opt.step())
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"during a backward pass.*call step\(\) after backward\(\)"):
        loss(model, x[1]).backward()
    assert_same(before, parameters(model))


# --- several optimizers, one projection -----------------------------------------------------------------------------


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


def jointly_by_hand(optimizers, directions, space, steps):
    """All gradients together, then the steps of some optimizers; or all that these steps did."""
    owners = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in owners]
    if space == "gradient":
        gradproj.project_([p.grad for p in owners], *directions, method="conflict")
    for i in steps:
        optimizers[i].step()
    if space == "update":
        update = [b - p.detach() for p, b in zip(owners, before, strict=True)]
        gradproj.project_(update, *directions, method="conflict")
        with torch.no_grad():
            for p, b, u in zip(owners, before, update, strict=True):
                p.copy_(b - u)


@in_both_spaces
@pytest.mark.parametrize("steps", [(0, 1), (1, 0), (0,), (1,), "alternately"], ids=str)
def test_a_list_is_projected_jointly(steps, space):
    """A wrapper for each projected the parts of one gradient separately. One may also be left out: a scaler skips it."""
    model, twin, x = twins()
    optimizers, by_hand = muon_and_adamw(model), muon_and_adamw(twin)
    protected = gradproj.attach(optimizers, gradproj.Directions(2, "conflict", space=space))
    for i, (a, b) in enumerate(zip(x[::2], x[1::2], strict=True)):
        now = (i % 2,) if steps == "alternately" else steps
        protect(model, protected, a)
        for m in (model, twin):
            m.zero_grad()
            loss(m, b, -1.0).backward()
        jointly_by_hand(by_hand, [[t.clone() for t in row] for row in protected.protection.rows()], space, now)
        for k in now:
            optimizers[k].step()
            optimizers[k].zero_grad()  # must not make the next one of the list project what is left, again
        optimizers[0].state_dict()  # the end of a round in which not all have stepped
        assert_same(parameters(model), parameters(twin), rtol=1e-5, atol=1e-7)
    assert protected.last.applied and protected.last.gram.shape == (3, 3)


@in_both_spaces
def test_a_list_whose_gradients_come_one_after_the_other(space):
    """As a generator's and a discriminator's: the second's are neither projected nor copied when the first one steps."""
    model, twin, x = twins()
    optimizers, by_hand = ([torch.optim.SGD(m[i].parameters(), lr=0.1) for i in (0, 2)] for m in (model, twin))
    protected = gradproj.attach(optimizers, gradproj.Directions(space=space))
    protect(model, protected, x[0])
    d, before = direction(twin, x[0]), parameters(twin)
    for i in range(2):
        for m in (model, twin):
            m[0].requires_grad_(i == 0)
            m[2].requires_grad_(i == 1)
            m.zero_grad()
            loss(m, x[1]).backward()
        optimizers[i].step()
        if space == "gradient":
            project_by_hand(twin, d)
        by_hand[i].step()
    result = parameters(twin)
    if space == "update":  # both steps are one
        update = [b - p for b, p in zip(before, result, strict=True)]
        gradproj.project_(update, d)
        result = [b - u for b, u in zip(before, update, strict=True)]
    assert_same(parameters(model), result, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_checkpoints_of_a_list(order):
    """Of four directions the newest three are wanted; two of them have no entry in the first optimizer's checkpoint."""
    model, x = model_and_batches()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    saving = gradproj.attach(optimizers, gradproj.Directions(4))
    for i in range(4):
        model[0].requires_grad_(i not in (1, 3))
        protect(model, saving, x[i])
    saved, expected = [o.state_dict() for o in optimizers], saving.protection.rows()[1:]
    saving.detach()
    loading = gradproj.attach(optimizers, gradproj.Directions(3))
    protect(model, loading, x[5])
    for i in order:
        optimizers[i].load_state_dict(saved[i])
    assert [[*map(id, row)] for row in loading.protection.rows()] == [[*map(id, row)] for row in expected]


# --- on and off -----------------------------------------------------------------------------------------------------


def test_protected_twice_is_refused(wrapping):
    """attach() in a callback, and train() called twice: both projected, and neither said so."""
    model, x = model_and_batches()
    opt, protected = wrapping(model)
    inner = getattr(opt, "optimizer", opt)
    for wrap in (gradproj.attach, gradproj.ProjectedOptimizer):
        for optimizer in (opt, inner):
            with pytest.raises(RuntimeError, match=r"this SGD is protected already; detach\(\) first"):
                wrap(optimizer, gradproj.Directions())
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match="this Directions protects another optimizer already"):
            wrap(other, protected.protection)
        wrap(other, gradproj.Directions()).detach()  # the refused one left nothing behind
    train(model, opt, protected, x)
    assert protected.last.applied


@in_both_spaces
def test_detach(space, wrapping):
    """The plain step again; the protection may go to another optimizer, and the optimizer get another protection."""
    model, twin, x = twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = set(vars(optimizer))
    opt, protected = wrapping(optimizer, space=space)
    protect(model, protected, x[0])
    loss(model, x[1]).backward()
    if space == "gradient":
        protected.project()
    protected.detach()
    protected.detach()
    assert set(vars(optimizer)) == before and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    for m, o in ((model, opt), (twin, plain)):
        descend(m, o, x[2])
    assert_same(parameters(model), parameters(twin))
    assert opt.state_dict() == plain.state_dict()
    with pytest.raises(RuntimeError, match="this Directions belongs to no optimizer"):
        protect(model, protected, x[0])
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    again = gradproj.attach(other, protected.protection)
    assert len(stored(again)) == 1
    protected.detach()  # not of the new one
    protect(model, again, x[0])
    gradproj.attach(optimizer, gradproj.Directions())


def test_freed_without_the_garbage_collector(wrapping):
    """An optimizer and its hooks referred to each other: K + 3 copies of the model stayed until a collection."""
    model, x = model_and_batches()
    opt, protected = wrapping(model, 2)
    train(model, opt, protected, x)
    kept = [weakref.ref(t) for t in stored(protected)[0].values()] + [weakref.ref(getattr(opt, "optimizer", opt))]
    gc.collect()
    gc.disable()
    try:
        del opt, protected
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


def test_stepping_the_inner_optimizer_projects_too():
    """It stepped unprotected, as whoever kept it in a variable did."""
    model, x = model_and_batches()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = projected(inner)
    train(model, inner, opt, x)
    assert opt.last.applied


class Wrapper(Optimizer):
    """Without hooks of its own, as Accelerate's is."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_of_a_wrapper_without_hooks_the_inner_optimizer_is_taken():
    """AcceleratedOptimizer was refused for want of hooks, which the optimizer in it has."""
    model, x = model_and_batches()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    protected = gradproj.attach(Wrapper(Wrapper(inner)), gradproj.Directions())
    train(model, inner, protected, x)
    assert protected.last.applied
    with pytest.raises(TypeError, match="Wrapper has no step hooks"):
        gradproj.attach(Wrapper(None), gradproj.Directions())


def test_six_frames_from_the_step_to_the_op(monkeypatch):
    """Of which one is torch's, which runs the hooks."""
    model, x = model_and_batches()
    opt = projected(model)
    protect(model, opt, x[0])
    loss(model, x[1]).backward()
    real, seen = Backend.op, []

    def op(backend, name):
        frame, names = sys._getframe(1), []
        while frame.f_code.co_name != "test_six_frames_from_the_step_to_the_op":
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        seen.append((name, names[::-1]))
        return real(backend, name)

    monkeypatch.setattr(Backend, "op", op)
    opt.step()
    assert seen == [("project_", ["step", "wrapper", "_before_step", "before_step", "project_rows", "run"])]


# --- state ----------------------------------------------------------------------------------------------------------


def test_is_an_optimizer_whose_hooks_run(wrapping):
    model, batches = model_and_batches()
    inner, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    opt, protected = wrapping(inner, 8, "conflict")
    assert isinstance(opt, Optimizer)
    assert opt.state is inner.state and opt.param_groups is inner.param_groups and opt.defaults is inner.defaults
    if opt is protected:
        assert "0 of 8, 'conflict'" in repr(opt) and "SGD" in repr(opt)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    descend(model, opt, batches[0])
    assert seen == ["before", "after"]


def through_a_file(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": through_a_file}


@in_both_spaces
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_alone_also_under_a_scheduler(how, space):
    """A scheduler replaces step() on the object by a function of its own, which cannot be pickled, and copied steps the original."""
    model, batches = model_and_batches()
    opt = projected(torch.optim.AdamW(model.parameters(), lr=0.01), 2, "conflict", space=space)
    scheduler = lr_scheduler.StepLR(opt, 2)
    train(model, opt, opt, batches[:4], scheduler)
    twin, twin_opt = COPIES[how]((model, opt))
    before = parameters(model)
    result = train(twin, twin_opt, twin_opt, batches[4:8])
    assert_same(before, parameters(model))
    assert_same(result, train(model, opt, opt, batches[4:8]))
    assert torch.equal(twin_opt.last.gram, opt.last.gram)


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_an_attached_optimizer_has_lost_its_hooks(how):
    """The copy stepped without protection, and nothing said so."""
    model, x = model_and_batches()
    optimizer, protected = WRAPPINGS["attached"](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        COPIES[how](optimizer)  # without directions nothing is lost
    protect(model, protected, x[0])
    with pytest.warns(RuntimeWarning, match=r"the copy steps without protection until attach\(\) is called on it"):
        twin, twin_optimizer = COPIES[how]((model, optimizer))
    with pytest.raises(TypeError, match=r"call gradproj.attach\(\) on the copy"):
        COPIES[how](protected)
    protect(twin, gradproj.attach(twin_optimizer, gradproj.Directions()), x[0])
    for m, opt in ((model, optimizer), (twin, twin_optimizer)):
        descend(m, opt, x[1])
    assert_same(parameters(model), parameters(twin))


# --- compile --------------------------------------------------------------------------------------------------------


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


# --- refused --------------------------------------------------------------------------------------------------------

both_wraps = pytest.mark.parametrize("wrap", [gradproj.ProjectedOptimizer, gradproj.attach])


@both_wraps
@pytest.mark.parametrize("what", ["number", "parameters", "method", "sharding"])
def test_wrong_types_are_refused(what, wrap):
    """ProjectedOptimizer(model.parameters(), ..) failed far from the call, with an attribute that a generator does not have."""
    parameters = model_and_batches()[0].parameters
    sgd = torch.optim.SGD(parameters(), lr=0.1)
    arguments, named, message = {
        "number": ([3, gradproj.Directions()], {}, "takes a torch.optim.Optimizer, got int"),
        "parameters": (
            [parameters(), gradproj.Directions()],
            {},
            "takes a torch.optim.Optimizer, got generator; for example",
        ),
        "method": ([sgd, "conflict"], {}, "protection must be a gradproj.Directions, got str; for example"),
        "sharding": (
            [sgd, gradproj.Directions()],
            {"sharding": "shard"},
            "sharding must be a gradproj.Sharding, got str",
        ),
    }[what]
    with pytest.raises(TypeError, match=f"{wrap.__name__}:? {message}"):
        wrap(*arguments, **named)
    wrap(sgd, gradproj.Directions())  # nothing was left behind


def test_lists_are_refused_that_name_no_optimizer_once():
    sgd = torch.optim.SGD(model_and_batches()[0].parameters(), lr=0.1)
    for given in ([], [sgd, sgd], [sgd, Wrapper(sgd)]):
        with pytest.raises(ValueError, match=r"attach: pass each optimizer once, got \["):
            gradproj.attach(given, gradproj.Directions())


@both_wraps
@pytest.mark.parametrize("base", [object, torch.optim.SGD])
def test_deepspeed_is_refused(base, wrap):
    """Known by the module of its classes, of which DeepSpeed need not be installed."""
    engine = type("DeepSpeedZeroOptimizer", (base,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(NotImplementedError, match=r"deepspeed.runtime.zero.stage_1_and_2.*fully_shard"):
        wrap(engine.__new__(engine), gradproj.Directions())
