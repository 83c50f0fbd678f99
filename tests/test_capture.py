"""Gradients are taken out of ``p.grad`` by protect(): without a copy, unless somebody else writes their memory afterwards."""

import contextlib

import pytest
import torch
import torch.distributed as dist

from training import assert_same, loss, model_and_batches, number_protected, parameters, protect, stored


def sgd(wrapping, parameters):
    return wrapping(torch.optim.SGD(parameters, lr=0.1))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- taken or cloned ------------------------------------------------------------------------------------------------


def addresses_made_inside(model, projector, run) -> list[int]:
    with projector.protect():
        run()
        made = [p.grad.data_ptr() for p in model.parameters()]
    return made


@pytest.mark.parametrize("ddp", [False, True], ids=["", "ddp"])
def test_gradients_of_their_own_are_taken(ddp, one_rank, wrapping):
    model, x = model_and_batches()
    _, projector = sgd(wrapping, model.parameters())
    forward = torch.nn.parallel.DistributedDataParallel(model) if ddp else model
    for batch in x[:3]:
        made = addresses_made_inside(model, projector, lambda batch=batch: loss(forward, batch).backward())
        assert [t.data_ptr() for t in stored(projector)[0].values()] == made


def test_views_of_a_sharded_group_are_taken(one_rank, wrapping):
    """They share one buffer, as DDP's do, but each backward pass makes a new one: copying would cost N for nothing."""
    from torch.distributed.fsdp import fully_shard

    model, x = model_and_batches()
    fully_shard(model)
    _, projector = sgd(wrapping, model.parameters())
    with projector.protect():
        loss(model, x[0]).backward()
        made = [p.grad.to_local().data_ptr() for p in model.parameters()]
    taken = [t.to_local() for t in stored(projector)[0].values()]
    assert len({t.untyped_storage().data_ptr() for t in taken}) == 1
    assert [t.data_ptr() for t in taken] == made
    kept = [t.clone() for t in taken]
    for batch in x[1:4]:
        loss(model, batch).backward()
        model.zero_grad()
    assert_same(taken, kept)


@pytest.mark.parametrize("bias", [True, False], ids=["", "one parameter a bucket"])
def test_bucket_views_are_cloned(bias, one_rank, wrapping):
    """DDP's next backward pass overwrote the protected direction. With one parameter the bucket is as large as the gradient."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=bias)
    x = [torch.randn(5, 4) for _ in range(6)]
    _, projector = sgd(wrapping, model.parameters())
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in x[:2]:  # after its first pass DDP builds its buckets anew
        loss(ddp, batch).backward()
        model.zero_grad()
    with projector.protect():
        loss(ddp, x[2], 1.0).backward()
        bucket = [p.grad.detach() for p in model.parameters()]
    kept = [t.clone() for t in stored(projector)[0].values()]
    loss(ddp, x[3]).backward()
    assert [p.grad.data_ptr() for p in model.parameters()] == [b.data_ptr() for b in bucket]  # it is that memory
    assert not torch.equal(bucket[0], kept[0])  # and it has been overwritten
    assert_same(stored(projector)[0].values(), kept)


def test_bucket_views_that_are_set_aside_come_back_with_their_contents(one_rank, wrapping):
    """The block's own backward pass goes through the same buckets as the gradients that wait outside."""
    model, x = model_and_batches()
    _, projector = sgd(wrapping, model.parameters())
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in x[:2]:
        model.zero_grad()
        loss(ddp, batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    views = [p.grad for p in model.parameters()]
    protect(ddp, projector, x[2])
    assert all(p.grad is v for p, v in zip(model.parameters(), views, strict=True))
    assert_same(views, expected)


class Tied(torch.nn.Module):
    """Two parameters that enter only through views whose sum is used: autograd gives both the same memory as gradient."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(2, 3))
        self.b = torch.nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return x * (self.a.view(6) + self.b.view(6))


def test_a_gradient_that_another_parameter_shares_is_cloned(wrapping):
    """Zeroing the other parameter's gradient, which belongs to another optimizer, zeroed the direction."""
    torch.manual_seed(0)
    model = Tied()
    _, projector = sgd(wrapping, [model.a])
    other = torch.optim.SGD([model.b], lr=0.1)
    with projector.protect():
        model(torch.randn(6)).square().sum().backward()
        assert model.a.grad.data_ptr() == model.b.grad.data_ptr()
    kept = stored(projector)[0][model.a].clone()
    other.zero_grad(set_to_none=False)
    assert kept.any() and torch.equal(stored(projector)[0][model.a], kept)


@pytest.mark.parametrize("view", [False, True], ids=["the gradient", "a view"])
def test_a_gradient_that_the_caller_keeps_is_cloned(view, wrapping):
    """Scripts that keep their gradients in a list zero them in place."""
    model, x = model_and_batches()
    _, projector = sgd(wrapping, model.parameters())
    with projector.protect():
        loss(model, x[0]).backward()
        mine = [p.grad.view(-1) if view else p.grad for p in model.parameters()]
    kept = [t.clone() for t in stored(projector)[0].values()]
    for g in mine:
        g.zero_()
    assert all(t.any() for t in kept)
    assert_same(stored(projector)[0].values(), kept)


# --- refused --------------------------------------------------------------------------------------------------------


def left_as_it_was(projector, model, block, error, match):
    """``block`` inside protect() fails, and has changed neither the directions nor the gradients."""
    before = [p.grad for p in model.parameters()]
    count = number_protected(projector)
    with pytest.raises(error, match=match), projector.protect():
        block()
    assert number_protected(projector) == count
    assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))


