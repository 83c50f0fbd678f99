"""The protected directions of one model, and the projection of its gradients against them."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from gradproj import methods
from gradproj.directions import Direction, Directions
from gradproj.functional import Projection, combine_, gram, project_

ParamGroups = Callable[[], list[dict[str, Any]]]


class Projector:
    """Owns the protected directions and projects the gradients of the parameters that ``param_groups()`` names right now.

    Users get one from :func:`gradproj.attach` or inside :class:`gradproj.ProjectedOptimizer`.

    Args:
        param_groups: returns the optimizer's live ``param_groups``; asked anew each time, never stored.
        method, eps, group: as for :func:`gradproj.project_`.
        directions: how many protected directions to keep; a further one replaces the oldest.
        space: ``"gradient"`` projects ``p.grad`` before the inner step. ``"update"`` projects what the inner step did to the
            parameters, momentum and weight decay included, and keeps one copy of the parameters while it runs.
    Attributes:
        last: :class:`gradproj.Projection` of the last projection, or None.
    """

    def __init__(
        self,
        param_groups: ParamGroups,
        method: methods.Method = "orthogonal",
        directions: int = 1,
        space: Literal["gradient", "update"] = "gradient",
        group=None,
        eps: float = 0.0,
    ):
        methods.parse(method, eps)
        if space not in ("gradient", "update"):
            raise ValueError(f'space must be "gradient" or "update", got {space!r}')
        self.param_groups: ParamGroups | None = param_groups
        self.method = method
        self.space = space
        self.group = group
        self.eps = eps
        self.last: Projection | None = None
        self._directions = Directions(directions)
        self._projected: weakref.ref[Tensor] | None = None  # a gradient that project() has already dealt with
        self._before: list[Tensor] | None = None  # parameters before the inner step, in update space
        self._protecting = False
        self._attached = False  # to an optimizer by hooks, which copies of that optimizer do not have

    def __len__(self) -> int:
        """How many directions are protected now."""
        return len(self._directions)

    def parameters(self) -> list[Tensor]:
        """The parameters that the optimizer steps, in its order, as of now."""
        if self.param_groups is None:
            raise RuntimeError("this Projector is a copy that belongs to no optimizer; call gradproj.attach() again")
        return [p for group in self.param_groups() for p in group["params"]]

    @contextlib.contextmanager
    def protect(self) -> Iterator[None]:
        """Make the gradients produced inside into one protected direction.

        Several backward passes inside add up. ``p.grad`` is set aside when the block is entered and put back when it ends.
        The gradients are taken, not copied: after the block ``p.grad`` is what it was before it. An exception inside
        leaves the directions as they were.

        Gradients of parameters that are not this optimizer's are not touched: they accumulate as they always do.

        Raises:
            RuntimeError: no parameter received a gradient inside the block, or the block is inside another one.
        """
        if self._protecting:
            raise RuntimeError(
                "protect() inside another protect(): several backward passes in one block add up already"
            )
        parameters = self.parameters()
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        taken: Direction = {}
        self._protecting = True
        try:
            yield
            taken = {p: p.grad for p in self.parameters() if p.grad is not None}
        finally:
            self._protecting = False
            for p in self.parameters():
                p.grad = None
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
        if not taken:
            raise RuntimeError(
                "protect(): no parameter of the optimizer received a gradient; call loss.backward() inside the block"
            )
        self._directions.add(taken)
        self._projected = None

    def unprotect(self) -> None:
        """Forget all protected directions: the next step is the plain step."""
        self._directions.clear()

    def project(self) -> Projection | None:
        """Project the gradients now, for clipping or logging before the step; that step then does not do it again.

        Returns:
            what happened, also kept as ``last``; None if nothing is protected.
        Raises:
            RuntimeError: in update space, where the projection is part of the step.
        """
        if self.space == "update":
            raise RuntimeError('project(): with space="update" the projection happens inside step()')
        grads = [p.grad for p in self.parameters()]
        return self._project_rows(grads)

    def forget_gradients(self) -> None:
        """The gradients are about to change in place (``zero_grad``): what was projected no longer counts."""
        self._projected = None

    def before_step(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """To call before the inner step; returns the closure to give to it."""
        if self._protecting:
            raise RuntimeError(
                "step() inside protect(): the gradients made there are not for a step; leave the block first"
            )
        if self.space == "update":
            if self._directions:
                self._before = [p.detach().clone() for p in self.parameters()]
            return closure
        if closure is None:
            self._project_once()
            return None

        def projected_closure():
            loss = closure()
            self._projected = None  # the closure has made new gradients
            self._project_rows([p.grad for p in self.parameters()])
            return loss

        return projected_closure

    def after_step(self) -> None:
        """To call after the inner step."""
        self._projected = None
        if self._before is None:
            return
        before, self._before = self._before, None
        self._project_update(before)

    def _project_once(self) -> None:
        done = self._projected() if self._projected is not None else None
        if done is not None and any(p.grad is done for p in self.parameters()):
            return
        self._project_rows([p.grad for p in self.parameters()])

    def _project_rows(self, grads: list[Tensor | None]) -> Projection | None:
        if not self._directions:
            return None
        parameters = self.parameters()
        rows = self._directions.rows(parameters)
        known = self._directions.gram(grads, parameters) if len(rows) > 1 else None
        self.last = project_(grads, *rows, method=self.method, eps=self.eps, group=self.group, known=known)
        some = next((g for g in grads if g is not None), None)
        self._projected = None if some is None else weakref.ref(some)
        return self.last

    @torch.no_grad()
    def _project_update(self, before: list[Tensor]) -> None:
        """Parameters <- before + projected (parameters - before).

        A step descends along minus the update, so the directions' inner products change sign, and with them the weights.
        """
        rows = self._directions.rows(self.parameters())
        parameters = [p.detach() for p in self.parameters()]
        torch._foreach_sub_(parameters, before)
        sign = torch.ones(len(rows) + 1, dtype=torch.float64)
        sign[0] = -1.0
        products = gram(parameters, *rows)
        sign = sign.to(products.device)
        products = products * sign * sign[:, None]
        rule = methods.parse(self.method, self.eps)
        weights = rule(products) if isinstance(rule, methods.Rule) else methods.apply_weighting(rule, products)
        combine_(parameters, rows, weights * -sign)
        torch._foreach_add_(parameters, before)
        self.last = Projection(products, weights, "update")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._attached and self._directions:
            warnings.warn(
                "a Projector with protected directions is being copied, but the step hooks that attach() registered do not "
                "go with the optimizer: call attach() again on the copy",
                RuntimeWarning,
                stacklevel=2,
            )
        state["param_groups"] = None  # the owner knows
        state["_projected"] = state["_before"] = None  # references do not survive a copy
        return state
