"""Processes that run many checks: starting them costs more than all the checks together."""

import queue
import tempfile
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120
IMPORTED_ONCE = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


class Pool:
    """``pool(world, check, *args)`` runs ``check(rank, world, *args)`` over gloo on ``world`` of ``size`` processes.

    A check that fails may leave ranks waiting for each other: all processes end, and the next check starts new ones.
    """

    def __init__(self, size: int):
        self.size = size
        self._world = self._group = 0  # how many ranks the present group has, and its number: it is new if they change
        self._processes: list = []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        self._folder = tempfile.TemporaryDirectory()
        self._tasks = [context.SimpleQueue() for _ in range(self.size)]
        self._results = context.Queue()
        for rank, tasks in enumerate(self._tasks):
            args = (rank, self._folder.name, tasks, self._results)
            self._processes.append(context.Process(target=_serve, args=args, daemon=True))
            self._processes[-1].start()

    def __call__(self, world: int, check: Callable, *args) -> list:
        if not self._processes:
            self._start()
        if world != self._world:
            self._world, self._group = world, self._group + 1
        for tasks in self._tasks[:world]:
            tasks.put((world, self._group, check, args))
        results = [None] * world
        for _ in range(world):
            try:
                rank, result, error = self._results.get(timeout=TIMEOUT_S)
            except queue.Empty:
                self.close()
                raise TimeoutError(f"{check.__name__}: a rank waits for a collective that others do not make") from None
            if error:
                self.close()
                raise AssertionError(f"rank {rank} of {world}: {error}")
            results[rank] = result
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._world = [], 0


def _serve(rank: int, folder: str, tasks, results) -> None:
    torch.set_num_threads(1)
    present = 0
    while True:
        world, group, check, args = tasks.get()
        try:
            if group != present:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group("gloo", init_method=f"file://{folder}/{group}", rank=rank, world_size=world)
                present = group
            results.put((rank, check(rank, world, *args), None))
        except BaseException:  # noqa: BLE001  whatever it is, the test process must hear of it
            results.put((rank, None, traceback.format_exc()))
