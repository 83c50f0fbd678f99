"""Gradients are taken out of ``p.grad`` by protect(): without a copy, unless somebody else writes their memory
afterwards."""

import sys
import types
import warnings

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from training import (
    assert_same,
    descend,
    gradients,
    loss,
    model_and_batches,
    parameters,
    protect,
    protecting,
    stored,
    train,
)


@pytest.mark.parametrize("ddp", [False, True], ids=["", "ddp"])
def test_gradients_of_their_own_are_taken(ddp, one_rank, wrapping):
    """And those from before the block are put back."""
    model, x, _, protected = protecting(wrapping, blocks=0)
    forward = DistributedDataParallel(model) if ddp else model
    for batch in x[:3]:
        before = [p.grad for p in model.parameters()]
        with protected.protect():
            assert all(p.grad is None for p in model.parameters())
            loss(forward, batch).backward()
            made = [p.grad.data_ptr() for p in model.parameters()]
        assert [t.data_ptr() for t in stored(protected)[0].values()] == made
        assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))
        loss(forward, batch).backward()


def test_views_of_a_sharded_group_are_taken(one_rank, wrapping):
    """They share one buffer, as DDP's do, but each backward pass makes a new one: copying would cost N for nothing."""
    model, x = model_and_batches()
    fully_shard(model)
    _, protected = wrapping(model)
    with protected.protect():
        loss(model, x[0]).backward()
        made = [p.grad.to_local().data_ptr() for p in model.parameters()]
    taken = [t.to_local() for t in stored(protected)[0].values()]
    assert len({t.untyped_storage().data_ptr() for t in taken}) == 1
    assert [t.data_ptr() for t in taken] == made
    kept = [t.clone() for t in taken]
    for batch in x[1:4]:
        loss(model, batch).backward()
        model.zero_grad()
    assert_same(taken, kept)


def with_bucket_views(model, x):
    """DDP whose gradients are views of its buckets, which it builds anew after its first pass."""
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in x[:2]:
        model.zero_grad()
        loss(ddp, batch).backward()
    return ddp


@pytest.mark.parametrize("bias", [True, False], ids=["", "one parameter a bucket"])
def test_bucket_views_are_cloned(bias, one_rank, wrapping):
    """DDP's next backward pass overwrote the protected direction. With one parameter the bucket is as large as the
    gradient."""
    _, x = model_and_batches()
    model = torch.nn.Linear(4, 3, bias=bias)
    _, protected = wrapping(model)
    ddp = with_bucket_views(model, x)
    model.zero_grad()
    with protected.protect():
        loss(ddp, x[2], 1.0).backward()
        bucket = [p.grad.detach() for p in model.parameters()]
    kept = [t.clone() for t in stored(protected)[0].values()]
    loss(ddp, x[3]).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == [b.data_ptr() for b in bucket]  # it is that memory
    assert not torch.equal(bucket[0], kept[0])  # and it has been overwritten
    assert_same(stored(protected)[0].values(), kept)


def test_bucket_views_that_are_set_aside_come_back_with_their_contents(one_rank, wrapping):
    """The block's own backward pass goes through the same buckets as the gradients that wait outside."""
    model, x, _, protected = protecting(wrapping, blocks=0)
    ddp = with_bucket_views(model, x)
    expected = gradients(model)
    views = [p.grad for p in model.parameters()]
    protect(ddp, protected, x[2])
    assert all(p.grad is v for p, v in zip(model.parameters(), views, strict=True))
    assert_same(views, expected)


def test_a_gradient_that_another_parameter_shares_is_cloned(wrapping):
    """Zeroing the other parameter's gradient, which belongs to another optimizer, zeroed the direction. Where two
    parameters enter only through views whose sum is used, autograd gives both the same memory."""
    a, b = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3, 2)))
    _, protected = wrapping(torch.optim.SGD([a], lr=0.1))
    with protected.protect():
        (a.view(6) + b.view(6)).square().sum().backward()
        assert a.grad.data_ptr() == b.grad.data_ptr()
    b.grad.zero_()
    assert torch.equal(stored(protected)[0][a], torch.full((2, 3), 4.0))


@pytest.mark.parametrize("view", [False, True], ids=["the gradient", "a view"])
def test_a_gradient_that_the_caller_keeps_is_cloned(view, wrapping):
    """Scripts that keep their gradients in a list zero them in place."""
    model, x, _, protected = protecting(wrapping, blocks=0)
    with protected.protect():
        loss(model, x[0]).backward()
        mine = [p.grad.view(-1) if view else p.grad for p in model.parameters()]
    kept = [t.clone() for t in stored(protected)[0].values()]
    for g in mine:
        g.zero_()
    assert all(t.any() for t in kept)
    assert_same(stored(protected)[0].values(), kept)


def refused(protected, model, block, error, match):
    """``block`` inside protect() fails, and has changed neither the directions nor the gradients."""
    before = [p.grad for p in model.parameters()]
    kept = [{p: t.clone() for p, t in d.items()} for d in stored(protected)]
    with pytest.raises(error, match=match), protected.protect():
        block()
    for d, e in zip(stored(protected), kept, strict=True):
        assert_same(d.values(), e.values())
    assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))


