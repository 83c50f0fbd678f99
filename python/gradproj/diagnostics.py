"""What the projections of a run did, as numbers for a log."""

from collections.abc import Callable
from typing import Any

import torch

from gradproj.functional import Projection
from gradproj.optim import ProjectedOptimizer
from gradproj.projector import Projector

Sink = Callable[[dict[str, float], int], Any]


def scalars(projection: Projection) -> dict[str, float]:
    """``projection`` as floats, read from the device in one transfer.

    Returns:
        ``removed`` and ``applied``; ``cosine/k`` and ``weight/k`` for direction k = 1.., oldest first; ``weight/0`` of the
        gradient.
    """
    k = projection.cosine.shape[0]
    names = ["removed", "applied", *(f"cosine/{i + 1}" for i in range(k)), *(f"weight/{i}" for i in range(k + 1))]
    parts = (projection.removed, projection.applied, projection.cosine, projection.weights)
    values = torch.cat([part.reshape(-1).to(torch.float64) for part in parts]).tolist()
    return dict(zip(names, values, strict=True))


def log_to(opt: ProjectedOptimizer | Projector, sink: Sink | Any, every: int = 1, start: int = 0) -> Callable[[], None]:
    """Report what the projections do, every ``every`` steps; nothing is read from the device in the others.

    Args:
        opt: a :class:`gradproj.ProjectedOptimizer`, or what :func:`gradproj.attach` returned.
        sink: called with a dictionary of floats (see :func:`scalars`) and the number of the step; or an object with
            ``add_scalar(name, value, step)``, such as TensorBoard's SummaryWriter, which gets each as ``gradproj/<name>``.
        every: one synchronisation in so many steps; steps without a projection report nothing.
        start: number of the first step, for a run that resumes.
    Returns:
        a function that ends the reports. Copies and pickles of ``opt`` do not report.
    Raises:
        TypeError, ValueError: ``opt``, ``sink`` or ``every`` is not one of these.
    """
    projector = getattr(opt, "projector", opt)
    if not isinstance(projector, Projector):
        raise TypeError(
            f"log_to: pass a ProjectedOptimizer or what attach() returned, got {type(opt).__name__}; of a wrapper around the "
            f"optimizer, pass what it wraps"
        )
    if every < 1:
        raise ValueError(f"log_to: every must be >= 1, got {every}")
    report = _scalar_writer(sink) if hasattr(sink, "add_scalar") else sink
    if not callable(report):
        raise TypeError(f"log_to: the sink must be callable or have add_scalar(), got {type(sink).__name__}")
    step = start - 1

    def observer(projection: Projection | None) -> None:
        nonlocal step
        step += 1
        if projection is not None and step % every == 0:
            report(scalars(projection), step)

    return projector.observe(observer)


def _scalar_writer(writer) -> Sink:
    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"gradproj/{name}", value, step)

    return write
