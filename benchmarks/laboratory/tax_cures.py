"""The settings of `make tax`: those that are tried under each objective, and which of them are reported.

Every family, the unprotected one included, is also tried at a smaller learning rate; in the harder case at a larger
one and for more steps as well, and compared at equal work there.
"""

import math

from laboratory.cures import NONE, Cure
from laboratory.page import SLIDER
from laboratory.points import OBJECTIVES, Point
from laboratory.runs import Run
from laboratory.small import HARDER

LEVELS = (0.97, 0.9)  # of what the best setting learns of the target
EVERY = 8  # steps between capability batches where they are rare
CAPTURE = 16  # capability batches of a capture
SLOW = {"lr": 0.3, "steps": 1.5}
# The learning rates of a capture without its pins. Its share leaves nearly all curvature.
ALONE = {"share": 0.001, "pinned": False}


def _family(family: str, strengths: dict[str, dict], slow: dict[str, dict], **common) -> list[Cure]:
    """``strengths`` at the objective's own learning rate, then ``slow`` at a smaller one for more steps."""
    cures = [Cure(family, name, **common, **turned) for name, turned in strengths.items()]
    for name, turned in slow.items():
        strength = f"{name}, lr x {SLOW['lr']}" if name else f"lr x {SLOW['lr']}"
        cures.append(Cure(family, strength, **common, **turned, **SLOW))
    return cures


def _null_space(family: str, strengths: dict[str, dict], slow: dict[str, dict], **common) -> list[Cure]:
    return _family(family, strengths, slow, fill=CAPTURE, **common)


def _over(name: str, key: str, *values: float) -> dict[str, dict]:
    return {f"{name} {v}": {key: v} for v in values}


def _shares(*values: float) -> dict[str, dict]:
    return _over("share", "share", *values)


def _damped(*pairs: tuple[float, float]) -> dict[str, dict]:
    return {f"share {s}, damping {d}": {"share": s, "damping": d} for s, d in pairs}


FAMILIES = [
    [NONE, *_family("none", {}, {"": {}}), Cure("none", "lr x 0.15", lr=0.15, steps=2.0)],
    _family("rest frozen", {"lr x 1": {}}, {"": {}}, frozen=True),
    _family("KL penalty", _over("beta", "kl", 0.3, 1.0), _over("beta", "kl", 0.3)),
    _family("PTX", _over("gamma", "gamma", 0.3, 1.0), _over("gamma", "gamma", 0.3)),
    _family("PTX, rare", _over("gamma", "gamma", 1.0), _over("gamma", "gamma", 1.0), every=EVERY),
    _family("interpolation", _over("alpha", "alpha", 0.4, 0.6, 0.8), {}),
    _family("EWC", _over("lambda", "ewc", 0.003, 0.03), _over("lambda", "ewc", 0.01), fill=CAPTURE),
    _family("orthogonal", {"lr x 1": {}}, {"": {}}, method="orthogonal"),
    _family("conflict", {"32 directions": {}}, {"32 directions": {}}, method="conflict", directions=32, fill=CAPTURE),
    _null_space("NullSpace", _shares(0.02, 0.05, 0.1, 0.2, 0.3), _shares(0.05)),
    _null_space("NullSpace, gradient space", _shares(0.1, 0.2), _shares(0.1), space="gradient"),
    _null_space("NullSpace, damped", _damped((0.05, 0.3), (0.1, 0.15), (0.1, 0.5)), _damped((0.05, 0.3))),
    _null_space("NullSpace, damped, gradient space", _damped((0.1, 0.3)), _damped((0.1, 0.3)), space="gradient"),
    _null_space(
        "damping alone", _over("damping", "damping", 0.15, 0.3, 0.5), _over("damping", "damping", 0.3), **ALONE
    ),
    _null_space("NullSpace and rare PTX", _shares(0.1), _shares(0.1), gamma=1.0, every=EVERY),
    _null_space("NullSpace and KL", _shares(0.1), _shares(0.1), kl=0.3),
    _family("K-FAC, two-sided", _over("damping", "kfac", 0.05, 0.1, 0.2), _over("damping", "kfac", 0.1), fill=CAPTURE),
]
CURES = [cure for family in FAMILIES for cure in family]
PROSE = {"none", "PTX", "NullSpace", "NullSpace and rare PTX", "K-FAC, two-sided"}


def _longer(family: str, strengths: dict[str, dict], *times: tuple[float, float], **common) -> list[Cure]:
    """At factors on learning rate and steps."""
    return [
        Cure(family, f"{name}, lr x {lr:g}, steps x {steps:g}".removeprefix(", "), lr, steps, **common, **turned)
        for name, turned in strengths.items()
        for lr, steps in times
    ]


