"""What a null space of a model would take, from shapes alone, so that the model may be on the meta device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradproj.capture import evaluating
from gradproj.nullspace.gather import Gather
from gradproj.nullspace.hearing import Hearing, experts
from gradproj.nullspace.matrices import Matrix, Slot
from gradproj.nullspace.products import Part


class Estimate(NamedTuple):
    """Of one GPU that holds the whole model.

    Attributes:
        matrices, weights: how many are covered.
        gathered: bytes of the moments, at the end of a capture.
        closing: bytes beside them while it closes: one moment, in float64, and what its eigenpairs need.
        held: bytes of bases and targets afterwards.
        multiply_adds: of the pin after a step.
    """

    matrices: int
    weights: int
    gathered: int
    closing: int
    held: int
    multiply_adds: int

    def __str__(self) -> str:
        numbers = (f"{self.gathered / 2**30:.2f}", f"{self.closing / 2**30:.2f}", f"{self.held / 2**30:.2f}")
        return (
            "| matrices | weights | capture GiB | closing GiB | held GiB | multiply-adds of a step |\n"
            "| ---: | ---: | ---: | ---: | ---: | ---: |\n"
            f"| {self.matrices:,} | {self.weights:,} | {' | '.join(numbers)} | {self.multiply_adds:.2e} |"
        )


class _Shapes:
    """A listener that notes which matrices are multiplied by, and which of them with the same input."""

    def __init__(self, sketch: Callable[[Matrix], int | None]):
        self.gather = Gather(sketch)

    def before(self, x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, None]:
        for part in parts:
            self.gather.call(part, x)
        return x, None

    def after(self, call: Any, y: Tensor) -> None:
        pass


@torch.enable_grad()
def estimate(
    model: nn.Module,
    slots: Sequence[Slot],
    share: float,
    sketch: Callable[[Matrix], int | None],
    run: Callable[..., Any],
) -> Estimate:
    """``run`` makes one forward pass of the model; its values do not matter, and it leaves no trace."""
    shapes = _Shapes(sketch)
    with experts(model, "grouped_mm"), evaluating(model), Hearing(slots, [shapes]):
        run(model)
    gather = shapes.gather
    gathered = closing = held = multiply_adds = 0
    for number, moment in enumerate(gather.moments):
        columns = moment.sketch or moment.width
        gathered += 4 * moment.width * columns
        closing = max(closing, 8 * moment.width * columns * 3)
        users = [matrix for matrix, n in zip(gather.matrices, gather.moment_of, strict=True) if n == number]
        rank = min(share * moment.width, (moment.sketch or 2 * moment.width) / 2)
        held += int(4 * rank * moment.width)  # the eigenvectors, which they share
        for matrix in users:
            outputs, inputs = matrix.shape
            held += int(4 * rank * outputs)
            multiply_adds += int(2 * outputs * inputs * rank)
    weights = sum(matrix.numel for matrix in gather.matrices)
    return Estimate(len(gather.matrices), weights, gathered, closing, held, multiply_adds)
