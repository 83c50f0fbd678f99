"""Makes runs, several at a time, each kept as soon as it is finished. A module of its own, for the processes that run it."""

import concurrent.futures
import time
from pathlib import Path

from alignment_tax.runs import pool_of
from alignment_tax.store import Store
from real_model import adapt, model
from real_model.settings import Cure, fingerprint

BASE = Cure("base model", steps=0)


def store(work: Path) -> Store:
    return Store(work, "smollm2-135m", fingerprint())


def make(work: Path, task: str, cure: Cure, seed: int) -> str:
    """Make one run and keep it."""
    result = (
        {"measured": adapt.measure(model.base(), task), "cost": None} if cure == BASE else adapt.run(task, cure, seed)
    )
    store(work).save(task, cure, seed, result)
    return f"{task}, {cure.name}, seed {seed}"


def make_all(work: Path, runs: list[tuple[str, Cure, int]], workers: int) -> None:
    """Those that are not finished. What a run raises is raised here; finished ones stay."""
    missing = [run for run in runs if not store(work).has(*run)]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already: {store(work).folder}", flush=True)
    begin = time.perf_counter()
    with pool_of(workers) as pool:
        waiting = [pool.submit(make, work, *run) for run in missing]
        try:
            for finished, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                left = (time.perf_counter() - begin) / finished * (len(missing) - finished)
                print(f"{finished}/{len(missing)}, about {left / 60:.0f} minutes left: {future.result()}", flush=True)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