def test_sparse_gradients_are_refused_at_once(wrapping):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Embedding(5, 3, sparse=True))
    _, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))

    def block():
        model[0](model[1](torch.tensor([1]))).sum().backward()

    left_as_it_was(
        projector, model, block, NotImplementedError, r"parameter 2 with shape \(5, 3\) has layout torch.sparse_coo"
    )


@pytest.mark.parametrize("does", ["steps", "frees", "steps and frees"])
def test_optimizer_in_backward_is_refused(does, wrapping):
    """A hook that steps trains on the capability loss, and one that frees the gradient leaves nothing to protect."""
    model, x = model_and_batches()
    _, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    mine = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(p):
        if "steps" in does:
            mine[p].step()
        if "frees" in does:
            p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    block = lambda: loss(model, x[0]).backward()
    left_as_it_was(projector, model, block, RuntimeError, r"optimizer-in-backward.*call step\(\) after backward\(\)")
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())  # ours are gone again


def test_torch_s_own_optimizer_in_backward_is_refused(wrapping):
    from torch.distributed.optim import _apply_optimizer_in_backward

    model, x = model_and_batches()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    _, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    before = parameters(model)
    left_as_it_was(projector, model, lambda: loss(model, x[0]).backward(), RuntimeError, "parameter 0 with shape")
    assert_same(before, parameters(model))


def test_hooks_that_only_look_are_none_of_our_business(wrapping):
    model, x = model_and_batches()
    _, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    norms = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    protect(model, projector, x[0])
    assert len(norms) == 4 and number_protected(projector) == 1


# --- parameters that are replaced -----------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(model):
    """New Parameter objects with the old values, as a framework makes when it prepares a model."""
    for module in model:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach().clone()))
    yield list(model.parameters())


@pytest.mark.parametrize("space", ["gradient", "update"])
def test_replaced_parameters_that_correspond_keep_their_directions(space, wrapping):
    model, x = model_and_batches()
    results = []
    for swap in (False, True):
        model, x = model_and_batches()
        opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1), directions=2, space=space)
        protect(model, projector, x[0])
        if swap:
            with replaced(model) as new:
                opt.param_groups[0]["params"] = new
        protect(model, projector, x[1])
        loss(model, x[2]).backward()
        opt.step()
        assert projector.last.gram.shape == (3, 3)
        results.append(parameters(model))
    assert_same(*results)


@pytest.mark.parametrize("what", ["order", "number"])
def test_replaced_parameters_that_do_not_correspond_are_refused(what, wrapping):
    model, x = model_and_batches()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    protect(model, projector, x[0])
    with replaced(model) as new:
        opt.param_groups[0]["params"] = new[::-1] if what == "order" else new[:2]
    loss(model, x[1]).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"4 of the optimizer's 4 parameters were replaced.*unprotect\(\) and protect\(\)"
    ):
        opt.step()
    assert_same(before, [p.grad for p in model.parameters()])
    projector.unprotect()
    opt.step()


def test_parameters_that_only_leave_or_come_are_no_swap(wrapping):
    model, x = model_and_batches()
    opt, projector = wrapping(torch.optim.SGD(model.parameters(), lr=0.1))
    protect(model, projector, x[0])
    opt.param_groups[0]["params"] = opt.param_groups[0]["params"][1:]
    loss(model, x[1]).backward()
    opt.step()
    opt.add_param_group({"params": [model[0].weight]})
    opt.step()
    assert projector.last.applied
