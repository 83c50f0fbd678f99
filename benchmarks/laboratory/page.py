"""The interactive page: the template with its script and the measured points in it, and nothing from outside."""

import json
from pathlib import Path
from typing import Any

from laboratory.figure import STYLES
from laboratory.points import METRICS, Point
from laboratory.small import OBJECTIVES

SLIDER = "NullSpace"  # whose share is the slider: its strengths are all reported, not only the chosen ones
TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html", "page.js"))


def write(base: dict[str, Any], points: list[Point], made: dict[str, str], found: list[str], path: Path) -> None:
    measured = base["measured"]
    data = {
        "made": made,
        "found": found,
        "objectives": {o: {"title": t.title, "target": t.target} for o, t in OBJECTIVES.items()},
        "slider": SLIDER,
        "colours": {family: colour for family, (colour, _) in STYLES.items()},
        "metrics": {m: metric._asdict() for m, metric in METRICS.items()},
        "base": {"values": {m: measured[m] for m in METRICS}, "bins": measured["bins"]},
        "points": [
            {
                "objective": p.objective,
                "family": p.cure.family,
                "strength": p.cure.strength,
                "values": {m: p.values[m] for m in METRICS},
                "bins": p.bins,
                "step_ms": p.step_ms,
                "backwards": p.backwards,
                "extra_bytes": p.extra_bytes,
            }
            for p in sorted(points, key=lambda p: p.cure.share)  # the slider goes from the smallest to the largest
        ],
    }
    # "</" would end the script element wherever it stands.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    script = SCRIPT.read_text(encoding="utf-8")
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*SCRIPT*/", script).replace("/*DATA*/null", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
