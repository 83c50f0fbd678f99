"""What a null space of a model would take, from shapes alone, so that the model may be on the meta device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradproj.capture import evaluating
from gradproj.nullspace import allocation
from gradproj.nullspace.allocation import Curvature
from gradproj.nullspace.gather import Gather
from gradproj.nullspace.hearing import Hearing, experts
from gradproj.nullspace.matrices import Matrix, Slot
from gradproj.nullspace.products import Part

POWER = 0.75  # chosen on SmolLM2-135M at a share of 0.05


class Estimate(NamedTuple):
    """Of one GPU that holds the whole model.

    Attributes:
        matrices, weights: how many are covered.
        gathered: bytes of the moments, at the end of a capture.
        closing: bytes beside them while it closes: what the eigenpairs of one moment need.
        held: bytes of bases and targets afterwards, without the pairs that Triton takes of bases of bfloat16 weights.
        multiply_adds: of the pin after a step.

    What is held, and the multiply-adds, depend on the ranks, which only a capture knows. Of SmolLM2-135M both are right
    to a tenth at shares of 0.05 and 0.15, and at 0.02 what is held is a seventh too low.
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

    def before(self, x: Tensor, weights: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Tensor, None]:
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
    most: Callable[[Matrix], int | None],
    run: Callable[..., Any],
) -> Estimate:
    """``run`` makes one forward pass of the model; its values do not matter, and it leaves no trace."""
    shapes = _Shapes(sketch)
    with experts(model, "grouped_mm"), evaluating(model), Hearing(slots, [shapes]):
        run(model)
    gather = shapes.gather
    ranks = allocation.ranks([_foreseen(*matrix.shape, most(matrix)) for matrix in gather.matrices], share)
    gathered = closing = held = multiply_adds = 0
    for number, moment in enumerate(gather.moments):
        size = 4 * moment.width * (moment.sketch or moment.width)
        gathered += size
        closing = max(closing, size * (8 if moment.sketch else 10))
        users = [m for m, n in enumerate(gather.moment_of) if n == number]
        held += 4 * moment.width * max(ranks[m] for m in users)  # the eigenvectors, which they share
    for matrix, rank in zip(gather.matrices, ranks, strict=True):
        held += 4 * rank * matrix.shape[0]
        multiply_adds += 2 * rank * matrix.numel
    weights = sum(matrix.numel for matrix in gather.matrices)
    return Estimate(len(gather.matrices), weights, gathered, closing, held, multiply_adds)


def _foreseen(outputs: int, inputs: int, most: int | None) -> Curvature:
    """Of a matrix nothing of which is known: as much of the loss's gradient arrives at each of a model's matrices,
    spread over its outputs, and its inputs have eigenvalues that fall by POWER."""
    values = torch.arange(1, inputs + 1, dtype=torch.float64).pow(-POWER)
    return Curvature(1 / outputs, (values / values.mean())[:most], float(inputs), outputs, inputs)
