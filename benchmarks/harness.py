"""Checks first, then times: every row of a table is the fused projection against its peers and the limit, in one run.

A ratio is the median of the ratios round by round. A contender whose result is wrong is named and not timed.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import gradproj
from gradproj import reference
from machine import machine  # noqa: F401  the header of a table
from timing import extra_memory, host_seconds, in_turns, ratio

Lists = list[list[Tensor]]  # one list of tensors for each direction
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Case(NamedTuple):
    """One projection: ``directions`` lists of tensors of these shapes, the columns of each of the ``parts`` by
    themselves.

    ``gram_dd``: the directions' own Gram is known, as it is to a wrapper that keeps them.
    """

    name: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    directions: int = 1
    rounds: int = 7
    parts: tuple[int, ...] = ()
    gram_dd: bool = False

    @property
    def list_bytes(self) -> int:
        return sum(int(np.prod(s)) for s in self.shapes) * torch.empty(0, dtype=self.dtype).element_size()

    @property
    def minimal_bytes(self) -> int:
        return (2 * self.directions + 3) * self.list_bytes


class Row(NamedTuple):
    """Medians in seconds; ratios are of other / fused, so that larger is better for the fused one. None: not measured.

    ``seconds`` of a GPU are per call of many in a queue; ``host_seconds`` are those in which one call is enqueued.
    """

    case: str
    backend: str
    buffers: int
    wrong: list[str]
    seconds: float | None = None
    host_seconds: float | None = None
    times_naive: float | None = None
    times_best_torch: float | None = None
    best_torch: str = ""
    share_of_limit: float | None = None
    extra_bytes: int | None = None
    naive_extra_bytes: int | None = None


GAP = 16  # elements between neighbours, so that they are segments of their own


class Rows(NamedTuple):
    """The lists of a case. Each lies in one flat storage, with gaps, so that the limit can be measured on the same
    memory: how fast a page is depends on where it lies, on virtual machines more than on others."""

    grads: list[Tensor]
    directions: Lists
    flat: list[Tensor]
    parameters: list[torch.nn.Parameter]  # whose .grad the gradients are, as in training


def make_rows(case: Case, device: str) -> Rows:
    generator = torch.Generator(device).manual_seed(0)
    sizes = [int(np.prod(s)) for s in case.shapes]
    starts = np.cumsum([0, *(n + GAP for n in sizes)])
    flat, rows = [], []
    for _ in range(case.directions + 1):
        storage = torch.empty(int(starts[-1]), dtype=case.dtype, device=device)
        storage.normal_(generator=generator)
        flat.append(storage)
        rows.append([storage[a : a + n].view(s) for a, n, s in zip(starts, sizes, case.shapes, strict=False)])
    parameters = [torch.nn.Parameter(g.detach()) for g in rows[0]]
    for p, g in zip(parameters, rows[0], strict=True):
        p.grad = g
    return Rows(rows[0], rows[1:], flat, parameters)


def exact_gram(rows: list[list[Tensor]]) -> Tensor:
    """float64 inner products, tensor by tensor."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for column in zip(*rows, strict=True):
        for part in zip(*(t.view(-1).split(1 << 22) for t in column), strict=True):
            m = torch.stack([t.double() for t in part])
            gram += (m @ m.T).cpu()
    return gram


def columns(case: Case) -> list[list[int]]:
    """Of every part; without parts all of them together."""
    parts = case.parts or (0,) * len(case.shapes)
    return [[i for i, p in enumerate(parts) if p == part] for part in range(max(parts) + 1)]


def expected_weights(case: Case, grads: list[Tensor], directions: Lists) -> list[np.ndarray]:
    """float64 weights of every part from float64 inner products."""
    lists = [grads, *directions]
    grams = [exact_gram([[row[i] for i in of] for row in lists]) for of in columns(case)]
    return [reference.oracle_weights(gram.numpy()) for gram in grams]


