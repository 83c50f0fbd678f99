"""What is said of finished runs: which settings are shown, what won, what it cost, and what work is equal."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from laboratory import tax, tax_cures
from laboratory.cures import NONE, Cure
from laboratory.points import METRICS, Point, pareto


def point(cure, behaviour, loss, backwards=0, objective="sft"):
    """A point with two seeds around the given means."""
    values = {m: [0.5, 0.5] for m in METRICS}
    values.update(behaviour=[behaviour - 0.001, behaviour + 0.001], loss=[loss - 0.01, loss + 0.01])
    return Point(objective, cure, values, [], 10.0 * (1 + bool(backwards)), backwards, 0)


def test_pareto():
    a, b, c, d = (point(NONE, x, y) for x, y in ((0.5, 1.0), (0.9, 1.2), (0.7, 1.3), (0.8, 1.2)))
    assert pareto([a, b, c, d]) == [a, b]
    assert pareto([c]) == [c]


def test_sentences_say_what_the_figures_say():
    ptx, rare = Cure("PTX", "gamma 1", gamma=1.0), Cure("conflict, rare", "8 directions", method="conflict")
    timid, slow = Cure("KL penalty", "beta 9", kl=9.0), Cure("none", "lr x 0.3", lr=0.3)
    start = {"measured": {"loss": 1.0, "behaviour": 0.5, "prose": 0.1}}
    of = [point(NONE, 0.9, 3.0), point(slow, 0.88, 2.0), point(ptx, 0.9, 1.2, 40), point(rare, 0.9, 1.7, 5)]
    of += [point(timid, 0.6, 1.0)]
    rest = [point(NONE, 0.9, 1.0, objective=o) for o in ("dpo", "prose")]
    rest += [point(ptx, 0.9, 0.9, 40, objective=o) for o in ("dpo", "prose")]
    of += rest
    won, lost, cost = tax.sentences(start, of)
    assert "fine-tuning PTX, gamma 1 (+0.200 nats a byte at 90.0 % right behaviour; the best setting" in won
    assert "without a cure, lr x 0.3, +1.000" in won and "(DPO) there was no tax" in won
    assert '"KL penalty"' in lost and "PTX" not in lost
    assert "the winner (PTX, gamma 1, +0.200) took 2.0 x the time of a step, 40 capability" in cost
    assert "few capability passes (conflict, rare, 8 directions, +0.700)" in cost
    won, lost, _ = tax.sentences(start, [*of[:2], point(ptx, 0.9, 2.5, 40), *rest])
    assert "no cure forgot less and learned as much" in won and '"PTX"' in lost


def test_settings_are_the_least_forgetting_at_each_level():
    ptx = [Cure("PTX", f"gamma {g}", gamma=g) for g in (1.0, 2.0, 3.0, 4.0)]
    start = {"behaviour": 0.5}
    of = [point(NONE, 0.9, 2.0)]
    of += [point(c, x, y) for c, x, y in zip(ptx, (0.9, 0.87, 0.85, 0.7), (1.5, 1.4, 1.2, 1.0), strict=True)]
    of += [point(Cure("KL penalty", f"beta {b}", kl=b), x, 1.0) for b, x in ((1.0, 0.6), (2.0, 0.55))]
    assert [c.strength for c in tax_cures.choose(start, of)] == ["lr x 1", "gamma 1.0", "gamma 2.0", "beta 1.0"]


def test_budgets_count_all_passes():
    """A distilled step is one of its own, and one of the text's with a third for the base model."""
    steps = 40
    none, ptx = point(NONE, 0.9, 3.0), point(Cure("PTX", "gamma 1", gamma=1.0), 0.9, 2.0, steps)
    distilled = point(Cure("distilled", "weight 1", distil=1.0, text="own", steps=1.5), 0.9, 1.5, 60)
    pinned = point(Cure("NullSpace", "share 0.1", share=0.1), 0.8, 1.2, 10)
    of = [none, ptx, distilled, pinned]
    assert tax_cures.plain_steps(of) == steps
    assert [tax_cures.work(p, steps) for p in of] == [1, 2, pytest.approx(3.5), 1.25]
    enough = tax_cures.usual(0.5, of)
    assert enough == pytest.approx(0.5 + 0.97 * 0.4)
    best = [tax_cures.least_forgetting(of, enough, budget=b) for b in (1.5, 2, 3, 4)]
    assert best == [none, ptx, ptx, distilled]
    assert tax_cures.least_forgetting(of, enough, "NullSpace") is None
    assert tax_cures.least_forgetting(of, 0.5) == pinned
