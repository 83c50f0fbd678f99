"""What ranks do together with a NullSpace. A pool runs every function as function(rank, world, ..) on all ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distributed import models
from distributed.checks import collectives, distance
from gradproj import NullSpace, ProjectedOptimizer

SETTINGS = {
    "ddp": {},
    "fsdp2": {},
    "hsdp": {},
    "tp": {"modules": lambda name, _: name in ("up", "head")},  # sharded over outputs; and not at all
}


def train(run: models.Run, steps: int = 10, **settings) -> tuple[list, list]:
    """Parameters after so many steps, and the collectives of the steps alone."""
    protection = NullSpace(run.model, share=0.3, **settings)
    with protection.capture():
        for step in range(3):
            run.backward(step, 1)
    groups = protection.param_groups(lr=0.05, damping=0.1)
    opt = ProjectedOptimizer(torch.optim.SGD(groups, momentum=0.9), protection, sharding=run.sharding)
    seen: list = []
    for step in range(steps):
        run.backward(step, 0)
        with collectives() as sent:
            opt.step()
        seen += sent
        opt.zero_grad()
    assert (opt.last.moved > 0).any()  # a rank may have no rows of a layer
    return [models.whole(p) for p in run.model.parameters()], seen


def train_alone(way: str) -> list:
    return train(models.Run(models.build(), lambda x: x), **SETTINGS[way])[0]


def training(rank: int, world: int, way: str, expected: list) -> None:
    actual, seen = train(models.WAYS[way](rank, world), **SETTINGS[way])
    assert seen == []
    assert distance(actual, expected) <= 1e-5


def refused(rank: int, world: int) -> None:
    run = models.tp(rank, world)
    protection = NullSpace(run.model)  # "down" is sharded over its inputs
    with (
        pytest.raises(NotImplementedError, match="the weight of down is .*sharded over its inputs"),
        protection.capture(),
    ):
        run.backward(0, 1)
    assert len(protection) == 0
    with pytest.raises(NotImplementedError, match="FSDP1.*fully_shard"):
        NullSpace(models.fsdp1(rank, world).model)


def file(rank: int, world: int, path: str, expected: dict) -> None:
    """Bases of all rows travel: written by shards, read by a single process, and back."""
    run = models.fsdp2(rank, world)
    protection = NullSpace(run.model, share=0.3)
    with protection.capture():
        run.backward(0, 1)
    if rank == 0:
        protection.save(path)
    else:
        protection.save(f"{path}.{rank}")
    again = NullSpace.load(path if rank == 0 else f"{path}.{rank}", models.fsdp2(rank, world).model)
    for name, basis in protection.bases.items():
        assert torch.equal(basis.vectors, again.bases[name].vectors)
        assert torch.equal(basis.target, again.bases[name].target)
        assert basis.rank == expected[name]


class Experts(nn.Module):
    """Three experts, called in any order; each is two matrices on one input, and one after them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3)) for _ in range(3))

    def forward(self, x, use):
        return sum(self.down[e](torch.sigmoid(self.gate[e](x)) * self.up[e](x)) for e in use)


ORDERS = [(0, 1), (1, 0), (2, 1), (1,)]  # of each rank


def _experts_batch(rank: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(rank))


def _capture_experts(protection: NullSpace, model: nn.Module, ranks) -> dict:
    """Per layer: its rank, what it spans, its target on that, and how many tokens it has seen."""
    with protection.capture():
        for rank in ranks:
            model(_experts_batch(rank), ORDERS[rank]).square().sum().backward()
    return {
        name: (basis.rank, basis.vectors @ basis.vectors.T, basis.target @ basis.vectors.T, basis.tokens)
        for name, basis in protection.bases.items()
    }


def experts_alone(world: int) -> dict:
    model = Experts()
    return _capture_experts(NullSpace(model, share=0.5), model, range(world))


