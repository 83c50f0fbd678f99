"""Rows of the tables for ``pin_``: against the loop of matrix products and the formula, and on a GPU against a copy."""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import gradproj
import harness
import timing
from gradproj import reference
from gradproj.kernels.backends import select
from gradproj.rows.functional import split_basis
from harness import Row


class PinCase(NamedTuple):
    """Weights of these shapes, [outputs, inputs], each with a basis of its own. ``transposed``: they lie [inputs,
    outputs]."""

    name: str
    shapes: list[tuple[int, ...]]
    rank: int = 64
    dtype: torch.dtype = torch.float32
    rounds: int = 7
    transposed: bool = False

    @property
    def minimal_bytes(self) -> int:
        return 2 * sum(o * i for o, i in self.shapes) * self.dtype.itemsize


SMALL, SMALL_INPUTS, SMALL_RANK = 210, 32, 8  # layers whose products cost less than the calls
Layers = list[tuple[Tensor, Tensor, Tensor, Tensor]]  # W, U, B in float32, and U as ``pin_`` takes it


def make_layers(case: PinCase, device: str) -> Layers:
    """B is a tenth off W U. Vectors of U lie one after the other, as ``NullSpace`` holds them: on a GPU it has a pair
    for bfloat16. Layers of as many inputs have the same U, each in memory of its own."""
    rng = torch.Generator(device).manual_seed(0)
    layers = []
    bases: dict[int, Tensor] = {}
    for outputs, inputs in case.shapes:
        rank = min(case.rank, inputs)
        if inputs not in bases:
            bases[inputs] = torch.linalg.qr(torch.randn(inputs, rank, generator=rng, device=device)).Q.T.contiguous()
        basis = bases[inputs].clone().T
        held = split_basis(basis) if device == "cuda" and case.dtype == torch.bfloat16 else basis
        weight = torch.randn((inputs, outputs) if case.transposed else (outputs, inputs), generator=rng, device=device)
        weight = (weight.T if case.transposed else weight).to(case.dtype)
        noise = torch.randn(outputs, rank, generator=rng, device=device)
        layers.append((weight, basis, weight.float() @ basis + 0.1 * noise, held))
    return layers


def fused(layers: Layers) -> None:
    weights, _, targets, bases = map(list, zip(*layers, strict=True))
    gradproj.pin_(weights, bases, targets)


def loop(layers: Layers) -> None:
    """The best plain torch: two products a layer, the second in place. Of 16-bit weights in float32, a layer at a
    time."""
    for weight, basis, target, _ in layers:
        wide = weight.float()
        wide.addmm_(torch.mm(wide, basis).sub_(target), basis.T, alpha=-1.0)
        if wide is not weight:
            weight.copy_(wide)


def pin_in_place(weight: Tensor, basis: Tensor, target: Tensor) -> None:
    weight.addmm_(torch.addmm(target, weight, basis, beta=-1.0), basis.T, alpha=-1.0)


class InOwnType:
    """Two products a layer in the weights' own dtype, U and B rounded to it beforehand, the second in place: it reads W
    twice and writes it once. In 16 bits W U is then another than was captured, by the rounding of U and of B."""

    def __init__(self, layers: Layers, pin: Callable[..., None] = pin_in_place):
        self.operands = [(basis.to(w.dtype), target.to(w.dtype)) for w, basis, target, _ in layers]
        self.pin = pin

    def __call__(self, layers: Layers) -> None:
        for (weight, *_), operands in zip(layers, self.operands, strict=True):
            self.pin(weight, *operands)


def formula(layers: Layers) -> None:
    for weight, basis, target, _ in layers:
        weight.data = reference.pin_(weight.float(), basis, target).to(weight.dtype)


def is_right(run: Callable[[Layers], None], layers: Layers) -> bool:
    """Against float64, layer by layer."""
    copies = [(weight.clone(), *operands) for weight, *operands in layers]
    run(copies)
    for (result, *_), (weight, basis, target, _) in zip(copies, layers, strict=True):
        exact = reference.pin_(weight.double(), basis.double(), target.double())
        if not (result.double() - exact).norm() <= harness.TOLERANCE[weight.dtype] * exact.norm():
            return False
    return True


def line(row: Row) -> str:
    """Of the table of `make bench`."""
    extra, other = (0 if n is None else n / 2**20 for n in (row.extra_bytes, row.naive_extra_bytes))
    return (
        f"| {row.case} | {harness.duration(row.seconds or 0.0)} | {row.times_best_torch or 0.0:.2f} {row.best_torch} | "
        f"{row.times_naive or 0.0:.2f} | {extra:.2f} MiB | {other:.0f} MiB |"
    )