def _weights(*values: float) -> dict[str, dict]:
    return _over("weight", "distil", *values)


OWN = {"text": "own"}  # distilled is what the base model writes: nothing of the capability is needed
PINNED = {"share": 0.02, "fill": CAPTURE}
LONGER = [
    *_longer("none", {"": {}}, (0.5, 1.5), (1, 2), (2, 1)),
    *_longer("PTX", _over("gamma", "gamma", 0.3, 1.0), (1, 1.5), (1, 2)),
    *_longer("PTX", _over("gamma", "gamma", 1.0), (2, 1)),
    *_longer("NullSpace", _shares(0.02, 0.05), (1, 2), (1, 3), (2, 1), (2, 2), fill=CAPTURE),
    *_longer("NullSpace, own text", _shares(0.02, 0.05), (1, 2), **OWN, fill=CAPTURE),
    *_longer("K-FAC, two-sided", _over("damping", "kfac", 0.05), (1, 2), (2, 2), fill=CAPTURE),
    *_longer(
        "K-FAC, elastic", _over("damping", "kfac", 0.003, 0.01), (1, 3), (2, 1.5), (2, 3), elastic=True, fill=CAPTURE
    ),
    *_longer("distilled", _weights(1, 3, 10), (1, 1.5), **OWN),
    *_longer("distilled", _weights(3), (1, 1), (1, 2), (2, 1), **OWN),
    *_longer("distilled, rare", _weights(3, 10, 30), (1, 2), **OWN, every=4),
    *_longer("distilled, rare", _weights(10), (1, 1), (1, 3), (2, 1), **OWN, every=4),
    *_longer("NullSpace and distilled, rare", _weights(3, 10), (1, 2), (2, 1), **OWN, **PINNED, every=4),
]
GRIDS = {"sft": CURES, "dpo": CURES, "prose": [*(c for c in CURES if c.family in PROSE), *LONGER]}
BUDGETS = (1.5, 2, 3, 4)  # of work, in unprotected runs at their usual length


def reached(start: float, of: list[Point], level: float) -> float:
    """The target quality at ``level`` of the way from the base model's to the best setting's."""
    return start + level * (max(p.target for p in of) - start)


def usual(start: float, of: list[Point]) -> float:
    """The target quality at which budgets are compared: nearly what an unprotected run of the usual length reaches."""
    return reached(start, [p for p in of if p.cure == NONE], LEVELS[0])


def plain_steps(of: list[Point]) -> float:
    """Of a run of the usual length, as PTX counts them: with a capability pass in each."""
    return next(p.backwards / p.cure.steps for p in of if p.backwards and p.cure.family == "PTX")


def work(p: Point, steps: float) -> float:
    """Passes of all batches, forward and backward, in runs of so many steps.

    The base model's forward pass is a third of one, and K-FAC's products a quarter of a step; pins are next to nothing.
    """
    own = p.cure.steps * (5 / 4 if p.cure.kfac else 1)
    return own + (p.backwards or 0) * (4 / 3 if p.cure.distil else 1) / steps


def least_forgetting(
    of: list[Point], enough: float, family: str | None = None, budget: float = math.inf
) -> Point | None:
    """Among points of one objective, of ``family`` or of all: the one that learns enough and forgets least."""
    steps = plain_steps(of) if budget < math.inf else 1
    mine = [p for p in of if family in (None, p.cure.family) and p.target >= enough]
    return min((p for p in mine if work(p, steps) <= budget), key=lambda p: p.mean("loss"), default=None)


def choose(base: dict[str, float], of: list[Point]) -> list[Cure]:
    """For each of two levels of target quality, each family's setting that reaches it and forgets least.

    In the harder case also for each budget of work. Of a family that reaches none, it is the setting that learns most.
    Without a cure, and of the page's slider, all usual settings are taken: they are what others are compared with.

    Args:
        base: what was measured of the base model.
        of: the points of one objective.
    """
    start = base[OBJECTIVES[of[0].objective].target]
    chosen = {p.cure for p in of if p.cure in CURES and p.cure.family in (NONE.family, SLIDER)}
    bars = [(reached(start, of, level), math.inf) for level in LEVELS]
    if of[0].objective == HARDER:
        bars += [(usual(start, of), budget) for budget in BUDGETS]
    for family in dict.fromkeys(p.cure.family for p in of):
        mine = [p for p in of if p.cure.family == family]
        best = [least_forgetting(of, enough, family, budget) for enough, budget in bars]
        chosen |= {p.cure for p in best if p} or {max(mine, key=lambda p: p.target).cure}
    return [p.cure for p in of if p.cure in chosen]


def grid(seeds: int) -> list[Run]:
    return [Run(objective, cure, seed) for seed in range(seeds) for objective, cures in GRIDS.items() for cure in cures]
