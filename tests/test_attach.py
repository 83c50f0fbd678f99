"""Wrapping and attaching: lists of optimizers, attach and detach, what an Optimizer must offer, copies, refusals."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

import gradproj
from training import (
    WRAPPINGS,
    adamw,
    assert_same,
    descend,
    direction,
    loss,
    model_and_batches,
    parameters,
    project_by_hand,
    projected,
    protect,
    protecting,
    stored,
    train,
    twins,
)

both_wraps = pytest.mark.parametrize("wrap", [gradproj.ProjectedOptimizer, gradproj.attach])


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


def jointly_by_hand(optimizers, directions, steps):
    """All gradients together, then the steps of some optimizers."""
    owners = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    gradproj.project_([p.grad for p in owners], *directions, method="conflict")
    for i in steps:
        optimizers[i].step()


@pytest.mark.parametrize("steps", [(0, 1), (1, 0), (0,), (1,), "alternately"], ids=str)
def test_a_list_is_projected_jointly(steps):
    """A wrapper for each would project one gradient in pieces. One may be left out: a scaler skips it."""
    model, twin, x = twins()
    optimizers, by_hand = muon_and_adamw(model), muon_and_adamw(twin)
    protected = gradproj.attach(optimizers, gradproj.Directions(2, "conflict"))
    for i, (a, b) in enumerate(zip(x[::2], x[1::2], strict=True)):
        now = (i % 2,) if steps == "alternately" else steps
        protect(model, protected, a)
        for m in (model, twin):
            m.zero_grad()
            loss(m, b, -1.0).backward()
        jointly_by_hand(by_hand, [[t.clone() for t in row] for row in protected.protection.rows()], now)
        for k in now:
            optimizers[k].step()
            optimizers[k].zero_grad()  # must not make the next one of the list project what is left, again
        optimizers[0].state_dict()  # the end of a round in which not all have stepped
        assert_same(parameters(model), parameters(twin), rtol=1e-5, atol=1e-7)
    assert protected.last.applied and protected.last.gram.shape == (3, 3)


def test_a_list_whose_gradients_come_one_after_the_other():
    """Like those of a generator and a discriminator: the first one's step neither projects nor copies the second's."""
    model, twin, x = twins()
    optimizers, by_hand = ([torch.optim.SGD(m[i].parameters(), lr=0.1) for i in (0, 2)] for m in (model, twin))
    protected = gradproj.attach(optimizers, gradproj.Directions())
    protect(model, protected, x[0])
    d = direction(twin, x[0])
    for i in range(2):
        for m in (model, twin):
            m[0].requires_grad_(i == 0)
            m[2].requires_grad_(i == 1)
            m.zero_grad()
            loss(m, x[1]).backward()
        optimizers[i].step()
        project_by_hand(twin, d)
        by_hand[i].step()
    assert_same(parameters(model), parameters(twin), rtol=1e-6, atol=1e-7)


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


def test_protected_twice_is_refused(wrapping):
    """attach() in a callback, and train() called twice: both projected, and neither said so."""
    model, x, opt, protected = protecting(wrapping, blocks=0)
    for wrap in (gradproj.attach, gradproj.ProjectedOptimizer):
        for optimizer in (opt, getattr(opt, "optimizer", opt)):
            with pytest.raises(RuntimeError, match=r"this SGD is protected already; detach\(\) first"):
                wrap(optimizer, gradproj.Directions())
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match="this Directions protects another optimizer already"):
            wrap(other, protected.protection)
        wrap(other, gradproj.Directions()).detach()  # the refused one left nothing behind
    train(model, opt, protected, x)
    assert protected.last.applied


def test_detach(wrapping):
    """The plain step again; the protection may go to another optimizer, and the optimizer get another protection."""
    model, twin, x = twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = set(vars(optimizer))
    opt, protected = wrapping(optimizer)
    protect(model, protected, x[0])
    loss(model, x[1]).backward()
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
    assert len(again.protection) == 1
    protected.detach()  # not of the new one
    protect(model, again, x[0])
    gradproj.attach(optimizer, gradproj.Directions())


def test_freed_without_the_garbage_collector(wrapping):
    """An optimizer and its hooks referred to each other: K + 3 copies of the model stayed until a collection."""
    model, x, opt, protected = protecting(wrapping, 2, blocks=0)
    train(model, opt, protected, x)
    kept = [weakref.ref(t) for t in stored(protected)[0].values()] + [weakref.ref(getattr(opt, "optimizer", opt))]
    gc.collect()
    gc.disable()
    try:
        del opt, protected
        assert not any(ref() is not None for ref in kept)
    finally:
        gc.enable()


class Wrapper(Optimizer):
    """Without hooks of its own, as Accelerate's is."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@both_wraps
@pytest.mark.parametrize("around", [lambda o: o, lambda o: Wrapper(Wrapper(o))], ids=["itself", "in wrappers"])
def test_stepping_the_inner_optimizer_projects_too(around, wrap):
    """Whoever kept it in a variable stepped unprotected. Of a wrapper without hooks the optimizer inside is taken."""
    model, x = model_and_batches()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    protected = wrap(around(inner), gradproj.Directions())
    train(model, inner, protected, x)
    assert protected.last.applied


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


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_alone_also_under_a_scheduler(how):
    """A scheduler replaces step() on the object: that cannot be pickled, and a copy would step the original."""
    model, batches = model_and_batches()
    opt = projected(adamw(model), 2, "conflict")
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
    model, x, optimizer, protected = protecting(WRAPPINGS["attached"], blocks=0)
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


# fmt: off
WRONG = {
    "number": (lambda sgd: [3, gradproj.Directions()], {}, "takes a torch.optim.Optimizer, got int"),
    "parameters": (lambda sgd: [iter(()), gradproj.Directions()], {},
                   "takes a torch.optim.Optimizer, got .*iterator; for example"),
    "wrapper of nothing": (lambda sgd: [Wrapper(None), gradproj.Directions()], {}, "Wrapper has no step hooks"),
    "method": (lambda sgd: [sgd, "conflict"], {},
               "protection must be a gradproj.NullSpace or gradproj.Directions, got str; for"),
    "sharding": (lambda sgd: [sgd, gradproj.Directions()], {"sharding": "shard"},
                 "sharding must be a gradproj.Sharding, got str"),
}
# fmt: on


@both_wraps
@pytest.mark.parametrize("what", WRONG)
def test_wrong_types_are_refused(what, wrap):
    """ProjectedOptimizer(model.parameters(), ..) failed far from the call, over a missing attribute of a generator."""
    sgd = torch.optim.SGD(model_and_batches()[0].parameters(), lr=0.1)
    arguments, named, message = WRONG[what]
    with pytest.raises(TypeError, match=f"{wrap.__name__}:? {message}"):
        wrap(*arguments(sgd), **named)
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
