"""That a capture has heard every use of a parameter: what was heard takes it detached, so gradients come from others.

A parameter may be used elsewise: by a penalty on weights, an adapter that rescales, an operation that is not read. What
it does there would not be protected.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gradproj.nullspace.matrices import Slot
from gradproj.nullspace.products import Part
from gradproj.rows.sharding import local_tensors


class Proof:
    """A listener of :class:`gradproj.nullspace.hearing.Hearing`.

    Attributes:
        heard: names of the parameters that were multiplied by, or added as a bias.
    """

    def __init__(self) -> None:
        self.heard: set[str] = set()
        self._elsewhere: dict[str, Tensor] = {}  # names of parameters -> whether they had a gradient that is not zero
        self._watched: dict[int, Tensor] = {}  # by identity, and alive, so that no other tensor gets it
        self._handles: list = []

    @contextlib.contextmanager
    def listening(self, slots: Sequence[Slot]) -> Iterator[None]:
        """
        Raises:
            RuntimeError: a parameter that was heard has a gradient, out of ``backward()`` or at the end; it names the
                parameter.
        """
        try:
            for slot in slots:
                self._watch(slot)
            yield
            for name in sorted(self.heard & self._elsewhere.keys()):
                self._refuse(name, self._elsewhere[name])
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles, self._watched = [], {}

    def before(self, x: Tensor, weights: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Tensor, None]:
        for part in parts if weights else ():
            for slot in (part.at.slot, part.at.consumer, part.bias and part.bias.slot):
                if slot is not None:
                    self.heard.add(slot.name)
                    self._watch(slot)  # FSDP2 puts another tensor there for the call
        return x, None

    def after(self, call: None, y: Tensor) -> None:
        pass

    def _watch(self, slot: Slot) -> None:
        t = slot.get()
        if id(t) not in self._watched and t.requires_grad:
            self._watched[id(t)] = t
            self._handles.append(t.register_hook(partial(self._take, slot.name)))

    @torch.no_grad()
    def _take(self, name: str, gradient: Tensor | None) -> None:
        if gradient is None:
            return
        some = local_tensors([gradient.detach()])[0].any()
        if name in self.heard:
            self._refuse(name, some)
        self._elsewhere[name] = self._elsewhere[name] | some if name in self._elsewhere else some

    def _refuse(self, name: str, some: Tensor) -> None:
        if some:
            raise RuntimeError(
                f"NullSpace: the products that were heard do not explain the gradient of {name}: it is also used "
                "elsewise than as a matrix that inputs are multiplied by (a penalty on weights, an adapter or a "
                "parametrization that computes with it, a fused operation). What it does there would not be "
                "protected; leave it out with modules=, and it is held"
            )
