"""What the ranks of a pool do together. Every function runs on all ranks; its first arguments are rank and world."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradproj
from distributed import models
from gradproj import Directions, ProjectedOptimizer, Sharding, functional, methods, ranks, reference, sharding
from gradproj.backends import select

TOLERANCE = 1e-6
METHODS = ["orthogonal", "conflict", ("mix", 0.3)]


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


def on(t: Tensor, mesh, *placements) -> DTensor:
    return distribute_tensor(t, mesh, placements, src_data_rank=None)


# --- training runs ----------------------------------------------------------------------------------------------------


def training(rank: int, world: int, way: str, expected: list[list[Tensor]], method, space: str = "gradient") -> None:
    """Projected gradients of every step and the parameters after them. With DDP, and only there, ranks are compared once."""
    run, read, numbers = models.WAYS[way](rank, world), [], ranks._numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_numbers", lambda tensors: read.append(tensors) or numbers(tensors))
        actual = models.train(run, method, space)
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
    # FSDP2 lays the gradients of a group side by side, so that kernels may walk them as one segment. There are four groups;
    # the outermost one's own parameter comes last in it, not first. Only the first rank's shards have no padding.
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


# --- single projections -----------------------------------------------------------------------------------------------


def random_lists(rank: int, world: int, seeds: range) -> None:
    """Lists of anything: every placement, several meshes, plain tensors and None, shapes that leave ranks empty."""
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2)))
    for seed in seeds:
        rng = np.random.default_rng(seed)  # the same on every rank
        torch.manual_seed(seed)
        here = Sharding(dist.group.WORLD, str(rng.choice(["replicate", "shard"])))
        num_rows, count = int(rng.integers(2, 5)), int(rng.integers(1, 7))
        columns = [_random_column(rng, rank, world, meshes, here.placement, num_rows) for _ in range(count)]
        whole, local = ([list(row) for row in zip(*(column[i] for column in columns), strict=True)] for i in (0, 1))
        before = [[None if t is None else models.whole(t) for t in row] for row in local[1:]]
        products = reference.oracle_gram(*whole)
        projected = reference.oracle_project(whole[0], whole[1:], METHODS[seed % 3])

        rule = methods.parse(METHODS[seed % 3])
        gram_dd = functional.local_gram(local[1:], here) if seed % 2 else None
        with collectives() as seen:
            info = functional.project_rows(local[0], local[1:], rule, here, gram_dd)
        of_gram = [s for s in seen if s[2] == torch.float64]  # the others reduce what is Partial
        assert of_gram == one_all_reduce(num_rows * (num_rows + 1) // 2), (seed, seen)

        lengths = np.sqrt(np.diag(products))
        assert (np.abs(info.gram.numpy() - products) <= TOLERANCE * np.outer(lengths, lengths)).all(), (seed, products)
        for t, e in zip(local[0], projected, strict=True):
            wanted = torch.from_numpy(e)
            if not isinstance(t, DTensor) and here.placement == "shard":
                wanted = wanted.tensor_split(world)[rank]
            error = (models.whole(t).double().flatten() - wanted).norm()
            scale = float(lengths[0]) + float(np.linalg.norm(e))
            assert error <= 2e-6 * scale * max(1.0, _condition(products)), (seed, t, wanted)
        for row, unchanged in zip(local[1:], before, strict=True):
            for t, b in zip(row, unchanged, strict=True):
                assert t is None or torch.equal(models.whole(t), b), seed


def _random_column(rng, rank, world, meshes, placement, num_rows) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """One parameter's tensors: whole, and as this rank has them."""
    shape = tuple(int(n) for n in rng.choice([0, 1, 2, 3, 5, 8], size=int(rng.integers(1, 4))))
    mesh = None if rng.random() < 0.3 else meshes[int(rng.integers(len(meshes)))]
    kinds = [] if mesh is None else list(rng.choice(["replicate", "shard", "partial"], size=mesh.ndim))
    dims = [int(rng.integers(len(shape))) for _ in kinds]
    whole: list[Tensor | None] = []
    local: list[Tensor | None] = []
    for r in range(num_rows):
        full = torch.randn(shape)
        if mesh is None:
            here = full.flatten().tensor_split(world)[rank].clone() if placement == "shard" else full.clone()
        else:
            placements = [Shard(d) if kind == "shard" else Replicate() for kind, d in zip(kinds, dims, strict=True)]
            here = on(full, mesh, *placements)
        if "partial" in kinds:
            at = [x for x, kind in zip(mesh.get_coordinate(), kinds, strict=True) if kind == "partial"]
            part = here.to_local() * (1 + sum(at))  # parts that differ, whose sum is the value
            partial = [Partial() if kind == "partial" else p for kind, p in zip(kinds, placements, strict=True)]
            here = DTensor.from_local(part, mesh, partial, run_check=False, shape=full.shape, stride=full.stride())
            full = here.full_tensor()
        absent = r > 0 and rng.random() < 0.2
        whole.append(None if absent else full)
        local.append(None if absent else here)
    return whole, local


