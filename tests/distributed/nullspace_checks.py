"""What the ranks of a pool do together with a NullSpace. Every function runs on all ranks; its first arguments are rank and world."""

import pytest
import torch

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
