"""Second moments of the inputs of layers, gathered during ordinary backward passes.

A token counts where the gradient of an output is not exactly zero: padding and masked positions do not. Layers that are
called with the same input tensor share one moment.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradproj.nullspace.layers import Layer, call_input, input_rows, is_product, output_rows
from gradproj.nullspace.precision import without_autocast
from gradproj.rows.sharding import local_tensors

WIDE = 2048  # inputs beyond which the moment is sketched instead of held as a matrix of width x width


class Moment:
    """Sum of x x^T over tokens: exact, or a single-pass sketch of rank ``sketch``.

    The sketch keeps Y = A Q for a fixed random orthonormal Q; Nystrom's formula A ~ Y (Q' Y)^-1 Y' gives the leading
    eigenpairs.
    Source: Tropp, Yurtsever, Udell & Cevher 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data", algorithm 3.

    Args:
        width: inputs, the bias's 1 included.
        ones: the last input is a bias's.
        sketch: columns of the sketch; None holds the matrix.
    Attributes:
        sum: of x x^T, or Y; freed when the eigenpairs have been taken.
        tokens: how many were added.
        trace: of the sum.
    """

    def __init__(self, width: int, ones: bool, sketch: int | None, device: torch.device, dtype: torch.dtype):
        self.width, self.ones = width, ones
        self.tokens = 0
        self.trace = torch.zeros((), dtype=torch.float64, device=device)
        self._test: Tensor | None = None
        if sketch is not None and sketch < width:
            generator = torch.Generator().manual_seed(width)  # the same on every rank
            test = torch.randn(width, sketch, generator=generator, dtype=torch.float32)
            self._test = torch.linalg.qr(test).Q.to(device, dtype)
        self.sum = torch.zeros(width, width if self._test is None else self._test.shape[1], dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """[tokens, inputs] without the bias's column."""
        rows = rows.to(self.sum.dtype)
        if self.ones:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.sum.addmm_(rows.T, rows if self._test is None else rows @ self._test)
        self.trace += _sum_of_squares(rows)
        self.tokens += len(rows)

    def add_eigen(self, values: Tensor, vectors: Tensor, tokens: int) -> None:
        """What an earlier capture of so many tokens found: eigenvalues [r] of its mean and eigenvectors [width, r]."""
        scaled = vectors.to(self.sum) * (values.to(self.sum) * tokens)
        self.sum.addmm_(scaled, vectors.T.to(self.sum) if self._test is None else vectors.T.to(self.sum) @ self._test)
        self.trace += values.double().sum() * tokens
        self.tokens += tokens

    def copy(self) -> "Moment":
        other = object.__new__(Moment)
        other.__dict__.update(self.__dict__, sum=self.sum.clone(), trace=self.trace.clone())
        return other

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the mean, descending, and orthonormal eigenvectors [width, k], without those below
        rounding."""
        mean = self.sum.double() / max(1, self.tokens)
        if self._test is None:
            values, vectors = torch.linalg.eigh((mean + mean.T) / 2)
        else:
            values, vectors = _nystrom(mean, self._test.double())
        values, vectors = values.flip(0), vectors.flip(1)
        there = values > 8 * torch.finfo(self.sum.dtype).eps * values[:1].clamp(min=0)
        count = int(there.sum())
        return values[:count], vectors[:, :count].contiguous()


def _sum_of_squares(t: Tensor) -> Tensor:
    """Added up in float64; squared in it on the CPU only."""
    wide = t.double() if t.device.type == "cpu" else t.float() if t.dtype.itemsize < 4 else t
    return wide.square().sum(dtype=torch.float64)


def _nystrom(sketched: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, ascending. A shift by a multiple of rounding keeps the Cholesky factor of the core well defined."""
    shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(sketched)
    shifted = sketched + shift * test
    core = test.T @ shifted
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if bool(failed):
        raise RuntimeError(
            "NullSpace: the sketch of a wide layer's inputs is not positive; its inputs may not be finite"
        )
    half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
    # Eigenpairs of half half' from those of half' half, which is small: float64 has digits for the square to spare.
    values, small = torch.linalg.eigh(half.T @ half)
    vectors = (half @ small) / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    return (values - shift).clamp(min=0), vectors