def _condition(gram: np.ndarray) -> float:
    """How much the weights amplify an error of the Gram."""
    lengths = np.sqrt(np.diag(gram)[1:])
    if not (lengths > 0).all():
        return 1.0
    return 1 / max(np.linalg.eigvalsh(gram[1:, 1:] / np.outer(lengths, lengths))[0], 1e-8)


def wrapper_counts(rank: int, world: int) -> None:
    """One collective a step, also where ranks disagree on which gradients there are: a kept Gram must not change that."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = ProjectedOptimizer(torch.optim.SGD(parameters, lr=0.1), Directions(3), sharding=Sharding(placement="shard"))
    for step in range(4):
        with collectives() as seen, opt.protect():
            sum((p * torch.arange(3.0)).sum() * (step + 1 + i) for i, p in enumerate(parameters)).backward()
        assert not seen, seen
        for _ in range(2):
            used = parameters if rank or step % 2 else parameters[:1]
            sum(p.square().sum() for p in used).backward()
            with collectives() as seen:
                opt.step()
            k = len(opt.protection)
            assert seen == one_all_reduce((k + 1) * (k + 2) // 2), seen
            opt.zero_grad()


def group_implied_by_gradients(rank: int, world: int) -> None:
    """One gradient's mesh covers the world, and so implies the group. No direction has that parameter: the directions' own
    Gram, which is kept, would not know the group."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    values = torch.arange(6.0).view(3, 2), torch.tensor([1.0, 2.0, 3.0])
    meshes = (mesh, Replicate(), Shard(0)), (mesh["inner"], Replicate())
    local = [torch.nn.Parameter(on(v, *where)) for v, where in zip(values, meshes, strict=True)]
    alone = [torch.nn.Parameter(v.clone()) for v in values]
    for parameters, here in ((local, Sharding(placement="replicate")), (alone, None)):
        opt = ProjectedOptimizer(torch.optim.SGD(parameters, lr=1.0), Directions(2), sharding=here)
        for direction in ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]):
            with opt.protect():
                t = torch.tensor(direction)
                parameters[1].grad = t if here is None else on(t, *meshes[1])
        for p in parameters:
            p.grad = 2 * p.detach()
        opt.step()
    torch.testing.assert_close([models.whole(p) for p in local], [p.detach() for p in alone])


def empty_rank(rank: int, world: int) -> None:
    """The last rank owns nothing, not even a list entry; without its call the others would wait for ever."""
    owns, here = rank < world - 1, Sharding(dist.group.WORLD, "shard")
    g, d = ([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]) if owns else ([], [])
    info = gradproj.project_(g, d, sharding=here)
    assert info.gram.flatten().tolist() == [n * (world - 1) for n in (5.0, 3.0, 3.0, 9.0)]
    assert info.weights.tolist() == [1.0, pytest.approx(-1 / 3)]
    assert info.backend == (select("cpu").name if owns else "none")
    assert gradproj.gram(g, d, sharding=here)[0, 1].abs() <= 1e-6
    none = gradproj.project_([None], [torch.ones(2) if rank else None], sharding=here)
    assert none.gram.abs().sum() == 0 and not none.applied and none.backend == "none"


