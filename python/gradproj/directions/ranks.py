"""Whether data-parallel ranks protect the same: compared once, without a collective.

A backward pass inside ``protect()`` that goes around DDP leaves every rank its own gradient: the ranks then project
differently, and their parameters drift apart without a word. Each rank leaves a few numbers of its direction in the
process group's store when it first protects, and looks there when it first steps: DDP's backward pass in between has
brought all ranks that far.

Directions may differ for good reasons: pipeline stages, ZeRO's partitions, local SGD, independent runs in one group.
All of these step gradients that differ too. So ranks that protect different directions show each other their gradients,
and only those that step the same gradient are wrong.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradproj.rows.dtensors import PLAIN_TYPES
from gradproj.rows.sharding import Sharding

# A reduced gradient is the same to the last bit, unless devices of two kinds have worked on it since; one rank's own
# gradient is off by far more.
_TOLERANCE = 1e-4
_PATIENCE_S = 10.0  # for the gradients of a rank that has protected something else
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
        if placement == "shard" or not _has_replicas(parameters, group):
            return
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        key = f"gradproj/protect/{hash((*ranks, *_numbers(parameters)))}"
        # Runs of one program may begin with the same parameters.
        self._key = f"{key}/{_store().add(f'{key}/begun/{dist.get_rank()}', 1)}"
        mine = _text(_numbers([direction.get(p) for p in parameters]))
        first, theirs = _store().compare_set(self._key, "", f"{dist.get_rank()} {mine}").decode().split(" ", 1)
        if not _alike(mine, theirs):
            self._other = first
            _store().set(f"{self._key}/other", str(dist.get_rank()))

    def check(self, parameters: Sequence[Tensor]) -> None:
        """To call with the first gradients that are about to be stepped.

        Raises:
            RuntimeError: a rank has the same parameters and the same gradients, and another direction.
        """
        if not self._key or _capturing():
            return
        key, self._key = self._key, ""
        # Reading gradients waits for their reduction, to which every rank comes after it has told.
        mine = _text(_numbers([p.grad for p in parameters]))
        if not self._other and _store().check([f"{key}/other"]):
            self._other = _store().get(f"{key}/other").decode()
        if not self._other:
            return
        _store().set(f"{key}/step/{dist.get_rank()}", mine)
        theirs = _wait_for(f"{key}/step/{self._other}")
        if theirs is not None and _alike(mine, theirs):
            raise RuntimeError(
                f"ranks {dist.get_rank()} and {self._other} step the same gradients but protect different directions, and would "
                f"drift apart: the backward pass inside protect() did not go through DDP, so it was not reduced. Call the wrapped "
                f"model there (in a Trainer's callback trainer.model_wrapped, not the model that it is given)"
            )


def _has_replicas(parameters: Sequence[Tensor], group) -> bool:
    """Whether other ranks of the group may hold the same parameters, and can be asked."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) < 2:
        return False
    if dist.get_backend(group) == "fake" or _store() is None or _capturing():
        return False
    return all(type(p) in PLAIN_TYPES for p in parameters)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, so that nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _store():
    return dist.distributed_c10d._get_default_store()


def _wait_for(key: str) -> str | None:
    end = time.monotonic() + _PATIENCE_S
    while not _store().check([key]):
        if time.monotonic() > end:
            return None
        time.sleep(0.01)
    return _store().get(key).decode()


def _numbers(tensors: Sequence[Tensor | None]) -> list[float]:
    """The tensors' lengths, folded. Reads N bytes once; None is 0. Not sums, which are 0 for some gradients."""
    there = [(i, t) for i, t in enumerate(tensors) if t is not None]
    folded = [0.0] * _NUMBERS
    if there:
        device = there[0][1].device
        lengths = torch.stack([torch.linalg.vector_norm(t.detach()).float().to(device) for _, t in there]).tolist()
        for (i, _), length in zip(there, lengths, strict=True):
            folded[i % _NUMBERS] += length
    return folded


def _text(numbers: list[float]) -> str:
    return " ".join(map(repr, numbers))


def _alike(mine: str, theirs: str) -> bool:
    """What is not finite is alike: such a direction is dropped."""
    a, b = ([float(x) for x in text.split()] for text in (mine, theirs))
    return not any(abs(x - y) > _TOLERANCE * sum(b) for x, y in zip(a, b, strict=True))
