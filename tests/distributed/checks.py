"""What the ranks of a pool do together. Every function runs on all ranks; its first argument is the rank."""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import gradproj
from distributed import models
from gradproj import distributed, reference

TOLERANCE = 1e-6
METHODS = ["orthogonal", "conflict", ("mix", 0.3)]


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Length of the difference over length of what is expected."""
    difference = sum((a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


@contextlib.contextmanager
def collectives():
    """The (operation, elements, dtype) of every collective that is called through torch.distributed inside."""
    seen, originals = [], {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}

    def recorded(name):
        def call(tensor, *args, **kwargs):
            sent = args[0] if name == "all_gather_into_tensor" else tensor
            seen.append((name, sent.numel(), sent.dtype))
            return originals[name](tensor, *args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, recorded(name))
    try:
        yield seen
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


# --- training runs ----------------------------------------------------------------------------------------------------


def training(rank: int, world: int, way: str, method, space: str = "gradient") -> list[float]:
    """Distances to the run of a single process: of the projected gradients of each step, then of the parameters."""
    spread = models.WAYS[way](rank, world)
    spread.arguments["space"] = space
    expected = models.train(models.alone(0, 1)._replace(arguments={"space": space}), method)
    actual = models.train(spread, method)
    return [distance(a, e) for a, e in zip(actual, expected, strict=True)]


def layouts(rank: int, world: int, way: str) -> list[str]:
    """The placements of every gradient, in words."""
    spread = models.WAYS[way](rank, world)
    models.loss(spread.model(spread.part(models.batch(0, 0))), 0).backward()
    return [str(getattr(p.grad, "placements", "plain")) for p in spread.model.parameters()]


def stages(rank: int, world: int, method) -> float:
    """A model split over pipeline stages, one parameter tied between the first and the last.

    Every rank runs the whole model and steps its own stage only; the owners then send the parameters round.
    """
    expected = models.train(models.alone(0, 1), method)[-1]
    model = models.build()
    everything = list(model.parameters())
    owners = [{i % world} for i in range(len(everything))]
    owners[0] = {0, world - 1}  # the tied one: both ranks hold it, and only the first counts it
    mine = [p for p, ranks in zip(everything, owners, strict=True) if rank in ranks]
    opt = gradproj.ProjectedOptimizer(
        torch.optim.SGD(mine, lr=0.05, momentum=0.9),
        method=method,
        directions=2,
        group=dist.group.WORLD,
        plain="sharded",
        counted=lambda p: p is not everything[0] or rank == 0,
    )
    for step in range(5):
        if step % 2 == 0:
            with opt.protect():
                models.loss(model(models.batch(step, 1)), 1).backward()
        models.loss(model(models.batch(step, 0)), 0).backward()
        opt.step()
        model.zero_grad()
        for p, ranks in zip(everything, owners, strict=True):
            dist.broadcast(p.data, min(ranks))
    return distance([p.detach() for p in everything], expected)


def fsdp1(rank: int, world: int, method) -> float:
    """Parameters after five steps. Every rank has flat parts of some parameters, and nothing of others."""
    spread = models.Spread(
        FullyShardedDataParallel(models.build(), use_orig_params=True, device_id=torch.device("cpu")),
        lambda x: x.chunk(world)[rank],
        {"group": dist.group.WORLD, "plain": "sharded"},
    )
    models.train(spread, method)
    expected = models.train(models.alone(0, 1), method)[-1]
    with FullyShardedDataParallel.summon_full_params(spread.model):
        return distance([p.detach().clone() for p in spread.model.parameters()], expected)


def one_call_form(rank: int, world: int, way: str) -> float:
    """``orthogonal_gradient_projection`` of a spread model, against the naive one on a whole model.

    DDP reduces one backward pass per forward pass: with both forward passes first, the second gradient stayed local.
    """
    whole = models.build()
    losses = [lambda m, kind=kind: models.loss(m(models.batch(0, kind)), kind) for kind in (0, 1)]
    reference.orthogonal_gradient_projection(whole, *losses)
    model, part, arguments = models.WAYS[way](rank, world)
    losses = [lambda m, kind=kind: models.loss(m(part(models.batch(0, kind))), kind) for kind in (0, 1)]
    gradproj.orthogonal_gradient_projection(model, *losses, **arguments)
    return distance([models.whole(p.grad) for p in model.parameters()], [p.grad for p in whole.parameters()])


# --- single projections -------------------------------------------------------------------------------------------------


def random_lists(rank: int, world: int, seeds: range) -> None:
    """Lists of anything: every placement, several meshes, plain tensors and None, shapes that leave ranks empty."""
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2)))
    for seed in seeds:
        rng = np.random.default_rng(seed)  # the same on every rank
        torch.manual_seed(seed)
        plain = str(rng.choice(["replicated", "sharded"]))
        num_rows = int(rng.integers(2, 5))
        whole: list[list[Tensor | None]] = [[] for _ in range(num_rows)]
        local: list[list[Tensor | None]] = [[] for _ in range(num_rows)]
        for _ in range(int(rng.integers(1, 7))):
            shape = tuple(int(n) for n in rng.choice([0, 1, 2, 3, 5, 8], size=int(rng.integers(1, 4))))
            mesh = None if rng.random() < 0.3 else meshes[int(rng.integers(len(meshes)))]
            kinds = [] if mesh is None else list(rng.choice(["replicate", "shard", "partial"], size=mesh.ndim))
            dims = [int(rng.integers(len(shape))) for _ in kinds]
            absent = [r > 0 and rng.random() < 0.2 for r in range(num_rows)]
            for r in range(num_rows):
                full = torch.randn(shape)
                if mesh is None and plain == "sharded":
                    whole[r].append(None if absent[r] else full)
                    local[r].append(None if absent[r] else full.flatten().tensor_split(world)[rank].clone())
                    continue
                placements = [Shard(d) if kind == "shard" else Replicate() for kind, d in zip(kinds, dims, strict=True)]
                spread = full.clone() if mesh is None else distribute_tensor(full, mesh, placements, src_data_rank=None)
                if "partial" in kinds:
                    here = [at for at, kind in zip(mesh.get_coordinate(), kinds, strict=True) if kind == "partial"]
                    part = spread.to_local() * (1 + sum(here))  # parts that differ, whose sum is the value
                    partial = [Partial() if kind == "partial" else p for kind, p in zip(kinds, placements, strict=True)]
                    spread = DTensor.from_local(
                        part, mesh, partial, run_check=False, shape=full.shape, stride=full.stride()
                    )
                    full = spread.full_tensor()
                whole[r].append(None if absent[r] else full)
                local[r].append(None if absent[r] else spread)
        method = METHODS[seed % 3]
        expected = reference.oracle_project(whole[0], whole[1:], method)
        products = reference.oracle_gram(*whole)
        known = torch.from_numpy(products[1:, 1:].copy()) if seed % 2 else None
        arguments = {"group": dist.group.WORLD, "plain": plain}
        directions = [[None if t is None else models.whole(t) for t in row] for row in local[1:]]

        with collectives() as seen:
            info = gradproj.project_(local[0], *local[1:], method=method, known=known, **arguments)
        numbers = num_rows if known is not None else num_rows * (num_rows + 1) // 2
        assert seen == [("all_reduce", numbers, torch.float64)], seen
        lengths = np.sqrt(np.diag(products))
        error = np.abs(info.gram.numpy() - products)
        assert (error <= TOLERANCE * np.outer(lengths, lengths)).all(), (seed, products, info.gram)
        for t, e in zip(local[0], expected, strict=True):
            actual = t.full_tensor() if isinstance(t, DTensor) else t
            wanted = (
                torch.from_numpy(e).view(actual.shape)
                if isinstance(t, DTensor) or plain == "replicated"
                else (torch.from_numpy(e).tensor_split(world)[rank])
            )
            scale = float(np.sqrt(products[0, 0])) + float(np.linalg.norm(e))
            assert (actual.double() - wanted).norm() <= 2e-6 * scale * max(1.0, condition(products)), (
                seed,
                actual,
                wanted,
            )
        for row, before in zip(local[1:], directions, strict=True):
            for t, b in zip(row, before, strict=True):
                assert t is None or torch.equal(models.whole(t), b), seed


def condition(gram: np.ndarray) -> float:
    """How much the weights amplify an error of the Gram."""
    directions = gram[1:, 1:]
    lengths = np.sqrt(np.diag(directions))
    if not (lengths > 0).all():
        return 1.0
    smallest = np.linalg.eigvalsh(directions / np.outer(lengths, lengths))[0]
    return 1 / max(smallest, 1e-8)


def counts(rank: int, world: int) -> None:
    """The collectives of every call, in number and size; all others of torch are counted by CommDebugMode."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    rows = [
        [distribute_tensor(torch.randn(n, 3), mesh, [Shard(0)], src_data_rank=None) for n in (8, 5)] for _ in range(4)
    ]
    with collectives() as seen, CommDebugMode() as mode:
        info = gradproj.project_(rows[0], *rows[1:])
        gradproj.project_(rows[0], *rows[1:], known=info.gram[1:, 1:])
        gradproj.gram(*rows)
        gradproj.gram(*rows, known=info.gram[1:, 1:])
        gradproj.combine_(rows[0], rows[1:], torch.ones(4))
    assert [s[:2] for s in seen] == [("all_reduce", 10), ("all_reduce", 4), ("all_reduce", 10), ("all_reduce", 4)], seen
    assert all(dtype == torch.float64 for _, _, dtype in seen)
    assert mode.get_total_counts() == len(seen), mode.get_comm_counts()


