"""What of a model no matrix of a null space covers: held during a step, or let go with a warning."""

import warnings
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradproj.nullspace.matrices import running_statistics, without_wrappers

SMALL = 1 << 20  # bytes of a parameter of which a copy is kept


class _Buffer:
    """A buffer, and what it was: values if they are few, else its version."""

    def __init__(self, name: str, buffer: Tensor):
        self.name, self._buffer = name, buffer
        self._version = None if buffer.is_inference() else buffer._version
        self._values = buffer.detach().clone() if buffer.nbytes <= SMALL else None

    def moved(self) -> bool:
        if self._version is None or self._buffer._version == self._version:
            return False
        self._version = self._buffer._version
        return self._values is None or not torch.equal(self._buffer, self._values)


class Uncovered:
    """The parameters that train and are in no matrix, and the buffers.

    An optimizer leaves a parameter without a gradient alone, its weight decay included, so gradients are set aside
    during a step. Some optimizers write all the same (Muon's reference gives such a parameter a gradient of zeros), so
    versions are compared; of a parameter of at most 1 MiB, such as a norm's or a bias's, there is a copy to put back.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._statistics = running_statistics(model)
        self._grads: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._copies: dict[Tensor, tuple[int, Tensor]] = {}  # with the version that they are of
        self._told = False
        self._inside: set[int] = set()  # the optimizers' parameters that are the model's, by identity
        self._buffers: list[_Buffer] | None = None  # since the last capture began, or the first step
        self.captured()

    def trained(self) -> list[Tensor]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def captured(self) -> None:
        """What trains now could be heard, and is where it is to be."""
        self._could_be_heard = set(self._names(self.trained()))
        self._stepped: set[int] = set()  # the optimizers' parameters, by identity
        self._elsewhere: dict[Tensor, int] = {}  # the model's that no optimizer here has, with their versions

    def begin_capture(self) -> None:
        """A RuntimeError if the model moves without a step."""
        if moving := self._moving_statistics():
            raise RuntimeError(moving)
        self._watch_buffers()

    def _watch_buffers(self) -> None:
        """They say what is computed, as parameters do, and are to stay what they are: a router's bias, say."""
        known = {id(b) for _, module in self._statistics for b in module.buffers()}
        found = self._model.named_buffers()
        self._buffers = [_Buffer(without_wrappers(name), b) for name, b in found if id(b) not in known]

    def _tell_of_buffers(self) -> None:
        if self._buffers is None:
            self._watch_buffers()
        elif moved := [b.name for b in self._buffers if b.moved()]:
            self._buffers = []
            warnings.warn(
                f"NullSpace: {_first(moved, 3)} changed since the capture began, and with them what the model makes of "
                "captured inputs, unless that does not depend on them: see that these buffers stay what they are "
                "(spectral_norm: eval(); a router's bias: without its update), and capture again",
                RuntimeWarning,
                stacklevel=5,
            )

    def _moving_statistics(self) -> str:
        moving = [name for name, module in self._statistics if module.training]
        if not moving:
            return ""
        return (
            f"NullSpace: the running statistics of {_first(moving, 3)} change in every forward pass in training mode, "
            "and with them what the model computes in eval mode: call eval() on these modules before the capture, and "
            "leave them so"
        )

    def begin_step(self) -> None:
        self._grads, self._versions = {}, {}

    def before_step(self, parameters: Sequence[Tensor], covered: Collection[int], rest: str) -> None:
        """May be called again in a step, for the gradients that a closure has made since.

        ``parameters`` are the optimizers', ``covered`` the identities of those in a matrix.
        """
        self._tell_of_buffers()
        stepped = [p for p in parameters if p.requires_grad]
        self._look_at(stepped, covered, rest)
        # What else an optimizer steps, a critic's say, learns freely.
        others = [p for p in stepped if id(p) in self._inside and id(p) not in covered]
        if rest == "hold":
            for p in others:
                if p.grad is not None:
                    self._grads[p], p.grad = p.grad, None
                if p not in self._versions:
                    self._versions[p] = p._version
                    if p.numel() * p.element_size() <= SMALL and self._copies.get(p, (None,))[0] != p._version:
                        self._copies[p] = p._version, p.detach().clone()
            self._tell_once(self._moving_statistics())
        elif others and not self._told:
            self._tell_once(
                f'NullSpace(rest="train"): {len(others)} trained parameters are not covered, and change what protected '
                f"layers see: {_first(self._names(others), 8)}"
            )

    def _look_at(self, stepped: list[Tensor], covered: Collection[int], rest: str) -> None:
        """Tell of what was not heard, and of what another optimizer steps."""
        asked = {id(p) for p in stepped}
        if asked != self._stepped:
            self._stepped, trained = asked, self.trained()
            self._inside = asked & {id(p) for p in trained}
            names = self._names([p for p in stepped if id(p) in self._inside])
            if late := [name for name in names if name not in self._could_be_heard]:
                then = "they stand still" if rest == "hold" else "nothing of them is protected"
                warnings.warn(
                    f"NullSpace: {_first(late, 3)} did not train yet when the capture listened, so {then}: capture "
                    "again",
                    RuntimeWarning,
                    stacklevel=5,
                )
            elsewhere = [p for p in trained if id(p) not in asked and (rest == "hold" or id(p) in covered)]
            self._elsewhere = {p: p._version for p in elsewhere}
        if moved := [p for p, version in self._elsewhere.items() if p._version != version]:
            self._elsewhere = {}
            warnings.warn(
                f"NullSpace: {_first(self._names(moved), 3)} changed since the last step, and with them what the model "
                "makes of captured inputs, though no protected optimizer has them: if another one steps them, protect "
                "both together, attach([first, second], protection)",
                RuntimeWarning,
                stacklevel=5,
            )

    def settled(self) -> None:
        """What was written until now was written here."""
        self._elsewhere = {p: p._version for p in self._elsewhere}

    @torch.no_grad()
    def after_step(self, optimizers: Sequence[weakref.ref[Optimizer]]) -> None:
        """Give the gradients back, and what the optimizers wrote to its values. A RuntimeError if that is too large."""
        written = [p for p, version in self._versions.items() if p._version != version]
        for p, grad in self._grads.items():
            p.grad = grad
        self.begin_step()
        large = [p for p in written if p not in self._copies]
        for p in written:
            if p in self._copies:
                values = self._copies[p][1]
                p.copy_(values)
                self._copies[p] = p._version, values
        self.settled()
        if large:
            names = " and ".join(type(o).__name__ for ref in optimizers if (o := ref()))
            raise RuntimeError(
                f"NullSpace: {names} has written to {self._names(large)[0]} {tuple(large[0].shape)}, which is held "
                "and had no gradient, and which is too large to keep a copy of: protected outputs have moved. Give the "
                "optimizer protection.param_groups(lr), in which held parameters are not, or use "
                'NullSpace(rest="train")'
            )

    def _tell_once(self, text: str) -> None:
        if text and not self._told:
            self._told = True
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _names(self, parameters: Sequence[Tensor]) -> list[str]:
        names = {id(p): without_wrappers(name) for name, p in self._model.named_parameters()}
        return [names[id(p)] for p in parameters]

    def __getstate__(self):
        mine: dict[str, Any] = {
            "_grads": {},
            "_versions": {},
            "_copies": {},
            "_buffers": None,
            "_stepped": set(),
            "_elsewhere": {},
        }
        return {**self.__dict__, **mine}


def _first(names: Sequence[str], most: int) -> str:
    return f"{', '.join(names[:most])}{', ..' if len(names) > most else ''}"
