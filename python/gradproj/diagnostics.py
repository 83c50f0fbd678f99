"""What the projections of a run did, as numbers for a log."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from gradproj.functional import Projection
from gradproj.optim import Protected
from gradproj.protection import Protection

Sink = Callable[[dict[str, float], int], Any]


def scalars(projection: Projection) -> dict[str, float]:
    """``projection`` as floats, read from the device in one transfer.

    Returns:
        ``removed`` and ``applied``; ``cosine/k`` and ``weight/k`` for direction k = 1.., oldest first; ``weight/0`` of the
        gradient. Of a projection in parts, part p's are ``removed/p``, ``cosine/p/k`` and so on.
    """
    fields = (
        ("removed", projection.removed, 0),
        ("applied", projection.applied, 0),
        ("cosine", projection.cosine, 1),  # numbered as the weights are, of which the first is the gradient's
        ("weight", projection.weights, 0),
    )
    names = [
        "/".join(map(str, (name, *at[:-1], *(last + first for last in at[-1:]))))
        for name, t, first in fields
        for at in itertools.product(*map(range, t.shape))
    ]
    values = torch.cat([t.reshape(-1).to(torch.float64) for _, t, _ in fields]).tolist()
    return dict(zip(names, values, strict=True))


def log_to(opt: Protected | Protection, sink: Sink | Any, every: int = 1, start: int = 0) -> Callable[[], None]:
    """Report what the projections do, every ``every`` steps; nothing is read from the device in the others.

    Args:
        opt: a :class:`gradproj.ProjectedOptimizer`, what :func:`gradproj.attach` returned, or the protection itself.
        sink: called with a dictionary of floats (see :func:`scalars`) and the number of the step; or an object with
            ``add_scalar(name, value, step)``, such as TensorBoard's SummaryWriter, which gets each as ``gradproj/<name>``.
        every: one synchronisation in so many steps; steps without a projection report nothing.
        start: number of the first step, for a run that resumes.
    Returns:
        a function that ends the reports. Copies and pickles of ``opt`` do not report.
    Raises:
        TypeError, ValueError: ``opt``, ``sink`` or ``every`` is not one of these.
    """
    protection = opt.protection if isinstance(opt, Protected) else opt
    if not isinstance(protection, Protection):
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

    return protection.observe(observer)


def _scalar_writer(writer) -> Sink:
    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(f"gradproj/{name}", value, step)

    return write
