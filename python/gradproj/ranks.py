"""Whether data-parallel ranks protect the same: compared once, without a collective.

A backward pass inside ``protect()`` that goes around DDP leaves every rank its own gradient: the ranks then project
differently, and their parameters drift apart without a word. Each rank leaves a few numbers in the process group's store when
it first protects, and looks for the others' when it first steps; by then DDP's backward pass has brought all ranks that far.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from gradproj.dtensors import PLAIN_TYPES
from gradproj.sharding import Sharding

_made = 0  # how many comparisons this process has begun: the same on all ranks that run the same program


class RanksAgree:
    """One comparison: of the first direction, where ranks hold the same parameters."""

    def __init__(self) -> None:
        self._told = False
        self._mine: list[str] = []
        self._key = ""
        self._ranks: list[int] = []

    def tell(self, taken: dict[Tensor, Tensor], sharding: Sharding | None) -> None:
        """Leave this rank's numbers, the first time that there are some."""
        if self._told or not taken or not (dist.is_available() and dist.is_initialized()):
            return
        self._told = True
        group, placement, _ = sharding or Sharding()
        plain = all(type(p) in PLAIN_TYPES for p in taken)
        if dist.get_world_size(group) == 1 or not plain or placement == "shard" or _store() is None:
            return
        global _made
        _made += 1
        self._key = f"gradproj/protect/{_made}"
        self._ranks = [r for r in dist.get_process_group_ranks(group or dist.group.WORLD) if r != dist.get_rank()]
        self._mine = [_fingerprint(list(taken)), _fingerprint(list(taken.values()))]
        _store().set(f"{self._key}/{dist.get_rank()}", " ".join(self._mine))

    def check(self) -> None:
        """Compare with the ranks that have told theirs.

        Raises:
            RuntimeError: a rank has the same parameters and another direction.
        """
        if not self._mine:
            return
        mine, self._mine = self._mine, []
        for rank in self._ranks:
            key = f"{self._key}/{rank}"
            if not _store().check([key]):
                continue
            parameters, direction = _store().get(key).decode().split()
            if parameters == mine[0] and direction != mine[1]:
                raise RuntimeError(
                    f"ranks {dist.get_rank()} and {rank} have the same parameters but protect different directions: the "
                    f"backward pass inside protect() did not go through DDP, so it was not reduced (in a Trainer's callback use "
                    f"trainer.model_wrapped, not the model that it is given); if the ranks hold other elements of one gradient, pass "
                    f'Sharding(group, placement="shard")'
                )


def _store():
    return dist.distributed_c10d._get_default_store()


def _fingerprint(tensors: list[Tensor]) -> str:
    """Of the first element of every tensor, bit by bit: DDP's reduced gradients are equal to the last bit."""
    some = [t.detach().reshape(-1)[:1].double() for t in tensors if t.numel() and not t.is_complex()]
    first = torch.cat([t.to(some[0].device) for t in some]) if some else torch.zeros(1, dtype=torch.float64)
    weights = torch.arange(1, len(first) + 1, dtype=torch.float64, device=first.device)
    return float((first * weights).sum()).hex()