class _Call:
    """One call of some layers on one input: waits until the gradients of all have said which tokens count."""

    def __init__(self, moment: int):
        self.moment = moment
        self.layers: set[int] = set()
        self.waiting = 0
        self.mask: Tensor | None = None
        self.rows: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Hands a layer's input to ``report`` when the layer's backward pass is done. It is saved as autograd saves things,
    so that gradient checkpointing drops it and makes it again."""

    @staticmethod
    def forward(ctx, x, report):
        ctx.save_for_backward(x)
        ctx.report = report
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.report(ctx.saved_tensors[0])
        return gradient, None


class Gather:
    """What one capture block gathers.

    Args:
        layers: to listen to.
        sketch: layer -> columns of the sketch of its inputs, None for an exact moment.
    Attributes:
        moments: of the inputs; layer l has number ``moment_of[l]``, None if it was never called.
        squares: per layer, the sum over tokens of the mean squared output gradient.
        tokens: per layer, how many tokens counted.
        ddp: the module of the forward pass, if it was DistributedDataParallel's.
    """

    def __init__(self, layers: Sequence[Layer], sketch: Callable[[Layer], int | None]):
        self.layers, self._sketch = layers, sketch
        self.moments: list[Moment] = []
        self.moment_of: list[int | None] = [None] * len(layers)
        self.squares: list[Tensor] = [torch.zeros((), dtype=torch.float64) for _ in layers]
        self.tokens = [0] * len(layers)
        self._calls: set[_Call] = set()
        self._recent: list[tuple[weakref.ref[Tensor], _Call]] = []  # inputs that are still alive, the newest last
        self._begun: list[int] = []  # per moment, how many calls it has had
        self.ddp: nn.Module | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Backward passes inside are gathered. A compiled model runs as it was written."""
        handles = []
        try:
            for number, layer in enumerate(self.layers):
                for module in layer.taps:
                    listener = _Listener(self, number, module)
                    handles.append(module.register_forward_pre_hook(listener.before, with_kwargs=True))
                    handles.append(module.register_forward_hook(listener.after))
            with torch.compiler.set_stance("force_eager"):
                yield
            for call in list(self._calls):  # some of whose layers got no gradient
                self._flush(call)
        finally:
            for handle in handles:
                handle.remove()
            self._recent, self._calls = [], set()

    def call(self, layer: int, x: Tensor) -> _Call:
        """The call of ``layer`` on ``x``, the same for layers that share this very input and have always shared it."""
        self._recent = [(ref, call) for ref, call in self._recent if ref() is not None][-16:]
        width, ones = self.layers[layer].shape[1], self.layers[layer].bias is not None
        mine = self.moment_of[layer]
        for ref, call in self._recent:
            moment = self.moments[call.moment]
            if ref() is not x or (moment.width, moment.ones) != (width, ones):
                continue
            if mine == call.moment or (mine is None and self._begun[call.moment] == 1):
                self.moment_of[layer] = call.moment
                return call
        if mine is None:
            mine = self.moment_of[layer] = len(self.moments)
            self.moments.append(self.new_moment(layer, x.device, x.dtype))
            self._begun.append(0)
        call = _Call(mine)
        self._begun[mine] += 1
        self._recent.append((weakref.ref(x), call))
        self._calls.add(call)
        return call

    def new_moment(self, layer: int, device: torch.device, dtype: torch.dtype) -> Moment:
        """Of no token yet. ``dtype``: of the inputs."""
        width, ones = self.layers[layer].shape[1], self.layers[layer].bias is not None
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return Moment(width, ones, self._sketch(self.layers[layer]), device, kept)

    def report(self, call: _Call, layer: int, rows: Tensor, gradients: Tensor) -> None:
        """Input rows and output gradients of one layer in a call, both [tokens, ..]."""
        mask = (gradients != 0).any(1)
        square = _sum_of_squares(gradients) / gradients.shape[1]
        self.squares[layer] = self.squares[layer].to(gradients.device) + square
        self.tokens[layer] += int(mask.sum())
        call.mask = mask if call.mask is None else call.mask | mask
        call.rows = rows
        call.waiting -= 1
        if call.waiting == 0:
            self._flush(call)

    def _flush(self, call: _Call) -> None:
        self._calls.discard(call)
        if call.rows is None or call.mask is None:
            return
        absent = {l for l, number in enumerate(self.moment_of) if number == call.moment} - call.layers
        if absent:  # they shared every input until now
            for l in absent:
                self.moment_of[l] = len(self.moments)
            self.moments.append(self.moments[call.moment].copy())
            self._begun.append(2)
        self.moments[call.moment].add(call.rows if bool(call.mask.all()) else call.rows[call.mask])
        call.rows = call.mask = None


def _refuse_split_inputs(layer: Layer, x: Tensor) -> None:
    for placement in getattr(x, "placements", ()):
        if placement.is_partial() or (placement.is_shard() and placement.dim in (x.dim() - 1, -1)):
            raise NotImplementedError(
                f"NullSpace: the weight of {layer.name} is sharded over its inputs, of which a rank sees {placement} only: leave it "
                f"out with modules="
            )


def _here(t: Tensor) -> Tensor:
    """This rank's tokens of a DTensor."""
    return local_tensors([t.detach()])[0]


class _Listener:
    """The hooks of one module."""

    def __init__(self, gather: Gather, layer: int, module: nn.Module):
        self._gather, self._layer, self._module = gather, layer, module
        self._call: _Call | None = None
        self._arrived: dict[str, Tensor] = {}

    def before(self, module, args, kwargs):
        x, keyword = call_input(module, args, kwargs)
        _refuse_split_inputs(self._gather.layers[self._layer], x)
        self._gather.ddp = self._gather.ddp or DistributedDataParallel._get_active_ddp_module()
        self._call = self._gather.call(self._layer, x)
        self._arrived = {}
        if not (torch.is_grad_enabled() and x.requires_grad):
            self._arrived["input"] = x.detach()
            return None
        tapped = _Tap.apply(x, self._reporter(self._call, self._arrived))
        return (args, {**kwargs, keyword: tapped}) if keyword else ((tapped, *args[1:]), kwargs)

    def after(self, module, args, y):
        call, arrived = self._call, self._arrived
        layer = self._gather.layers[self._layer]
        if (
            call is None
            or not is_product(module, layer.outputs, y)
            or not (torch.is_grad_enabled() and y.requires_grad)
        ):
            return
        call.layers.add(self._layer)
        call.waiting += 1
        report = self._reporter(call, arrived)

        def seen(gradient):
            arrived["gradient"] = gradient.detach()
            if "input" in arrived:
                report(arrived["input"])

        y.register_hook(seen)

    def _reporter(self, call: _Call, arrived: dict[str, Tensor]) -> Callable[[Tensor], None]:
        def report(x: Tensor) -> None:
            if "gradient" not in arrived:
                return
            with without_autocast(x.device):
                rows = input_rows(self._module, _here(x))
                gradients = output_rows(self._module, _here(arrived.pop("gradient")))
                self._gather.report(call, self._layer, rows, gradients)

        return report