def wrapper_on_empty_rank(rank: int, world: int) -> None:
    """FSDP1 and ZeRO leave ranks whose parameters have no elements and no gradients: they protect and step like all others.

    protect() raised there that nothing had received a gradient, and the others waited.
    """
    owns = rank < world - 1
    parameter = torch.nn.Parameter(torch.zeros(2 if owns else 0))
    opt = ProjectedOptimizer(
        torch.optim.SGD([parameter], lr=1.0), Directions(2), sharding=Sharding(dist.group.WORLD, "shard")
    )
    for direction in ([1.0, 0.0], [2.0, 1.0]):
        with opt.protect():
            if owns:
                parameter.grad = torch.tensor(direction) * (rank + 1)
    parameter.grad = torch.tensor([1.0, 2.0]) if owns else None
    opt.step()
    assert opt.last.applied and (opt.last.backend == "none") == (not owns)
    assert_same_on_all_ranks(opt.last.gram.tolist())


def disagreeing_shards(rank: int, world: int) -> None:
    """Shard-local inner products of either sign: decided locally, some ranks would project and others not."""
    for here, applied in ((-5.0, True), (-0.5, False)):
        g, d = [torch.tensor([1.0])], [torch.tensor([here if rank == 0 else 1.0])]
        info = gradproj.project_(g, d, method="conflict", sharding=Sharding(dist.group.WORLD, "shard"))
        assert info.applied == applied and (g[0].item() == 1.0) == (not applied)
        assert_same_on_all_ranks((info.weights.tolist(), info.gram.tolist()))


def non_finite(rank: int, world: int) -> None:
    """An inf on one rank must leave every bit on all ranks, Partial gradients included."""
    mesh = init_device_mesh("cpu", (world,))
    sharded, partial = torch.randn(3), torch.randn(2)
    g = [DTensor.from_local(sharded, mesh, [Shard(0)]), DTensor.from_local(partial, mesh, [Partial()])]
    d = [DTensor.from_local(torch.full((3,), float("inf") if rank == 0 else 1.0), mesh, [Shard(0)]), None]
    before = sharded.clone(), partial.clone()
    info = gradproj.project_(g, d)
    assert not info.finite and not info.applied
    assert torch.equal(sharded, before[0]) and torch.equal(partial, before[1])


def partial_gradient(rank: int, world: int) -> None:
    """In place on a Partial gradient: it stays Partial, and its first rank has the sum."""
    mesh = init_device_mesh("cpu", (world,))
    for operation in ("sum", "avg"):
        local = torch.tensor([1.0 + rank, 2.0])
        g = DTensor.from_local(local, mesh, [Partial(operation)], run_check=False)
        whole, d, version = g.full_tensor().clone(), torch.tensor([1.0, 0.0]), g._version
        gradproj.project_([g], [on(d, mesh, Replicate())])
        assert g.placements == (Partial(operation),) and g._version > version
        torch.testing.assert_close(g.full_tensor(), whole - whole * d)
        has_it = rank == 0 or operation == "avg"
        torch.testing.assert_close(local, whole - whole * d if has_it else torch.zeros(2))


