"""The interactive page: the template with its script and the measured points in it, and nothing from outside."""

import json
from pathlib import Path
from typing import Any

from alignment_tax.cures import SLIDER
from alignment_tax.figure import STYLES
from alignment_tax.points import METRICS, Point
from alignment_tax.settings import OBJECTIVES

TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html", "page.js"))


def write(base: dict[str, Any], points: list[Point], made: dict[str, str], found: list[str], path: Path) -> None:
    data = {
        "made": made,
        "found": found,
        "objectives": {o: objective._asdict() for o, objective in OBJECTIVES.items()},
        "slider": SLIDER,
        "colours": {family: colour for family, (colour, _) in STYLES.items()},
        "metrics": {m: metric._asdict() for m, metric in METRICS.items()},
        "base": {"values": {m: base["measured"][m] for m in METRICS}, "bins": base["measured"]["bins"]},
        "points": [
            {
                "objective": p.objective,
                "family": p.cure.family,
                "strength": p.cure.strength,
                "values": p.values,
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
    made_of = TEMPLATE.read_text(encoding="utf-8")
    for mark, part in (("/*SCRIPT*/", SCRIPT.read_text(encoding="utf-8")), ("/*DATA*/null", text)):
        if made_of.count(mark) != 1:
            raise ValueError(f"{TEMPLATE} with {SCRIPT.name}: {mark} must occur exactly once")
        made_of = made_of.replace(mark, part)
    path.write_text(made_of, encoding="utf-8")
