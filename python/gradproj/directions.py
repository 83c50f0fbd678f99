"""The store of protected directions and what is known about them."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradproj import functional

Direction = dict[Tensor, Tensor]  # parameter -> its gradient; a parameter that is missing counts as zeros


class _Known(NamedTuple):
    """The Gram of the directions ``serials`` over the parameters ``columns``."""

    serials: tuple[int, ...]
    columns: tuple[int, ...]
    gram: Tensor


class Directions:
    """The ``capacity`` newest directions, oldest first; a further one replaces the oldest."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"directions must be >= 1, got {capacity}")
        self._stored: deque[Direction] = deque(maxlen=capacity)
        self._serials: deque[int] = deque(maxlen=capacity)  # which add() made each: no two have the same
        self._known: _Known | None = None

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, taken: Direction) -> None:
        """Keep ``taken`` as the newest direction; its tensors are not copied."""
        self._stored.append(taken)
        self._serials.append(self._serials[-1] + 1 if self._serials else 0)

    def clear(self) -> None:
        self._stored.clear()
        self._serials.clear()
        self._known = None

    def drop(self, which: Collection[int]) -> None:
        """Forget the directions numbered ``which``, 0 being the oldest."""
        kept = [k for k in range(len(self)) if k not in which]
        self._stored = deque((self._stored[k] for k in kept), self._stored.maxlen)
        self._serials = deque((self._serials[k] for k in kept), self._serials.maxlen)
        self._known = None

    def move(self, successors: Mapping[Tensor, Tensor]) -> None:
        """Parameters were replaced: what belonged to a key now belongs to its value."""
        self._stored = deque(
            ({successors.get(p, p): t for p, t in direction.items()} for direction in self._stored), self._stored.maxlen
        )
        self._known = None

    def rows(self, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Per direction, oldest first, one tensor or None for each of ``parameters``.

        Raises:
            RuntimeError: a direction belongs to none of ``parameters``.
        """
        rows: list[list[Tensor | None]] = []
        for direction in self._stored:
            row = [direction.get(p) for p in parameters]
            if all(t is None for t in row):
                raise RuntimeError(
                    "a protected direction belongs to none of the optimizer's parameters: they were replaced after "
                    "protect(); call unprotect() and protect() again"
                )
            rows.append(row)
        return rows

    def gram(self, grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
        """[K, K] Gram of the directions where there is a gradient, of this rank's shards.

        It is kept, cut when a direction is evicted, and extended by a row when one is added, so that a step computes K + 1
        products instead of (K + 1)(K + 2) / 2.
        """
        columns = [i for i, g in enumerate(grads) if g is not None]
        # While a direction lives it keeps its parameters alive, so an id stands for one parameter.
        key = tuple(id(parameters[i]) for i in columns)
        rows = [[row[i] for i in columns] for row in self.rows(parameters)]
        serials = tuple(self._serials)
        products, kept = None, 0
        if self._known is not None and self._known.columns == key and serials[0] in self._known.serials:
            start = self._known.serials.index(serials[0])
            products = self._known.gram[start:, start:].contiguous()
            kept = len(products)
        if products is None:
            products, kept = functional.gram(*rows), len(rows)
        for r in range(kept, len(rows)):
            # The new one goes last.
            products = functional.gram(rows[r], *rows[:r], known=products).roll((-1, -1), (0, 1))
        self._known = _Known(serials, key, products)
        return products

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}  # ids do not survive a copy
