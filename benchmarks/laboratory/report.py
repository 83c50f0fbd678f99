"""What the three reports have in common: how a figure was made, a table in markdown, runs as JSON, a picture."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laboratory.model import VERSION
from laboratory.points import Point


def header(made: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in made.items())


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text, the others numbers."""
    lines = [f"| {' | '.join(heads)} |", f"| --- {'| ---: ' * (len(heads) - 1)}|"]
    # An empty cell is one space wide.
    return "\n".join([*lines, *(f"|{'|'.join(f' {c} ' if c else ' ' for c in row)}|" for row in rows)])


def forgotten(base: dict[str, float], p: Point, text: str = "loss") -> float:
    """How much loss a text gained over what was measured of the base model."""
    return p.mean(text) - base[text]


def dump(facts: dict[str, Any], **runs: list[dict[str, Any]]) -> str:
    """JSON with a line for each run, which leaves out what is the same for all."""

    def short(value):
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items() if k != "fingerprint"}
        return [short(v) for v in value] if isinstance(value, list) else value

    def text(value) -> str:
        return json.dumps(short(value), allow_nan=False, separators=(",", ":"))

    def lines(runs: list[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(text(r) for r in runs) + "\n]"

    fields = [f"{text(k)}:{text(v)}" for k, v in {"version": VERSION, **facts}.items()]
    return "{" + ",\n".join(fields + [f"{text(k)}:{lines(v)}" for k, v in runs.items()]) + "}\n"


def check() -> None:
    """Said before the runs, not after them.

    Raises:
        ImportError: what draws is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is missing, which draws the figure: pip install matplotlib")


@contextlib.contextmanager
def picture(
    path: Path, rows: int, columns: int, bbox: str | None = None, font: int = 10, **layout: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its [rows, columns] axes, saved at the end. ``layout``: of ``plt.subplots``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": font, "axes.spines.top": False, "axes.spines.right": False}):
        made, axes = plt.subplots(rows, columns, squeeze=False, **layout)
        yield made, axes
        made.savefig(path, bbox_inches=bbox)
        plt.close(made)
