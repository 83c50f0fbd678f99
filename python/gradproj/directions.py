"""The store of protected directions and what is known about them."""

import warnings
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradproj import distributed, float8, functional, offload
from gradproj.distributed import Share, Spread
from gradproj.float8 import Float8Row

MOST = 64  # what the kernels take in one pass
STORE_DTYPES = (None, torch.bfloat16, torch.float16, float8.DTYPE)

Direction = dict[Tensor, Tensor]  # parameter -> its gradient; a parameter that is missing counts as zeros
_Stored = dict[Any, Any]  # parameter -> tensor, or the Float8Row of one buffer


class _Known(NamedTuple):
    """This rank's share of the Gram of the directions ``serials`` over the columns ``key``; None: asked for, not known yet."""

    serials: tuple[int, ...]
    key: tuple
    gram: Tensor | None


class Directions:
    """The ``capacity`` newest directions, oldest first; a further one replaces the oldest.

    Args:
        capacity: 1 to 64.
        dtype: None keeps gradients as they are made, without a copy. bfloat16 or float16 take 2 bytes an element (float16
            overflows at 65504 and loses digits below 6e-5), float8_e4m3fn takes 1 and 4 more per 512, see
            :mod:`gradproj.float8`. A projection is exact with respect to what is stored.
        device: None keeps them beside the gradients. ``"cpu"`` keeps them in pinned host memory; see :mod:`gradproj.offload`.
        average: None, or beta in (0, 1): a single direction, which becomes beta d + (1 - beta) new. The first is taken as it
            is, so nothing is biased towards zero. With a 16-bit or float8 dtype every average is rounded to it, so that
            changes smaller than its spacing are lost: 1 - beta should be well above 2^-8 (bfloat16), 2^-11, 2^-4 (float8).
    Raises:
        ValueError: any of them out of range.
    """

    def __init__(
        self,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        average: float | None = None,
    ):
        if capacity < 1:
            raise ValueError(f"directions must be >= 1, got {capacity}")
        if capacity > MOST:
            raise ValueError(
                f"directions={capacity}, but a projection takes up to {MOST}: add up several losses in one protect() block, or "
                f"keep an average of all of them (average=0.9)"
            )
        if dtype not in STORE_DTYPES:
            raise ValueError(f"store_dtype must be one of {', '.join(map(str, STORE_DTYPES))}, got {dtype}")
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f'store_device must be None (beside the gradients) or "cpu", got {device!r}')
        if average is not None and not 0.0 < average < 1.0:
            raise ValueError(f"average must be between 0 and 1, got {average}")
        if average is not None and capacity != 1:
            raise ValueError(f"average= keeps a single direction: pass directions=1, got {capacity}")
        self._stored: deque[_Stored] = deque(maxlen=capacity)
        self._serials: deque[int] = deque(maxlen=capacity)  # which add() made each: no two have the same
        self._known: _Known | None = None
        self._dtype, self._device, self._average = dtype, device, average
        self._refused: _Refused | None = None

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def capacity(self) -> int | None:
        """How many directions can be added before one is forgotten; None if none ever is."""
        return self._stored.maxlen if self._average is None else None

    def add(self, taken: Direction) -> None:
        """Keep ``taken`` as the newest direction, or average it in. Its tensors are not copied; where they are converted or
        moved, ``taken`` is emptied on the way, so that one of them at a time exists twice.

        Raises:
            NotImplementedError: a DTensor, where it would have to be converted or moved.
        """
        if self._average is not None and self._stored:
            self._average_in(taken)
        self.restore(taken)

    def restore(self, direction: Direction) -> None:
        """Like :meth:`add`, but never averages: for directions that :meth:`tensors` gave."""
        if self._dtype is not None or self._device is not None:
            direction = self._packed(direction)
        self._stored.append(direction)
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

    def rows(self, parameters: Sequence[Tensor]) -> list[functional.Row]:
        """Per direction, oldest first, a row with an entry for each of ``parameters``.

        Raises:
            RuntimeError: a direction belongs to none of ``parameters``.
        """
        for direction in self._stored:
            if direction and not any(p in direction for p in parameters):
                raise RuntimeError(
                    "a protected direction belongs to none of the optimizer's parameters: they were replaced after "
                    "protect(); call unprotect() and protect() again"
                )
        return [self._row(direction, parameters) for direction in self._stored]

    def tensors(self, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """The same with the exact values as tensors, float32 where they are stored in float8. Waits for the device."""
        self._wait()
        rows = []
        for direction in self._stored:
            row = [direction.get(p) for p in parameters]
            rows.append([_exact(t, p) for t, p in zip(row, parameters, strict=True)])
        return rows

    def share(
        self,
        grads: Sequence[Tensor | None],
        parameters: Sequence[Tensor],
        spread: Spread,
        parts: Sequence[int] | None = None,
    ) -> Share | None:
        """[K, K] this rank's share of the directions' Gram where there is a gradient; [P, K, K] with ``parts``.

        It is kept, cut when a direction is evicted, and extended by a row when one is added, so that a step computes K + 1
        products instead of (K + 1)(K + 2) / 2. None if it would take a walk over host memory of its own: the projection
        then computes all products in its walk, and :meth:`keep` gets them.
        """
        columns = [None if g is None else p for g, p in zip(grads, parameters, strict=True)]
        # While a direction lives it keeps its parameters alive, so an id stands for one parameter.
        key = (spread, *map(id, columns), *(parts or ()))
        serials = tuple(self._serials)
        products, kept = None, 0
        known = self._known
        if known is not None and known.gram is not None and known.key == key and serials[0] in known.serials:
            start = known.serials.index(serials[0])
            products = known.gram[..., start:, start:].contiguous()
            kept = products.shape[-1]
        if kept < len(serials) and self._device is not None:
            products = None
        else:
            rows = [self._row(direction, columns) for direction in self._stored]
            settings = {"parts": parts, "like": grads, **spread._asdict()}
            if products is None:
                products, kept = functional.share(*rows, **settings).gram, len(rows)
            for r in range(kept, len(rows)):
                # The new one goes last.
                extended = functional.share(rows[r], *rows[:r], known=Share(products), **settings).gram
                products = extended.roll((-1, -1), (-2, -1))
        self._known = _Known(serials, key, products)
        return None if products is None else Share(products)

    def keep(self, products: Tensor) -> None:
        """The directions' Gram as a projection computed it, where :meth:`gram` was asked and did not know it."""
        if self._known is not None and self._known.gram is None:
            self._known = self._known._replace(gram=products)

    def _row(self, direction: _Stored, parameters: Iterable[Tensor | None]) -> functional.Row:
        row: functional.Row
        if self._dtype == float8.DTYPE:
            entries = [direction.get(p, _ABSENT) for p in parameters]
            row = Float8Row([e.codes[0] for e in entries], [e.scales[0] for e in entries])
        else:
            row = [direction.get(p) for p in parameters]
        return row if self._device is None else offload.HostRow(row)

    def _packed(self, taken: Direction) -> _Stored:
        for p, t in taken.items():
            if self._device is not None and hasattr(t, "device_mesh"):
                raise NotImplementedError(
                    f"protect(): the gradient of a parameter with shape {tuple(p.shape)} is a DTensor, which store_device= does "
                    f"not take; store_dtype=torch.float8_e4m3fn takes a quarter of its memory"
                )
        stored: _Stored = {}
        while taken:
            p, t = taken.popitem()
            if self._dtype == float8.DTYPE:
                stored[p] = float8.quantize(distributed.local([t]))  # of a DTensor this rank's shard
            else:
                t = t if self._dtype is None else float8.real(t).to(self._dtype)
                stored[p] = t
            if self._device is not None:
                stored[p] = _to_host(stored[p])
        return stored

    def _average_in(self, taken: Direction) -> None:
        """taken <- beta d + (1 - beta) taken, where a missing gradient counts as zeros.

        What is not finite is left out, decided on the device.
        """
        (stored,) = self._stored
        taken.update((p, torch.zeros_like(p, requires_grad=False)) for p in stored if p not in taken)
        parameters, new = [*taken], [*taken.values()]
        old = self._row(stored, parameters)
        finite = functional.gram(new, old).diagonal().isfinite()
        beta = float(self._average or 0.0)
        both, only_new, only_old = torch.tensor(
            [[1 - beta, beta], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, device=finite.device
        )
        weights = torch.where(finite[0], torch.where(finite[1], both, only_new), only_old)
        functional.combine_(new, [old], weights)
        self._report()
        self._refused = _Refused(finite)
        if finite.device.type == "cpu":
            self._report()

    def _report(self) -> None:
        """Warn of a new gradient that was left out of the average, once that is known."""
        refused, self._refused = self._refused, None
        if refused is not None and refused():
            warnings.warn(
                "the gradient of a protect() block is inf, nan or overflows, and was left out of the average: look at the "
                "capability loss, or lower the loss scale",
                RuntimeWarning,
                stacklevel=4,
            )

    def _wait(self) -> None:
        """Until what :meth:`add` copies to host memory is there."""
        for device in {p.device for direction in self._stored for p in direction if self._device and p.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def __getstate__(self) -> dict[str, Any]:
        self._wait()
        return {**self.__dict__, "_known": None, "_refused": None}  # ids do not survive a copy


class _Refused:
    """Whether a new gradient was not finite, on its way from the device to the host."""

    def __init__(self, finite: Tensor):
        self._finite = finite.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if finite.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def __call__(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return not bool(self._finite[0])


_ABSENT = Float8Row([None], [None])


def _to_host(stored: Tensor | Float8Row) -> Tensor | Float8Row:
    if isinstance(stored, Tensor):
        return offload.to_host(stored)
    codes, scales = ([offload.to_host(t) if t is not None else None for t in part] for part in stored)
    return Float8Row(codes, scales)


def _exact(stored: Tensor | Float8Row | None, like: Tensor) -> Tensor | None:
    """What is stored of the gradient of ``like``, as a tensor of its kind."""
    if isinstance(stored, Float8Row):
        (stored,) = float8.dequantize(stored)
        if stored is not None and hasattr(like, "device_mesh"):
            stored = distributed.like_shard(stored, like)
    if stored is not None and like.is_complex() and not stored.is_complex():
        stored = torch.view_as_complex(stored.float())
    return stored
