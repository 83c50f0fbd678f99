"""Directions: K gradients of the capability loss, over all parameters as one vector, that a step leaves alone."""

import contextlib
import operator
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradproj.capture import CaptureBlock, Direction, gradients_aside, take
from gradproj.directions import checkpoint
from gradproj.directions.kept_gram import KeptGram
from gradproj.directions.ranks import RanksAgree
from gradproj.directions.step_memory import OnHost, StepMemory, is_capturing
from gradproj.kernels import methods
from gradproj.protection import Closure, Protection
from gradproj.rows import functional
from gradproj.rows.functional import Row
from gradproj.rows.results import Projection

MOST = 64  # what the kernels take in one pass
DTYPES = (None, torch.bfloat16, torch.float16)


class Directions(Protection):
    """The ``count`` newest gradients of ``protect()`` blocks; before each step the gradient is projected against them.

    A direction that is not finite is dropped with a RuntimeWarning: on the CPU before the step uses the others,
    elsewhere at the next ``protect()`` or ``step()``, because asking at once would synchronise; until then the device
    leaves the gradients untouched.

    ``"orthogonal"`` and ``"conflict"`` with ``eps=0`` do not depend on the scale of a direction, so a ``GradScaler``
    need not unscale anything. For other methods, scale the capability loss as the safety loss is scaled.

    Args:
        count: how many directions to keep, 1 to 64; a further ``protect()`` block replaces the oldest.
        method: ``"orthogonal"``, ``"conflict"``, ``"pcgrad"``, ``("mix", gamma)``, or a callable Gram -> weights; see
            :func:`gradproj.project_`.
        eps: added to every <d, d>; 0 is scale-free.
        per: ``"model"`` projects all parameters as one vector; ``"group"`` those of each parameter group, ``"tensor"``
            each parameter by itself, in the same passes: the tensors in ``last`` then have a leading dimension.
        dtype: None keeps gradients as they are made, without a copy. bfloat16 or float16 halve the memory of float32
            directions (float16 overflows at 65504 and loses digits below 6e-5). A projection is exact with respect to
            what is stored. Complex gradients are kept as their real view in either case.
    Raises:
        ValueError, TypeError: a setting that is not one of these.

    Example::

        inner = torch.optim.AdamW(model.parameters(), lr=1e-5)
        opt = gradproj.ProjectedOptimizer(inner, gradproj.Directions(8, "conflict"))
        with opt.protect():
            capability_loss(model, anchor).backward()
        safety_loss(model, batch).backward()
        opt.step()
        opt.zero_grad()
    """

    captures_once = False

    def __init__(
        self,
        count: int = 1,
        method: methods.Method = "orthogonal",
        *,
        eps: float = 0.0,
        per: Literal["model", "group", "tensor"] = "model",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"Directions: count must be an int, got {count!r}")
        if per not in ("model", "group", "tensor"):
            raise ValueError(f'Directions: per must be "model", "group" or "tensor", got {per!r}')
        if not 1 <= count <= MOST:
            raise ValueError(
                f"Directions: count must be 1 to {MOST}, got {count}; to protect more losses, add several up in one "
                f"protect() block"
            )
        if dtype not in DTYPES:
            raise ValueError(f"Directions: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self._rule = methods.parse(method, eps)
        self._repeatable = method in ("orthogonal", "conflict")
        self.count, self.method, self.eps, self.per, self.dtype = count, method, eps, per, dtype
        self._last: Projection | None = None
        self._ranks_agree = RanksAgree()
        self._rows: deque[Direction] = deque(maxlen=count)
        self._lists: list[Row] | None = None  # the same in the order of _owners, made when needed
        self._owners: list[Tensor] = []  # the parameters when the directions were last used, to find replaced ones
        self._loaded: list[Direction] = []  # what came from checkpoints since the last protect() block
        self._gram_dd = KeptGram()
        self._lengths: OnHost | None = None  # of the last projection's directions
        self._memory = StepMemory()

    def __len__(self) -> int:
        """How many directions are protected now."""
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Directions({len(self)} of {self.count}, {self.method!r}, per={self.per!r})"

    def clear(self) -> None:
        self._keep(())
        self._owners, self._loaded, self._lengths = [], [], None
        self._memory.forget()

    def rows(self) -> list[list[Tensor | None]]:
        """The directions, oldest first: of each a list with an entry for every parameter. Not copied."""
        return [[*row] for row in self._in_order_of(self.parameters())]

    @property
    def last(self) -> Projection | None:
        return self._last

    def metrics(self) -> dict[str, float]:
        """``removed``: length of the change over that of the gradient; ``cosine_min``: least with a direction."""
        if self._last is None:
            return {}
        return {"removed": self._last.removed.max().item(), "cosine_min": self._last.cosine.min().item()}

    def capture(self) -> CaptureBlock:
        """Context manager: the gradients made inside are a direction; several backward passes add up.

        ``p.grad`` is set aside when the block is entered and put back when it ends. The gradients are taken, not
        copied, except those whose memory somebody else may write: DDP's bucket views, gradients that share memory,
        gradients that the caller keeps. An exception inside leaves everything as it was. Gradients of parameters that
        are not this optimizer's are not touched: they accumulate as they always do.

        Raises:
            RuntimeError: no parameter received a gradient inside the block (with a group, some ranks may own none); the
                block is inside another one, or inside a closure of ``step()``; a parameter is stepped during the
                backward pass; DeepSpeed owns the parameters.
            NotImplementedError: a gradient is sparse.
        """
        return CaptureBlock(self._capture())

    @contextlib.contextmanager
    def _capture(self) -> Iterator[None]:
        with self._while_capturing(), gradients_aside(self.parameters) as aside:
            yield
            parameters = self.parameters()
            taken = take(parameters)
        alone = self.sharding is None or (self.sharding.group is None and self.sharding.placement is None)
        if not taken and alone:  # in a group, a rank may own nothing
            raise RuntimeError(f"protect(): {aside.why_empty()}")
        self._ranks_agree.tell(parameters, taken, self.sharding)
        self._drop_non_finite()
        self._follow(parameters)
        if len(self._rows) == self.count:
            self._gram_dd.evict()
        self._rows.append({p: self._as_kept(t) for p, t in taken.items()})
        self._owners, self._lists, self._loaded = parameters, None, []
        self._memory.outdated = True

    def _as_kept(self, t: Tensor) -> Tensor:
        if t.is_complex():
            t = torch.view_as_real(t.resolve_conj())
        return t if self.dtype is None else t.to(self.dtype)

    def before_step(self, closure: Closure | None, begins: bool = True) -> Closure | None:
        self._check_step()
        if closure is not None:
            return self._guarded(closure, then=lambda: self.before_step(None))
        self._ranks_agree.check(self.parameters())
        # The loop of project(), but not in a function of its own: from opt.step() to the op there are six frames.
        for call in self._projections(again=False, watch=len(self._optimizers) > 1):
            self._last = functional.project_rows(*call)
        return None

    def after_step(self) -> None:
        self._memory.forget()

    def project(self) -> Projection | None:
        self._ranks_agree.check(self.parameters())
        if not self._rows:
            return None
        for call in self._projections(again=True, watch=True):
            self._last = functional.project_rows(*call)
        return self._last

    def _projections(self, again: bool, watch: bool) -> Iterator[tuple]:
        """Arguments for a projection. For another one while it finds directions that are not finite: it wrote nothing.

        Args:
            again: also if these gradients have been projected.
            watch: there may be further backward passes before the step.
        """
        parameters = self.parameters()
        grads = [p.grad for p in parameters]
        if not self._rows or not again and self._memory.holds(parameters, grads, self._repeatable):
            return
        self._drop_non_finite()
        while self._rows:
            rows, part = self._in_order_of(parameters), self._part(parameters)
            gram_dd = self._gram_dd.of(rows, parameters, grads, self.sharding, part)
            yield grads, rows, self._rule, self.sharding, gram_dd, *part
            assert self._last is not None
            lengths = self._last.gram.diagonal(dim1=-2, dim2=-1)[..., 1:]
            self._lengths = OnHost(lengths.isfinite().reshape(-1, lengths.shape[-1]).all(0))
            if not _reads_for_free(lengths) or not self._drop_non_finite():
                break
        self._memory.remember(parameters, grads, watch)

    def _keep(self, rows: Iterable[Direction]) -> None:
        """Other directions than before."""
        self._rows, self._lists = deque(rows, self.count), None
        self._gram_dd.clear()

    def _in_order_of(self, parameters: list[Tensor]) -> list[Row]:
        self._follow(parameters)
        if self._lists is None:
            for row in self._rows:
                if row and not any(p in row for p in parameters):
                    raise RuntimeError(
                        "a direction belongs to none of the optimizer's parameters: they were replaced after "
                        "protect(); call unprotect() and protect() again"
                    )
            self._lists = [[row.get(p) for p in parameters] for row in self._rows]
        return self._lists

    def _part(self, parameters: list[Tensor]) -> tuple[Sequence[int], int]:
        """``part`` and ``num_parts`` of :class:`gradproj.rows.call.Call`."""
        if self.per == "model":
            return (), 0
        if self.per == "tensor":
            return range(len(parameters)), len(parameters)
        groups = self._live_groups()
        return [i for i, group in enumerate(groups) for _ in group["params"]], len(groups)

    def _drop_non_finite(self) -> bool:
        """Drop the directions that are known not to be finite. Returns whether there were any."""
        if self._lengths is None or is_capturing():
            return False
        finite, self._lengths = self._lengths.read(), None
        bad = [k for k, good in enumerate(finite) if not good]
        if bad:
            numbers = ", ".join(map(str, bad))
            warnings.warn(
                f"{len(bad)} of {len(self._rows)} directions (number {numbers}, 0 being the oldest) had a gradient "
                f"that is inf, nan or overflows, and was dropped: look at the capability loss, or lower the loss scale",
                RuntimeWarning,
                stacklevel=2,
            )
            self._keep([row for k, row in enumerate(self._rows) if k not in bad])
        return bool(bad)

    def _follow(self, parameters: list[Tensor]) -> None:
        """Give the directions of replaced parameters to their successors; RuntimeError if those are not clear."""
        owners = self._owners
        if not self._rows or (len(owners) == len(parameters) and all(map(operator.is_, owners, parameters))):
            return
        left, came = set(owners).difference(parameters), set(parameters).difference(owners)
        if left and came:
            successors = dict(zip(owners, parameters, strict=False))
            if len(owners) != len(parameters) or not all(
                a is b or (a in left and b in came and _kind(a) == _kind(b)) for a, b in successors.items()
            ):
                raise RuntimeError(
                    f"{len(left)} of the optimizer's {len(owners)} parameters were replaced after protect(), and the "
                    f"present {len(parameters)} do not correspond to them in number, order and shape; call unprotect() "
                    f"and protect() again"
                )
            self._keep([{successors.get(p, p): t for p, t in row.items()} for row in self._rows])
        self._owners, self._lists = parameters, None

    def state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        self._follow(self.parameters())
        return checkpoint.insert(state_dict, [[row.get(p) for p in parameters] for row in self._rows])

    def strip(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return checkpoint.without_directions(state_dict)

    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Its directions, the newest if there are too many, replace what is protected. Those of several optimizers,
        loaded one after the other, come together again."""
        found = checkpoint.directions(state_dict, parameters)
        if not found:
            return
        mine = set(parameters)
        loaded = [{p: t for p, t in row.items() if p not in mine} for row in self._loaded]
        loaded += [{} for _ in found[len(loaded) :]]
        for row, came in zip(loaded, found, strict=False):
            row.update((p, self._as_kept(t)) for p, t in came.items())
        while not loaded[-1]:  # what these parameters had in a checkpoint before
            loaded.pop()
        self.clear()
        self._keep(loaded)
        self._owners, self._loaded = self.parameters(), loaded

    def release(self) -> None:
        super().release()
        self._memory.forget()

    def __getstate__(self) -> dict[str, Any]:
        mine = {"_gram_dd": KeptGram(), "_lists": None, "_memory": StepMemory(), "_lengths": None}
        return {**super().__getstate__(), **mine, "_ranks_agree": RanksAgree()}


def _reads_for_free(t: Tensor) -> bool:
    return t.device.type == "cpu"  # elsewhere reading synchronises


def _kind(p: Tensor) -> tuple:
    return p.shape, hasattr(p, "device_mesh")
