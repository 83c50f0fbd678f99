"""Second moments of inputs, exact or sketched, and their leading eigenpairs."""

import math

import torch
from torch import Tensor

WIDE = 2048  # inputs beyond which the moment is sketched instead of held as a matrix of width x width
SKETCH = 512  # eigenvectors that a wide layer keeps at most, unless max_rank says otherwise

BLOCK = 256  # columns of an exact moment that are added to at once
SMALL = 512  # inputs up to which all eigenpairs are computed: the leading ones would save little
LEADING = 6  # of more inputs, the leading ones if they are at most this part of all: more take as long as all
STEPS = 8  # products of the block Lanczos method


def sketch_columns(width: int, one_of_many: bool, share: float, max_rank: int | None) -> int | None:
    """Columns of the sketch of a matrix's inputs; None for an exact moment. Twice the rank that it may have, which for
    experts is twice their share: a layer of 128 would hold 128 exact moments."""
    if one_of_many and width > WIDE // 4:
        return 2 * (max_rank or math.ceil(2 * share * width))
    return 2 * (max_rank or SKETCH) if width > WIDE else None


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
        values: the eigenvalues that are known, see :meth:`eigenvalues`.
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
        self.values = torch.zeros(0, dtype=torch.float64)
        self._vectors = self.sum

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
        self.trace += row_norms(rows).square().sum()
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

    def is_finite(self) -> bool:
        """No element of a sum of x x^T is larger than the largest on its diagonal."""
        return bool((self.sum if self.sketch is not None else self.sum.diagonal()).isfinite().all())

    def eigenvalues(self, count: int) -> Tensor:
        """At most ``count`` leading ones of the mean, descending, float64 on the CPU; without those below rounding.
        Their vectors are kept; the sum too, if there may be more."""
        self.has_more = self.sketch is None and self.width > SMALL and LEADING * count <= self.width
        if self.sketch is not None:
            values, vectors = _nystrom(self.sum.double(), self._test(self.sum).to(torch.float64, copy=True))
        else:
            for begin in range(0, self.width, BLOCK):  # the blocks on the diagonal are whole
                end = begin + BLOCK
                self.sum[begin:end, end:] = self.sum[end:, begin:end].T
            # In float64: eigenvectors of small eigenvalues would have rounding of the largest one's among them.
            values, vectors = _leading(self.sum, count) if self.has_more else torch.linalg.eigh(self.sum.double())
        values = values.double().flip(0).cpu() / max(1, self.tokens)
        self.values = values[values > 8 * torch.finfo(self.sum.dtype).eps * values[:1].clamp(min=0)]
        self._vectors = vectors.flip(1)[:, : len(self.values)].to(self.sum.dtype)
        self.has_more &= len(self.values) == count
        if not self.has_more:
            self.sum = self.sum.new_empty(0)
        return self.values

    def expected_values(self) -> Tensor:
        """The eigenvalues, and what the others are if they go on falling by the same power of their number."""
        known = len(self.values)
        if not self.has_more or known < 2:
            return self.values
        last, half = float(self.values[-1]), float(self.values[known // 2 - 1])
        power = math.log(half / last) / math.log(known / (known // 2))
        numbers = torch.arange(known + 1, self.width + 1, dtype=torch.float64)
        return torch.cat([self.values, last * (known / numbers) ** power])

    def eigenvectors(self, count: int) -> Tensor:
        """[width, count], orthonormal: of as many of those eigenvalues. The moment is freed."""
        vectors, self._vectors, self.sum = self._vectors[:, :count], self.sum.new_empty(0), self.sum.new_empty(0)
        return vectors


def _leading(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading ``count`` eigenpairs of a symmetric matrix, ascending, right to a part in 1e4 of the curvature: by
    the block Lanczos method, many times as fast as reducing the matrix to tridiagonal form. A last product in float64
    takes out what float32 leaves of directions that few tokens do not span.

    Source: Golub & Underwood 1977, "The block Lanczos method for computing eigenvalues"; Musco & Musco 2015,
    "Randomized block Krylov methods for stronger and faster approximate singular value decomposition".
    """
    width, columns = len(total), -(-(3 * count // 10 + 8) // 8) * 8  # products of whole vector registers
    generator = torch.Generator().manual_seed(width)
    block = torch.randn(width, columns, generator=generator).to(total)
    basis, products = total.new_empty(2, width, STEPS * columns)
    for begin in range(0, STEPS * columns, columns):
        earlier = basis[:, :begin]
        for _ in range(2):  # once leaves what rounding makes of it
            block = torch.linalg.qr(block - earlier @ (earlier.T @ block)).Q
        basis[:, begin : begin + columns] = block
        block = products[:, begin : begin + columns] = total @ block
    small = (basis.T @ products).double()
    vectors = torch.linalg.eigh((small + small.T) / 2).eigenvectors
    rough = _orthonormal((basis @ vectors[:, -count:].to(basis)).double())
    return _nystrom((rough.T @ total.double()).T, rough)


def _orthonormal(vectors: Tensor) -> Tensor:
    """The nearest orthonormal columns to ones that nearly are, by a step of Newton's and Schulz's iteration."""
    return vectors @ (1.5 * torch.eye(vectors.shape[1]).to(vectors) - 0.5 * (vectors.T @ vectors))


def row_norms(rows: Tensor) -> Tensor:
    """Of [tokens, inputs]: [tokens] float64, of sums of squares in float32 at least."""
    dtype = torch.float32 if rows.dtype.itemsize < 4 else rows.dtype
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double()


def _nystrom(sketched: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenpairs, ascending; both arguments are used up. A shift by a multiple of rounding keeps the Cholesky factor of
    the core well defined."""
    shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(sketched)
    shift.clamp_(min=1e-100)  # of inputs that are all zero
    sketched.add_(test.mul_(shift))
    core = test.T @ sketched / shift
    del test
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
    if bool(failed):
        raise RuntimeError(
            "NullSpace: the sketch of a wide layer's inputs is not positive; its inputs may not be finite"
        )
    half = torch.linalg.solve_triangular(factor, sketched.T, upper=False).T
    del sketched
    # Eigenpairs of half half' from those of half' half, which is small: float64 has digits for the square to spare.
    values, small = torch.linalg.eigh(half.T @ half)
    vectors = (half @ small).div_(values.clamp(min=torch.finfo(values.dtype).tiny).sqrt())
    return (values - shift) * (values > 2 * shift), vectors
