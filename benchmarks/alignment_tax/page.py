"""The interactive page: the template with the measured points in it, and nothing from outside."""

import json
from pathlib import Path
from typing import Any

from alignment_tax.figure import STYLES
from alignment_tax.points import METRICS, Point
from alignment_tax.settings import OBJECTIVES

TEMPLATE = Path(__file__).with_name("page.html")
MARK = "/*DATA*/null"


def write(base: dict[str, Any], points: list[Point], made: dict[str, str], found: list[str], path: Path) -> None:
    data = {
        "made": made,
        "found": found,
        "objectives": OBJECTIVES,
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
            for p in points
        ],
    }
    # "</" would end the script element wherever it stands.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    template = TEMPLATE.read_text(encoding="utf-8")
    if template.count(MARK) != 1:
        raise ValueError(f"{TEMPLATE}: {MARK} must occur exactly once")
    path.write_text(template.replace(MARK, text), encoding="utf-8")
