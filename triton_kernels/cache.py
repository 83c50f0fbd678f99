"""Tables on the device, kept.

They are kept so that a training loop checks its buffers and builds once: under the addresses, shapes, strides and
dtypes of all buffers, the newest of them, up to ``CACHE_BYTES``. Their memory outlives every reader: a stream that uses
a table is recorded on it, the copy's pinned source is held by torch until the copy is done, and what a CUDA graph has
captured stays for ever, because the graph reads it at every replay.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.triton_kernels.op import Refused

CACHE_BYTES = 1 << 20

_lock = threading.Lock()
_tables: OrderedDict[tuple, Any] = OrderedDict()
_captured: dict[int, Any] = {}


def keep(key: tuple, device: torch.device, build: Callable[[], Any]) -> Any:
    """The table under ``key``, built once; on the device when the current stream comes to use it. A table says what its
    ``memory`` there is, and with what event the upload was ``ready``."""
    with _lock:
        table = _tables.get(key)
        if table is None and _capturing(device):
            raise Refused(
                "gradproj: these buffers are new to the Triton backend, and a table cannot be copied to the device while a CUDA "
                "graph is captured; run one step with the same buffers before the capture"
            )
        if table is None:
            table = _tables[key] = build()
        elif table is not next(reversed(_tables.values())):  # a key is long: it is hashed once
            _tables.move_to_end(key)
        while len(_tables) > 1 and sum(t.memory.nbytes for t in _tables.values()) > CACHE_BYTES:
            _tables.popitem(last=False)
        if _capturing(device):  # the capture began with a synchronisation, so that the upload is done
            _captured[id(table)] = table
        elif table.ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(table.ready)
            table.memory.record_stream(stream)
    return table


def upload(arrays: list[np.ndarray], device: torch.device) -> tuple[Tensor, list[Tensor], torch.cuda.Event | None]:
    """The arrays one after the other on the device, each from a 16-byte boundary on, in one copy."""
    starts = np.cumsum([0, *(a.size + a.size % 2 for a in arrays)])
    flat = np.zeros(starts[-1], dtype=np.int64)
    for start, a in zip(starts, arrays, strict=False):
        flat[start : start + a.size] = a.ravel()
    memory, ready = torch.from_numpy(flat), None
    if device.type == "cuda":
        with torch.cuda.device(device):
            memory = memory.pin_memory().to(device, non_blocking=True)
            ready = torch.cuda.current_stream(device).record_event()
    return memory, [memory[s : s + a.size].view(a.shape) for s, a in zip(starts, arrays, strict=False)], ready


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
