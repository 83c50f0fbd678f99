"""Inner products of rows: float64 sums of every program and part, then one program a part that adds them up in fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.methods import Rule
from gradproj.triton_kernels.table import Rows, small
from gradproj.triton_kernels.walk import find_segment, load_gradient, load_row
from gradproj.triton_kernels.weights import CLOSED_FORMS, closed_form

PASS_ROWS = 9  # rows whose products one pass accumulates
FINISH = 2048  # doubles that the finish takes at a time


@triton.jit
def pair_number(i: tl.constexpr, j: tl.constexpr, rows: tl.constexpr):
    """Where the sums have pair (i, j), i <= j."""
    return i * rows - i * (i - 1) // 2 + j - i


@triton.jit
def add_products(
    sums, line, start, numel, rows: tl.constexpr, row_only: tl.constexpr, full: tl.constexpr, ids: tl.constexpr,
    dtypes: tl.constexpr, base: tl.constexpr, parts: tl.constexpr, ndim: tl.constexpr, width: tl.constexpr,
    compute: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Products of a block in ``compute``, summed over the block, added to float64 ``sums`` of the pass's ``rows``."""
    index = tl.arange(0, pairs)
    values = (load_gradient(line, start, numel, dtypes, base, parts, ndim, width, full, compute, block),)
    for a in tl.static_range(1, len(ids)):
        values = values + (load_row(line, a, start, numel, dtypes, parts, ndim, width, full, compute, block),)
    for a in tl.static_range(1 if row_only else len(ids)):
        for b in tl.static_range(a, len(ids)):
            product = tl.sum(values[a] * values[b], axis=0).to(tl.float64)
            sums += tl.where(index == pair_number(ids[a], ids[b], rows), product, 0.0)
    return sums


