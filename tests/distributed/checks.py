"""What the ranks of a pool do together. Every function runs on all ranks; its first arguments are rank and world."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradproj
from distributed import models
from gradproj import Directions, ProjectedOptimizer, Sharding, reference
from gradproj.directions import ranks

TOLERANCE = 1e-6


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Length of the difference over length of what is expected."""
    difference = sum((a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


class collectives(TorchDispatchMode):
    """The (operation, elements, dtype) of every collective inside, DTensor's included."""

    def __enter__(self) -> list[tuple]:
        self.seen: list[tuple] = []
        super().__enter__()
        return self.seen

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operations on its local tensors come here
        name = op.overloadpacket.__name__
        if op.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            sent = next(t for t in tree_leaves(args) if isinstance(t, Tensor))
            self.seen.append((name, sent.numel(), sent.dtype))
        return op(*args, **(kwargs or {}))


def one_all_reduce(numbers: int) -> list[tuple]:
    return [("allreduce_", numbers, torch.float64)]


def assert_same_on_all_ranks(value) -> None:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    assert all(v == value for v in gathered), gathered


def training(rank: int, world: int, way: str, expected: list[list[Tensor]], method) -> None:
    """Every step's projected gradients, and the parameters at the end. Only with DDP are ranks compared, and once."""
    run, read, numbers = models.WAYS[way](rank, world), [], ranks._numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_numbers", lambda tensors: read.append(tensors) or numbers(tensors))
        actual = models.train(run, method)
    assert len(read) == (3 if "ddp" in way else 0)  # parameters, direction, gradients
    if way == "fsdp1":  # its gradients are flat parts
        with FullyShardedDataParallel.summon_full_params(run.model):
            actual, expected = [[models.whole(p) for p in run.model.parameters()]], expected[-1:]
    assert max(distance(a, e) for a, e in zip(actual, expected, strict=True)) <= TOLERANCE


def layouts(rank: int, world: int) -> None:
    """The models would prove little if torch stopped to produce what makes them difficult."""

    def grads(way):
        run = models.WAYS[way](rank, world)
        run.backward(0, 0)
        return [p.grad for p in run.model.parameters()]

    tp = [str(getattr(g, "placements", "plain")) for g in grads("tp")]
    assert "Partial" in str(tp) and "plain" in tp, tp
    if world == 4:
        assert "_StridedShard" in str([g.placements for g in grads("fsdp2_tp") if isinstance(g, DTensor)])
    # FSDP2 lays the gradients of a group side by side, so that kernels may walk them as one segment. There are four
    # groups; the outermost one's own parameter comes last in it, not first. Only the first rank's shards have no
    # padding.
    shards = [g.to_local() for g in grads("fsdp2")]
    merged = sum(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in itertools.pairwise(shards))
    assert rank or (len(shards), merged) == (9, 4)


def stages(rank: int, world: int, expected: list[list[Tensor]], method) -> None:
    """A model split over pipeline stages, one parameter tied between the first and the last.

    Every rank runs the whole model and steps its own stage only; the owners then send the parameters round.
    """
    model = models.build()
    everything = list(model.parameters())
    owners = [{i % world} for i in range(len(everything))]
    owners[0] = {0, world - 1}  # the tied one: both ranks hold it, and only the first counts it
    mine = [p for p, held_by in zip(everything, owners, strict=True) if rank in held_by]
    here = Sharding(dist.group.WORLD, "shard", owned=[p is not everything[0] or rank == 0 for p in mine])
    opt = ProjectedOptimizer(torch.optim.SGD(mine, lr=0.05, momentum=0.9), Directions(2, method), sharding=here)
    run = models.Run(model, lambda x: x)
    for step in range(5):
        if step % 2 == 0:
            with opt.protect():
                run.backward(step, 1)
        run.backward(step, 0)
        opt.step()
        model.zero_grad()
        for p, held_by in zip(everything, owners, strict=True):
            dist.broadcast(p.data, min(held_by))
    assert distance([p.detach() for p in everything], expected[-1]) <= TOLERANCE


def one_call_form(rank: int, world: int) -> None:
    """``orthogonal_gradient_projection`` of a distributed model, against the naive one on a whole model.

    DDP reduces one backward pass per forward pass: with both forward passes first, the second gradient stayed local.
    """
    whole = models.build()
    losses = [lambda m, kind=kind: models.loss(m(models.batch(0, kind)), kind) for kind in (0, 1)]
    reference.orthogonal_gradient_projection(whole, *losses)
    for way in ("ddp", "fsdp2", "tp"):
        model, part, here = models.WAYS[way](rank, world)
        losses = [lambda m, part=part, kind=kind: models.loss(m(part(models.batch(0, kind))), kind) for kind in (0, 1)]
        gradproj.orthogonal_gradient_projection(model, *losses, sharding=here)
        grads = [models.whole(p.grad) for p in model.parameters()]
        assert distance(grads, [p.grad for p in whole.parameters()]) <= 1e-5, way  # its eps of 1e-8, in float32


def micro_batches(rank: int, world: int) -> None:
    """Gradients of several micro-batches add up, if the last one of each objective is reduced."""
    for way in ("ddp", "fsdp2"):
        run = models.WAYS[way](rank, world)
        opt = ProjectedOptimizer(torch.optim.SGD(run.model.parameters(), lr=0.1), Directions(), sharding=run.sharding)

        def backward(step, synchronise, run=run, way=way):
            if way == "fsdp2":
                run.model.set_requires_gradient_sync(synchronise)
            with run.model.no_sync() if way == "ddp" and not synchronise else contextlib.nullcontext():
                run.backward(step, 1)

        if way == "fsdp2":  # what was not reduced is not in p.grad at all
            with pytest.raises(RuntimeError, match="parameters received a gradient"), opt.protect():
                backward(0, False)
            backward(0, True)  # brings out what had been kept back
            opt.zero_grad()
        with opt.protect():
            backward(0, False)
            backward(0, True)
        (taken,) = opt.protection.rows()
        before = [models.whole(t) for t in taken]
        alone = models.Run(models.build(), lambda x: x)
        alone.backward(0, 1)
        assert distance(before, [2 * p.grad for p in alone.model.parameters()]) <= TOLERANCE
        backward(1, True)  # p.grad was moved out: a later backward pass does not write it
        assert all(torch.equal(models.whole(t), b) for t, b in zip(taken, before, strict=True))


def save(rank: int, world: int, way: str, folder: str, protected: bool) -> tuple[list, list]:
    """Train, save with torch.distributed.checkpoint, train on: returns the saved directions and the last parameters."""
    run, opt = _resumable(rank, world, way)
    _steps(run, opt, range(3))
    if not protected:
        opt.unprotect()
    model_state, optimizer_state = get_state_dict(run.model, opt)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    saved = _whole_directions(opt)
    _steps(run, opt, range(3, 5))
    return saved, [models.whole(p) for p in run.model.parameters()]


def load(rank: int, world: int, way: str, folder: str, directions: int) -> tuple[list, list]:
    """A fresh model and optimizer on another number of ranks; the same as :func:`save` returned."""
    run, opt = _resumable(rank, world, way)
    for p in run.model.parameters():
        torch.nn.init.zeros_(p)
    for _ in range(directions):  # a checkpoint is read into what is there: room for each direction
        with opt.protect():
            for p in run.model.parameters():
                p.grad = torch.zeros_like(p)
    model_state, optimizer_state = get_state_dict(run.model, opt)
    checkpoint.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(run.model, opt, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = _whole_directions(opt)
    _steps(run, opt, range(3, 5))
    return loaded, [models.whole(p) for p in run.model.parameters()]


def _resumable(rank, world, way):
    run = models.WAYS[way](rank, world)
    inner = torch.optim.AdamW(run.model.parameters(), lr=0.01, eps=1e-3)
    return run, ProjectedOptimizer(inner, Directions(2, "conflict"), sharding=run.sharding)


def _steps(run, opt, steps):
    for step in steps:
        if step < 3:
            with opt.protect():
                run.backward(step, 1)
        run.backward(step, 0)
        opt.step()
        opt.zero_grad()


def _whole_directions(opt):
    return [[models.whole(t) for t in row] for row in opt.protection.rows()]