def wrapper_counts(rank: int, world: int) -> None:
    """One collective a step, also where ranks disagree on which gradients there are: a kept Gram must not change that."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = gradproj.ProjectedOptimizer(
        torch.optim.SGD(parameters, lr=0.1), directions=3, group=dist.group.WORLD, plain="sharded"
    )
    for step in range(4):
        with opt.protect():
            sum((p * torch.arange(3.0)).sum() * (step + 1 + i) for i, p in enumerate(parameters)).backward()
        for _ in range(2):
            used = parameters if rank or step % 2 else parameters[:1]
            sum(p.square().sum() for p in used).backward()
            with collectives() as seen:
                opt.step()
            k = len(opt.projector)
            assert [s[:2] for s in seen] == [("all_reduce", (k + 1) * (k + 2) // 2)], seen
            opt.zero_grad()


def empty_rank(rank: int, world: int) -> list[float]:
    """The last rank owns nothing, not even a list entry; without its call the others would wait for ever."""
    owns = rank < world - 1
    g, d = ([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]) if owns else ([], [])
    info = gradproj.project_(g, d, group=dist.group.WORLD, plain="sharded")
    none = gradproj.project_([None], [torch.ones(2) if rank else None], group=dist.group.WORLD, plain="sharded")
    assert none.gram.abs().sum() == 0 and not none.applied and none.backend == "none"
    assert info.backend == ("cpu" if owns else "none")
    total = gradproj.gram(g, d, group=dist.group.WORLD, plain="sharded")
    assert total[0, 1].abs() <= 1e-6
    return [*info.gram.flatten().tolist(), *info.weights.tolist()]


def wrapper_on_empty_rank(rank: int, world: int) -> tuple[float, ...]:
    """FSDP1 and ZeRO leave ranks whose parameters have no elements and no gradients: they protect and step like all others."""
    owns = rank < world - 1
    parameter = torch.nn.Parameter(torch.zeros(2 if owns else 0))
    inner = torch.optim.SGD([parameter], lr=1.0)
    opt = gradproj.ProjectedOptimizer(inner, directions=2, group=dist.group.WORLD, plain="sharded")
    for direction in ([1.0, 0.0], [2.0, 1.0]):
        with opt.protect():
            if owns:
                parameter.grad = torch.tensor(direction) * (rank + 1)
    parameter.grad = torch.tensor([1.0, 2.0]) if owns else None
    opt.step()
    assert opt.last.applied and opt.last.backend == ("cpu" if owns else "none")
    return tuple(opt.last.gram.flatten().tolist())


def disagreeing_shards(rank: int, world: int) -> list[float]:
    """Shard-local inner products of either sign: decided locally, some ranks would project and others not."""
    g, d = [torch.tensor([1.0])], [torch.tensor([-5.0 if rank == 0 else 1.0])]
    info = gradproj.project_(g, d, method="conflict", group=dist.group.WORLD, plain="sharded")
    assert info.applied == (world < 6)
    helpful = [torch.tensor([1.0])]
    info_helpful = gradproj.project_(
        helpful,
        [torch.tensor([-0.5 if rank == 0 else 1.0])],
        method="conflict",
        group=dist.group.WORLD,
        plain="sharded",
    )
    assert not info_helpful.applied and helpful[0].item() == 1.0
    return [g[0].item(), *info.weights.tolist(), *info.gram.flatten().tolist()]


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
    """In place on a Partial gradient: it stays Partial, its first rank carries the sum."""
    mesh = init_device_mesh("cpu", (world,))
    for operation in ("sum", "avg"):
        local = torch.tensor([1.0 + rank, 2.0])
        g = DTensor.from_local(local, mesh, [Partial(operation)], run_check=False)
        whole = g.full_tensor().clone()
        d = torch.tensor([1.0, 0.0])
        version = g._version
        gradproj.project_([g], [distribute_tensor(d, mesh, [Replicate()], src_data_rank=None)])
        assert g.placements == (Partial(operation),) and g._version > version
        torch.testing.assert_close(g.full_tensor(), whole - whole * d)
        carries = rank == 0 or operation == "avg"
        torch.testing.assert_close(local, whole - whole * d if carries else torch.zeros(2))
    widest = DTensor.from_local(torch.ones(2), mesh, [Partial("max")], run_check=False)
    try:
        gradproj.project_([widest], [widest])
    except NotImplementedError as error:
        assert "grads[0]" in str(error) and "redistribute" in str(error), error
    else:
        raise AssertionError("a max cannot be written back")


def smaller_groups(rank: int, world: int) -> None:
    """Groups and meshes of different ranks: weights count the ranks of the group only."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    g, d = torch.randn(5), torch.randn(5)
    expected = reference.oracle_gram([g], [d])

    def on(placements, where=mesh):
        return [[distribute_tensor(t, where, placements, src_data_rank=None)] for t in (g, d)]

    hsdp = [Replicate(), Shard(0)]
    for group in (dist.group.WORLD, mesh.get_group("shard")):  # one group has two copies of each element, the other one
        np.testing.assert_allclose(gradproj.gram(*on(hsdp), group=group).numpy(), expected, rtol=1e-6)
    inner = on([Shard(0)], mesh["shard"])  # nothing says that the two rows of the mesh hold copies
    np.testing.assert_allclose(gradproj.gram(*inner, group=mesh.get_group("shard")).numpy(), expected, rtol=1e-6)
    for plain, times in (("replicated", 1), ("sharded", 2)):
        total = gradproj.gram(*inner, group=dist.group.WORLD, plain=plain)
        np.testing.assert_allclose(total.numpy(), times * expected, rtol=1e-6)
    for arguments, words in (
        ({}, "2 of 4 ranks"),
        ({"group": dist.group.WORLD}, "with 2 of the 4 ranks of the group"),
    ):
        try:
            gradproj.gram(*inner, **arguments)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"ambiguous, but taken: {arguments}")
    try:
        gradproj.gram(*on(hsdp), group=mesh.get_group("replicate"))
    except ValueError as error:
        assert "rows[0][0] has shards on ranks" in str(error), error
    else:
        raise AssertionError("half of the shards are outside of the group")