def experts(rank: int, world: int, expected: dict) -> None:
    """Moments were numbered by first calls: bases were off by a half, and all hung if a rank never called an expert."""
    model = DistributedDataParallel(Experts(), find_unused_parameters=True)
    protection = NullSpace(model, share=0.5)
    found = _capture_experts(protection, model, [rank])
    assert found.keys() == expected.keys()
    for name, (kept, *tensors, tokens) in expected.items():
        assert found[name][0] == kept and found[name][3] == tokens
        for mine, theirs in zip(found[name][1:3], tensors, strict=True):
            assert (mine - theirs).abs().max() < 1e-5
    for e in range(3):  # those of one input still share their memory
        memory = {protection.bases[f"{kind}.{e}"].vectors.untyped_storage().data_ptr() for kind in ("gate", "up")}
        assert len(memory) == 1
    assert protection.coverage.unused == (0 if world == 4 else 108)


def _capture_parting(protection: NullSpace, model: nn.Module, ranks) -> dict:
    """Two layers on one input; those of the first rank part within the same forward pass."""
    one, other = model["one"], model["other"]
    with protection.capture():
        for rank in ranks:
            x = _experts_batch(rank)
            y = (one(x) * other(x)).sum()
            (y if rank else y + one(_experts_batch(9)).square().sum()).backward()
    return {name: (basis.curvature.values, basis.tokens) for name, basis in protection.bases.items()}


def _two_layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(6, 6, bias=False) for name in ("one", "other")})


def parting_alone(world: int) -> dict:
    model = _two_layers()
    return _capture_parting(NullSpace(model, share=0.9), model, range(world))


def parting(rank: int, world: int, expected: dict) -> None:
    model = _two_layers()
    found = _capture_parting(NullSpace(model, share=0.9, group=dist.group.WORLD), model, [rank])
    for name, (values, tokens) in expected.items():
        assert found[name][1] == tokens == 5 * (world + (name == "one"))
        torch.testing.assert_close(found[name][0], values, rtol=1e-5, atol=1e-6)


def several_biases(rank: int, world: int) -> None:
    """One rank multiplies with the bias, the others without: refused on all of them."""
    model = nn.Linear(6, 6)
    with pytest.raises(NotImplementedError, match="with a bias and without it"):
        protection = NullSpace(model, group=dist.group.WORLD)
        with protection.capture():
            x = _experts_batch(rank)
            (model(x) if rank == 0 else F.linear(x, model.weight)).square().sum().backward()
    assert len(protection) == 0


def adapted_embedding(rank: int, world: int, way: str) -> None:
    """Ranks capture other tokens; what any of them has captured stays on all of them."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 5))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    shown = [torch.tensor([[1, 2, 3], [3, 5, 1]]), torch.tensor([[2, 7, 9], [11, 5, 5]])]
    others = torch.tensor([0, 4, 6])
    before, free = model(torch.cat(shown)).detach(), model(others).detach()
    run = DistributedDataParallel(model) if way == "ddp" else fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    protection = NullSpace(model, share=0.6)
    with protection.capture():
        run(shown[rank]).square().sum().backward()
    assert sum("lora_embedding_A" in name for name in protection.bases) == 7
    opt = ProjectedOptimizer(torch.optim.AdamW(protection.param_groups(lr=0.05)), protection)
    for _ in range(5):
        opt.zero_grad()
        (run(torch.arange(20)) - 1).square().mean().backward()
        opt.step()
    assert (run(torch.cat(shown)) - before).abs().max() < 1e-4
    assert (run(others) - free).abs().max() > 1e-2


class StackedExperts(nn.Module):
    """Four experts as slices of two parameters, of which a rank's tokens reach some."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 6, 8) / 3)
        self.down = nn.Parameter(torch.randn(4, 6, 8) / 3)  # [outputs, inputs]
        self.bias = nn.Parameter(torch.zeros(4, 6))

    def forward(self, x, use):
        return sum(F.linear(torch.tanh(x @ self.up[e]), self.down[e], self.bias[e]) for e in use)


def _train_stacked(model: nn.Module, ranks, path: str = "") -> tuple[dict, list]:
    """Ranks and targets' norms by matrix, and the parameters after some steps."""
    protection = NullSpace(model, share=0.4)
    with protection.capture():
        for rank in ranks:
            (model(_experts_batch(rank)[:2], ORDERS[rank]).square().sum() / len(ranks)).backward()
    if path:
        protection.save(path)
        protection = NullSpace.load(path, model)
    opt = ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), protection)
    for step in range(5):
        opt.zero_grad()
        for rank in ranks:
            ((model(_experts_batch(10 + 4 * step + rank), (0, 1, 2, 3)) - 1).square().mean() / len(ranks)).backward()
        opt.step()
    kept = {name: (basis.rank, basis.tokens) for name, basis in protection.bases.items()}
    return kept, [models.whole(p) for p in model.parameters()]


