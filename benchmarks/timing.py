"""Time and memory of calls: contenders take turns, so that a slow second of a shared machine meets all of them.

On a GPU the time is the device's, of calls in a queue; what a call costs the host is measured by itself.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(contenders: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round."""
    turn, calls_for = (_queued_turn, _queued_calls) if device == "cuda" else (_turn, _calls)
    calls = {}
    for name, run in contenders.items():
        run()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        calls[name] = calls_for(time.perf_counter() - start)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(turn(run, calls[name]))
    return seconds


def _calls(once: float) -> int:
    """As many as take 2 ms."""
    return max(1, min(1000, int(0.002 / max(1e-7, once))))


def _turn(run: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


QUEUED = 20  # calls between two events


def _queued_calls(once: float) -> int:
    """QUEUED, but no more than take 0.1 s: to a call of 5 ms, what the host adds at either end is nothing."""
    return max(3, min(QUEUED, int(0.1 / max(1e-7, once))))


def _queued_turn(run: Callable[[], None], calls: int) -> float:
    """Between events around calls in a queue. The one before the first event keeps the device busy while the host
    enqueues the first that counts: only a host that is slower than the device is seen, as it is in training."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    run()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def host_seconds(run: Callable[[], None], rounds: int = 21) -> float:
    """In which one call is enqueued on an idle GPU. Not of a call that waits for the device itself."""
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def extra_memory(run: Callable[[], None], device: str) -> int:
    """Bytes by which the peak grows during one call, the second one: what the first allocates for good is set-up.

    On the CPU the peak of resident memory, which sees every allocator; the kernel resets it on request (Linux).
    """
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
