"""The protected directions of one model, and the projection of its gradients against them."""

import contextlib
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports the compiler only when needed

from gradproj import checkpoint, distributed, methods
from gradproj.capture import captured
from gradproj.directions import Direction, Directions
from gradproj.functional import Projection, project_

ParamGroups = Callable[[], list[dict[str, Any]]]
Per = Literal["model", "group", "tensor"]


class Projector:
    """Owns the protected directions and projects the gradients of the parameters that ``param_groups()`` names right now.

    Users get one from :func:`gradproj.attach` or inside :class:`gradproj.ProjectedOptimizer`.

    A direction that is not finite is dropped with a RuntimeWarning: on the CPU before the step uses the others, elsewhere at
    the next ``protect()`` or ``step()``, because asking at once would synchronise; until then the device leaves the
    gradients untouched.

    Args:
        param_groups: returns the optimizer's live ``param_groups``; asked anew each time.
        method, eps, group, plain: as for :func:`gradproj.project_`.
        counted: parameter -> whether this rank counts it in inner products; None counts all. See :func:`gradproj.project_`.
        directions: how many protected directions to keep; a further one replaces the oldest.
        space: ``"gradient"`` projects ``p.grad`` before the inner step. ``"update"`` projects what the inner step did to the
            parameters, momentum and weight decay included. That takes one copy of the parameters that have gradients (with a
            closure: of all that require them), N bytes more, kept from step to step.
        per: ``"model"`` projects all parameters as one vector; ``"group"`` those of each parameter group, ``"tensor"`` each
            parameter by itself, in the same passes: the tensors in ``last`` then have a leading dimension.
        store_dtype, store_device, average: how directions are kept; see :class:`gradproj.directions.Directions`.
        refresh_every: after how many steps ``protection_due`` asks for a new direction.
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
        plain: distributed.Plain | None = None,
        counted: Callable[[Tensor], bool] | None = None,
        per: Per = "model",
        store_dtype: torch.dtype | None = None,
        store_device: torch.device | str | None = None,
        average: float | None = None,
        refresh_every: int = 1,
    ):
        methods.parse(method, eps)
        if space not in ("gradient", "update"):
            raise ValueError(f'space must be "gradient" or "update", got {space!r}')
        if per not in ("model", "group", "tensor"):
            raise ValueError(f'per must be "model", "group" or "tensor", got {per!r}')
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be >= 1, got {refresh_every}")
        self.param_groups: ParamGroups | None = param_groups
        self.method = method
        self.space = space
        self.group, self.plain, self.counted = group, plain, counted
        self.eps = eps
        self.last: Projection | None = None
        self.per = per
        self.refresh_every = refresh_every
        self._age: int | None = None  # steps since the last protect()
        self._directions = Directions(directions, store_dtype, store_device, average)
        self._owners: list[Tensor] = []  # the parameters when the directions were last used, to find replaced ones
        self._unread: _Lengths | None = None  # of the last projection's directions
        self._projected: weakref.ref[Tensor] | None = None  # a gradient that project() has already dealt with
        self._before: dict[Tensor, Tensor] = {}  # in update space: parameters before the inner step
        self._stepping = False  # _before is to be compared with the parameters
        self._protecting = False
        self._in_closure = False
        self._attached = False  # to an optimizer by hooks, which copies of that optimizer do not have
        self._observers: list[Callable[[Projection | None], None]] = []  # called after each step

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
        The gradients are taken, not copied, except those whose memory somebody else may write: DDP's bucket views,
        gradients that share memory, gradients that the caller keeps. An exception inside leaves the directions as they were.

        Gradients of parameters that are not this optimizer's are not touched: they accumulate as they always do.

        Raises:
            RuntimeError: no parameter received a gradient inside the block (in a group, some ranks may own none); the block is
                inside another one, or inside a closure of ``step()``; a parameter is stepped during the backward pass.
            NotImplementedError: a gradient is sparse.
        """
        if self._protecting:
            raise RuntimeError(
                "protect() inside another protect(): several backward passes in one block add up already"
            )
        if self._in_closure:
            raise RuntimeError(
                "protect() inside the closure of step(), which an optimizer may call many times: protect before step(), under "
                "Lightning in on_train_batch_start()"
            )
        self._read_lengths()
        self._protecting = True
        try:
            with captured(self.parameters) as taken:
                yield
        finally:
            self._protecting = False
        if not taken and self.group is None:  # in a group, this rank may own nothing
            raise RuntimeError(
                "protect(): no parameter of the optimizer received a gradient; call loss.backward() inside the block"
            )
        parameters = self.parameters()
        self._follow(parameters)
        self._directions.add(taken)
        self._owners = parameters
        self._projected = None
        self._age = 0

    def protect_each(self, losses: Iterable[Tensor]) -> None:
        """One protected direction per loss, for example per example of a batch: ``protect_each(cross_entropy(..., "none"))``.

        The graph is kept until the last backward pass. As :meth:`protect`, once for each; an exception leaves the directions
        of the losses before it.

        Args:
            losses: scalars that may share a graph, or a tensor [B].
        Raises:
            ValueError: none, or more than directions are kept. Nothing is changed.
        """
        each = [*losses]
        most = self._directions.capacity
        if not each or (most is not None and len(each) > most):
            raise ValueError(f"protect_each: {len(each)} losses, but directions={most}; pass 1 to {most} at a time")
        for i, loss in enumerate(each):
            with self.protect():
                loss.backward(retain_graph=i + 1 < len(each))

    @property
    def protection_due(self) -> bool:
        """Whether nothing was protected in the last ``refresh_every`` steps."""
        return self._age is None or self._age >= self.refresh_every

    def unprotect(self) -> None:
        """Forget all protected directions: the next step is the plain step."""
        self._directions.clear()
        self._owners = []
        self._unread = None
        self._before = {}
        self._age = None

    def project(self) -> Projection | None:
        """Project the gradients now, for clipping or logging before the step; that step then does not do it again.

        Returns:
            what happened, also kept as ``last``; None if nothing is protected.
        Raises:
            RuntimeError: in update space, where the projection is part of the step.
        """
        if self.space == "update":
            raise RuntimeError('project(): with space="update" the projection happens inside step()')
        return self._project_gradients()

    def forget_gradients(self) -> None:
        """The gradients are about to change in place (``zero_grad``): what was projected no longer counts."""
        self._projected = None

    def state_dict(self) -> dict[str, Any]:
        """The directions in the layout of an optimizer's ``state_dict()``: ``["state"][i]["protected_k"]``, oldest first.

        Keeps the tensors, as an optimizer's does; copies none.
        """
        empty = {"state": {}, "param_groups": [{"params": list(range(len(self.parameters())))}]}
        return self.with_directions(empty)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the directions by those in ``state_dict``, this object's or an optimizer's; the newest, if too many.

        Where it has none, the directions stay as they are.

        Raises:
            ValueError: not one entry per parameter, or a shape that is not its parameter's. Nothing is changed.
        """
        _, found = checkpoint.extract(state_dict)
        parameters = self.parameters()
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(ids) != len(parameters):
            raise ValueError(f"load_state_dict: {len(ids)} parameters, but the optimizer has {len(parameters)}")
        directions: dict[int, Direction] = {}
        for i, p in zip(ids, parameters, strict=True):
            for k, t in found.get(i, {}).items():
                if t.shape != p.shape:
                    raise ValueError(
                        f"load_state_dict: direction {k} of parameter {i} has shape {tuple(t.shape)}, but the parameter has "
                        f"shape {tuple(p.shape)}"
                    )
                directions.setdefault(k, {})[p] = t.to(p.device)
        if directions:
            self.unprotect()
            self._owners, self._projected = parameters, None
            for k in sorted(directions):
                self._directions.restore(directions[k])

    def with_directions(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """``state_dict``, the optimizer's, with the directions in it."""
        parameters = self.parameters()
        self._follow(parameters)
        return checkpoint.insert(state_dict, self._directions.tensors(parameters)) if self._directions else state_dict

    def observe(self, observer: Callable[[Projection | None], None]) -> Callable[[], None]:
        """Call ``observer`` with the projection of every step, None if it had none. Returns what ends that.

        Observers do not go with a copy or a pickle, as an optimizer's hooks do not.
        """
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    # Not traced: what is decided here changes from step to step, and each change would compile the step anew.
    @_disable_dynamo
    def before_step(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """To call before the inner step; returns the closure to give to it."""
        if self._protecting:
            raise RuntimeError(
                "step() inside protect(): the gradients made there are not for a step; leave the block first"
            )
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "step() during a backward pass (optimizer-in-backward): a projection needs the gradients of all parameters at "
                "once; remove that hook and call step() after backward()"
            )
        if self.space == "update":
            if self._directions:
                self._read_lengths()
                self._copy_parameters(closure is not None)
        elif closure is None:
            self._project_once()
        if closure is None:
            return None

        def guarded():
            self._in_closure = True
            try:
                loss = closure()
            finally:
                self._in_closure = False
            if self.space == "gradient":
                self._projected = None  # the closure has made new gradients
                self._project_gradients()
            return loss

        return guarded

    @_disable_dynamo
    def after_step(self) -> None:
        """To call after the inner step."""
        self._projected = None
        if self._stepping:
            self._stepping = False
            self._settle(self._project_update)
        if self._age is not None:
            self._age += 1
        for observer in self._observers:
            observer(self.last if self._directions else None)

    def warn_of_a_copy(self) -> None:
        """To call when the optimizer that this is attached to, or this object itself, is copied or pickled."""
        if self._directions:
            warnings.warn(
                f"what attach() put on an optimizer is being copied, but its hooks do not go with it: the copy steps without its "
                f"{len(self)} protected directions until attach() is called again on it",
                RuntimeWarning,
                stacklevel=3,
            )

    def _project_once(self) -> None:
        done = self._projected() if self._projected is not None else None
        if done is not None and any(p.grad is done for p in self.parameters()):
            return
        self._project_gradients()

    def _project_gradients(self) -> Projection | None:
        if not self._directions:
            return None
        self._read_lengths()
        grads = [p.grad for p in self.parameters()]
        self._settle(lambda: self._project_rows(grads))
        some = next((g for g in grads if g is not None), None)
        self._projected = None if some is None else weakref.ref(some)
        return self.last

    def _spread(self, parameters: list[Tensor]) -> distributed.Spread:
        """How the rows are spread over ranks."""
        counted = None if self.counted is None else [bool(self.counted(p)) for p in parameters]
        return distributed.Spread(self.group, self.plain, counted)

    @torch.no_grad()
    def _copy_parameters(self, any_may_change: bool) -> None:
        """What the step may change: what has a gradient, or may get one in a closure. The memory is that of the last step."""
        changing = [p for p in self.parameters() if p.grad is not None or (any_may_change and p.requires_grad)]
        before = {p: self._before.get(p) for p in changing}
        self._before = {p: _like(p) if t is None or not _fits(t, p) else t for p, t in before.items()}
        if changing:  # foreach takes neither an empty list nor a mixture of DTensors and plain tensors
            torch._foreach_copy_(distributed.local([*self._before.values()]), distributed.local(changing))
        self._stepping = True

    @torch.no_grad()
    def _project_update(self) -> Projection:
        parameters = self.parameters()
        after = [p.detach() if p in self._before else None for p in parameters]
        return self._project_rows(after, [self._before.get(p) for p in parameters])

    def _project_rows(self, grads: list[Tensor | None], base: list[Tensor | None] | None = None) -> Projection:
        parameters = self.parameters()
        self._follow(parameters)
        rows, parts, spread = self._directions.rows(parameters), self._parts(parameters), self._spread(parameters)
        known = self._directions.share(grads, parameters, spread, parts) if len(rows) > 1 else None
        done = project_(
            grads,
            *rows,
            method=self.method,
            eps=self.eps,
            known=known,
            base=base,
            parts=parts,
            **spread._asdict(),
        )
        self._directions.keep(done.gram[..., 1:, 1:])
        return done

    def _parts(self, parameters: list[Tensor]) -> list[int] | None:
        """The number of the part that each parameter belongs to; None if all are one."""
        if self.per == "model":
            return None
        if self.per == "tensor":
            return [*range(len(parameters))]
        assert self.param_groups is not None  # parameters() has asked
        return [i for i, group in enumerate(self.param_groups()) for _ in group["params"]]

    def _settle(self, project: Callable[[], Projection]) -> None:
        """``last = project()``, and again without the directions that turn out not to be finite, for which nothing was written."""
        while self._directions:
            self.last = project()
            self._unread = _Lengths(self.last.gram)
            if not self._unread.on_host or not self._read_lengths():
                break

    def _read_lengths(self) -> bool:
        """Drop the directions that are known not to be finite; returns whether there were some."""
        if self._unread is None or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return False
        bad, self._unread = self._unread.not_finite(), None
        if bad:
            warnings.warn(
                f"{len(bad)} of {len(self._directions)} protected directions (number {', '.join(map(str, bad))}, 0 being the "
                f"oldest) had a gradient that is inf, nan or overflows, and was dropped: look at the capability loss, or "
                f"lower the loss scale",
                RuntimeWarning,
                stacklevel=2,
            )
            self._directions.drop(bad)
        return bool(bad)

    def _follow(self, parameters: list[Tensor]) -> None:
        """Give the directions of parameters that were replaced, one to one, to their successors.

        Raises:
            RuntimeError: some were replaced, and it is not clear by which.
        """
        owners = self._owners
        if not self._directions or (len(owners) == len(parameters) and all(map(operator.is_, owners, parameters))):
            return
        left, came = set(owners).difference(parameters), set(parameters).difference(owners)
        if left and came:
            pairs = list(zip(owners, parameters, strict=False))
            same = len(owners) == len(parameters) and all(a is b or (a in left and b in came) for a, b in pairs)
            if not same or any(_kind(a) != _kind(b) for a, b in pairs):
                raise RuntimeError(
                    f"{len(left)} of the optimizer's {len(owners)} parameters were replaced after protect(), and the present "
                    f"{len(parameters)} do not correspond to them in number, order and shape; call unprotect() and "
                    f"protect() again"
                )
            self._directions.move(dict(pairs))
        self._owners = parameters

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._attached:
            self.warn_of_a_copy()
        state["param_groups"] = None  # the owner knows
        state["_projected"] = state["_unread"] = None  # references do not survive a copy
        state["_before"] = {}
        state["_observers"] = []
        return state


class _Lengths:
    """Squared lengths of the directions of one projection, on their way from the device to the host."""

    def __init__(self, gram: Tensor):
        lengths = gram.diagonal(dim1=-2, dim2=-1)[..., 1:]
        self.on_host = lengths.device.type == "cpu"
        self._copied = None
        if lengths.is_cuda and not torch.cuda.is_current_stream_capturing():
            lengths = lengths.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._lengths = lengths

    def not_finite(self) -> list[int]:
        """Numbers of the directions that are not finite. Waits for that projection, not for what was queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        columns = zip(*self._lengths.reshape(-1, self._lengths.shape[-1]).tolist(), strict=True)
        return [k for k, column in enumerate(columns) if not all(map(math.isfinite, column))]


def _like(p: Tensor) -> Tensor:
    return torch.empty_like(p, requires_grad=False)


def _fits(t: Tensor, p: Tensor) -> bool:
    return t.shape == p.shape and t.dtype == p.dtype and t.device == p.device


def _kind(p: Tensor) -> tuple:
    return p.shape, hasattr(p, "device_mesh")
