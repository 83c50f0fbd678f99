"""The settings of `make refusals`, each family on a small grid, and which of a family is reported."""

from laboratory import tax_cures
from laboratory.cures import NONE, Cure
from laboratory.points import OBJECTIVES, Point
from laboratory.refusals_model import DATA, DIALOGUES

LEVEL = (
    0.95  # of the way to the best setting's right behaviour, which a reported setting reaches if any of its family does
)
PINNED = {"share": 0.05, "damping": 0.3}
CAPTURED = {**PINNED, "fill": 16}
OWN = {"text": DIALOGUES}
OWN_CAPTURED = {**PINNED, **OWN, "fill": 32}


def at(family: str, *lrs: float, **turned) -> list[Cure]:
    """At factors on the learning rate."""
    return [Cure(family, f"lr x {lr:g}", lr=lr, **turned) for lr in lrs]


FAMILIES = [
    [NONE, *at("none", 0.3, 3)],
    [Cure("interpolation", f"alpha {alpha}", alpha=alpha) for alpha in (0.3, 0.5, 0.7)],
    at("LoRA", 3, 10, lora=True),
    at("PTX", 1, 3, gamma=1.0),
    at("KL to the base", 1, 3, kl=0.3),
    at("distilled, own dialogues", 1, 3, distil=1.0, **OWN),
    [Cure("EWC", f"lambda {strength}", ewc=strength, fill=16) for strength in (0.01, 0.1, 1.0)],
    at("OSF", 0.3, 1, osf=0.5),
    at("CorDA", 3, 10, lora=True, init="corda", fill=32),
    at("LoRA-Null", 3, 10, lora=True, init="null", fill=32),
    at("NullSpace", 1, 3, **CAPTURED),
    at("NullSpace, own dialogues", 1, 3, **OWN_CAPTURED),
    at("LoRA, NullSpace", 3, 10, lora=True, **CAPTURED),
    at("LoRA, NullSpace, own dialogues", 3, 10, lora=True, **OWN_CAPTURED),
    at("NullSpace, KL to the base", 1, 3, kl=0.3, **CAPTURED),
    at("NullSpace, own dialogues as examples too", 1, 3, gamma=1.0, **OWN_CAPTURED),
    [
        Cure(
            "NullSpace, own dialogues, a rate for the last layers",
            f"lr x {lr}, there x {late}",
            lr=lr,
            late=late,
            **OWN_CAPTURED,
        )
        for lr, late in ((1.0, 0.1), (0.3, 10.0))
    ],
]
BY_DPO = {"none", "interpolation", "LoRA", "NullSpace, own dialogues", "LoRA, NullSpace, own dialogues"}
GRIDS = {
    "refuse-sft": [cure for family in FAMILIES for cure in family],
    "refuse-dpo": [cure for family in FAMILIES for cure in family if cure.family in BY_DPO],
}
# The families that a second seed repeats: without a cure, and the best with data, with a pin, and with no data.
REPEATED = ("none", "PTX", "NullSpace", "LoRA, NullSpace, own dialogues")
# What --quick shows: one setting of each, which nothing chose.
QUICK = [
    NONE,
    Cure("interpolation", "alpha 0.5", alpha=0.5),
    *at("LoRA", 10, lora=True),
    *at("PTX", 1, gamma=1.0),
    *at("NullSpace", 1, **CAPTURED),
    *at("NullSpace, own dialogues", 1, **OWN_CAPTURED),
    *at("NullSpace, own dialogues as examples too", 1, gamma=1.0, **OWN_CAPTURED),
]


def choose(base: dict[str, float], of: list[Point]) -> list[Cure]:
    """Of points of one objective, each family's setting that behaves well enough and forgets least.

    Of a family that has none, the one that behaves best. And ``NONE``, whose weights are interpolated.
    """
    enough = tax_cures.reached(base[OBJECTIVES[of[0].objective].target], of, LEVEL)
    chosen = {NONE}
    for family in dict.fromkeys(p.cure.family for p in of):
        mine = [p for p in of if p.cure.family == family]
        best = tax_cures.least_forgetting(mine, enough) or max(mine, key=lambda p: p.target)
        chosen.add(best.cure)
    return [p.cure for p in of if p.cure in chosen]


def needs(cure: Cure) -> str:
    """The data that a cure needs beside what is taught."""
    if not any((cure.share, cure.gamma, cure.distil, cure.ewc, cure.init)):
        return "none"
    return "none, own text" if (cure.text or "").startswith("own") else DATA
