"""Which settings are reported: chosen on some seeds, measured again on others."""

from alignment_tax.cures import GRIDS, NONE, SLIDER
from alignment_tax.points import Point
from alignment_tax.settings import OBJECTIVES, Cure

LEVELS = (0.97, 0.9)  # of what the best setting learns of the target


def reached(start: float, of: list[Point], level: float) -> float:
    """The target quality at ``level`` of the way from the base model's to the best setting's."""
    return start + level * (max(p.target for p in of) - start)


def choose(base: dict[str, float], of: list[Point]) -> list[Cure]:
    """For each of two levels of target quality, each family's setting that reaches it and forgets least; of a family that reaches
    none, the one that learns most.

    Without a cure, and of the page's slider, all settings are taken: they are what others are compared with.

    Args:
        base: what was measured of the base model.
        of: the points of one objective.
    """
    start = base[OBJECTIVES[of[0].objective].target]
    chosen = {p.cure for p in of if p.cure.family in (NONE.family, SLIDER)}
    for family in dict.fromkeys(p.cure.family for p in of):
        mine = [p for p in of if p.cure.family == family]
        best = [
            min((p for p in mine if p.target >= reached(start, of, level)), key=lambda p: p.mean("loss"), default=None)
            for level in LEVELS
        ]
        chosen |= {p.cure for p in best if p} or {max(mine, key=lambda p: p.target).cure}
    return [p.cure for p in of if p.cure in chosen]


def grid(seeds: int) -> list[tuple[str, Cure, int]]:
    return [(objective, cure, seed) for seed in range(seeds) for objective, cures in GRIDS.items() for cure in cures]
