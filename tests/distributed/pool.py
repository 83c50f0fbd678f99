"""Processes with a process group that run many checks: starting them costs more than all the checks together."""

import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


class Pool:
    """``world`` processes over gloo. ``pool(check, *args)`` runs ``check(rank, *args)`` on all and returns the results.

    A check that fails leaves ranks that wait for each other: the processes are ended, and the next check starts new ones.
    """

    def __init__(self, world: int):
        self.world = world
        self._processes: list = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._tasks = [context.SimpleQueue() for _ in range(self.world)]
        self._results = context.Queue()
        for rank in range(self.world):
            args = (rank, self.world, str(Path(self._folder.name) / "store"), self._tasks[rank], self._results)
            self._processes.append(context.Process(target=_serve, args=args, daemon=True))
            self._processes[-1].start()

    def __call__(self, check: Callable, *args) -> list:
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((check, args))
        results = [None] * self.world
        for _ in range(self.world):
            try:
                rank, result, error = self._results.get(timeout=TIMEOUT_S)
            except queue.Empty:
                self.close()
                raise TimeoutError(f"{check.__name__}: a rank waits for a collective that others do not make") from None
            if error:
                self.close()
                raise AssertionError(f"rank {rank} of {self.world}: {error}")
            results[rank] = result
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes = []


def _serve(rank: int, world: int, store: str, tasks, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        check, args = tasks.get()
        try:
            results.put((rank, check(rank, *args), None))
        except Exception:  # noqa: BLE001  whatever it is, the test process must hear of it
            results.put((rank, None, traceback.format_exc()))
