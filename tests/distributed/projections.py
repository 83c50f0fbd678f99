"""Single projections, and what ranks protect. A pool runs every function as function(rank, world) on all ranks."""

import contextlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gradproj
from distributed import models
from distributed.checks import TOLERANCE, assert_same_on_all_ranks, collectives, one_all_reduce
from gradproj import Directions, ProjectedOptimizer, Sharding, reference
from gradproj.directions import ranks
from gradproj.kernels import methods
from gradproj.kernels.backends import select
from gradproj.rows import functional, sharding

METHODS = ["orthogonal", "conflict", ("mix", 0.3)]


def on(t: Tensor, mesh, *placements) -> DTensor:
    return distribute_tensor(t, mesh, placements, src_data_rank=None)


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
    """One collective a step, even where ranks have different gradients: a kept Gram must not change that."""
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
    """One gradient's mesh covers the world, and so implies the group. No direction has that parameter: the directions'
    own Gram, which is kept, would not know the group."""
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
    """With FSDP1 and ZeRO some ranks have no elements and no gradients: they protect and step like all others.

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


def around_ddp(rank: int, world: int, way: str, how: str) -> None:
    """The backward pass inside protect() skips DDP: every rank says so, and nothing was projected or stepped."""
    run = models.WAYS[way](rank, world)
    inner = torch.optim.SGD(run.model.parameters(), lr=0.1)
    opt = ProjectedOptimizer(inner, Directions(1), sharding=run.sharding)
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
