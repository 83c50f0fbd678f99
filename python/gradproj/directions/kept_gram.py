"""The directions' own Gram, kept from step to step: a step computes K + 1 products, not (K + 1)(K + 2) / 2."""

from collections.abc import Sequence

from torch import Tensor

from gradproj.rows import functional
from gradproj.rows.functional import Row
from gradproj.rows.sharding import Sharding, with_group


class KeptGram:
    """Cut when a direction is evicted, extended by a row when one is added, computed anew when the columns change.

    It is this rank's summand, so a rank may compute it anew without the others: that needs no collective.
    """

    def __init__(self) -> None:
        self._key: tuple = ()  # the columns that it is over
        self._gram: Tensor | None = None  # of the oldest directions, as many as it has rows

    def evict(self) -> None:
        """The oldest direction leaves."""
        if self._gram is not None:
            self._gram = self._gram[..., 1:, 1:].contiguous()

    def clear(self) -> None:
        self._gram = None

    def of(
        self,
        rows: Sequence[Row],
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        sharding: Sharding | None,
        part: tuple[Sequence[int], int],
    ) -> Tensor | None:
        """[K, K] or [P, K, K] over the columns that have a gradient; None for one direction, whose square a projection
        computes along the way. ``part`` is the pair ``part``, ``num_parts`` of :class:`gradproj.rows.call.Call`."""
        if len(rows) == 1:
            return None
        # While a direction lives it keeps its parameters alive, so an id stands for one parameter.
        sharding = with_group("project_", sharding, grads)  # a direction may miss what implies it
        key = (sharding, part, *(None if g is None else id(p) for p, g in zip(parameters, grads, strict=True)))
        gram = self._gram if key == self._key else None
        if gram is None or gram.shape[-1] < len(rows):
            rows = [[None if g is None else t for g, t in zip(grads, row, strict=True)] for row in rows]
            if gram is None or not gram.shape[-1]:
                gram = functional.local_gram(rows, sharding, None, *part)
            for r in range(gram.shape[-1], len(rows)):
                with_new_first = functional.local_gram([rows[r], *rows[:r]], sharding, gram, *part)
                gram = with_new_first.roll((-1, -1), (-2, -1))
        self._key, self._gram = key, gram
        return gram
