"""The plan: how runs are made, several at a time, each kept as soon as it is finished."""

import concurrent.futures
import functools
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alignment_tax import adapt, base
from alignment_tax.cures import NONE
from alignment_tax.measure import measure
from alignment_tax.settings import FIRST_REPORTED, SCALES, Cure, Settings
from alignment_tax.store import Store
from tiny_lm import TinyLM

Report = Callable[[str], None]


class Plan(NamedTuple):
    """Where and at which size; a worker is told this and nothing else."""

    scale: str
    device: str
    work: Path

    @property
    def settings(self) -> Settings:
        return SCALES[self.scale]

    @property
    def store(self) -> Store:
        shipped = base.digest() if self.settings.base_shipped else ""
        return Store(self.work, self.scale, self.settings.fingerprint(self.device, shipped))


class Run(NamedTuple):
    objective: str
    cure: Cure
    seed: int

    def __str__(self) -> str:
        return f"{self.objective}, {self.cure.name}, seed {self.seed}"


class Stopped(Exception):
    """Why not every run is finished. Those that are stay on disk."""


def base_model(plan: Plan, report: Report) -> dict[str, Any]:
    """Load the shipped base model or train one, unless that has been done, and measure it."""
    store, settings = plan.store, plan.settings
    run = Run("base", Cure("base model"), 0)
    if store.has_weights("base") and store.has(*run):
        return store.load(*run)
    model = base.shipped(settings, plan.device) if settings.base_shipped else base.train(settings, plan.device, report)
    store.save_weights("base", model.state_dict())
    store.save(*run, {"measured": measure(model, settings), "cost": None})
    return store.load(*run)


@functools.cache
def _base(plan: Plan) -> TinyLM:
    settings = plan.settings
    model = TinyLM(settings.width, settings.layers, settings.heads).to(plan.device)
    model.load_state_dict(plan.store.load_weights("base", plan.device))
    return model


def make(plan: Plan, run: Run) -> None:
    """Make one run and keep it.

    Raises:
        FloatingPointError: naming the run and the step whose loss is not finite.
    """
    settings, start = plan.settings, _base(plan)
    tuned = f"{run.objective}-{NONE.slug}-seed{run.seed}"
    if run.cure.alpha is not None:
        model, cost = adapt.interpolated(start, plan.store.load_weights(tuned, plan.device), run.cure.alpha), None
    else:
        model, cost = adapt.align(start, *run, settings)
        if run.cure == NONE:
            plan.store.save_weights(tuned, model.state_dict())
    # Sampling takes most of the time of measuring, and choosing does not look at it.
    measured = measure(model, settings, variety=run.seed >= FIRST_REPORTED)
    plan.store.save(*run, {"measured": measured, "cost": cost and cost._asdict()})


def make_all(plan: Plan, runs: list[Run], workers: int, report: Report) -> None:
    """Make the runs that are not finished yet.

    Interpolation comes last: it needs the finished runs without a cure.
    Raises:
        Stopped: one of them failed or was interrupted; those under way were finished first.
    """
    waves = [[r for r in runs if (r.cure.alpha is not None) == late] for late in (False, True)]
    missing = [[r for r in wave if not plan.store.has(*r)] for wave in waves]
    total, begin, finished = sum(map(len, missing)), time.perf_counter(), 0
    if len(runs) > total:
        report(f"{len(runs) - total} of {len(runs)} runs are finished already: {plan.store.folder}")
    with pool_of(workers if total > 1 else 1) as pool:
        for wave in missing:
            waiting = {pool.submit(make, plan, r): r for r in wave}
            try:
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
                    finished += 1
                    left = (time.perf_counter() - begin) / finished * (total - finished)
                    report(f"{finished}/{total} runs, about {left:.0f} s left; finished {waiting[future]}")
            except (Exception, KeyboardInterrupt) as e:
                for future in waiting:
                    future.cancel()
                reason = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e) or type(e).__name__
                raise Stopped(
                    f"{reason}\nFinished runs are kept in {plan.store.folder}; the same command goes on from there."
                ) from e


def pool_of(workers: int) -> concurrent.futures.Executor:
    if workers == 1:
        return concurrent.futures.ThreadPoolExecutor(1)
    # One thread each: two models of this size side by side are faster than one on two threads. Not forked: the parent has
    # threads of its own.
    return concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
