"""`make real`: what a real language model forgets while it is taught something narrow, under cures of the alignment tax."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from machine import machine
from real_model import model, report
from real_model.runs import BASE, make_all, store
from real_model.settings import ABLATIONS, CURES, SEEDS, TASKS, VERSION

OUT = Path(__file__).parent.parent / "results" / "real_model"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="real_model", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="what is taught (default: both)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="(default %(default)s)")
    parser.add_argument("--ablations", action="store_true", help="one thing changed at a time, of the first task")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one a core)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/real_model"), help="finished runs (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="tables, picture (default benchmarks/results/real_model)")
    options = parser.parse_args(arguments)
    try:
        model.check()
    except ImportError as e:
        raise SystemExit(f"make real: {e}") from None
    cures = ABLATIONS if options.ablations else CURES
    tasks = options.tasks[:1] if options.ablations else options.tasks
    runs = [(task, BASE, 0) for task in tasks]
    runs += [(task, cure, seed) for seed in options.seeds for task in tasks for cure in cures]
    try:
        make_all(options.work, runs, options.workers)
        finished: list[dict[str, Any]] = [store(options.work).load(*run) for run in runs]
    except (ValueError, FloatingPointError) as e:
        raise SystemExit(f"make real: {e}\nFinished runs are kept; the same command goes on from there.") from None
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on from there") from None
    made = {**machine("cpu"), "workers": options.workers, "seeds": " ".join(map(str, options.seeds))}
    name = "ablations" if options.ablations else "table"
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in finished)
    head = json.dumps({"version": VERSION, "made": made})[:-1]
    (options.out / f"{name}.json").write_text(f'{head},"runs":[\n{lines}\n]}}\n')
    text = report.tables(finished)
    (options.out / f"{name}.md").write_text(f"Made by {', '.join(f'{k} {v}' for k, v in made.items())}.\n\n{text}\n")
    if not options.ablations:
        report.draw(finished, options.out / "figure.png")
    print(f"\n{text}\n\nin {options.out}")


if __name__ == "__main__":
    main()
