"""A backward pass's gradients, apart from those that are there: set aside, taken without a copy where that is safe, put
back."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradproj.rows.dtensors import summed as summed_partial

Direction = dict[Tensor, Tensor]  # parameter -> its gradient; a parameter that is missing counts as zeros

SCALE = 2.0**12  # of losses that callbacks capture: no rounding, and float16 holds gradients of a mean over many tokens
DEEPSPEED = (
    "DeepSpeed's engine reduces, partitions and frees the gradients itself, so that p.grad is not the gradient; "
    "protect with gradproj.integrations.deepspeed.protect(), or shard with fully_shard (FSDP2) and pass a torch "
    "optimizer"
)


class Aside:
    """What a block with gradients of its own is asked when it ends."""

    def __init__(self, parameters: list[Tensor]):
        self._parameters = parameters
        self._reached = False
        first = next((p for p in parameters if p.requires_grad), None)
        self._watch = first.register_post_accumulate_grad_hook(self._reach) if first is not None else None

    def _reach(self, _) -> None:
        self._reached = True

    def end(self) -> None:
        if self._watch is not None:
            self._watch.remove()

    def why_empty(self) -> str:
        """Why no parameter has a gradient, in words."""
        count = len(self._parameters)
        if self._reached:
            return "the gradients that backward() made were dropped inside the block (zero_grad()?); leave them there"
        if "deepspeed" in sys.modules and all(p.dim() == 1 for p in self._parameters):  # its flat copies
            return DEEPSPEED
        if self._watch is None:
            return (
                f"none of the optimizer's {count} parameters requires a gradient: they were frozen after the optimizer "
                "was made, or it was made from another model"
            )
        return (
            f"none of the optimizer's {count} parameters received a gradient: call loss.backward() inside the block, "
            "on the model whose parameters these are (adapters added after the optimizer was made, and copies, are "
            "others)"
        )


@contextlib.contextmanager
def gradients_aside(parameters: Callable[[], list[Tensor]]) -> Iterator[Aside]:
    """``p.grad`` is None when the block begins, and what it was before when it has ended, also after an exception.

    Args:
        parameters: gives the parameters; asked again at the end, since the block may replace some.
    Raises:
        RuntimeError: a parameter is stepped, or its gradient freed, during the backward pass; DeepSpeed owns the
            parameters.
    """
    owners = parameters()
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in owners):
        raise RuntimeError(f"protect(): {DEEPSPEED}")
    watches = _watch(owners)
    # Contents are kept too where a backward pass may overwrite them.
    before = [(p, g, g.clone() if g is not None and _shares_storage(g) else None) for p in owners for g in [p.grad]]
    for p in owners:
        p.grad = None
    aside = Aside(owners)
    try:
        yield aside
    finally:
        aside.end()
        for watch in watches:
            watch.remove()
        for p in parameters():
            p.grad = None
        for p, grad, contents in before:
            if grad is not None and contents is not None:
                with torch.no_grad():
                    grad.copy_(contents)
            p.grad = grad


def take(parameters: list[Tensor]) -> Direction:
    """The gradients of ``parameters``, to keep: not copied, except those whose memory somebody else may write.

    Raises:
        NotImplementedError: a gradient is sparse.
    """
    return {p: _take(p, i) for i, p in enumerate(parameters) if p.grad is not None}


def _take(p: Tensor, index: int) -> Tensor:
    kept = _references(p) > _fresh().references  # asked before this function holds the gradient too
    grad = cast(Tensor, p.grad)
    if grad.layout != torch.strided:
        raise NotImplementedError(
            f"protect(): the gradient of parameter {index} with shape {tuple(p.shape)} has layout {grad.layout}; a "
            f"projection takes dense ones: build the layer without sparse=True"
        )
    summed = summed_partial(grad)
    return grad.clone() if summed is grad and (kept or _shares_storage(grad)) else summed


def _shares_storage(grad: Tensor) -> bool:
    """Whether another tensor lies in the memory of ``grad``, through which it may be written.

    DDP's bucket views, contiguous gradient buffers, and gradients of several views of one tensor. Not a DTensor: the
    gradients of a ``fully_shard`` group are views of one buffer, but each backward pass makes a new one, and what
    writes to it afterwards is only the accumulation into ``p.grad``.
    """
    if grad.layout != torch.strided or hasattr(grad, "device_mesh"):
        return False
    return _storage_users(grad) > _fresh().storage_users


def _storage_users(grad: Tensor) -> int:
    return torch._C._storage_Use_Count(grad.untyped_storage()._cdata)


def _references(p: Tensor) -> int:
    """To the Python object ``p.grad``: more than to a fresh one if the caller keeps it, and may zero it."""
    return sys.getrefcount(p.grad)


class _Counts(NamedTuple):
    references: int
    storage_users: int


@functools.cache
def _fresh() -> _Counts:
    """The counts of a gradient that only its parameter has; they differ between versions of Python and torch."""
    p = torch.zeros(1, requires_grad=True)
    p.grad = torch.zeros(1)
    return _Counts(_references(p), _storage_users(p.grad))


def _watch(parameters: list[Tensor]) -> list[RemovableHandle]:
    """Hooks, run after the users' own, that find a parameter stepped, or its gradient freed, during a backward pass."""
    watches = []
    for i, p in enumerate(parameters):
        if hasattr(p, "_in_backward_optimizers"):
            raise _stepped(i, p)
        if not p._post_accumulate_grad_hooks:
            continue

        def check(p, i=i, version=p._version):
            if p.grad is None or p._version != version:
                raise _stepped(i, p)

        watches.append(p.register_post_accumulate_grad_hook(check))
    return watches


def _stepped(i: int, p: Tensor) -> RuntimeError:
    return RuntimeError(
        f"protect(): parameter {i} with shape {tuple(p.shape)} is stepped, or its gradient freed, during the backward "
        "pass (optimizer-in-backward); a projection needs the gradients of all parameters at once: remove that hook "
        "and call step() after backward()"
    )


class CaptureBlock:
    """A context manager that warns if it was never entered: ``opt.protect()`` without ``with`` protects nothing."""

    def __init__(self, block: contextlib.AbstractContextManager[None]):
        self._block = block
        self._entered = False

    def __enter__(self) -> None:
        self._entered = True
        self._block.__enter__()

    def __exit__(self, *error) -> bool | None:
        return self._block.__exit__(*error)

    def __del__(self) -> None:
        if not self._entered:
            warnings.warn(
                "protect() was called without `with`: nothing was protected; write `with opt.protect():` around the "
                "backward pass",
                RuntimeWarning,
                stacklevel=2,
            )


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """In evaluation mode, with all that is in them; every module's own mode comes back."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
