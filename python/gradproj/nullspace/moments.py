"""Second moments of inputs, exact or sketched, and their leading eigenpairs."""

import torch
from torch import Tensor

WIDE = 2048  # inputs beyond which the moment is sketched instead of held as a matrix of width x width
BLOCK = 256  # columns of an exact moment that are added to at once
SMALL = 512  # inputs up to which all eigenpairs are as fast as the leading ones


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
        tests: where the moments of a capture keep Q, of which those of one width share one.
    Attributes:
        sum: of x x^T, above the diagonal unfinished, or Y; empty before the first token and after :meth:`eigenvectors`.
        tokens: how many were added.
        trace: of the sum.
    """

    def __init__(
        self,
        width: int,
        ones: bool,
        sketch: int | None,
        device: torch.device,
        dtype: torch.dtype,
        tests: dict[tuple, Tensor],
    ):
        self.width, self.ones, self._tests = width, ones, tests
        self.sketch = sketch if sketch is not None and sketch < width else None
        self.tokens = 0
        self.trace = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(0, dtype=dtype, device=device)
        self.has_more = True  # eigenvalues than have been computed
        self._values = self._vectors = self.sum

    def whole_sum(self) -> Tensor:
        """The sum, zeros before the first token."""
        if not self.sum.numel():
            self.sum = self.sum.new_zeros(self.width, self.sketch or self.width)
        return self.sum

    def _test(self, like: Tensor) -> Tensor:
        """Q, the same on every rank."""
        key = self.width, self.sketch, like.device, like.dtype
        if key not in self._tests:
            generator = torch.Generator().manual_seed(self.width)
            gaussian = torch.randn(self.width, self.sketch or 0, generator=generator, dtype=torch.float32)
            self._tests[key] = torch.linalg.qr(gaussian).Q.to(like)
        return self._tests[key]

    def _times_test(self, t: Tensor) -> Tensor:
        """``t`` [.., width] times Q."""
        return t if self.sketch is None else t @ self._test(t)

    def add(self, rows: Tensor) -> None:
        """[tokens, inputs] without the bias's column."""
        rows = rows.to(self.sum.dtype)
        if self.ones:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        total = self.whole_sum()
        if self.sketch is None:  # of a symmetric matrix the blocks on the diagonal and below
            for begin in range(0, self.width, BLOCK):
                total[begin:, begin : begin + BLOCK].addmm_(rows[:, begin:].T, rows[:, begin : begin + BLOCK])
        else:
            total.addmm_(rows.T, self._times_test(rows))
        self.trace += sum_of_squares(rows)
        self.tokens += len(rows)

    def add_eigen(self, values: Tensor, vectors: Tensor, tokens: int) -> None:
        """What an earlier capture of so many tokens found: eigenvalues [r] of its mean and eigenvectors [width, r]."""
        vectors = vectors.to(self.sum)
        self.whole_sum().addmm_(vectors * (values.to(self.sum) * tokens), self._times_test(vectors.T))
        self.trace += values.double().sum() * tokens
        self.tokens += tokens

    def copy(self) -> "Moment":
        other = object.__new__(Moment)
        other.__dict__.update(self.__dict__, sum=self.sum.clone(), trace=self.trace.clone())
        return other

    @property
    def mean_trace(self) -> float:
        return float(self.trace) / max(1, self.tokens)

    def eigenvalues(self, count: int) -> Tensor:
        """At most ``count`` leading ones of the mean, descending, float64; without those below rounding. Their vectors
        are kept; the sum too, if there may be more."""
        if self.has_more:
            mean = self._mean()
            self.has_more = self.sketch is None and self.width > SMALL and 2 * count <= self.width
            if self.has_more:
                values, vectors = _leading(mean, count)
            else:
                if self.sketch is not None:
                    values, vectors = _nystrom(mean, self._test(mean))
                else:
                    values, vectors = torch.linalg.eigh(mean)
                values, vectors = values.flip(0), vectors.flip(1)
                self.sum = self.sum.new_empty(0)
            self._values = values[values > 8 * torch.finfo(self.sum.dtype).eps * values[:1].clamp(min=0)]
            self._vectors = vectors[:, : len(self._values)].to(self.sum.dtype)
        return self._values

    def eigenvectors(self, count: int) -> Tensor:
        """[width, count], orthonormal: of as many of those eigenvalues. The moment is freed."""
        vectors, self._vectors, self.sum = self._vectors, self.sum.new_empty(0), self.sum.new_empty(0)
        return vectors[:, :count]

    def _mean(self) -> Tensor:
        mean = self.whole_sum().double() / max(1, self.tokens)
        return mean if self.sketch is not None else mean.tril() + mean.tril(-1).T


def _leading(mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading ``count`` eigenpairs, descending, right to a part in 1e4 of the curvature.

    Subspace iteration in float32, and Nystrom's formula on one product in float64: products with the matrix, which are
    many times as fast as reducing it to tridiagonal form.
    Source: Halko, Martinsson & Tropp 2011, "Finding structure with randomness", algorithms 4.4 and 5.5.
    """
    rough = mean.float()
    columns = min(len(mean), 2 * count + 16)
    generator = torch.Generator().manual_seed(len(mean))
    basis = torch.randn(len(mean), columns, generator=generator).to(rough.device)
    for _ in range(3):
        basis = torch.linalg.qr(rough @ basis).Q
    wide = basis.double()
    values, vectors = _nystrom(mean @ wide, wide)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def sum_of_squares(t: Tensor) -> Tensor:
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
