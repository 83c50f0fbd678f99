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
    """One implementation of ops.

    Attributes:
        device_types: of the tensors that it takes.
        ops: that it has.
        load: makes the ops; what it returns is why it cannot, or an empty string. Called when the backend is first
            asked for.
        on_request: never chosen without :func:`use_backend`.
    """

    name: str
    namespace: str
    device_types: tuple[str, ...]
    ops: tuple[str, ...]
    load: Callable[[], str]
    on_request: bool = False

    @property
    def reason(self) -> str:
        """Why it is not available; empty if it is."""
        return _loaded(self.load)

    @property
    def available(self) -> bool:
        return not self.reason

    def op(self, name: str):
        """The op's overload packet, for example ``op("gram")``."""
        return getattr(getattr(torch.ops, self.namespace), name).default


@functools.cache
def _loaded(load: Callable[[], str]) -> str:
    return load()


def library(name: str) -> Path:
    """Where the library of native kernels ``name``, ``"cpu"`` or ``"cuda"``, is or would be. It is made for the stable
    ABI of torch 2.10: whichever torch it was built on, it loads on 2.10 and later."""
    return Path(__file__).parent.parent / f"_{name}.so"


def how_to_build(name: str) -> str:
    return f"{'GRADPROJ_CUDA=1 ' if name == 'cuda' else ''}pip install --no-build-isolation ."


def _load_native(name: str) -> str:
    """Load the library of native kernels ``name``; the reason why not, or an empty string."""
    if not library(name).exists():
        return f"not built; build it with: {how_to_build(name)}"
    try:
        torch.ops.load_library(library(name))
    except OSError as error:
        return f"{library(name).name} does not load ({error}); rebuild it with: {how_to_build(name)}"
    return ""


def _load_cuda() -> str:
    return _load_native("cuda") if torch.cuda.is_available() else "torch sees no CUDA device"


def _load_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with: pip install triton"
    if not INTERPRETED and torch.version.hip is not None:
        return "ROCm is not supported: the kernels have never run there"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no CUDA device (on a CPU it runs in triton's interpreter: set TRITON_INTERPRET=1)"
    importlib.import_module("gradproj.triton_kernels")
    return ""


def _load_torch() -> str:
    importlib.import_module("gradproj.kernels.torch_backend")
    return ""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)
NATIVE = tuple(op for op in OPS if op != "pin_")  # whose matrix products are a BLAS's business
# The best first.
TABLE = {
    backend.name: backend
    for backend in (
        Backend("cpu", "gradproj", ("cpu",), NATIVE, functools.partial(_load_native, "cpu")),
        Backend("cuda", "gradproj", ("cuda",), NATIVE, _load_cuda),
        Backend("triton", "gradproj_triton", ("cpu",) if INTERPRETED else ("cuda",), OPS, _load_triton, INTERPRETED),
        Backend("torch", "gradproj_torch", ("cpu", "cuda", "xpu", "meta"), OPS, _load_torch),
    )
}
_requested: ContextVar[str | None] = ContextVar("gradproj_backend", default=None)


def backends() -> dict[str, Backend]:
    """Name -> :class:`Backend`, whose ``available`` and ``reason`` say what can run here."""
    return dict(TABLE)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"torch"``.

    ``torch.compile`` decides when it traces: what was compiled outside keeps the backend that it has.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run here, with the reason.
    """
    if name not in TABLE:
        raise ValueError(f"use_backend: unknown backend {name!r}; known: {', '.join(TABLE)}")
    backend = TABLE[name]
    if not backend.available:
        raise RuntimeError(f"use_backend: {name!r} is not available: {backend.reason}")
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
        f"{op}: no backend takes tensors on {device_type}: sums are float64, on {', '.join(TABLE['torch'].device_types)}; move "
        f"them to the CPU"
    )


def select(device_type: str, op: str = "gram") -> Backend:
    """The backend for tensors of one device type: the requested one, else the best that works and has the op.

    Raises:
        ValueError: the requested backend, or every backend, does not take tensors of this device type.
    """
    name = _requested.get()
    if name is None or op not in TABLE[name].ops:
        return _best(device_type, op)
    backend = TABLE[name]
    if device_type not in backend.device_types:
        raise ValueError(
            f"backend {name!r} takes tensors on {' or '.join(backend.device_types)}, not on {device_type}; move them or "
            f"leave use_backend({name!r})"
        )
    return backend


# torch.compiler.assume_constant_result, without importing the compiler now: a context variable and the disk cannot be
# traced.
select.__dict__["_dynamo_marked_constant"] = True
