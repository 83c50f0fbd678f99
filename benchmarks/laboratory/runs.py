"""The plan: how runs are made, several at a time, each kept as soon as it is finished."""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from laboratory.cures import BASE, NONE, Cure
from laboratory.model import Model, fingerprint
from laboratory.store import Store
from laboratory.train import interpolated, train

FIRST_REPORTED = 1_000  # seeds of `make tax` from here on are reported, those below choose settings

Report = Callable[[str], None]


class Plan(NamedTuple):
    """Which model, and where its runs are kept; a worker is told this and nothing else."""

    model: Model
    work: Path

    @property
    def store(self) -> Store:
        return Store(self.work, self.model.name, fingerprint(self.model))


class Run(NamedTuple):
    objective: str
    cure: Cure
    seed: int

    def __str__(self) -> str:
        return f"{self.objective}, {self.cure.name}, seed {self.seed}"


class Stopped(Exception):
    """Why not every run is finished. Those that are stay on disk."""


def make(plan: Plan, run: Run) -> None:
    """Make one run and keep it.

    Raises:
        FloatingPointError: naming the run and the step whose loss is not finite.
    """
    model, store, cost = plan.model, plan.store, None
    tuned = f"{run.objective}-{NONE.slug}-seed{run.seed}"
    if run.cure == BASE:
        pupil = model.base()
    elif run.cure.alpha is not None:
        pupil = interpolated(model.base(), store.load_weights(tuned, model.device), run.cure.alpha)
    else:
        pupil, cost = train(model, *run)
        if run.cure == NONE:
            store.save_weights(tuned, pupil.state_dict())
    # What takes most of the time of measuring is not looked at where settings are chosen.
    measured = model.measure(pupil.eval(), run.objective, run.cure == BASE or run.seed >= FIRST_REPORTED)
    store.save(*run, {"measured": measured, "cost": cost and cost._asdict()})


def make_all(
    plan: Plan, runs: list[Run], workers: int, report: Report, one: Callable[[Plan, Run], None] | None = None
) -> list[dict[str, Any]]:
    """Make the runs that are not finished yet, and load all. ``one`` makes a run and keeps it; None: :func:`make`.

    Interpolation comes last: it needs the finished runs without a cure.
    Raises:
        Stopped: one of them failed or was interrupted; those under way were finished first.
    """
    store = plan.store
    waves = [[r for r in runs if (r.cure.alpha is not None) == late] for late in (False, True)]
    missing = [[r for r in wave if not store.has(*r)] for wave in waves]
    total, begin, finished = sum(map(len, missing)), time.perf_counter(), 0
    if len(runs) > total:
        report(f"{len(runs) - total} of {len(runs)} runs are finished already: {store.folder}")
    with pool_of(min(total, workers)) as pool:
        for wave in missing:
            waiting = {pool.submit(one or make, plan, r): r for r in wave}
            try:
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
                    finished += 1
                    left = (time.perf_counter() - begin) / finished * (total - finished)
                    when = f"{left:.0f} s" if left < 300 else f"{left / 60:.0f} minutes"
                    report(f"{finished}/{total} runs, about {when} left; finished {waiting[future]}")
            except (Exception, KeyboardInterrupt) as e:
                for future in waiting:
                    future.cancel()
                reason = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e) or type(e).__name__
                raise Stopped(
                    f"{reason}\nFinished runs are kept in {store.folder}; the same command goes on from there."
                ) from e
    return [store.load(*run) for run in runs]


def cores(device: str) -> int:
    """Runs at a time, where nothing else is said."""
    return 1 if device == "cuda" else os.cpu_count() or 1


def pool_of(workers: int) -> concurrent.futures.Executor:
    if workers <= 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    # One thread each: two models of this size side by side are faster than one on two threads. Not forked: the parent
    # has threads of its own.
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
