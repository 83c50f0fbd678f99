"""What of a model no layer of a null space covers: held during a step, or let go with a warning."""

import warnings
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gradproj.nullspace.layers import running_statistics

SMALL = 1 << 20  # bytes of a parameter of which a copy is kept


class Uncovered:
    """The parameters that train and are in no layer, and the running statistics.

    An optimizer leaves a parameter without a gradient alone, its weight decay included, so that gradients are set aside
    during a step. Some write all the same (Muon's reference gives such a parameter one of zeros), so that versions are
    compared; of a parameter of at most 1 MiB, such as a norm's or a bias's, there is a copy to put back.
    """

    def __init__(self, model: nn.Module, rest: Literal["hold", "train"]):
        self._model, self.rest = model, rest
        self._statistics = running_statistics(model)
        self._grads: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._copies: dict[Tensor, tuple[int, Tensor]] = {}  # and the version that they are of
        self._told: set[str] = set()

    def moving_statistics(self) -> str:
        """What of the model moves without a step, in words; empty if nothing does."""
        moving = [name for name, module in self._statistics if module.training]
        if not moving:
            return ""
        return (
            f"NullSpace: the running statistics of {', '.join(moving[:3])}{', ..' if len(moving) > 3 else ''} change in every forward "
            f"pass in training mode, and with them what the model computes in eval mode: call eval() on these modules before the "
            f"capture, and leave them so"
        )

    def begin_step(self) -> None:
        self._grads, self._versions = {}, {}

    def before_step(self, parameters: Sequence[Tensor], covered: Collection[int]) -> None:
        """May be called again in a step, for the gradients that a closure has made since.

        Args:
            parameters: of the optimizers.
            covered: identities of those that are in a layer.
        """
        others = [p for p in parameters if p.requires_grad and id(p) not in covered]
        if self.rest == "hold":
            self._set_aside(others)
            self._tell_once("statistics", self.moving_statistics())
        elif others:
            shown = ", ".join(self._name(p) for p in others[:8])
            self._tell_once(
                "rest",
                f'NullSpace(rest="train"): {len(others)} trained parameters are not covered, and change what protected layers see: '
                f"{shown}{', ..' if len(others) > 8 else ''}",
            )

    @torch.no_grad()
    def _set_aside(self, others: Sequence[Tensor]) -> None:
        for p in others:
            if p.grad is not None:
                self._grads[p], p.grad = p.grad, None
            if p in self._versions:
                continue
            self._versions[p] = p._version
            if p.numel() * p.element_size() <= SMALL and self._copies.get(p, (None,))[0] != p._version:
                self._copies[p] = p._version, p.detach().clone()

    @torch.no_grad()
    def after_step(self, optimizers: str) -> None:
        """Give the gradients back, and what was written its values.

        Args:
            optimizers: their names, for the error.
        Raises:
            RuntimeError: something large was written to; it is named, with the way out.
        """
        written = [p for p, version in self._versions.items() if p._version != version]
        for p, grad in self._grads.items():
            p.grad = grad
        self.begin_step()
        for p in written:
            if p in self._copies:
                values = self._copies[p][1]
                p.copy_(values)
                self._copies[p] = p._version, values
        for p in written:
            if p not in self._copies:
                raise RuntimeError(
                    f"NullSpace: {optimizers} has written to {self._name(p)} {tuple(p.shape)}, which is held and had no gradient, and "
                    f"which is too large to keep a copy of: protected outputs have moved. Give the optimizer "
                    f'protection.param_groups(lr), in which held parameters are not, or use NullSpace(rest="train")'
                )

    def _tell_once(self, subject: str, text: str) -> None:
        if text and subject not in self._told:
            self._told.add(subject)
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _name(self, wanted: Tensor) -> str:
        found = (name for name, p in self._model.named_parameters() if p is wanted)
        return next(found, f"a parameter of shape {tuple(wanted.shape)}")

    def __getstate__(self):
        return {**self.__dict__, "_grads": {}, "_versions": {}, "_copies": {}}