def without_float64(rank: int, world: int) -> None:
    """A device whose collectives have no float64: the numbers' bits travel, in one collective, and nothing is lost."""
    original = distributed._carries_float64
    distributed._carries_float64 = lambda device: False
    try:
        numbers = torch.tensor([1e300, -1e-300, 1 / 3], dtype=torch.float64) * (rank + 1)
        with collectives() as seen:
            total = distributed.all_reduce(numbers, dist.group.WORLD)
        assert seen == [("all_gather_into_tensor", 6, torch.int32)], seen
        factor = world * (world + 1) / 2
        torch.testing.assert_close(total, numbers / (rank + 1) * factor, rtol=1e-15, atol=0)
        assert not distributed.all_reduce(torch.tensor([float("inf")]).double(), dist.group.WORLD).isfinite()
    finally:
        distributed._carries_float64 = original


# --- FSDP2 --------------------------------------------------------------------------------------------------------------


def merged_segments(rank: int, world: int) -> tuple[int, int]:
    """(buffers, segments): FSDP2 lays the gradients of a group side by side, and a kernel walks them as one segment."""
    from gradproj.triton_kernels import table

    model, part, _ = models.fsdp2(rank, world)
    rows = []
    for kind in (0, 1):
        models.loss(model(part(models.batch(0, kind))), kind).backward()
        rows.append([p.grad.to_local() for p in model.parameters()])
        model.zero_grad()
    walked = table.Rows([*rows[0], *rows[1]], 2, None, None, (), 0, False).walk((0, 1))
    return len(rows[0]), sum(launch.table.shape[0] for launch in walked.launches)