LOOP, OWN, COMPILED = "mm + addmm_", "addmm + addmm_", "torch.compile"


def measure(case: PinCase, device: str = "cpu", backend: str | None = None, compiled: bool = False) -> Row:
    """On the CPU there is no share of the limit: the products take longer than the bytes; nor do 16-bit products
    compete there. ``compiled``: against torch.compile of the products in the weights' own dtype alone."""
    layers = make_layers(case, device)
    runs = {"fused": harness.on_backend(backend, fused), "formula": formula}
    if compiled:
        inductor = torch.compile(pin_in_place, backend="inductor" if device == "cuda" else "eager", dynamic=False)
        runs[COMPILED] = InOwnType(layers, inductor)
    else:
        runs[LOOP] = loop
        if device == "cuda" or case.dtype == torch.float32:
            runs[OWN] = InOwnType(layers)
    wrong = [name for name, run in runs.items() if not is_right(run, layers)]
    row = Row(case.name, backend or select(device, "pin_").name, len(layers), wrong)
    if "fused" in wrong:
        return row
    timed = {name: functools.partial(run, layers) for name, run in runs.items() if name not in wrong}
    extra = timing.extra_memory(timed["fused"], device)
    if device == "cuda":
        timed["limit"], share = harness.copy_limit(case.minimal_bytes)
    seconds = timing.in_turns(timed, case.rounds, device)
    ratios = {name: timing.ratio(seconds[name], seconds["fused"]) for name in seconds}
    best = min((name for name in (LOOP, OWN, COMPILED) if name in ratios), key=ratios.__getitem__, default="")
    return row._replace(
        seconds=statistics.median(seconds["fused"]),
        host_seconds=timing.host_seconds(timed["fused"]) if device == "cuda" else None,
        times_naive=ratios.get("formula"),
        times_best_torch=ratios.get(best),
        best_torch=best,
        share_of_limit=share * ratios["limit"] if device == "cuda" else None,
        extra_bytes=extra,
        naive_extra_bytes=timing.extra_memory(timed["formula"], device) if "formula" in timed else None,
    )


def small_layers(biased: bool, rounds: int = 41) -> tuple[float, float]:
    """Microseconds a layer, the best round on one thread: ``pin_``, and its excess over plain calls of torch. Those are
    three, five with a bias, whose views of U are made beforehand.

    Raises:
        AssertionError: the two do not agree.
    """
    rng = torch.Generator().manual_seed(0)
    bases = torch.linalg.qr(torch.randn(SMALL, SMALL_INPUTS + biased, SMALL_RANK, generator=rng)).Q.mT.contiguous().mT
    weights = torch.randn(SMALL, SMALL_INPUTS, SMALL_INPUTS, generator=rng)
    targets = torch.randn(SMALL, SMALL_INPUTS, SMALL_RANK, generator=rng)
    biases = torch.randn(SMALL, SMALL_INPUTS, generator=rng)
    each = list(bases)
    views = [(u[:SMALL_INPUTS], u[:SMALL_INPUTS].T, u[-1]) for u in bases]

    def plain(weights: list[Tensor], targets: list[Tensor], biases: list[Tensor]) -> None:
        for w, b, c, (u, transposed, of_bias) in zip(weights, targets, biases, views, strict=True):
            moved = torch.mm(w, u).sub_(b)
            if biased:
                moved.addr_(c, of_bias)
                c.addmv_(moved, of_bias, alpha=-1.0)
            w.addmm_(moved, transposed, alpha=-1.0)

    def fused(weights: list[Tensor], targets: list[Tensor], biases: list[Tensor]) -> None:
        gradproj.pin_(weights, each, targets, biases if biased else None)

    one, other = ([[t.clone() for t in row] for row in (weights, targets, biases)] for _ in range(2))
    fused(*one)
    plain(*other)
    for a, b in zip(one[0] + one[2], other[0] + other[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    runs = {"pin_": functools.partial(fused, *one), "plain": functools.partial(plain, *one)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = timing.in_turns(runs, rounds, "cpu")
    torch.set_num_threads(threads)
    best = {name: min(found) * 1e6 / SMALL for name, found in seconds.items()}
    return best["pin_"], best["pin_"] - best["plain"]
