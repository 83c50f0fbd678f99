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
        # While a direction lives it keeps its parameters alive, so an id stands for one parameter.
        sharding = with_group("project_", sharding, grads)  # a direction may miss what implies it
        key = (sharding, part, *(None if g is None else id(p) for p, g in zip(parameters, grads, strict=True)))
        first = self._added - len(rows)
        gram = self._still_known(first, key)
        if gram is None or gram.shape[-1] < len(rows):
            gram = _extended(gram, [_where(grads, row) for row in rows], sharding, part)
        self._known = _Known(first, key, gram)
        return gram

    def _still_known(self, first: int, key: tuple) -> Tensor | None:
        """The Gram of the directions from number ``first`` on, as far as it is known."""
        known = self._known
        if known is None or known.key != key or not known.first <= first < known.first + known.gram.shape[-1]:
            return None
        gone = first - known.first
        return known.gram[..., gone:, gone:].contiguous() if gone else known.gram


def _extended(
    gram: Tensor | None, rows: list[Row], sharding: Sharding | None, part: tuple[Sequence[int], int]
) -> Tensor:
    """``gram`` of the first of ``rows``, None if of none, extended to all of them."""
    if gram is None:
        return functional.local_gram(rows, sharding, None, *part)
    for r in range(gram.shape[-1], len(rows)):
        with_new_first = functional.local_gram([rows[r], *rows[:r]], sharding, gram, *part)
        gram = with_new_first.roll((-1, -1), (-2, -1))
    return gram


def _where(grads: Sequence[Tensor | None], row: Row) -> Row:
    return [None if g is None else t for g, t in zip(grads, row, strict=True)]