def micro_batches(rank: int, world: int, way: str) -> None:
    """Gradients of several micro-batches add up, if the last one of each objective is reduced."""
    model, part, arguments = models.WAYS[way](rank, world)
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **arguments)

    def backward(x, synchronise):
        if way == "ddp":
            with contextlib.nullcontext() if synchronise else model.no_sync():
                models.loss(model(x), 1).backward()
        else:
            model.set_requires_gradient_sync(synchronise)
            models.loss(model(x), 1).backward()

    x = part(models.batch(0, 1))
    if way == "fsdp2":  # what was not reduced is not in p.grad at all
        try:
            with opt.protect():
                backward(x, False)
        except RuntimeError as error:
            assert "no parameter of the optimizer received a gradient" in str(error), error
        else:
            raise AssertionError("protected nothing")
        model.set_requires_gradient_sync(True)
        models.loss(model(x), 1).backward()  # brings out what had been kept back
        opt.zero_grad()
    with opt.protect():
        backward(x, False)
        backward(x, True)
    (taken,) = opt.projector._directions._stored
    taken = [taken[p] for p in model.parameters()]
    before = [models.whole(t) for t in taken]
    whole = models.build()
    models.loss(whole(models.batch(0, 1)), 1).backward()
    assert distance(before, [2 * p.grad for p in whole.parameters()]) <= TOLERANCE
    backward(part(models.batch(1, 1)), True)  # p.grad was moved out: a later backward pass does not write it
    assert all(torch.equal(models.whole(t), b) for t, b in zip(taken, before, strict=True))


