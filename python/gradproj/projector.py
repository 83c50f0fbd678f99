"""The protected directions of one model, and the projection of its gradients against them."""

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradproj import methods
from gradproj.functional import Projection, combine_, gram, project_

ParamGroups = Callable[[], list[dict[str, Any]]]
Direction = dict[Tensor, Tensor]  # parameter -> its gradient; a parameter that is missing counts as zeros


class _Known(NamedTuple):
    """The Gram of the directions ``serials`` over the parameters ``columns``."""

    serials: tuple[int, ...]
    columns: tuple[int, ...]
    gram: Tensor


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
        if directions < 1:
            raise ValueError(f"directions must be >= 1, got {directions}")
        if space not in ("gradient", "update"):
            raise ValueError(f'space must be "gradient" or "update", got {space!r}')
        self.param_groups: ParamGroups | None = param_groups
        self.method = method
        self.space = space
        self.group = group
        self.eps = eps
        self.last: Projection | None = None
        self._directions: deque[Direction] = deque(maxlen=directions)
        self._serials: deque[int] = deque(maxlen=directions)  # which protect() made each: no two have the same
        self._known: _Known | None = None
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
        self._directions.append(taken)
        self._serials.append(self._serials[-1] + 1 if self._serials else 0)
        self._projected = None

    def unprotect(self) -> None:
        """Forget all protected directions: the next step is the plain step."""
        self._directions.clear()
        self._serials.clear()
        self._known = None

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
        rows = self._rows()
        known = self._known_gram(grads, rows) if len(rows) > 1 else None
        self.last = project_(grads, *rows, method=self.method, eps=self.eps, group=self.group, known=known)
        some = next((g for g in grads if g is not None), None)
        self._projected = None if some is None else weakref.ref(some)
        return self.last

    def _known_gram(self, grads: list[Tensor | None], rows: list[list[Tensor | None]]) -> Tensor:
        """[K, K] Gram of the directions where there is a gradient, of this rank's shards.

        It is kept, cut when a direction is evicted, and extended by a row when one is added, so that a step computes K + 1
        products instead of (K + 1)(K + 2) / 2.
        """
        columns = [i for i, g in enumerate(grads) if g is not None]
        parameters = self.parameters()
        # While a direction lives it keeps its parameters alive, so an id stands for one parameter.
        key = tuple(id(parameters[i]) for i in columns)
        rows = [[row[i] for i in columns] for row in rows]
        serials = tuple(self._serials)
        products, kept = None, 0
        if self._known is not None and self._known.columns == key and serials[0] in self._known.serials:
            start = self._known.serials.index(serials[0])
            products = self._known.gram[start:, start:].contiguous()
            kept = len(products)
        if products is None:
            products, kept = gram(*rows), len(rows)
        for r in range(kept, len(rows)):
            products = gram(rows[r], *rows[:r], known=products).roll((-1, -1), (0, 1))  # the new one goes last
        self._known = _Known(serials, key, products)
        return products

    @torch.no_grad()
    def _project_update(self, before: list[Tensor]) -> None:
        """Parameters <- before + projected (parameters - before).

        A step descends along minus the update, so the directions' inner products change sign, and with them the weights.
        """
        parameters = [p.detach() for p in self.parameters()]
        torch._foreach_sub_(parameters, before)
        rows = self._rows()
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

    def _rows(self) -> list[list[Tensor | None]]:
        parameters = self.parameters()
        rows: list[list[Tensor | None]] = []
        for direction in self._directions:
            row = [direction.get(p) for p in parameters]
            if all(t is None for t in row):
                raise RuntimeError(
                    "a protected direction belongs to none of the optimizer's parameters: they were replaced after "
                    "protect(); call unprotect() and protect() again"
                )
            rows.append(row)
        return rows

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
        state["_projected"] = state["_before"] = state["_known"] = None  # ids and references do not survive a copy
        return state
