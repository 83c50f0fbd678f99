"""`make refusals`: the alignment tax of a real language model that is taught to refuse, with prompts of benchmarks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laboratory import refusals_report, refusals_texts, report, smollm2
from laboratory.cures import BASE, Cure
from laboratory.refusals_cures import GRIDS, QUICK, REPEATED, choose
from laboratory.refusals_model import OBJECTIVES, Refusals, rows
from laboratory.runs import FIRST_REPORTED, Plan, Run, cores, make_all
from machine import machine

OUT = Path(__file__).parent.parent / "results" / "refusals"
SHORT = 60  # steps of --quick, and of the runs that choose the settings
CHOOSING = 0  # the seed of those


def made(plan: Plan, settings: dict[str, list[Cure]], seeds: list[int], workers: int, progress: Callable) -> list:
    """Finished runs of each objective's settings, those of the base model first. On further seeds only the main ones."""
    runs = [Run(objective, BASE, 0) for objective in settings]
    runs += [
        Run(objective, cure, seed)
        for seed in seeds
        for objective, some in settings.items()
        for cure in some
        if seed == seeds[0] or cure.family in REPEATED
    ]
    return make_all(plan, runs, workers, progress)


def chosen(tried: list[dict[str, Any]]) -> dict[str, list[Cure]]:
    """Each objective's settings to report."""
    found = {}
    for objective in dict.fromkeys(run["objective"] for run in tried):
        base, of = refusals_report.of_objective(tried, objective)
        found[objective] = choose(base, of)
    return found


def options(parser: argparse.ArgumentParser) -> None:
    what = "by what it is taught (default: refuse-sft; both take twice as long)"
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["refuse-sft"], help=what)
    parser.add_argument("--seeds", type=int, default=1, help=f"of {'; '.join(REPEATED)} (default 1; all others: 1)")
    parser.add_argument(
        "--quick", action="store_true", help=f"seven settings, {SHORT} steps, one objective; half an hour"
    )
    work = Path("build/refusals")
    parser.add_argument("--work", type=Path, default=work, help="finished runs (default %(default)s)")
    where = "table, figures, runs, and in choosing/ those that settings are chosen from (default"
    where = f"{where} benchmarks/results/refusals, for --quick WORK/quick)"
    parser.add_argument("--out", type=Path, help=where)


def main(options: argparse.Namespace, progress: Callable) -> None:
    smollm2.check()
    refusals_texts.check()
    report.check()
    if options.seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {options.seeds}")
    workers = options.workers or cores("cpu")
    about = {**machine("cpu"), "workers": workers}  # now: the results are part of the checkout
    out = options.out or (options.work / "quick" if options.quick else OUT)
    short = Plan(Refusals(SHORT), options.work)
    objectives = options.objectives[:1] if options.quick else options.objectives
    for objective in objectives:  # the base model's answers, once, before there are several processes
        rows(1 + OBJECTIVES[objective].preferences)
    plan, tried, settings = short, [], dict.fromkeys(objectives, QUICK)
    if not options.quick:
        plan = Plan(Refusals(), options.work)
        tried = made(short, {o: GRIDS[o] for o in objectives}, [CHOOSING], workers, progress)
        write(out / "choosing", about, tried, [], SHORT)
        settings = chosen(tried)
    seeds = [FIRST_REPORTED + i for i in range(options.seeds)]
    finished = made(plan, settings, seeds, workers, progress)
    text = write(out, about, finished, tried, plan.model.steps)
    for objective in settings:
        refusals_report.draw(finished, tried, objective, out / f"{objective}.png")
    print(f"\n{text}\n\nin {out}")


def write(out: Path, about: dict[str, Any], finished: list, tried: list, steps: int) -> str:
    """Table and runs; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    about = {**about, "steps": steps}
    text = refusals_report.tables(finished, steps)
    (out / "runs.json").write_text(report.dump({"made": about}, runs=finished, chosen_from=tried))
    (out / "table.md").write_text(f"Made by {report.header(about)}.\n\n{text}\n")
    return text
