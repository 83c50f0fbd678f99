"""Large groups and errors, in one process: a process group that sends nothing."""

import contextlib

import numpy as np
import pytest
import torch
import torch.distributed as dist

import gradproj
from gradproj import float8, functional, reference

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

try:
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError:
    pytest.skip("this torch has no fake process group", allow_module_level=True)


@contextlib.contextmanager
def simulated(rank: int, world: int):
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def four_ranks():
    with simulated(rank=0, world=4):
        yield


def ones(*shape):
    return torch.ones(shape)


WORLD = 256
LAYOUTS = [  # of buffers on a mesh of 32 x 8 ranks
    (Shard(0), Shard(1)),
    (Replicate(), Shard(0)),
    (Shard(0), Replicate()),
    (Replicate(), Replicate()),
]


def test_weights_and_counts_of_256_ranks(monkeypatch):
    """The fake group leaves each rank its own share of the Gram: the shares of 256 ranks add up to the whole."""
    sizes = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, group=None: sizes.append(t.numel()))
    torch.manual_seed(0)
    shapes = [(40, 16), (20,), (33, 3), (7, 5), (9,)]  # most leave ranks without a share
    rows = [[torch.randn(s) for s in shapes] for _ in range(3)]
    total = torch.zeros(3, 3, dtype=torch.float64)
    for rank in range(WORLD):
        with simulated(rank, WORLD):
            # Without a group for each dimension: 40 more for every rank, and nothing here communicates over them.
            mesh = DeviceMesh("cpu", torch.arange(WORLD).view(32, 8), _init_backend=False)
            local = [
                [
                    *(DTensor.from_local(share(t, mesh, p), mesh, p, run_check=False) for t, p in zip(row, LAYOUTS)),  # noqa: B905
                    row[-1],
                ]
                for row in rows
            ]
            total += gradproj.gram(*local, group=dist.group.WORLD, plain="replicated")
    np.testing.assert_allclose(total.numpy(), reference.oracle_gram(*rows), rtol=1e-6)
    assert sizes == [6] * WORLD


def share(t, mesh, placements):
    for size, at, p in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if p.is_shard():
            chunks = t.chunk(size, p.dim)
            t = chunks[at] if at < len(chunks) else t.narrow(p.dim, 0, 0)
    return t


def on(mesh, placements, t=None):
    return DTensor.from_local(ones(2, 2) if t is None else t, mesh, placements, run_check=False)


def test_group_is_that_of_a_mesh_that_covers_the_world(four_ranks, monkeypatch):
    groups = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, group=None: groups.append(group))
    for shape, placements in (((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])):
        mesh = init_device_mesh("cpu", shape)
        gradproj.project_([on(mesh, placements)], [on(mesh, placements)])
    assert groups == [dist.group.WORLD] * 2


def test_refused_by_name(four_ranks):
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    world, elsewhere = dist.group.WORLD, dist.new_group([1, 2])
    sharded, replicated, on_square = on(line, [Shard(0)]), on(line, [Replicate()]), on(square, [Shard(0), Shard(1)])
    half = on(square["tp"], [Shard(0)])
    cases = [
        ([ones(2)], [ones(2)], {"group": world}, r'grads\[0\] is a plain tensor.*"replicated".*"sharded"'),
        ([sharded, ones(2)], [sharded, ones(2)], {}, r'grads\[1\] is a plain tensor.*"replicated".*"sharded"'),
        ([half], [half], {}, r"has 2 of 4 ranks: pass group="),
        ([half], [half], {"group": world}, r"grads\[0\] is on a mesh with 2 of the 4 ranks of the group.*plain="),
        ([None, sharded], [None, replicated], {}, r"directions\[0\]\[1\] and grads\[1\] are not laid out alike"),
        ([sharded], [on_square], {}, r"directions\[0\]\[0\] and grads\[0\] are not laid out alike"),
        ([sharded], [ones(2, 2)], {}, r"directions\[0\]\[0\] and grads\[0\] are not laid out alike"),
        ([ones(2, 2)], [sharded], {}, r"directions\[0\]\[0\] and grads\[0\] are not laid out alike"),
        ([ones(2)], [ones(2)], {"group": elsewhere, "plain": "sharded"}, "rank 0 is not in group"),
        ([ones(2)], [ones(2)], {"group": world, "plain": "split"}, 'plain must be "replicated" or "sharded"'),
        ([ones(2)], [ones(2)], {"counted": [True, False]}, "counted has 2 entries for 1 buffers"),
        ([on_square], [on_square], {"group": square.get_group("dp")}, r"grads\[0\] has shards on ranks \[0, 1, 2, 3\]"),
        ([sharded], [on(line, [Shard(0)], ones(3))], {}, r"directions\[0\]\[0\] has shape \(3,\)"),
    ]
    for grads, directions, arguments, words in cases:
        before = [None if t is None else gradproj.distributed.local([t])[0].clone() for t in grads]
        with pytest.raises(ValueError, match=words):
            gradproj.project_(grads, directions, **arguments)
        for t, b in zip(grads, before, strict=True):
            assert t is None or torch.equal(gradproj.distributed.local([t])[0], b)