def relative_error(result: list[Tensor], rows: list[list[Tensor]], weights: Sequence[float]) -> float:
    """Length of (result - what the weights make of the rows) over the length of the latter."""
    error = scale = 0.0
    for r, column in zip(result, zip(*rows, strict=True), strict=True):
        wanted = torch.zeros_like(r, dtype=torch.promote_types(r.dtype, torch.float32))
        for w, t in zip(weights, column, strict=True):
            wanted.add_(t, alpha=float(w))
        scale += float(wanted.square().sum(dtype=torch.float64))
        error += float(wanted.sub_(r).square_().sum(dtype=torch.float64))
    return (error / scale) ** 0.5


def has_result(
    case: Case, result: list[Tensor], grads: list[Tensor], directions: Lists, weights: list[np.ndarray]
) -> bool:
    """Whether ``result`` is what the weights make of the rows, up to the rounding of the dtype."""
    for of, w in zip(columns(case), weights, strict=True):
        rows = [[row[i] for i in of] for row in (grads, *directions)]
        if not relative_error([result[i] for i in of], rows, w.tolist()) <= TOLERANCE[case.dtype]:
            return False
    return True


def is_right(run: Callable, case: Case, grads: list[Tensor], directions: Lists, weights: list[np.ndarray]) -> bool:
    copies = [t.clone() for t in grads]
    run(copies, directions)
    return has_result(case, copies, grads, directions, weights)


GPU_COPY_BYTES = 1 << 30  # far beyond any L2: what counts is the bandwidth of the memory


