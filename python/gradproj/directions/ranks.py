"""Whether data-parallel ranks protect the same: compared once, without a collective.

A backward pass inside ``protect()`` that goes around DDP leaves every rank its own gradient: the ranks then project
differently, and their parameters drift apart silently. Each rank leaves a few numbers of its first direction in the
process group's store, and looks there at its first step: DDP's backward pass in between has waited for all ranks.

Directions may differ for good reasons: pipeline stages, ZeRO's partitions, local SGD, independent runs in one group.
All of these step gradients that differ too. So ranks that protect different directions show each other their gradients,
and only those that step the same gradient are wrong.
"""

import time
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradproj.directions.step_memory import is_capturing
from gradproj.rows.dtensors import PLAIN_TYPES
from gradproj.rows.sharding import Sharding, is_distributed

# A reduced gradient is the same to the last bit, unless ranks have devices of two kinds; a rank's own differs by more.
_TOLERANCE = 1e-4
_PATIENCE_S = 10.0  # seconds to wait for the gradients of a rank that protects something else
_NUMBERS = 16


class RanksAgree:
    """One comparison: of the first direction, among ranks that hold the same parameters."""

    def __init__(self) -> None:
        self._told = False
        self._key = ""  # of the comparison in the store, until it is made
        self._other = ""  # a rank that protects another direction

    def tell(self, parameters: Sequence[Tensor], direction: dict[Tensor, Tensor], sharding: Sharding | None) -> None:
        """Leave numbers of this rank's ``direction``, the first time that there is one."""
        if self._told or not direction:
            return
        self._told = True
        group, placement, _ = sharding or Sharding()
        parameters = [p for p in parameters if p.requires_grad]
        if placement == "shard" or not is_distributed() or dist.get_world_size(group) < 2 or is_capturing():
            return
        if dist.get_backend(group) == "fake" or _store() is None or not {*map(type, parameters)} <= PLAIN_TYPES:
            return
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        key = f"gradproj/protect/{zlib.crc32(f'{ranks} {_numbers(parameters)}'.encode())}"
        # Runs of one program may begin with the same parameters.
        self._key = f"{key}/{_store().add(f'{key}/begun/{dist.get_rank()}', 1)}"
        mine = _numbers([direction.get(p) for p in parameters])
        first, theirs = _store().compare_set(self._key, "", f"{dist.get_rank()} {mine}").decode().split(" ", 1)
        if not _alike(mine, theirs):
            self._other = first
            _store().set(f"{self._key}/other", str(dist.get_rank()))

    def check(self, parameters: Sequence[Tensor]) -> None:
        """At the first step: RuntimeError if a rank has the same parameters and gradients, and another direction."""
        if not self._key or is_capturing():
            return
        key, self._key = self._key, ""
        # Reading gradients waits for their reduction, to which every rank comes after it has told.
        mine = _numbers([p.grad for p in parameters])
        if not self._other and _store().check([f"{key}/other"]):
            self._other = _store().get(f"{key}/other").decode()
        if not self._other:
            return
        _store().set(f"{key}/step/{dist.get_rank()}", mine)
        theirs = _wait_for(f"{key}/step/{self._other}")
        if theirs and _alike(mine, theirs):
            raise RuntimeError(
                f"ranks {dist.get_rank()} and {self._other} step the same gradients but protect different directions, "
                f"and would drift apart: the backward pass inside protect() did not go through DDP, so it was not "
                f"reduced. Call the wrapped model there (in a Trainer's callback trainer.model_wrapped, not the model "
                f"that it is given)"
            )


def _store():
    return dist.distributed_c10d._get_default_store()


def _wait_for(key: str) -> str:
    """Not ``store.wait()``, which writes to stderr when it times out."""
    end = time.monotonic() + _PATIENCE_S
    while not _store().check([key]):
        if time.monotonic() > end:
            return ""
        time.sleep(0.01)
    return _store().get(key).decode()


def _numbers(tensors: Sequence[Tensor | None]) -> str:
    """The tensors' lengths, added up in a few places. Reads N bytes once; None is 0. Sums would be 0 for some."""
    there = [(i, t) for i, t in enumerate(tensors) if t is not None]
    folded = [0.0] * _NUMBERS
    if there:
        device = there[0][1].device
        lengths = torch.stack([torch.linalg.vector_norm(t.detach()).float().to(device) for _, t in there]).tolist()
        for (i, _), length in zip(there, lengths, strict=True):
            folded[i % _NUMBERS] += length
    return " ".join(map(repr, folded))


def _alike(mine: str, theirs: str) -> bool:
    """What is not finite is alike: such a direction is dropped."""
    a, b = ([float(x) for x in text.split()] for text in (mine, theirs))
    return not any(abs(x - y) > _TOLERANCE * sum(b) for x, y in zip(a, b, strict=True))
