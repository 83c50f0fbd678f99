"""How an op of this backend is registered, refuses, and launches its kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gradproj.kernels import backends, ops


class Refused(RuntimeError):
    """Says what the kernels do not take. Nothing has been written."""


def refusing(check: Callable, *arguments: Any) -> Any:
    """What ``check`` returns. An error of it is raised as :class:`Refused`."""
    try:
        return check(*arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise Refused(str(error)) from error


def implement(function: Callable) -> Callable:
    """Registers the op of ``gradproj_triton`` that has the function's name: for CUDA tensors, or interpreted for those
    on the CPU. A kernel that does not compile or start becomes one error that says what failed, where, and the way out.
    """
    name = function.__name__

    @functools.wraps(function)
    def op(*arguments):
        try:
            return function(*arguments)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            first = arguments[0]
            device = (first if isinstance(first, Tensor) else next(t for t in first if t is not None)).device
            called = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            cause: BaseException = error
            while cause.__cause__ is not None:  # the compiler's own errors begin with a listing
                cause = cause.__cause__
            line = (str(cause).strip().splitlines() or [""])[0]
            raise RuntimeError(
                f"{name}: a Triton kernel does not compile or start (Triton {triton.__version__}, {called}): "
                f"{type(cause).__name__}: {line}; use gradproj.use_backend('torch'), or install another Triton"
            ) from error

    ops.implement("gradproj_triton", name, op, "CPU" if backends.INTERPRETED else "CUDA")
    return function


class Start(NamedTuple):
    """A launch, ``kernel[grid](*arguments)``; ``form`` is all of it that the compiler specialises on."""

    kernel: Any
    form: tuple
    grid: int
    arguments: tuple
    warps: int = 4
    registers: int | None = None  # of a thread, at most

    def run(self) -> None:
        self.kernel[(self.grid,)](*self.arguments, num_warps=self.warps, maxnreg=self.registers)


_compiled: set[tuple] = set()


def launch(device: torch.device, starts: Sequence[Start]) -> None:
    """Launches kernels that write the user's buffers, after all of them are compiled and loaded: if one cannot be,
    nothing is half written."""
    for start in starts:
        key = id(start.kernel), device, start.form
        if key not in _compiled:
            settings = {"num_warps": start.warps, "maxnreg": start.registers}
            compiled = start.kernel.warmup(*start.arguments, grid=(start.grid,), **settings)
            if compiled is not None:  # the interpreter compiles nothing
                compiled.run  # noqa: B018  loads it
            _compiled.add(key)
    for start in starts:
        start.run()