def test_only_a_sum_or_an_average_is_written_back(four_ranks):
    g = on(init_device_mesh("cpu", (4,)), [Partial("max")])
    with pytest.raises(NotImplementedError, match=r"grads\[0\] is .*P.*redistribute"):
        gradproj.project_([g], [g])


def test_what_nobody_else_holds_needs_no_group():
    """``counted`` without a group leaves a buffer out of the products, and writes it."""
    g, d = [ones(2), ones(2)], [torch.tensor([1.0, 0.0]), torch.tensor([5.0, 5.0])]
    info = gradproj.project_(g, d, counted=[True, False])
    assert info.gram.tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert g[0].tolist() == [0.0, 1.0] and g[1].tolist() == [-4.0, -4.0]


def test_combine_takes_dtensors_of_any_mesh(four_ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    g, plain = on(mesh, [Shard(0)]), ones(2)
    gradproj.combine_([g, plain], [[on(mesh, [Shard(0)]), None]], torch.tensor([2.0, -0.5]))
    assert torch.equal(g.to_local(), 1.5 * ones(2, 2)) and plain.tolist() == [2.0, 2.0]


def test_wrapper_passes_it_all_on(four_ranks, monkeypatch):
    seen, project_ = [], gradproj.project_
    monkeypatch.setattr(
        gradproj.projector, "project_", lambda *a, **kwargs: seen.append(kwargs) or project_(*a, **kwargs)
    )
    parameters = [torch.nn.Parameter(ones(2)) for _ in range(2)]
    arguments = {"group": dist.group.WORLD, "plain": "sharded", "counted": lambda p: p is parameters[0]}
    projected = gradproj.ProjectedOptimizer(torch.optim.SGD(parameters), **arguments)
    inner = torch.optim.SGD(parameters)
    for opt, projector in ((projected, projected), (inner, gradproj.attach(inner, **arguments))):
        with projector.protect():
            sum(p.sum() for p in parameters).backward()
        sum(p.sum() for p in parameters).backward()
        opt.step()
        opt.zero_grad()
    for kwargs in seen:
        assert (kwargs["group"], kwargs["plain"], kwargs["counted"]) == (dist.group.WORLD, "sharded", [True, False])
    assert len(seen) == 2


def test_gradient_that_is_still_under_way(four_ranks):
    """The local tensor of a DTensor may be the promise of a collective: kernels must wait for it."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    mesh = init_device_mesh("cpu", (4,))
    memory = torch.tensor([3.0, 4.0])
    g = on(mesh, [Shard(0)], AsyncCollectiveTensor(memory))
    info = gradproj.project_([g], [on(mesh, [Shard(0)], torch.tensor([1.0, 0.0]))])
    assert memory.tolist() == [0.0, 4.0] and info.gram[0, 0] == 25.0


def test_float8_rows_lie_as_the_gradient_does(four_ranks):
    """Their codes are plain tensors of this rank's shards; with two copies of each shard they were refused, or counted twice."""
    mesh = init_device_mesh("cpu", (2, 2))
    g = on(mesh, [Replicate(), Shard(0)], torch.tensor([1.0, 2.0]))
    d = float8.quantize([torch.tensor([448.0, 0.0])])
    half = [[0.5 * 5.0, 0.5 * 448.0], [0.5 * 448.0, 0.5 * 448.0**2]]  # of two copies; the group adds nothing here
    assert gradproj.gram([g], d).tolist() == half
    assert functional.share(d, like=[g]).gram.tolist() == [[half[1][1]]]
    with pytest.raises(ValueError, match="plain tensor"):
        functional.share(d, group=dist.group.WORLD)
    info = gradproj.project_([g], d, known=functional.share(d, like=[g]))
    assert info.gram.tolist() == half
    assert g.to_local().tolist() == pytest.approx([0.0, 2.0], abs=1e-6)
