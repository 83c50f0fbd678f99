"""Large groups and errors, in one process: a process group that sends nothing."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist

import gradproj
from gradproj import Directions, ProjectedOptimizer, Sharding, reference
from gradproj.kernels import methods
from gradproj.kernels.backends import Backend
from gradproj.rows import call, functional
from gradproj.rows.sharding import local_tensors, localize

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

try:
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError:
    pytest.skip("this torch has no fake process group", allow_module_level=True)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def groups(monkeypatch):
    """The group of every all_reduce."""
    seen = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, group=None: seen.append(group))
    return seen


def ones(*shape):
    return torch.ones(shape)


def on(mesh, placements, t=None):
    return DTensor.from_local(ones(2, 2) if t is None else t, mesh, placements, run_check=False)


WORLD = 256
ALL, PART = Replicate(), Shard(0)
LAYOUTS = [(PART, Shard(1)), (ALL, PART), (PART, ALL), (ALL, ALL)]  # of tensors on a mesh of 32 x 8 ranks


def test_weights_and_counts_of_256_ranks(monkeypatch):
    """The fake group leaves each rank its own summand of the Gram: those of 256 ranks add up to the whole."""
    sizes = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, group=None: sizes.append(t.numel()))
    torch.manual_seed(0)
    shapes = [(40, 16), (20,), (33, 3), (7, 5), (9,)]  # most leave ranks without elements
    rows = [[torch.randn(s) for s in shapes] for _ in range(3)]
    total = torch.zeros(3, 3, dtype=torch.float64)
    for rank in range(WORLD):
        with simulated(rank, WORLD):
            # Without a group for each dimension: 40 more for every rank, and nothing here communicates over them.
            mesh = DeviceMesh("cpu", torch.arange(WORLD).view(32, 8), _init_backend=False)
            local = [
                [*(on(mesh, p, shard(t, mesh, p)) for t, p in zip(row, LAYOUTS, strict=False)), row[-1]] for row in rows
            ]
            total += gradproj.gram(*local, sharding=Sharding(placement="replicate"))
    np.testing.assert_allclose(total.numpy(), reference.oracle_gram(*rows), rtol=1e-6)
    assert sizes == [6] * WORLD


def shard(t, mesh, placements):
    for size, at, p in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if p.is_shard():
            chunks = t.chunk(size, p.dim)
            t = chunks[at] if at < len(chunks) else t.narrow(p.dim, 0, 0)
    return t


def test_group_is_the_one_given_or_the_world(four_ranks, groups):
    world, half = dist.group.WORLD, dist.new_group([0, 1])
    for shape, placements in (((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])):
        mesh = init_device_mesh("cpu", shape)
        gradproj.project_([on(mesh, placements)], [on(mesh, placements)])
    for sharding in (Sharding(placement="replicate"), Sharding(world, "shard"), Sharding(half, "shard")):
        gradproj.project_([ones(2)], [ones(2)], sharding=sharding)
    assert groups == [world] * 4 + [half]
    gradproj.project_([ones(2)], [ones(2)])
    gradproj.project_([ones(2)], [ones(2)], sharding=Sharding())
    assert len(groups) == 5


def test_one_process_needs_no_group():
    """A script that runs with torchrun and without passes its placement in both."""
    info = gradproj.project_([ones(2)], [ones(2)], sharding=Sharding(placement="replicate"))
    assert info.gram.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    with pytest.raises(RuntimeError, match=r"has a group but torch\.distributed is not initialised"):
        gradproj.project_([ones(2)], [ones(2)], sharding=Sharding(object(), "replicate"))
    with pytest.raises(TypeError, match=r"sharding must be a gradproj\.Sharding, got str"):
        gradproj.project_([ones(2)], [ones(2)], sharding="replicate")


def test_refused_by_name(four_ranks):
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    world, elsewhere = dist.group.WORLD, dist.new_group([1, 2])
    sharded, replicated, on_square = on(line, [Shard(0)]), on(line, [Replicate()]), on(square, [Shard(0), Shard(1)])
    half = on(square["tp"], [Shard(0)])
    unknown = r'grads\[{}\] is a plain tensor.*Sharding\(group, placement="replicate"\).*placement="shard"'
    cases = [
        ([ones(2)], [ones(2)], Sharding(world), unknown.format(0)),
        ([sharded, ones(2)], [sharded, ones(2)], None, unknown.format(1)),
        ([half], [half], None, r"has 2 of 4 ranks: pass Sharding\(group=\)"),
        ([half], [half], Sharding(world), r"grads\[0\] is on a mesh with 2 of the 4 ranks of the group.*placement="),
        ([None, sharded], [None, replicated], None, r"directions\[0\]\[1\] and grads\[1\] are not laid out alike"),
        ([sharded], [on_square], None, r"directions\[0\]\[0\] and grads\[0\] are not laid out alike"),
        ([sharded], [ones(2, 2)], None, r"directions\[0\]\[0\] and grads\[0\] are not laid out alike"),
        ([ones(2, 2)], [sharded], None, r"directions\[0\]\[0\] and grads\[0\] are not laid out alike"),
        ([ones(2)], [ones(2)], Sharding(elsewhere, "shard"), "rank 0 is not in group"),
        ([ones(2)], [ones(2)], Sharding(world, "split"), 'placement must be "replicate" or "shard", got \'split\''),
        ([ones(2)], [ones(2)], Sharding(owned=[True, False]), "owned has 2 entries for 1 parameters"),
        ([None], [ones(2)], Sharding(owned=[]), "owned has 0 entries for 1 parameters"),
        ([on_square], [on_square], Sharding(square.get_group("dp")), r"grads\[0\] has shards on ranks \[0, 1, 2, 3\]"),
        ([sharded], [on(line, [Shard(0)], ones(3))], None, r"directions\[0\]\[0\] has shape \(3,\)"),
    ]
    for grads, directions, sharding, words in cases:
        before = [None if t is None else local_tensors([t])[0].clone() for t in grads]
        with pytest.raises(ValueError, match=words):
            gradproj.project_(grads, directions, sharding=sharding)
        for t, b in zip(grads, before, strict=True):
            assert t is None or torch.equal(local_tensors([t])[0], b)


def test_only_a_sum_or_an_average_is_written_back(four_ranks):
    g = on(init_device_mesh("cpu", (4,)), [Partial("max")])
    with pytest.raises(NotImplementedError, match=r"grads\[0\] is .*P.*redistribute"):
        gradproj.project_([g], [g])


def test_weights_count_the_ranks_of_the_group_only(four_ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    hsdp, inner = on(mesh, [Replicate(), Shard(0)]), on(mesh["shard"], [Shard(0)])
    copied = on(mesh["shard"], [Replicate()])
    world, half, alone = dist.group.WORLD, mesh.get_group("shard"), dist.new_group([0])
    for t, sharding, weight in [
        (hsdp, Sharding(world), 1 / 2),
        (hsdp, Sharding(half), 1),
        (inner, Sharding(half), 1),
        (inner, Sharding(world, "replicate"), 1 / 2),  # nothing says that the two rows of the mesh hold copies
        (inner, Sharding(world, "shard"), 1),
        (copied, Sharding(world, "replicate"), 1 / 4),
        (copied, Sharding(world, "shard"), 1 / 2),  # two hold each element, whatever the others have
        (ones(2), Sharding(world, "replicate"), 1 / 4),
        (ones(2), Sharding(world, "shard"), 1),
        (ones(2), Sharding(alone), 1),
    ]:
        assert localize(call.unpack("gram", [[t]]), sharding)[1].weights == [weight]


def test_what_nobody_else_holds_needs_no_group():
    """``owned`` without a group leaves a tensor out of the products, and writes it."""
    g, d = [ones(2), ones(2)], [torch.tensor([1.0, 0.0]), torch.tensor([5.0, 5.0])]
    info = gradproj.project_(g, d, sharding=Sharding(owned=[True, False]))
    assert info.gram.tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert g[0].tolist() == [0.0, 1.0] and g[1].tolist() == [-4.0, -4.0]


def test_combine_takes_dtensors_of_any_mesh(four_ranks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    g, plain = on(mesh, [Shard(0)]), ones(2)
    gradproj.combine_([g, plain], [[on(mesh, [Shard(0)]), None]], torch.tensor([2.0, -0.5]))
    assert torch.equal(g.to_local(), 1.5 * ones(2, 2)) and plain.tolist() == [2.0, 2.0]


@pytest.fixture(params=[ProjectedOptimizer, gradproj.attach], ids=["wrapped", "attached"])
def protection_of(request):
    return request.param


def protect_and_step(protected, optimizer, parameters):
    with protected.protect():
        for p in parameters:
            p.grad = torch.ones_like(p)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def test_wrapper_passes_it_on(four_ranks, groups, protection_of):
    """The second parameter is another rank's: it is written, and does not count. A copy knows it too."""
    parameters = [torch.nn.Parameter(ones(2)) for _ in range(2)]
    sharding = Sharding(dist.group.WORLD, "shard", owned=[True, False])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    protected = protection_of(optimizer, Directions(), sharding=sharding)
    protect_and_step(protected, optimizer, parameters)
    assert groups == [dist.group.WORLD] and protected.last.gram.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert all(torch.equal(p, ones(2)) for p in parameters)
    if protection_of is ProjectedOptimizer:
        copied = copy.deepcopy(protected)
        assert copied.protection.sharding == sharding and copied.protection.sharding.group is dist.group.WORLD


