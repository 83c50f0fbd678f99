"""One small network, the ways to spread it over ranks, and the training run that all of them must reproduce."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradproj

WIDTH = 8
SEQUENCE = 4
BATCH = 8  # divisible by every number of ranks: the mean over it is the mean of the ranks' means


class Net(nn.Module):
    """Shapes that four ranks split unevenly, and one that leaves ranks without a share."""

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


class Spread(NamedTuple):
    """A model on this rank's share: its part of a batch, and how its buffers lie."""

    model: nn.Module
    part: Callable[[Tensor], Tensor]
    arguments: dict


def _rows(x: Tensor, ranks: int, rank: int) -> Tensor:
    return x.chunk(ranks)[rank]


def alone(rank: int, world: int) -> Spread:
    return Spread(build(), lambda x: x, {})


def ddp(rank: int, world: int) -> Spread:
    model = nn.parallel.DistributedDataParallel(build())
    return Spread(model, lambda x: _rows(x, world, rank), {"group": dist.group.WORLD, "plain": "replicated"})


def fsdp2(rank: int, world: int) -> Spread:
    model, mesh = build(), init_device_mesh("cpu", (world,))
    for module in (model.up, model.down, model.head):
        fully_shard(module, mesh=mesh)
    return Spread(fully_shard(model, mesh=mesh), lambda x: _rows(x, world, rank), {})


def hsdp(rank: int, world: int) -> Spread:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    model = build()
    fully_shard(model.up, mesh=mesh)
    return Spread(fully_shard(model, mesh=mesh), lambda x: _rows(x, world, rank), {})


def _parallelize(model: Net, mesh) -> Net:
    """Sequence parallel norm (its gradients are Partial), a column- and a row-parallel layer; head and scale stay plain."""
    sequence = Shard(1)
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=sequence),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model.norm, mesh, PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=sequence))
    return parallelize_module(model, mesh, plan)


def tp(rank: int, world: int) -> Spread:
    model = _parallelize(build(), init_device_mesh("cpu", (world,)))
    return Spread(model, lambda x: x, {"group": dist.group.WORLD, "plain": "replicated"})


def fsdp2_tp(rank: int, world: int) -> Spread:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = _parallelize(build(), mesh["tp"])
    fully_shard(model.up, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return Spread(model, lambda x: _rows(x, 2, mesh.get_local_rank("dp")), {"plain": "replicated"})


WAYS = {w.__name__: w for w in (ddp, fsdp2, hsdp, tp, fsdp2_tp)}


def train(spread: Spread, method, steps: int = 5, directions: int = 2) -> list[list[Tensor]]:
    """Projected gradients of every step (in gradient space), and the parameters at the end, as whole tensors."""
    model, part, arguments = spread
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    opt = gradproj.ProjectedOptimizer(optimizer, method=method, directions=directions, **arguments)
    history = []
    for step in range(steps):
        if step % 2 == 0:
            with opt.protect():
                loss(model(part(batch(step, 1))), 1).backward()
        loss(model(part(batch(step, 0))), 0).backward()
        if opt.projector.space == "gradient":
            opt.project()
            history.append([whole(p.grad) for p in parameters])
        opt.step()
        opt.zero_grad()
    return [*history, [whole(p) for p in parameters]]
