"""Tables on the device, cached, so that a training loop checks its buffers and builds its table once.

The newest stay, up to ``CACHE_BYTES``. Their memory outlives every reader: each stream that uses a table is recorded on
it, torch holds the upload's pinned source until the copy is done, and what a CUDA graph has captured stays for ever,
because the graph reads it at every replay.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from gradproj.triton_kernels.op import Refused

CACHE_BYTES = 1 << 20

_lock = threading.Lock()
_tables: OrderedDict[tuple, Any] = OrderedDict()
_captured: dict[int, Any] = {}


class Fields(tl.constexpr):
    """Where a table's entry has its fields: ``LAYER.rank`` in a kernel is an index, compiled or interpreted."""

    def __init__(self, entry: Any):
        super().__init__(entry(*range(len(entry._fields))))
        vars(self).update(self.value._asdict())  # the interpreter looks here, the compiler at ``value``

    def __len__(self) -> int:
        return len(self.value)


def keep(key: tuple, device: torch.device, build: Callable[[], Any]) -> Any:
    """The table under ``key``: built once, uploaded before the current stream reads it. It has its ``memory`` on the
    device, and in ``ready`` the event recorded after the upload; None on a CPU."""
    with _lock:
        table = _tables.get(key)
        if table is None:
            if _capturing(device):
                raise Refused(
                    "gradproj: these buffers are new to the Triton backend, and a table cannot be copied to the device "
                    "while a CUDA graph is captured; run one step with the same buffers before the capture"
                )
            table = _tables[key] = build()
        elif table is not next(reversed(_tables.values())):  # spares a second hash of a long key
            _tables.move_to_end(key)
        while len(_tables) > 1 and sum(t.memory.nbytes for t in _tables.values()) > CACHE_BYTES:
            _tables.popitem(last=False)
        if _capturing(device):  # a capture begins with a synchronisation, so the upload is done
            _captured[id(table)] = table
        elif table.ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(table.ready)
            table.memory.record_stream(stream)
    return table


def upload(arrays: list[np.ndarray], device: torch.device) -> tuple[Tensor, list[Tensor], torch.cuda.Event | None]:
    """One copy of all arrays to the device, each on a 16-byte boundary: (memory, a view for each array, ready)."""
    padded = [np.append(a, np.zeros(a.size % 2, dtype=np.int64)) for a in arrays]
    memory, ready = torch.from_numpy(np.concatenate(padded)), None
    if device.type == "cuda":
        with torch.cuda.device(device):
            memory = memory.pin_memory().to(device, non_blocking=True)
            ready = torch.cuda.current_stream(device).record_event()
    views = memory.split([len(a) for a in padded])
    return memory, [v[: a.size].view(a.shape) for v, a in zip(views, arrays, strict=True)], ready


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