def stacked_alone(world: int) -> tuple[dict, list]:
    return _train_stacked(StackedExperts(), range(world))


def stacked_experts(rank: int, world: int, path: str, expected: tuple) -> None:
    """Under FSDP2 each rank has whole experts; routing differs between ranks."""
    model = StackedExperts()
    fully_shard(model)
    kept, parameters = _train_stacked(model, [rank], f"{path}.{rank}")
    assert kept == expected[0]
    assert distance(parameters, expected[1]) <= 1e-5


def runs_apart(rank: int, world: int) -> None:
    """Independent runs and pipeline stages in one job were mixed: now each says which ranks it is of."""
    half = world // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, world)))]
    mine, first = groups[rank // half], rank // half * half
    width = 6 + rank // half  # two different models
    torch.manual_seed(rank // half)
    model = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    alone = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
    alone.load_state_dict(model.state_dict())

    def capture(model, ranks, group):
        protection = NullSpace(model, share=0.4, group=group)
        with protection.capture():
            for r in ranks:
                model(torch.randn(4, width, generator=torch.Generator().manual_seed(r))).square().sum().backward()
        return protection.bases

    with pytest.raises(RuntimeError, match=r"nothing says which of them hold this model.*group="):
        capture(model, [rank], None)
    with pytest.raises(RuntimeError, match=r"the ranks .* have different layers.*group="):
        capture(model, [rank], dist.group.WORLD)
    found = capture(model, [rank], mine)
    expected = capture(alone, range(first, first + half), dist.new_group([rank], use_local_synchronization=True))
    for name, basis in expected.items():
        assert found[name].rank == basis.rank and found[name].tokens == 4 * half
        assert (found[name].vectors @ found[name].vectors.T - basis.vectors @ basis.vectors.T).abs().max() < 1e-5

    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("pp", "dp"))["dp"]
    fully_shard(model, mesh=mesh)
    sharded = capture(model, [rank], None)
    for name, basis in expected.items():
        assert (sharded[name].vectors @ sharded[name].vectors.T - basis.vectors @ basis.vectors.T).abs().max() < 1e-5


def conv1d(width: int = 4):
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    return nn.Sequential(conv(8, width), nn.Tanh(), conv(4, 8))


def train_conv1d(model: nn.Module, part, path: str = "") -> list:
    protection = NullSpace(model, share=0.4)
    rng = torch.Generator().manual_seed(0)
    with protection.capture():
        model(part(torch.randn(8, 4, generator=rng))).square().mean().backward()
    if path:
        protection.save(path)
        again = NullSpace.load(path, model)
        for name, basis in protection.bases.items():
            assert torch.equal(basis.target, again.bases[name].target)
        protection = again
    opt = ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), protection)
    for _ in range(5):
        opt.zero_grad()
        (model(part(torch.randn(8, 4, generator=rng))) - 1).square().mean().backward()
        opt.step()
    return [models.whole(p) for p in model.parameters()]


def conv1d_over_outputs(rank: int, world: int, path: str, expected: list) -> None:
    """Conv1D's outputs are its weight's columns, its target's rows: B was gathered along the rank."""
    model = conv1d()
    fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    assert distance(train_conv1d(model, lambda x: x.chunk(world)[rank], f"{path}.{rank}"), expected) <= 1e-5


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        penalty = self.layer.weight.sin().sum()
        return torch.tanh(self.layer(x)) + 0.1 * (penalty.full_tensor() if isinstance(penalty, DTensor) else penalty)


def proof(rank: int, world: int, way: str) -> None:
    """Each rank's own gradient, before it is reduced, is looked at."""
    model: nn.Module = Penalty()
    if way == "tp":
        parallelize_module(model.layer, init_device_mesh("cpu", (world,)), ColwiseParallel(output_layouts=Replicate()))
    else:
        model = DistributedDataParallel(model) if way == "ddp" else fully_shard(model)
    with pytest.raises(RuntimeError, match=r"the gradient of layer.weight.*used elsewise"), NullSpace(model).capture():
        model(_experts_batch(rank)).square().sum().backward()