# --- checkpoints --------------------------------------------------------------------------------------------------------


def save(rank: int, world: int, way: str, folder: str, save_directions: bool) -> tuple[list, list]:
    """Train, save with torch.distributed.checkpoint, train on: the directions when saved, and the parameters at the end."""
    model, part, opt = _resumable(rank, world, way, save_directions)
    _steps(model, part, opt, range(3))
    model_state, optimizer_state = get_state_dict(model, opt)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    saved = _whole_directions(model, opt)
    _steps(model, part, opt, range(3, 5))
    return saved, [models.whole(p) for p in model.parameters()]


def load(rank: int, world: int, way: str, folder: str, directions: int) -> tuple[list, list]:
    """A fresh model and optimizer on another number of ranks; the same as :func:`save` returned."""
    model, part, opt = _resumable(rank, world, way, True)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    for _ in range(directions):  # a checkpoint is read into what is there: room for each direction
        with opt.protect():
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
    model_state, optimizer_state = get_state_dict(model, opt)
    checkpoint.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=model_state, optim_state_dict=optimizer_state)
    loaded = _whole_directions(model, opt)
    if not directions:  # an old checkpoint: protect anew
        _protect(model, part, opt, 2)
    _steps(model, part, opt, range(3, 5))
    return loaded, [models.whole(p) for p in model.parameters()]


def _resumable(rank, world, way, save_directions):
    model, part, arguments = models.WAYS[way](rank, world)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    opt = gradproj.ProjectedOptimizer(
        inner, method="conflict", directions=2, save_directions=save_directions, **arguments
    )
    return model, part, opt


def _protect(model, part, opt, step):
    with opt.protect():
        models.loss(model(part(models.batch(step, 1))), 1).backward()


def _steps(model, part, opt, steps):
    for step in steps:
        if step < 3:
            _protect(model, part, opt, step)
        models.loss(model(part(models.batch(step, 0))), 0).backward()
        opt.step()
        opt.zero_grad()


def _whole_directions(model, opt):
    stored = opt.projector._directions._stored
    return [[models.whole(direction[p]) for p in model.parameters()] for direction in stored]
