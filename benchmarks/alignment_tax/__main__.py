"""`make tax`: the alignment-tax laboratory. Aligns a small language model under every cure, and measures what each costs it."""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

from alignment_tax import report, runs
from alignment_tax.choose import choose, grid
from alignment_tax.points import points
from alignment_tax.settings import FIRST_REPORTED, OBJECTIVES, SCALES

BENCHMARKS = Path(__file__).parent.parent


def progress(message: str, milestone: bool = False) -> None:
    """One line that is overwritten; where that is not possible, a line per message."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message[:110]}", end="", flush=True)
    else:
        print(message, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="alignment_tax", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="sizes of everything (default cpu)")
    parser.add_argument("--quick", action="store_const", dest="scale", const="quick", help="the same as --scale quick")
    parser.add_argument("--device", help="cpu or cuda (default: cuda for --scale gpu)")
    parser.add_argument("--seeds", type=int, default=3, help="alignments of each reported setting (default 3)")
    parser.add_argument("--choosing-seeds", type=int, help="other seeds, which choose the settings (default: --seeds)")
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a core, or 1 on cuda)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/alignment_tax"), help="finished runs (default %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="table, figure, page (default: results/alignment_tax, for --quick DIR/quick)"
    )
    parser.add_argument("--page", action="store_true", help="no runs: only the page of those in --out, into --work")
    options = parser.parse_args(arguments)
    for name, count in (("--seeds", options.seeds), ("--choosing-seeds", options.choosing_seeds)):
        if count is not None and count < 1:
            parser.error(f"{name} must be >= 1, got {count}")
    device = options.device or ("cuda" if options.scale == "gpu" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    workers = options.workers or (1 if device == "cuda" else os.cpu_count() or 1)
    out = options.out or (BENCHMARKS / "results" if options.scale == "cpu" else options.work) / "alignment_tax"

    if options.page:
        path = options.work / "index.html"
        try:
            report.write_page(out / "runs.json", path)
        except ValueError as e:
            raise SystemExit(str(e)) from None
        print(f"page: {path}")
        return
    if importlib.util.find_spec("matplotlib") is None:  # said before the runs, not after them
        parser.error("matplotlib is missing, which draws the figure: pip install matplotlib")
    begin = time.perf_counter()
    plan = runs.Plan(options.scale, device, options.work)
    choosing = [runs.Run(*r) for r in grid(options.choosing_seeds or options.seeds)]
    try:
        for other in plan.store.others:
            progress(f"ignored, made with other settings or versions: {other}", True)
        base = runs.base_model(plan, progress)
        runs.make_all(plan, choosing, workers, progress)
        tried = [plan.store.load(*run) for run in choosing]
        reported = [
            runs.Run(objective, cure, FIRST_REPORTED + seed)
            for seed in range(options.seeds)
            for objective in OBJECTIVES
            for cure in choose(base["measured"], [p for p in points(tried) if p.objective == objective])
        ]
        runs.make_all(plan, reported, workers, progress)
        finished = [plan.store.load(*run) for run in reported]
    except (runs.Stopped, ValueError, FloatingPointError) as e:
        raise SystemExit(f"\n{e}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; the same command goes on from {plan.store.folder}") from None
    progress("")
    print(report.write(base, tried, finished, plan, out, time.perf_counter() - begin))


if __name__ == "__main__":
    main()
