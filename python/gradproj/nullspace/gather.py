"""What a capture gathers: second moments of inputs and squares of output gradients, in ordinary backward passes.

A token counts where the gradient of an output is not exactly zero: padding and masked positions do not. Matrices that
are always multiplied with the same rows of the same tensor share one moment.
"""

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.nullspace.matrices import Matrix
from gradproj.nullspace.moments import Moment, row_norms
from gradproj.nullspace.precision import without_autocast
from gradproj.nullspace.products import Part
from gradproj.rows.sharding import local_tensors

UNDERFLOW = 2.0**-24  # the smallest number that float16 has


class _Call:
    """The rows of one input that some matrices are multiplied with: waits until all their gradients have said which
    tokens count."""

    def __init__(self, moment: int):
        self.moment = moment
        self.matrices: set[int] = set()
        self.waiting = 0
        self.mask: Tensor | None = None
        self.rows: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Hands a call's input to ``report`` when its backward pass is done. It is saved as autograd saves things, so that
    gradient checkpointing drops it and makes it again.

    Its result depends on ``weights``, although they get no gradient: the call's does so too, and DDP waits for all.
    """

    @staticmethod
    def forward(ctx, x, report, *weights):
        ctx.save_for_backward(x)
        ctx.report = report
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.report(ctx.saved_tensors[0])
        return gradient if ctx.needs_input_grad[0] else None, *[None] * (len(ctx.needs_input_grad) - 1)


class _Heard(NamedTuple):
    """Between a call and its gradient."""

    calls: list[tuple[_Call, int, Part]]  # and the matrix's number
    arrived: dict[str, Tensor]


class Gather:
    """What one capture gathers; a listener of :class:`gradproj.nullspace.hearing.Hearing`.

    Args:
        sketch: matrix -> columns of the sketch of its inputs, None for an exact moment.
        without: names of parameters that are not gathered.
        tick: called after every backward pass.
        scale: of the losses.
    Attributes:
        matrices: those that were multiplied by, in the order in which they were.
        moments: of the inputs; matrix m has number ``moment_of[m]``.
        squares: per matrix, the sum over tokens of the mean squared output gradient.
        tokens: per matrix, how many tokens counted.
        ddp: the module of the forward pass, if it was DistributedDataParallel's.
    """

    def __init__(
        self,
        sketch: Callable[[Matrix], int | None],
        without: Collection[str] = (),
        tick: Callable[[], Any] = lambda: None,
        scale: float = 1.0,
    ):
        self._sketch, self._without, self._tick, self._scale = sketch, without, tick, scale
        self.last_pass: int | None = None  # the number of the backward pass of which something was heard
        self.matrices: list[Matrix] = []
        self.moments: list[Moment] = []
        self.moment_of: list[int | None] = []
        self.squares: list[Tensor] = []
        self.tokens: list[int] = []
        self.ddp: nn.Module | None = None
        self._numbers: dict[tuple, int] = {}
        self._calls: set[_Call] = set()
        self._recent: list[tuple[weakref.ref[Tensor], tuple, _Call]] = []  # inputs still alive, the newest last
        self._tests: dict[tuple, Tensor] = {}
        self._begun: list[int] = []  # per moment, how many calls it has had
        self._faint = False

    def number(self, matrix: Matrix) -> int:
        """Of a matrix, which is added if it is new."""
        m = self._numbers.setdefault(matrix.key, len(self.matrices))
        if m == len(self.matrices):
            self.matrices.append(matrix)
            self.moment_of.append(None)
            self.squares.append(torch.zeros((), dtype=torch.float64))
            self.tokens.append(0)
        return m

    def names_with_tokens(self) -> set[str]:
        """Of the parameters that some token's gradient has reached."""
        return {matrix.slot.name for matrix, tokens in zip(self.matrices, self.tokens, strict=True) if tokens}

    def order(self, numbers: Sequence[int]) -> None:
        """Matrix m is from now on the one that was number ``numbers[m]``."""
        self.matrices = [self.matrices[m] for m in numbers]
        self.moment_of = [self.moment_of[m] for m in numbers]
        self.squares = [self.squares[m] for m in numbers]
        self.tokens = [self.tokens[m] for m in numbers]
        self._numbers = {matrix.key: m for m, matrix in enumerate(self.matrices)}

    def before(self, x: Tensor, weights: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Tensor, _Heard]:
        calls = []
        for part in parts:
            if part.at.consumer or part.at.slot.name not in self._without:
                calls.append((*self.call(part, x), part))
        if calls:
            _refuse_split_inputs(self.matrices[calls[0][1]], x)
        self.ddp = self.ddp or DistributedDataParallel._get_active_ddp_module()
        heard = _Heard(calls, {})
        if not (weights or x.requires_grad):
            heard.arrived["input"] = x.detach()
            return x, heard
        return _Tap.apply(x, lambda rows: self._report(heard, rows), *weights), heard

    def after(self, heard: _Heard, y: Tensor) -> None:
        if not heard.calls:
            return
        for call, m, _ in heard.calls:
            call.matrices.add(m)
            call.waiting += 1

        def seen(gradient: Tensor) -> None:
            number = torch._C._current_graph_task_id()
            if number != self.last_pass:
                self.last_pass = number
                torch.autograd.Variable._execution_engine.queue_callback(self._tick)
            heard.arrived["gradient"] = gradient.detach()
            if "input" in heard.arrived:
                self._report(heard, heard.arrived["input"])

        y.register_hook(seen)

    def why_nothing(self) -> str:
        """Why no token counts."""
        if self.matrices:
            return (
                "none of the matrices that were heard received a gradient: give it batches whose loss depends on them"
            )
        return (
            "no product of an input with a parameter that trains was heard: weights that are computed (weight_norm, a "
            "parametrization) are none: remove that first; nor are recurrent layers and fused operations"
        )

    def end(self) -> None:
        """Of calls some of whose matrices got no gradient, what the others said."""
        for call in list(self._calls):
            self._flush(call)
        self._recent = []
        if self._faint:
            warnings.warn(
                "NullSpace: some tokens' gradients are about the smallest that float16 has; those of others may have "
                "become zero, so that they were not captured: in `with capture(scale=4096):` multiply the loss by that",
                RuntimeWarning,
                stacklevel=5,
            )

    def call(self, part: Part, x: Tensor) -> tuple[_Call, int]:
        """Which call a part of one on ``x`` belongs to, and the number of its matrix."""
        m = self._matrix(part)
        return self._call(m, x, part.reading), m

    def _matrix(self, part: Part) -> int:
        m = self._numbers.get((part.at.slot.name, part.at.region))
        if m is None:
            return self.number(Matrix(part.at, part.bias))
        if self.matrices[m].bias_at != part.bias:
            raise several_biases(self.matrices[m].name)
        return m

    def _call(self, m: int, x: Tensor, reading: tuple) -> _Call:
        """The call on these rows of ``x``, the same for matrices that share them now and have always shared them."""
        self._recent = [entry for entry in self._recent if entry[0]() is not None][-16:]
        width, ones = self.matrices[m].shape[1], self.matrices[m].bias_at is not None
        mine = self.moment_of[m]
        for ref, of, call in self._recent:
            moment = self.moments[call.moment]
            if ref() is not x or of != reading or (moment.width, moment.ones) != (width, ones):
                continue
            if call not in self._calls or m in call.matrices:  # they count once more
                continue
            if mine == call.moment or (mine is None and self._begun[call.moment] == 1):
                self.moment_of[m] = call.moment
                return call
        if mine is None:
            mine = self.moment_of[m] = len(self.moments)
            self.moments.append(self.new_moment(m, x.device, x.dtype))
            self._begun.append(0)
        call = _Call(mine)
        self._begun[mine] += 1
        self._recent.append((weakref.ref(x), reading, call))
        self._calls.add(call)
        return call

    def new_moment(self, m: int, device: torch.device, dtype: torch.dtype) -> Moment:
        """Of no token yet. ``dtype``: of the inputs."""
        matrix = self.matrices[m]
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return Moment(matrix.shape[1], matrix.bias_at is not None, self._sketch(matrix), device, kept, self._tests)

    def _report(self, heard: _Heard, x: Tensor) -> None:
        if "gradient" not in heard.arrived:
            return
        x, y = _here(x), _here(heard.arrived.pop("gradient"))
        with torch.no_grad(), without_autocast(x.device):
            for call, m, part in heard.calls:
                rows, gradients = part.rows(x), part.outputs(y)
                norms = row_norms(gradients)
                mask = norms != 0
                square = (norms / self._scale).square().sum() / gradients.shape[1]
                self.squares[m] = self.squares[m].to(square.device) + square
                self.tokens[m] += int(mask.sum())
                if gradients.dtype == torch.float16:
                    self._faint |= bool((mask & (norms < UNDERFLOW * gradients.shape[1] ** 0.5)).any())
                call.mask = mask if call.mask is None else call.mask | mask
                call.rows = rows
                call.waiting -= 1
                if call.waiting == 0:
                    self._flush(call)

    def _flush(self, call: _Call) -> None:
        self._calls.discard(call)
        if call.rows is None or call.mask is None:
            return
        rows = call.rows if bool(call.mask.all()) else call.rows[call.mask]
        # One number, unless a call that was made later, and is heard of earlier, has parted its matrices.
        for number in sorted({n for m in call.matrices if (n := self.moment_of[m]) is not None}):
            absent = {m for m, of in enumerate(self.moment_of) if of == number} - call.matrices
            if absent:  # they shared every input until now
                for m in absent:
                    self.moment_of[m] = len(self.moments)
                self.moments.append(self.moments[number].copy())
                self._begun.append(2)
            if len(rows):
                self.moments[number].add(rows)
        call.rows = call.mask = None


def several_biases(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"NullSpace: {name} is multiplied by with a bias and without it, or with several: leave it out with modules="
    )


def _refuse_split_inputs(matrix: Matrix, x: Tensor) -> None:
    for placement in getattr(x, "placements", ()):
        if placement.is_partial() or (placement.is_shard() and placement.dim in (x.dim() - 1, -1)):
            raise NotImplementedError(
                f"NullSpace: the weight of {matrix.name} is sharded over its inputs, of which a rank sees {placement} "
                "only: leave it out with modules="
            )


def _here(t: Tensor) -> Tensor:
    """This rank's tokens of a DTensor."""
    return local_tensors([t.detach()])[0]
