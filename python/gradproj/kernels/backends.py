"""Which implementation runs, why, and what is missing."""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch

from gradproj.kernels import ops as _ops  # noqa: F401  declares the ops that a library implements


class Backend(NamedTuple):
    """One implementation of the ops.

    ``reason`` says why it is not available; it is empty if it is.
    """

    name: str
    namespace: str
    device_types: tuple[str, ...]
    reason: str

    @property
    def available(self) -> bool:
        return not self.reason

    def has(self, name: str) -> bool:
        """Whether this backend has an implementation of its own of an op."""
        return name != "pin_" or self.namespace != "gradproj"  # matrix products are a BLAS's business

    def op(self, name: str):
        """The op's overload packet, for example ``op("gram")``."""
        return getattr(getattr(torch.ops, self.namespace), name).default


def library(name: str) -> Path:
    """Where the library of native kernels ``name``, ``"cpu"`` or ``"cuda"``, is or would be. It is made for the stable ABI of
    torch 2.10: whichever torch it was built on, it loads on 2.10 and later."""
    return Path(__file__).parent.parent / f"_{name}.so"


def how_to_build(name: str) -> str:
    return f"{'GRADPROJ_CUDA=1 ' if name == 'cuda' else ''}pip install --no-build-isolation ."


@functools.cache
def _load_native(name: str) -> str:
    """Load the library of native kernels ``name``; the reason why not, or an empty string."""
    if not library(name).exists():
        return f"not built; build it with: {how_to_build(name)}"
    try:
        torch.ops.load_library(library(name))
    except OSError as error:
        return f"{library(name).name} does not load ({error}); rebuild it with: {how_to_build(name)}"
    return ""


@functools.cache
def _cpu() -> Backend:
    return Backend("cpu", "gradproj", ("cpu",), _load_native("cpu"))


@functools.cache
def _cuda() -> Backend:
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    else:
        reason = _load_native("cuda")
    return Backend("cuda", "gradproj", ("cuda",), reason)


@functools.cache
def _triton() -> Backend:
    device_types: tuple[str, ...] = ("cuda",)
    reason = ""
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed; install it with: pip install triton"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        device_types = ("cpu",)
    elif torch.version.hip is not None:
        reason = "ROCm is not supported: the kernels have never run there"
    elif not torch.cuda.is_available():
        reason = "torch sees no CUDA device (on a CPU it runs in triton's interpreter: set TRITON_INTERPRET=1)"
    if not reason:
        importlib.import_module("gradproj.triton_kernels")
    return Backend("triton", "gradproj_triton", device_types, reason)


@functools.cache
def _torch() -> Backend:
    importlib.import_module("gradproj.kernels.torch_backend")
    return Backend("torch", "gradproj_torch", ("cpu", "cuda", "xpu", "meta"), "")


_FACTORIES = {"cpu": _cpu, "cuda": _cuda, "triton": _triton, "torch": _torch}
# The best first. Triton on CPU tensors is an interpreter: only on request.
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_requested: ContextVar[str | None] = ContextVar("gradproj_backend", default=None)


def backends() -> dict[str, Backend]:
    """Name -> :class:`Backend`, whose ``available`` and ``reason`` say what can run here."""
    return {name: factory() for name, factory in _FACTORIES.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    ``torch.compile`` decides when it traces: what was compiled outside keeps the backend that it has.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run here, with the reason.
    """
    if name not in _FACTORIES:
        raise ValueError(f"use_backend: unknown backend {name!r}; known: {', '.join(_FACTORIES)}")
    backend = _FACTORIES[name]()
    if not backend.available:
        raise RuntimeError(f"use_backend: {name!r} is not available: {backend.reason}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def _best(device_type: str, op: str) -> Backend:
    for name in _PREFERENCE.get(device_type, ("torch",)):
        backend = _FACTORIES[name]()
        if backend.available and backend.has(op) and device_type in backend.device_types:
            return backend
    raise ValueError(
        f"{op}: no backend takes tensors on {device_type}: sums are float64, on {', '.join(_torch().device_types)}; move "
        f"them to the CPU"
    )


def select(device_type: str, op: str = "gram") -> Backend:
    """The backend for tensors of one device type: the requested one, else the best that works and has the op.

    Raises:
        ValueError: the requested backend, or every backend, does not take tensors of this device type.
    """
    name = _requested.get()
    if name is None:
        return _best(device_type, op)
    backend = _FACTORIES[name]()
    if not backend.has(op):
        return _best(device_type, op)
    if device_type not in backend.device_types:
        raise ValueError(
            f"backend {name!r} takes tensors on {' or '.join(backend.device_types)}, not on {device_type}; move them or "
            f"leave use_backend({name!r})"
        )
    return backend


# torch.compiler.assume_constant_result, without importing the compiler now: a context variable and the disk cannot be traced.
select.__dict__["_dynamo_marked_constant"] = True
