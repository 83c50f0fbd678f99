"""One small network, the ways to distribute it over ranks, and the training run that all of them must reproduce."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from gradproj import Directions, ProjectedOptimizer, Sharding

WIDTH = 8
SEQUENCE = 4
BATCH = 8  # divisible by every number of ranks: the mean over it is the mean of the ranks' means


class Net(nn.Module):
    """Shapes that four ranks split unevenly, and one that leaves ranks without elements."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.scale = nn.Parameter(torch.ones(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(h) * self.scale.sum(0)


def build() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int, kind: int) -> Tensor:
    """[BATCH, SEQUENCE, WIDTH]: the same on every rank."""
    return torch.randn(BATCH, SEQUENCE, WIDTH, generator=torch.Generator().manual_seed(10 * step + kind))


def loss(y: Tensor, kind: int) -> Tensor:
    """Two objectives that disagree."""
    return (y - 1).square().mean() if kind else (y + 1).abs().mean()


def whole(t: Tensor) -> Tensor:
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


class Run(NamedTuple):
    """A model on this rank: its part of a batch, and what the other ranks hold."""

    model: nn.Module
    part: Callable[[Tensor], Tensor]
    sharding: Sharding | None = None

    def backward(self, step: int, kind: int) -> None:
        loss(self.model(self.part(batch(step, kind))), kind).backward()


def _chunk(ranks: int, rank: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.chunk(ranks)[rank]


def ddp(rank: int, world: int) -> Run:
    return Run(nn.parallel.DistributedDataParallel(build()), _chunk(world, rank))


def ddp_bucket_view(rank: int, world: int) -> Run:
    """Its next backward pass writes into the memory of the last one's gradients. A group is not needed, and allowed."""
    model = nn.parallel.DistributedDataParallel(build(), gradient_as_bucket_view=True)
    return Run(model, _chunk(world, rank), Sharding(dist.group.WORLD, "replicate"))


def fsdp1(rank: int, world: int) -> Run:
    """Every rank has flat parts of some parameters, and nothing of others."""
    model = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    return Run(model, _chunk(world, rank), Sharding(dist.group.WORLD, "shard"))


def fsdp2(rank: int, world: int) -> Run:
    model, mesh = build(), init_device_mesh("cpu", (world,))
    for module in (model.up, model.down, model.head):
        fully_shard(module, mesh=mesh)
    return Run(fully_shard(model, mesh=mesh), _chunk(world, rank))


def hsdp(rank: int, world: int) -> Run:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    model = build()
    fully_shard(model.up, mesh=mesh)
    return Run(fully_shard(model, mesh=mesh), _chunk(world, rank))


def _parallelize(model: Net, mesh) -> Net:
    """A sequence-parallel norm (Partial gradients), a column- and a row-parallel layer; head and scale stay plain."""
    sequence = Shard(1)
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=sequence),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model.norm, mesh, PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=sequence))
    return parallelize_module(model, mesh, plan)


def tp(rank: int, world: int) -> Run:
    model = _parallelize(build(), init_device_mesh("cpu", (world,)))
    return Run(model, lambda x: x, Sharding(dist.group.WORLD, "replicate"))


def fsdp2_tp(rank: int, world: int) -> Run:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = _parallelize(build(), mesh["tp"])
    fully_shard(model.up, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return Run(model, _chunk(2, mesh.get_local_rank("dp")), Sharding(placement="replicate"))


WAYS = {w.__name__: w for w in (ddp, ddp_bucket_view, fsdp1, fsdp2, hsdp, tp, fsdp2_tp)}


def train(run: Run, method, steps: int = 5) -> list[list[Tensor]]:
    """Projected gradients of every step, and the parameters at the end, as this rank holds them."""
    parameters = list(run.model.parameters())
    inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    opt = ProjectedOptimizer(inner, Directions(2, method), sharding=run.sharding)
    history = []
    for step in range(steps):
        if step % 2 == 0:
            with opt.protect():
                run.backward(step, 1)
        run.backward(step, 0)
        opt.project()
        history.append([whole(p.grad) for p in parameters if p.grad is not None])
        opt.step()
        opt.zero_grad()
    return [*history, [whole(p) for p in parameters]]


@functools.cache
def train_alone(method) -> list[list[Tensor]]:
    """The run of a single process, which no rank may be: it would be compared with the others."""
    return train(Run(build(), lambda x: x), method)
