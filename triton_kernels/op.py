"""How an op of this backend is registered, refuses, and starts its kernels."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gradproj.kernels import ops


class Refused(RuntimeError):
    """What the kernels do not take, in words. Nothing has been written."""


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What a check raises, as the one error that ops refuse by."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise Refused(str(error)) from error


def implement(function: Callable) -> Callable:
    """Register an op of ``gradproj_triton`` under the function's name: for CUDA tensors, or interpreted for those on
    the CPU.

    A kernel that does not compile or start becomes one error that says what failed, where, and the way out.
    """
    name = function.__name__

    @functools.wraps(function)
    def op(*arguments):
        try:
            return function(*arguments)
        except (Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            cause: BaseException = error
            device = next(_tensors(arguments)).device
            called = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            while cause.__cause__ is not None:  # the compiler's own errors begin with a listing
                cause = cause.__cause__
            line = (str(cause).strip().splitlines() or [""])[0]
            raise RuntimeError(
                f"{name}: a Triton kernel does not compile or start (Triton {triton.__version__}, {called}): "
                f"{type(cause).__name__}: {line}; use gradproj.use_backend('torch'), or install another Triton"
            ) from error

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    ops.implement("gradproj_triton", name, op, "CPU" if interpreted else "CUDA")
    return function


class Start(NamedTuple):
    """A launch: ``kernel[grid](*arguments)``; ``form`` is what of it the compiler sees."""

    kernel: Any
    form: tuple
    grid: int
    arguments: tuple
    warps: int = 4


_compiled: set[tuple] = set()


def launch(device: torch.device, starts: Sequence[Start]) -> None:
    """Launches of kernels that write the user's buffers. All are compiled and loaded before the first runs: if one is
    not, nothing is half written."""
    for start in starts:
        key = id(start.kernel), device, start.form
        if key not in _compiled:
            compiled = start.kernel.warmup(*start.arguments, grid=(start.grid,), num_warps=start.warps)
            if compiled is not None:  # the interpreter compiles nothing
                compiled.run  # noqa: B018  loads it
            _compiled.add(key)
    for start in starts:
        start.kernel[(start.grid,)](*start.arguments, num_warps=start.warps)


def _tensors(arguments) -> Iterator[Tensor]:
    for argument in arguments:
        yield from (t for t in (argument if isinstance(argument, list) else [argument]) if isinstance(t, Tensor))
