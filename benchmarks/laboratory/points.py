"""Runs -> points: one cure under one objective, over its seeds."""

import statistics
from typing import Any, NamedTuple

from laboratory import refusals_model, small, smollm2
from laboratory.cures import BASE, Cure

OBJECTIVES = {**small.OBJECTIVES, **smollm2.OBJECTIVES, **refusals_model.OBJECTIVES}


class Metric(NamedTuple):
    """How a figure is shown.

    Attributes:
        label, unit: in words.
        factor, digits: shown is ``factor * value`` with that many digits.
        better: "high", "low", or "base" where any departure from the base model is a loss.
    """

    label: str
    unit: str
    factor: float
    digits: int
    better: str

    def show(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}"


METRICS = {
    "behaviour": Metric("right behaviour", "%", 100, 1, "high"),
    "prose": Metric("a byte of English prose", "%", 100, 2, "high"),
    "preference": Metric("preference accuracy", "%", 100, 1, "high"),
    "loss": Metric("loss on Python", "nats a byte", 1, 3, "low"),
    "task_accuracy": Metric("exercises solved", "%", 100, 1, "high"),
    "entropy": Metric("entropy of samples", "nats a byte", 1, 2, "base"),
    "distinct_3": Metric("distinct-3 of samples", "", 1, 2, "base"),
    "ece": Metric("calibration error", "%", 100, 1, "low"),
}


class Point(NamedTuple):
    """One cure under one objective, over its seeds.

    Attributes:
        values: metric -> one value a seed, of every number that was measured.
        bins: of the reliability diagram, summed over the seeds.
        step_ms, backwards, extra_bytes, capture_s: means; None for interpolation, which trains nothing.
    """

    objective: str
    cure: Cure
    values: dict[str, list[float]]
    bins: list[dict[str, Any]]
    step_ms: float | None
    backwards: int | None
    extra_bytes: float | None
    capture_s: float | None = None

    def mean(self, metric: str) -> float:
        return statistics.mean(self.values[metric])

    @property
    def target(self) -> float:
        """How well it has learned what its objective teaches."""
        return self.mean(OBJECTIVES[self.objective].target)

    def spread(self, metric: str) -> float:
        return statistics.stdev(self.values[metric]) if len(self.values[metric]) > 1 else 0.0


def points(finished: list[dict[str, Any]]) -> list[Point]:
    """In the order in which objective and cure first occur; what was measured of the base model is left out."""
    groups: dict[tuple[str, Cure], list[dict[str, Any]]] = {}
    for run in finished:
        if run["cure"]["family"] != BASE.family:
            groups.setdefault((run["objective"], Cure(**run["cure"])), []).append(run)
    result = []
    for (objective, cure), group in groups.items():
        costs = [r["cost"] for r in group if r["cost"]]

        def mean(key: str, costs=costs) -> Any:
            return statistics.mean(c.get(key, 0.0) for c in costs) if costs else None

        measured = [r["measured"] for r in group]
        values = {m: [r[m] for r in measured] for m, v in measured[0].items() if not isinstance(v, list)}
        bins = _sum_bins([r.get("bins", []) for r in measured])
        cost = (mean(key) for key in ("step_ms", "capability_backwards", "extra_bytes", "capture_s"))
        result.append(Point(objective, cure, values, bins, *cost))
    return result


def _sum_bins(many: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    result = []
    for bins in zip(*many, strict=True):
        count = sum(b["count"] for b in bins)
        total = {k: sum(b["count"] * b[k] for b in bins if b["count"]) for k in ("confidence", "accuracy")}
        result.append({"count": count, **{k: v / count if count else None for k, v in total.items()}})
    return result


def pareto(of: list[Point]) -> list[Point]:
    """Of points of one objective, those that no other beats in both target and loss, by mean; by rising target."""

    def beaten(p: Point) -> bool:
        return any(
            q.target >= p.target
            and q.mean("loss") <= p.mean("loss")
            and (q.target, q.mean("loss")) != (p.target, p.mean("loss"))
            for q in of
        )

    return sorted((p for p in of if not beaten(p)), key=lambda p: p.target)
