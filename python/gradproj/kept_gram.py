"""The directions' own Gram, kept from step to step: a step then computes K + 1 products instead of (K + 1)(K + 2) / 2."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gradproj import functional
from gradproj.functional import Row
from gradproj.sharding import Sharding, with_group


class _Known(NamedTuple):
    """This rank's Gram of the directions ``first``, ``first`` + 1, .. over the columns ``key``."""

    first: int
    key: tuple
    gram: Tensor


class KeptGram:
    """Cut when a direction is evicted, extended by a row when one is added, computed anew when the columns change.

    It is this rank's own share: ranks may then each decide what to compute anew, since no collective comes of it.
    """

    def __init__(self) -> None:
        self._added = 0  # directions so far: the newest has number _added - 1
        self._known: _Known | None = None

    def added(self) -> None:
        """A direction came, behind all others; the oldest may have left."""
        self._added += 1

    def clear(self) -> None:
        self._known = None

    def of(
        self,
        rows: Sequence[Row],
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        sharding: Sharding | None,
        part: tuple[Sequence[int], int],
    ) -> Tensor | None:
        """[K, K], or [P, K, K] with P parts, over the columns that have a gradient; None for one direction, where a
        projection computes it along the way."""
        if len(rows) == 1:
            return None
        there = [g is not None for g in grads]
        # While a direction lives it keeps its parameters alive, so an id stands for one parameter.
        sharding = with_group("project_", sharding, grads)  # a direction may miss what implies it
        key = (sharding, part, *(id(p) if has else None for p, has in zip(parameters, there, strict=True)))
        first = self._added - len(rows)
        masked = [[t if has else None for t, has in zip(row, there, strict=True)] for row in rows]
        known, gram, count = self._known, None, 0
        if known is not None and known.key == key and known.first <= first < known.first + known.gram.shape[-1]:
            gram = known.gram[..., first - known.first :, first - known.first :].contiguous()
            count = gram.shape[-1]
        if gram is None:
            gram, count = functional.local_gram(masked, sharding, None, *part), len(rows)
        for r in range(count, len(rows)):
            # The new one goes last.
            extended = functional.local_gram([masked[r], *masked[:r]], sharding, gram, *part)
            gram = extended.roll((-1, -1), (-2, -1))
        self._known = _Known(first, key, gram)
        return gram