# Counts are not specialised: a value of 1 would be a constant of another type, and other values another compilation.
@triton.jit(do_not_specialize=["segments", "blocks", "slot"])
def gram_kernel(
    table, segments, blocks, partial, slot, rows: tl.constexpr, row_only: tl.constexpr, ids: tl.constexpr,
    dtypes: tl.constexpr, base: tl.constexpr, parts: tl.constexpr, ndim: tl.constexpr, width: tl.constexpr,
    compute: tl.constexpr, pairs: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Reads each row once, 16 bytes at a time in aligned full blocks; writes ``pairs`` doubles per program and part that it
    meets. A program takes neighbouring blocks, in order: same grid, same bits. Programs and parts both ascend along the
    table, so program + part is another number for every two that meet: that of their slot."""
    count: tl.constexpr = len(dtypes)
    index = tl.arange(0, pairs)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    first, last = program * blocks // programs, (program + 1) * blocks // programs
    segment = find_segment(table, segments, first, count, width)
    place = slot + program
    if parts:
        part = tl.load(table + segment * width + count + 3)
    sums = tl.zeros([pairs], dtype=tl.float64)
    for b in range(first, last):
        while tl.load(table + segment * width + count + 1) <= b:
            segment += 1
        line = table + segment * width
        if parts:
            here = tl.load(line + count + 3)
            if here != part:
                tl.store(partial + (place + part) * pairs + index, sums)
                sums = tl.zeros([pairs], dtype=tl.float64)
                part = here
        numel = tl.load(line + count)
        begin = tl.load(line + count + 1) - (numel + block - 1) // block
        start = tl.multiple_of((b - begin) * block, block)
        if ndim == 0 and (start + block <= numel) & (tl.load(line + count + 2) != 0):
            sums = add_products(
                sums, line, start, numel, rows, row_only, True, ids, dtypes, base, parts, ndim, width, compute, pairs, block
            )  # fmt: skip
        else:
            sums = add_products(
                sums, line, start, numel, rows, row_only, False, ids, dtypes, base, parts, ndim, width, compute, pairs, block
            )  # fmt: skip
    if parts:
        place += part
    tl.store(partial + place * pairs + index, sums)


@triton.jit(do_not_specialize=["launches", "num_rows", "lead", "first"])
def gram_finish_kernel(
    partial, spans, launches, gram, num_rows, lead, first, known, weights, gamma: tl.float64, eps: tl.float64,
    rows: tl.constexpr, row_only: tl.constexpr, method: tl.constexpr, pairs: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Writes the products of rows ``lead`` and ``first``, ``first`` + 1, .. to ``gram``: all of them, or with ``row_only``
    those of ``lead``. A program a part; reads its slots, ``pairs`` doubles each, in fixed order. Copies ``known`` if given,
    and with a ``method`` solves for the weights of one direction."""
    part = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, pairs)
    gram += part * num_rows * num_rows
    tile = tl.zeros([chunk, pairs], dtype=tl.float64)
    for k in range(launches):
        span = spans + (part * launches + k) * 2
        end = tl.load(span + 1)
        for begin in range(tl.load(span), end, chunk):
            slots = begin + tl.arange(0, chunk)[:, None]
            tile += tl.load(partial + slots * pairs + index[None, :], mask=slots < end, other=0.0)
    total = tl.sum(tile, axis=0)
    for a in tl.static_range(1 if row_only else rows):
        for b in tl.static_range(a, rows):
            value = tl.sum(tl.where(index == pair_number(a, b, rows), total, 0.0), axis=0)
            i = lead if a == 0 else first + a - 1
            j = lead if b == 0 else first + b - 1
            tl.store(gram + i * num_rows + j, value)
            tl.store(gram + j * num_rows + i, value)
    if known is not None:
        size = num_rows - 1
        known += part * size * size
        for begin in range(0, size * size, 1024):
            entry = begin + tl.arange(0, 1024)
            values = tl.load(known + entry, mask=entry < size * size)
            tl.store(gram + (entry // size + 1) * num_rows + entry % size + 1, values, mask=entry < size * size)
    if method is not None:
        gg = tl.sum(tl.where(index == 0, total, 0.0), axis=0)
        gd = tl.sum(tl.where(index == 1, total, 0.0), axis=0)
        if row_only:
            dd = tl.load(known)
        else:
            dd = tl.sum(tl.where(index == 2, total, 0.0), axis=0)
        # As tensors: triton's interpreter makes a float32 of a number.
        weight = closed_form(gg, gd, dd, tl.full([], gamma, tl.float64), tl.full([], eps, tl.float64), method)
        tl.store(weights + part * 2, tl.full([], 1.0, tl.float64))
        tl.store(weights + part * 2 + 1, weight)


def _run_pass(
    rows: Rows, gram: Tensor, lead: int, others: list[int], row_only: bool, known: Tensor | None, rule: Rule | None,
    weights: Tensor | None,
) -> None:  # fmt: skip
    wanted = (lead, *others)
    found = rows.walk(wanted)
    count = len(wanted)
    pairs = triton.next_power_of_2(count if row_only else count * (count + 1) // 2)
    partial = torch.empty(found.slots, pairs, dtype=torch.float64, device=rows.device)
    for launch in found.launches:
        gram_kernel[(launch.programs,)](
            *launch.arguments, partial, launch.slot, count, row_only, *launch.form, launch.table.shape[1], rows.compute,
            pairs, rows.block, num_warps=8,
        )  # fmt: skip
    gram_finish_kernel[(max(1, rows.num_parts),)](
        partial, found.spans, len(found.launches), gram, gram.shape[-1], lead, others[0] if others else 0, known, weights,
        rule.gamma if rule else 0.0, rule.eps if rule else 0.0, count, row_only, rule.name if rule else None, pairs,
        FINISH // pairs,
    )  # fmt: skip


def products(rows: Rows, known: Tensor | None, rule: Rule | None = None) -> tuple[Tensor, Tensor | None]:
    """Gram, [R, R] or [P, R, R], and for one direction the weights of ``rule``, [R] or [P, R]. Up to 9 rows in one pass; more
    as passes of one row against eight others."""
    count = rows.num_rows
    gram = torch.empty(*rows.lead, count, count, dtype=torch.float64, device=rows.device)
    weights = None
    if rule is not None and rule.name in CLOSED_FORMS and count == 2:
        weights = torch.empty(*rows.lead, 2, dtype=torch.float64, device=rows.device)
    else:
        rule = None
    with torch.cuda.device_of(gram):
        if count <= PASS_ROWS:
            _run_pass(rows, gram, 0, list(range(1, count)), known is not None, known, rule, weights)
            return gram, weights
        for lead in range(count if known is None else 1):
            others = list(range(lead + 1, count))
            for k in range(0, max(1, len(others)), PASS_ROWS - 1):
                _run_pass(rows, gram, lead, others[k : k + PASS_ROWS - 1], True, None if k else known, None, None)
    return gram, weights


def gram(
    rows: list[Tensor | None], num_rows: int, known: Tensor | None = None, base: list[Tensor | None] | None = None,
    scales: list[Tensor | None] | None = None, parts: tuple[int, ...] = (), num_parts: int = 0,
) -> Tensor:  # fmt: skip
    """The op ``gram``; see ``gradproj.ops``."""
    found = Rows(rows, num_rows, base, scales, parts, num_parts, written=False)
    return products(found, small(known, (*found.lead, num_rows - 1, num_rows - 1), found, "known"))[0]