def copy_limit(minimal_bytes: int) -> tuple[Callable[[], None], float]:
    """(a copy between two large buffers on the GPU, the share of its bytes that the minimal ones are)"""
    a = torch.randn(GPU_COPY_BYTES // 4, device="cuda")
    b = torch.randn(GPU_COPY_BYTES // 4, device="cuda")
    return lambda: a.copy_(b), minimal_bytes / (2 * GPU_COPY_BYTES)


def limit(case: Case, rows: Rows, device: str) -> tuple[Callable[[], None], float]:
    """What the minimal bytes cost: (run, its share of the minimal bytes).

    On the CPU the very storages of the rows, streamed by torch as float32: one dot per pair of rows, then one add_ on
    rows 0 and 1 (5 N bytes at K = 1) and dots over the rest. On a GPU a copy between two large buffers.
    """
    if device == "cuda":
        return copy_limit(case.minimal_bytes)
    # Streamed with their gaps, and of 2-byte elements an even number, viewed as float32: a thousandth more or less.
    flat = [f[: f.numel() // 2 * 2].view(torch.float32) if f.element_size() == 2 else f for f in rows.flat]

    def read(some: list[Tensor]):
        for k in range(0, len(some), 2):
            torch.dot(some[k], some[min(k + 1, len(some) - 1)])

    def stream():
        read(flat)
        flat[0].add_(flat[1], alpha=0.0)
        read(flat[2:])

    return stream, 1.0


def fused(grads: list[Tensor], directions: Lists) -> None:
    gradproj.project_(grads, *directions)


def naive(grads: list[Tensor], directions: Lists) -> None:
    reference.project_(grads, directions[0], eps=0.0)


def project_op(
    backend: str, grads: list[Tensor], directions: Lists, method: str = "orthogonal",
    gram_dd: Tensor | None = None, parts: Sequence[int] = (),
) -> None:  # fmt: skip
    """The op itself, for what the functions do not take: the directions' own Gram, columns in parts."""
    chosen = gradproj.backends()[backend]
    if chosen.reason:  # asking loads it
        raise RuntimeError(f"{backend}: {chosen.reason}")
    op = chosen.op("project_")
    flat = [t for d in directions for t in d]
    op(grads, flat, method, 0.0, 0.0, gram_dd, part=list(parts), num_parts=max(parts) + 1 if parts else 0)


def fused_for(case: Case, directions: Lists, backend: str | None) -> Callable:
    if not case.parts and not case.gram_dd:
        return on_backend(backend, fused)
    assert backend is not None, f"{case.name}: the op of which backend?"
    gram_dd = on_backend(backend, gradproj.gram)(*directions) if case.gram_dd else None
    return lambda g, ds: project_op(backend, g, ds, gram_dd=gram_dd, parts=case.parts)


def measure(case: Case, peers: dict[str, Callable], device: str = "cpu", backend: str | None = None) -> Row:
    """One row of the table."""
    rows = make_rows(case, device)
    grads, directions = rows.grads, rows.directions
    weights = expected_weights(case, grads, directions)
    runs = {"fused": fused_for(case, directions, backend), **peers}
    if case.directions == 1 and not case.parts:
        runs["naive"] = naive
    wrong = [name for name, run in runs.items() if not is_right(run, case, grads, directions, weights)]
    ran = backend or gradproj.project_([g.clone() for g in grads], *directions).backend
    row = Row(case.name, ran, len(grads) * (case.directions + 1), wrong)
    if "fused" in wrong:
        return row
    timed = {name: functools.partial(run, grads, directions) for name, run in runs.items() if name not in wrong}
    stream, scale = limit(case, rows, device)
    seconds = in_turns({**timed, "limit": stream}, case.rounds, device)
    torch_times = {name: ratio(seconds[name], seconds["fused"]) for name in peers if name in seconds}
    best = min(torch_times, key=torch_times.__getitem__) if torch_times else ""
    return row._replace(
        seconds=statistics.median(seconds["fused"]),
        host_seconds=host_seconds(timed["fused"]) if device == "cuda" else None,
        times_naive=ratio(seconds["naive"], seconds["fused"]) if "naive" in seconds else None,
        times_best_torch=torch_times.get(best),
        best_torch=best,
        share_of_limit=scale * ratio(seconds["limit"], seconds["fused"]),
        extra_bytes=extra_memory(timed["fused"], device),
        naive_extra_bytes=extra_memory(timed["naive"], device) if "naive" in timed else None,
    )


def measure_captured(case: Case, backend: str) -> Row:
    """The row of a projection that is replayed from a CUDA graph."""
    rows = make_rows(case, "cuda")
    grads, directions = rows.grads, rows.directions
    weights = expected_weights(case, grads, directions)
    before = [g.clone() for g in grads]
    run = functools.partial(on_backend(backend, fused), grads, directions)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    torch._foreach_copy_(grads, before)
    graph.replay()
    row = Row(case.name, backend, len(grads) * (case.directions + 1), [])
    if not has_result(case, grads, before, directions, weights):
        return row._replace(wrong=["fused"])
    return row._replace(seconds=statistics.median(in_turns({"replay": graph.replay}, case.rounds, "cuda")["replay"]))


def on_backend(backend: str | None, run: Callable) -> Callable:
    """``run`` with that backend chosen; with None it is left to the package."""
    if backend is None:
        return run

    def chosen(*args):
        with gradproj.use_backend(backend):
            return run(*args)

    return chosen


def heading(header: dict[str, str]) -> str:
    return f"{header['machine']}; torch {header['torch']}; {header['date']}; commit {header['commit']}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds > 2e-3 else f"{seconds * 1e6:.0f} us"


def table(rows: list[Row], header: dict[str, str]) -> str:
    """Markdown."""

    def show(value, form):
        return "" if value is None else form.format(value)

    heads = ["case", "time", "x naive", "x best torch", "of the limit", "extra memory", "naive's"]
    lines = [heading(header), "", f"| {' | '.join(heads)} |", "| --- " + "| ---: " * 6 + "|"]
    for r in rows:
        if r.seconds is None:
            lines.append(f"| {r.case} | wrong result: {', '.join(r.wrong)} | | | | | |")
            continue
        best = f"{r.times_best_torch:.2f} ({r.best_torch})" if r.times_best_torch else ""
        extra, other = (None if n is None else n / 2**20 for n in (r.extra_bytes, r.naive_extra_bytes))
        cells = [r.case, duration(r.seconds), show(r.times_naive, "{:.1f}"), best, show(r.share_of_limit, "{:.0%}")]
        lines.append(f"| {' | '.join([*cells, show(extra, '{:.2f} MiB'), show(other, '{:.0f} MiB')])} |")
        if r.wrong:
            lines.append(f"| | not timed, wrong result: {', '.join(r.wrong)} | | | | | |")
    return "\n".join(lines)
