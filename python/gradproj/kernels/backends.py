"""Which implementation runs, why, and what is missing."""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch

from gradproj.kernels.ops import SCHEMAS


class Backend(NamedTuple):
    """One implementation of ops."""

    name: str
    namespace: str
    device_types: tuple[str, ...]  # of the tensors that it takes
    ops: tuple[str, ...]  # that it implements
    load: Callable[[], str]  # registers the ops when they are first needed; returns why it cannot, or an empty string
    on_request: bool = False  # never chosen without use_backend()

    @property
    def reason(self) -> str:
        """Why it is not available; empty if it is."""
        return self.load()

    @property
    def available(self) -> bool:
        return not self.reason

    def op(self, name: str):
        """The op's default overload, for example of ``"gram"``."""
        return getattr(getattr(torch.ops, self.namespace), name).default


def library(name: str) -> Path:
    """Where the native library ``"cpu"`` or ``"cuda"`` is or would be. By the stable ABI it loads on torch >= 2.10."""
    return Path(__file__).parent.parent / f"_{name}.so"


def how_to_build(name: str) -> str:
    return f"{'GRADPROJ_CUDA=1 ' if name == 'cuda' else ''}pip install --no-build-isolation ."


@functools.cache
def _load_native(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not library(name).exists():
        return f"not built; build it with: {how_to_build(name)}"
    try:
        torch.ops.load_library(library(name))
    except OSError as error:
        return f"{library(name).name} does not load ({error}); rebuild it with: {how_to_build(name)}"
    return ""


def _load_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with: pip install triton"
    if not INTERPRETED and torch.version.hip is not None:
        return "ROCm is not supported: the kernels have never run there"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no CUDA device (on a CPU it runs in triton's interpreter: set TRITON_INTERPRET=1)"
    return _load_module("gradproj.triton_kernels")


def _load_module(name: str) -> str:
    importlib.import_module(name)
    return ""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)
NATIVE = tuple(op for op in OPS if op != "pin_")  # pin_ is two matrix products, which a BLAS does
_TORCH_DEVICES = ("cpu", "cuda", "xpu", "meta")
# The best first.
TABLE = {
    backend.name: backend
    for backend in (
        Backend("cpu", "gradproj", ("cpu",), NATIVE, lambda: _load_native("cpu")),
        Backend("cuda", "gradproj", ("cuda",), NATIVE, lambda: _load_native("cuda")),
        Backend("triton", "gradproj_triton", ("cpu",) if INTERPRETED else ("cuda",), OPS, _load_triton, INTERPRETED),
        Backend("torch", "gradproj_torch", _TORCH_DEVICES, OPS, lambda: _load_module("gradproj.kernels.torch_backend")),
    )
}
_requested: ContextVar[str | None] = ContextVar("gradproj_backend", default=None)


def backends() -> dict[str, Backend]:
    """Name -> :class:`Backend`, whose ``available`` and ``reason`` say what can run here."""
    return dict(TABLE)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    ``torch.compile`` chooses a backend while it traces: a function compiled outside keeps the one that it has.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend cannot run here; the message says why.
    """
    if name not in TABLE:
        raise ValueError(f"use_backend: unknown backend {name!r}; known: {', '.join(TABLE)}")
    if reason := TABLE[name].reason:
        raise RuntimeError(f"use_backend: {name!r} is not available: {reason}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def _best(device_type: str, op: str) -> Backend:
    for backend in TABLE.values():
        if op in backend.ops and device_type in backend.device_types and not backend.on_request and backend.available:
            return backend
    raise ValueError(
        f"{op}: no backend takes tensors on {device_type}: sums are float64, on {', '.join(_TORCH_DEVICES)}; move "
        f"them to the CPU"
    )


def select(device_type: str, op: str = "gram") -> Backend:
    """The backend for tensors of one device type: the requested one, or the best that is available and has the op.

    Raises:
        ValueError: the requested backend, or every backend, does not take tensors of this device type.
    """
    name = _requested.get()
    if name is None or op not in TABLE[name].ops:
        return _best(device_type, op)
    backend = TABLE[name]
    if device_type not in backend.device_types:
        raise ValueError(
            f"backend {name!r} takes tensors on {' or '.join(backend.device_types)}, not on {device_type}; "
            f"move them or leave use_backend({name!r})"
        )
    return backend


# torch.compiler.assume_constant_result without importing the compiler: a context variable and the disk have no trace.
select.__dict__["_dynamo_marked_constant"] = True