def without_float64(rank: int, world: int) -> None:
    """A device whose collectives have no float64: the numbers' bits travel, in one collective, and nothing is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_carries_float64", lambda device: False)
        numbers = torch.tensor([1e300, -1e-300, 1 / 3], dtype=torch.float64)
        with collectives() as seen:
            total = sharding.all_reduce(numbers * (rank + 1), dist.group.WORLD)
        assert seen == [("allgather_", 6, torch.int32)], seen
        torch.testing.assert_close(total, numbers * (world * (world + 1) / 2), rtol=1e-15, atol=0)
        assert not sharding.all_reduce(torch.tensor([float("inf")]).double(), dist.group.WORLD).isfinite()


# --- ranks that protect different directions --------------------------------------------------------------------------


def around_ddp(rank: int, world: int, way: str, how: str) -> None:
    """The backward pass inside protect() skips DDP: every rank says so, and nothing was projected or stepped."""
    run = models.WAYS[way](rank, world)
    space = "update" if how == "update" else "gradient"
    inner = torch.optim.SGD(run.model.parameters(), lr=0.1)
    opt = ProjectedOptimizer(inner, Directions(1, space=space), sharding=run.sharding)
    with opt.protect():
        run._replace(model=run.model.module).backward(0, 1)
    run.backward(0, 0)
    grads = [p.grad.clone() for p in run.model.parameters()]
    with collectives() as seen, pytest.raises(RuntimeError, match=r"did not go through DDP.*trainer\.model_wrapped"):
        (opt.project if how == "project" else opt.step)()
    assert not seen, seen
    assert all(torch.equal(p.grad, g) for p, g in zip(run.model.parameters(), grads, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), models.build().parameters(), strict=True))


def _disagree(direction, gradient, parameters=((1.0, 1.0),), here=None, protects=True, steps=True) -> bool:
    """Whether a step is refused that follows on protecting ``direction``; of all three one entry per parameter."""
    held = [torch.nn.Parameter(torch.tensor(p)) for p in parameters]
    opt = ProjectedOptimizer(torch.optim.SGD(held, lr=0.1), Directions(), sharding=here)

    def set_grads(rows):
        for p, row in zip(held, rows, strict=True):
            p.grad = None if row is None else torch.tensor(row)

    with collectives() as seen, opt.protect() if protects else contextlib.nullcontext():
        set_grads(direction)
    set_grads(gradient)
    assert not seen, seen
    dist.barrier()  # as DDP's backward pass
    try:
        if steps:
            opt.step()
    except RuntimeError as error:
        assert "protect different directions" in str(error), error
        return True
    return False


def disagreement(rank: int, world: int) -> None:
    """What is an error, and what are good reasons to protect something else."""
    n, last, same = float(rank), rank == world - 1, [[3.0, 4.0]]
    assert _disagree([[1.0, n]], same)
    assert _disagree([[0.0, n]], same)  # the first elements are equal
    assert _disagree([[n, -n]], same)  # the sums are
    assert _disagree([[1.0], None if last else [1.0]], [[1.0], [1.0]], [[1.0], [1.0]])  # unused on one rank
    assert _disagree([[1.0, n]], [None])  # a closure will make them

    assert not _disagree([[1.0, 2.0]], same)
    assert not _disagree([[1.0, 2.0 + 1e-6 * n]], same)  # rounding of devices of two kinds
    assert not _disagree([[1.0, n]], [[3.0, n]])  # independent runs, local SGD
    assert not _disagree([[1.0, n]], same, [[1.0, n]])  # other parameters: stages, partitions
    assert not _disagree([[1.0, n]], same, here=Sharding(dist.new_group([rank], use_local_synchronization=True)))
    assert not _disagree([[n, 1.0]], same, here=Sharding(placement="shard"))
    with pytest.warns(RuntimeWarning, match="inf, nan"):
        assert not _disagree([[float("nan"), 1.0]], same)

    # A rank never protects, or never steps: the others neither fail nor wait for it.
    assert not _disagree([[1.0, 2.0]], same, [[2.0, 2.0]], protects=not last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_PATIENCE_S", 0.1)
        assert not _disagree([[1.0, n]], same, [[3.0, 3.0]], steps=rank == 0)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(rank: int, world: int, way: str, folder: str, protected: bool) -> tuple[list, list]:
    """Train, save with torch.distributed.checkpoint, train on: the directions when saved, and the parameters at the end."""
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
