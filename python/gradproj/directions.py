"""Directions: K gradients of the capability loss, over all parameters as one vector, that a step leaves alone."""

import operator
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports the compiler only when needed
from torch.utils.hooks import RemovableHandle

from gradproj import checkpoint, functional, methods, sharding
from gradproj.capture import Direction
from gradproj.functional import Projection, Row
from gradproj.kept_gram import KeptGram
from gradproj.protection import Closure, Protection

MOST = 64  # what the kernels take in one pass
DTYPES = (None, torch.bfloat16, torch.float16)


class Directions(Protection):
    """The ``count`` newest gradients of ``protect()`` blocks; before each step the gradient is projected against them.

    A direction that is not finite is dropped with a RuntimeWarning: on the CPU before the step uses the others, elsewhere at
    the next ``protect()`` or ``step()``, because asking at once would synchronise; until then the device leaves the
    gradients untouched.

    Under a ``GradScaler`` nothing needs to be unscaled for ``"orthogonal"`` and ``"conflict"`` with ``eps=0``, which do not
    depend on the scale of a direction. For other methods, divide the capability loss by what the safety loss is divided by.

    Args:
        count: how many directions to keep, 1 to 64; each further ``protect()`` block replaces the oldest.
        method: ``"orthogonal"``, ``"conflict"``, ``"pcgrad"``, ``("mix", gamma)``, or a callable Gram -> weights; see
            :func:`gradproj.project_`.
        eps: added to every <d, d>; 0 is scale-free.
        per: ``"model"`` projects all parameters as one vector; ``"group"`` those of each parameter group, ``"tensor"`` each
            parameter by itself, in the same passes: the tensors in ``last`` then have a leading dimension.
        space: ``"gradient"`` projects ``p.grad`` before the inner step. ``"update"`` projects what the inner step did to the
            parameters, momentum and weight decay included. That takes one copy of the parameters that have gradients (with a
            closure: of all that require them), N bytes more, kept from step to step.
        dtype: None keeps gradients as they are made, without a copy. bfloat16 or float16 halve the memory of float32
            directions (float16 overflows at 65504 and loses digits below 6e-5). A projection is exact with respect to what
            is stored.
    Raises:
        ValueError, TypeError: a setting that is not one of these.

    Example::

        opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-5), gradproj.Directions(8, "conflict"))
        with opt.protect():
            capability_loss(model, anchor).backward()
        safety_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    """

    def __init__(
        self,
        count: int = 1,
        method: methods.Method = "orthogonal",
        *,
        eps: float = 0.0,
        per: Literal["model", "group", "tensor"] = "model",
        space: Literal["gradient", "update"] = "gradient",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"Directions: count must be an int, got {count!r}")
        if not 1 <= count <= MOST:
            raise ValueError(
                f"Directions: count must be 1 to {MOST}, got {count}; to protect more losses, add several up in one protect() block"
            )
        if per not in ("model", "group", "tensor"):
            raise ValueError(f'Directions: per must be "model", "group" or "tensor", got {per!r}')
        if space not in ("gradient", "update"):
            raise ValueError(f'Directions: space must be "gradient" or "update", got {space!r}')
        if dtype not in DTYPES:
            raise ValueError(f"Directions: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self._rule = methods.parse(method, eps)
        self.count, self.method, self.eps, self.per, self.space, self.dtype = count, method, eps, per, space, dtype
        self._rows: deque[Direction] = deque(maxlen=count)
        self._gram_dd = KeptGram()
        self._owners: list[Tensor] = []  # the parameters when the directions were last used, to find replaced ones
        self._lengths: _OnHost | None = None  # of the last projection's directions
        self._projected: _Projected | None = None
        self._before: dict[Tensor, Tensor] = {}  # in update space: parameters before the inner step
        self._stepping = False  # _before is to be compared with the parameters

    def __len__(self) -> int:
        """How many directions are protected now."""
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Directions({len(self)} of {self.count}, {self.method!r}, per={self.per!r}, space={self.space!r})"

    def clear(self) -> None:
        self._rows.clear()
        self._gram_dd.clear()
        self._owners, self._lengths, self._before = [], None, {}

    def rows(self) -> list[list[Tensor | None]]:
        """The directions, oldest first: per direction a list with an entry for each parameter. Not copied.

        Raises:
            RuntimeError: parameters were replaced, and it is not clear by which.
        """
        parameters = self.parameters()
        self._follow(parameters)
        return [[row.get(p) for p in parameters] for row in self._rows]

    def _add(self, taken: Direction) -> None:
        self._drop_non_finite()
        parameters = self.parameters()
        self._follow(parameters)
        if self.dtype is not None:
            for p, t in taken.items():
                taken[p] = _real(t).to(self.dtype)
        self._rows.append(taken)
        self._gram_dd.added()
        self._owners, self._projected = parameters, None

    # --- the step -------------------------------------------------------------------------------------------------------

    # Not traced: what is decided here changes from step to step, and each change would compile the step anew.
    @_disable_dynamo
    def before_step(self, closure: Closure | None) -> Closure | None:
        self._check_step()
        if self.space == "update":
            if self._rows and not self._stepping:
                self._drop_non_finite()
                self._copy_parameters(closure is not None)
            return None if closure is None else self._guarded(closure, None)
        if closure is not None:
            return self._guarded(closure, self._project_gradients)
        if self._projected is None or not self._projected.holds(self.parameters(), self._rule):
            self._project_gradients()
        return None

    @_disable_dynamo
    def after_step(self) -> None:
        self._forget_projected()
        if self._stepping:
            self._stepping = False
            self._project_until_finite(self._project_update)
        for observer in self._observers:
            observer(self.last if self._rows else None)

    def project(self) -> Projection | None:
        if self.space == "update":
            super().project()
        self._ranks_agree.check(self.parameters())
        done = self._project_gradients()
        if self._projected is not None:
            self._projected.watch(self.parameters())
        return done

    def _project_gradients(self) -> Projection | None:
        self._forget_projected()
        if not self._rows:
            return None
        self._drop_non_finite()
        parameters = self.parameters()
        grads = [p.grad for p in parameters]
        self._project_until_finite(lambda: self._project_rows(parameters, grads))
        some = next((g for g in grads if g is not None), None)
        self._projected = None if some is None else _Projected(some)
        return self.last

    def _project_rows(self, parameters: list[Tensor], grads: list[Tensor | None]) -> Projection:
        rows = self._usable_rows(parameters)
        part = self._parts(parameters)
        gram_dd = self._gram_dd.of(rows, parameters, grads, self.sharding, part)
        return functional.project_rows(grads, rows, self._rule, self.sharding, gram_dd, *part)

    def _forget_projected(self) -> None:
        if self._projected is not None:
            self._projected.unwatch()
            self._projected = None

    # --- update space ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _copy_parameters(self, any_may_change: bool) -> None:
        """What the step may change: what has a gradient, or may get one in a closure. The memory is that of the last step."""
        changing = [p for p in self.parameters() if p.grad is not None or (any_may_change and p.requires_grad)]
        before = {p: self._before.get(p) for p in changing}
        self._before = {p: _like(p) if t is None or not _fits(t, p) else t for p, t in before.items()}
        if changing:  # foreach takes neither an empty list nor a mixture of DTensors and plain tensors
            torch._foreach_copy_(sharding.local_tensors([*self._before.values()]), sharding.local_tensors(changing))
        self._stepping = True

    @torch.no_grad()
    def _project_update(self) -> Projection:
        """The update u = before - after is made in the memory of the copy; with its weights w, u becomes w_0 u + sum w_k d_k,
        which is what (1, 1 - w_0, -w_1, ..) makes of the rows (after, u, d_1, ..)."""
        parameters = self.parameters()
        after = [p.detach() if p in self._before else None for p in parameters]
        update = [self._before.get(p) for p in parameters]
        if self._before:
            mine = [p for p in parameters if p in self._before]
            torch._foreach_sub_(
                sharding.local_tensors([self._before[p] for p in mine]), sharding.local_tensors([p.detach() for p in mine])
            )
        rows, part = self._usable_rows(parameters), self._parts(parameters)
        gram_dd = self._gram_dd.of(rows, parameters, update, self.sharding, part)
        products = functional.weigh_rows(update, rows, self._rule, self.sharding, gram_dd, *part)
        change = -products.weights
        change[..., 0] += 1.0
        weights = torch.cat([torch.ones_like(change[..., :1]), change], dim=-1)
        functional.combine_parts(after, [update, *rows], weights, *part)
        return products

    # --- which directions -----------------------------------------------------------------------------------------------

    def _usable_rows(self, parameters: list[Tensor]) -> list[Row]:
        self._follow(parameters)
        for row in self._rows:
            if row and not any(p in row for p in parameters):
                raise RuntimeError(
                    "a direction belongs to none of the optimizer's parameters: they were replaced after protect(); call "
                    "unprotect() and protect() again"
                )
        return [[row.get(p) for p in parameters] for row in self._rows]

    def _parts(self, parameters: list[Tensor]) -> tuple[Sequence[int], int]:
        """The number of the part that each parameter belongs to, and how many there are."""
        if self.per == "model":
            return (), 0
        if self.per == "tensor":
            return range(len(parameters)), len(parameters)
        groups = self.param_groups()
        return [i for i, group in enumerate(groups) for _ in group["params"]], len(groups)

    def _project_until_finite(self, project: Callable[[], Projection]) -> None:
        """``last = project()``, again without the directions that turn out not to be finite, for which nothing was written."""
        while self._rows:
            self.last = project()
            lengths = self.last.gram.diagonal(dim1=-2, dim2=-1)[..., 1:]
            self._lengths = _OnHost(lengths.isfinite().reshape(-1, lengths.shape[-1]).all(0))
            if lengths.device.type != "cpu" or not self._drop_non_finite():
                break

    def _drop_non_finite(self) -> bool:
        """Drop the directions that are known not to be finite; returns whether there were some."""
        if self._lengths is None or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return False
        finite, self._lengths = self._lengths.read(), None
        bad = [k for k, good in enumerate(finite) if not good]
        if bad:
            warnings.warn(
                f"{len(bad)} of {len(self._rows)} directions (number {', '.join(map(str, bad))}, 0 being the oldest) had a "
                f"gradient that is inf, nan or overflows, and was dropped: look at the capability loss, or lower the loss scale",
                RuntimeWarning,
                stacklevel=2,
            )
            self._rows = deque((row for k, row in enumerate(self._rows) if k not in bad), self.count)
            self._gram_dd.clear()
        return bool(bad)

    def _follow(self, parameters: list[Tensor]) -> None:
        """Give the directions of parameters that were replaced, one to one, to their successors.

        Raises:
            RuntimeError: some were replaced, and it is not clear by which.
        """
        owners = self._owners
        if not self._rows or (len(owners) == len(parameters) and all(map(operator.is_, owners, parameters))):
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
            successors = dict(pairs)
            self._rows = deque(({successors.get(p, p): t for p, t in row.items()} for row in self._rows), self.count)
            self._gram_dd.clear()
        self._owners = parameters

    # --- state ----------------------------------------------------------------------------------------------------------

    def state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        self._follow(self.parameters())
        rows = [[row.get(p) for p in parameters] for row in self._rows]
        return checkpoint.insert(state_dict, rows)

    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Directions replace those of ``parameters``; the newest, if there are too many.

        Raises:
            ValueError: not one entry per parameter, or a shape that is not its parameter's. Nothing is changed.
        """
        loaded = checkpoint.directions(state_dict, parameters)
        if not loaded:
            return
        mine = set(parameters)
        kept = [{p: t for p, t in row.items() if p not in mine} for row in self._rows]  # of the other optimizers of a list
        kept += [{}] * (len(loaded) - len(kept))
        loaded += [{}] * (len(kept) - len(loaded))
        rows = [a | b for a, b in zip(kept, loaded, strict=True)]
        self.clear()
        self._rows.extend(row for row in rows if row)
        self._owners, self._projected = self.parameters(), None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_projected": None, "_lengths": None, "_before": {}, "_gram_dd": KeptGram()}


class _Projected:
    """Gradients that have been projected already, known by one of them; what adds to them afterwards is noticed if watched."""

    def __init__(self, grad: Tensor):
        self._grad = weakref.ref(grad)
        self._hooks: list[RemovableHandle] = []
        self._added = False

    def watch(self, parameters: list[Tensor]) -> None:
        """From now on notice backward passes."""
        self._hooks = [p.register_post_accumulate_grad_hook(self._notice) for p in parameters if p.requires_grad]

    def _notice(self, _) -> None:
        self._added = True

    def unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def holds(self, parameters: list[Tensor], rule) -> bool:
        """Whether the present gradients are projected.

        Raises:
            RuntimeError: they are in part, and projecting twice is not projecting once.
        """
        done = self._grad()
        if done is None or not any(p.grad is done for p in parameters):
            return False
        if self._added and getattr(rule, "name", "") not in ("orthogonal", "conflict"):
            raise RuntimeError(
                "step(): a backward pass has added to the gradients since project(), which is not to be applied twice with this "
                "method; call project() after the last backward()"
            )
        return not self._added


class _OnHost:
    """A small tensor on its way to the host."""

    def __init__(self, t: Tensor):
        self._tensor, self._copied = t, None
        if t.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._tensor = t.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list:
        """Waits for what made it, not for what was queued afterwards."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.tolist()


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _like(p: Tensor) -> Tensor:
    return torch.empty_like(p, requires_grad=False)


def _fits(t: Tensor, p: Tensor) -> bool:
    return t.shape == p.shape and t.dtype == p.dtype and t.device == p.device


def _kind(p: Tensor) -> tuple:
    return p.shape, hasattr(p, "device_mesh")