def test_an_op_never_sees_a_dtensor(four_ranks, groups, protection_of, monkeypatch):
    seen, op = [], Backend.op

    def watched(self, name):
        def call(*arguments):
            flat = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
            seen.append((name, {type(t) for t in flat}))
            return op(self, name)(*arguments)

        return call

    monkeypatch.setattr(Backend, "op", watched)
    mesh = init_device_mesh("cpu", (4,))
    rows = [[on(mesh, [p]) for p in (Shard(0), Replicate(), Partial())] for _ in range(3)]
    gradproj.combine_(rows[0], rows[1:], ones(3))
    gram_dd = functional.local_gram(rows[1:], None)
    assert not groups
    gradproj.project_(rows[0], *rows[1:])
    gradproj.gram(*rows)
    functional.project_rows(rows[0], rows[1:], methods.parse("conflict"), None, gram_dd)
    assert len(groups) == 3
    parameters = [torch.nn.Parameter(on(mesh, [Shard(0)]))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    protected = protection_of(optimizer, Directions(2))
    for _ in range(2):
        protect_and_step(protected, optimizer, parameters)
    assert {name for name, _ in seen} == {"gram", "combine_", "weights"}
    assert all(types <= {torch.Tensor} for _, types in seen)


def test_gradient_that_is_still_under_way(four_ranks):
    """The local tensor of a DTensor may be the promise of a collective: kernels must wait for it."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    mesh = init_device_mesh("cpu", (4,))
    memory = torch.tensor([3.0, 4.0])
    g = on(mesh, [Shard(0)], AsyncCollectiveTensor(memory))
    info = gradproj.project_([g], [on(mesh, [Shard(0)], torch.tensor([1.0, 0.0]))])
    assert memory.tolist() == [0.0, 4.0] and info.gram[0, 0] == 25.0
