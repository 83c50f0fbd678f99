"""The grids: which cures are tried under which objective. Every family, the unprotected one included, has a smaller learning rate too."""

from alignment_tax.settings import Cure

NONE = Cure("none", "lr x 1")
EVERY = 8  # steps between capability batches where they are rare
CAPTURE = 16  # capability batches of a capture
SLOW = {"lr": 0.3, "steps": 1.5}
WHOLE = 0.001  # share of a capture whose learning rates are wanted, not its pins: nearly all curvature is left


def _family(family: str, strengths: dict[str, dict], slow: dict[str, dict], **common) -> list[Cure]:
    """``strengths`` at the objective's own learning rate, then ``slow`` at a smaller one for more steps."""
    cures = [Cure(family, name, **common, **turned) for name, turned in strengths.items()]
    for name, turned in slow.items():
        strength = f"{name}, lr x {SLOW['lr']}" if name else f"lr x {SLOW['lr']}"
        cures.append(Cure(family, strength, **common, **turned, **SLOW))
    return cures


def _over(name: str, key: str, *values: float, **fixed) -> dict[str, dict]:
    return {f"{name} {v}": {key: v, **fixed} for v in values}


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
    _family(
        "NullSpace",
        _over("share", "share", 0.02, 0.05, 0.1, 0.2, 0.3),
        _over("share", "share", 0.05),
        fill=CAPTURE,
    ),
    _family(
        "NullSpace, gradient space",
        _over("share", "share", 0.1, 0.2),
        _over("share", "share", 0.1),
        space="gradient",
        fill=CAPTURE,
    ),
    _family(
        "NullSpace, damped",
        _damped((0.05, 0.3), (0.1, 0.15), (0.1, 0.5)),
        _damped((0.05, 0.3)),
        fill=CAPTURE,
    ),
    _family(
        "NullSpace, damped, gradient space", _damped((0.1, 0.3)), _damped((0.1, 0.3)), space="gradient", fill=CAPTURE
    ),
    _family(
        "damping alone",
        _over("damping", "damping", 0.15, 0.3, 0.5),
        _over("damping", "damping", 0.3),
        share=WHOLE,
        pinned=False,
        fill=CAPTURE,
    ),
    _family(
        "NullSpace and rare PTX",
        _over("share", "share", 0.1),
        _over("share", "share", 0.1),
        gamma=1.0,
        every=EVERY,
        fill=CAPTURE,
    ),
    _family("NullSpace and KL", _over("share", "share", 0.1), _over("share", "share", 0.1), kl=0.3, fill=CAPTURE),
    _family("K-FAC, two-sided", _over("damping", "kfac", 0.05, 0.1, 0.2), _over("damping", "kfac", 0.1), fill=CAPTURE),
]
CURES = [cure for family in FAMILIES for cure in family]
PROSE = {"none", "PTX", "NullSpace", "NullSpace and rare PTX", "K-FAC, two-sided"}
GRIDS = {"sft": CURES, "dpo": CURES, "prose": [c for c in CURES if c.family in PROSE]}
SLIDER = "NullSpace"  # whose share is the page's slider: its strengths are all reported, not only the chosen ones