def test_blocks_and_steps_inside_a_block_are_refused(wrapping):
    model, x, opt, protected = protecting(wrapping, blocks=0)
    with protected.protect():
        loss(model, x[0]).backward()
        with pytest.raises(RuntimeError, match="inside another protect"), protected.protect():
            pass
        with pytest.raises(RuntimeError, match="inside protect"):
            opt.step()
    assert len(stored(protected)) == 1


def test_a_block_without_with_warns(wrapping):
    """``opt.protect(); loss.backward()`` protected nothing and said nothing."""
    model, x, _, protected = protecting(wrapping, blocks=0)
    with pytest.warns(RuntimeWarning, match="called without `with`: nothing was protected") as seen:
        protected.protect()
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        protect(model, protected, x[0])


DEEPSPEED = "DeepSpeed's engine reduces, partitions and frees the gradients itself.*fully_shard"
CAUSES = {
    "frozen": "none of the optimizer's 4 parameters requires a gradient: they were frozen",
    "other model": r"none of the optimizer's 4 parameters received a gradient: call loss.backward\(\) inside the block",
    "zero_grad": r"dropped inside the block \(zero_grad\(\)\?\); leave them there",
    "stage 3": DEEPSPEED,
    "stage 2": DEEPSPEED,
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_block_without_gradients_says_why(cause, wrapping, monkeypatch):
    """One message, "call backward inside the block", stood for all of them, though it had been called."""
    model, x, opt, protected = protecting(wrapping, blocks=0)
    used = model_and_batches(1)[0] if cause in ("frozen", "other model", "stage 2") else model
    if cause == "frozen":
        model.requires_grad_(False)
    if cause == "stage 3":
        model[0].weight.ds_id = 0
    if cause == "stage 2":  # the engine puts flat copies in their place
        monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
        opt.param_groups[0]["params"] = [torch.nn.Parameter(p.detach().flatten()) for p in model.parameters()]

    def block():
        loss(used, x[0]).backward()
        if cause == "zero_grad":
            opt.zero_grad()

    refused(protected, model, block, RuntimeError, CAUSES[cause])


def test_an_exception_inside_changes_nothing(wrapping):
    model, x, opt, protected = protecting(wrapping, 2)
    descend(model, opt, x[1])
    block = lambda: (loss(model, x[2]).backward(), 1 / 0)
    refused(protected, model, block, ZeroDivisionError, "division by zero")


def test_sparse_gradients_are_refused_at_once(wrapping):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Embedding(5, 3, sparse=True))
    _, protected = wrapping(model)
    block = lambda: model[0](model[1](torch.tensor([1]))).sum().backward()
    message = r"parameter 2 with shape \(5, 3\) has layout torch.sparse_coo"
    refused(protected, model, block, NotImplementedError, message)


@pytest.mark.parametrize("does", ["looks", "steps", "frees", "steps and frees", "torch's own"])
def test_optimizer_in_backward_is_refused(does, wrapping):
    """A hook that steps trains on the capability loss, and one that frees the gradient leaves nothing to protect."""
    model, x, _, protected = protecting(wrapping, blocks=0)
    mine, seen = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}, []

    def hook(p):
        seen.append(p.grad.norm())
        if "steps" in does:
            mine[p].step()
        if "frees" in does:
            p.grad = None

    if does == "torch's own":
        from torch.distributed.optim import _apply_optimizer_in_backward

        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    else:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
    before = parameters(model)
    if does == "looks":
        protect(model, protected, x[0])
        assert len(seen) == 4 and len(stored(protected)) == 1
    else:
        message = r"optimizer-in-backward.*call step\(\) after backward\(\)"
        refused(protected, model, lambda: loss(model, x[0]).backward(), RuntimeError, message)
    if "steps" not in does:
        assert_same(before, parameters(model))
    if does != "torch's own":
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())  # ours are gone again


def replaced(model):
    """New Parameter objects with the old values, as a framework makes when it prepares a model."""
    for module in model:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach().clone()))
    return list(model.parameters())


def test_replaced_parameters_that_correspond_keep_their_directions(wrapping):
    results = []
    for swap in (False, True):
        model, x = model_and_batches()
        opt, protected = wrapping(model, 2)
        protect(model, protected, x[0])
        if swap:
            opt.param_groups[0]["params"] = replaced(model)
        protect(model, protected, x[1])
        descend(model, opt, x[2])
        assert protected.last.gram.shape == (3, 3)
        results.append(parameters(model))
    assert_same(*results)


@pytest.mark.parametrize("what", ["order", "number"])
def test_replaced_parameters_that_do_not_correspond_are_refused(what, wrapping):
    model, x, opt, protected = protecting(wrapping)
    new = replaced(model)
    opt.param_groups[0]["params"] = new[::-1] if what == "order" else new[:2]
    loss(model, x[1]).backward()
    before = gradients(model)
    message = r"4 of the optimizer's 4 parameters were replaced.*unprotect\(\) and protect\(\)"
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert_same(before, gradients(model))
    protected.unprotect()
    opt.step()


def test_parameters_that_only_leave_or_come_are_no_swap(wrapping):
    model, x, opt, protected = protecting(wrapping)
    opt.param_groups[0]["params"] = opt.param_groups[0]["params"][1:]
    train(model, opt, None, x[:2])
    opt.add_param_group({"params": [model[0].weight], "lr": 0.01})
    assert [len(group["params"]) for group in getattr(opt, "optimizer", opt).param_groups] == [3, 1]
    opt.step()
    assert protected.last.applied
