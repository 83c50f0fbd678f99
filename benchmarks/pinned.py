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
Layers = list[tuple[Tensor, Tensor, Tensor]]  # W, U, B; U and B are float32


def make_layers(case: PinCase, device: str) -> Layers:
    """B is a tenth off W U. Vectors of U lie one after the other, as ``NullSpace`` holds them."""
    rng = torch.Generator(device).manual_seed(0)
    layers = []
    for outputs, inputs in case.shapes:
        rank = min(case.rank, inputs)
        basis = torch.linalg.qr(torch.randn(inputs, rank, generator=rng, device=device)).Q.T.contiguous().T
        weight = torch.randn((inputs, outputs) if case.transposed else (outputs, inputs), generator=rng, device=device)
        weight = (weight.T if case.transposed else weight).to(case.dtype)
        noise = torch.randn(outputs, rank, generator=rng, device=device)
        layers.append((weight, basis, weight.float() @ basis + 0.1 * noise))
    return layers


def fused(layers: Layers) -> None:
    gradproj.pin_(*map(list, zip(*layers, strict=True)))


def loop(layers: Layers) -> None:
    """The best plain torch: two products a layer, the second in place. Of 16-bit weights in float32, a layer at a
    time."""
    for weight, basis, target in layers:
        wide = weight.float()
        wide.addmm_(torch.mm(wide, basis).sub_(target), basis.T, alpha=-1.0)
        if wide is not weight:
            weight.copy_(wide)


def formula(layers: Layers) -> None:
    for weight, basis, target in layers:
        weight.data = reference.pin_(weight.float(), basis, target).to(weight.dtype)


def is_right(run: Callable[[Layers], None], layers: Layers) -> bool:
    """Against float64, layer by layer."""
    copies = [(weight.clone(), basis, target) for weight, basis, target in layers]
    run(copies)
    for (result, *_), (weight, basis, target) in zip(copies, layers, strict=True):
        exact = reference.pin_(weight.double(), basis.double(), target.double())
        if not (result.double() - exact).norm() <= harness.TOLERANCE[weight.dtype] * exact.norm():
            return False
    return True


def line(row: Row) -> str:
    """Of the table of `make bench`."""
    extra, other = (0 if n is None else n / 2**20 for n in (row.extra_bytes, row.naive_extra_bytes))
    return (
        f"| {row.case} | {harness.duration(row.seconds or 0.0)} | {row.times_best_torch or 0.0:.2f} | "
        f"{row.times_naive or 0.0:.2f} | {extra:.2f} MiB | {other:.0f} MiB |"
    )


def measure(case: PinCase, device: str = "cpu", backend: str | None = None) -> Row:
    """On the CPU there is no share of the limit: the products take longer than the bytes."""
    layers = make_layers(case, device)
    runs = {"fused": harness.on_backend(backend, fused), "mm + addmm_": loop, "formula": formula}
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
    return row._replace(
        seconds=statistics.median(seconds["fused"]),
        host_seconds=timing.host_seconds(timed["fused"]) if device == "cuda" else None,
        times_naive=ratios.get("formula"),
        times_best_torch=ratios.get("mm + addmm_"),
        best_torch="mm + addmm_",
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
