"""Inner products of rows: float64 sums of every program, then one program a part that adds them up in fixed order.

Products of a thread's 16 bytes are summed in float32 (at most 8 terms, so no relative error above 1e-6 even where every
rounding goes the same way) and added to a float64 sum of that thread. Threads are summed once, at the end of a program.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradproj.kernels.methods import Rule
from gradproj.triton_kernels.op import implement
from gradproj.triton_kernels.table import PROGRAM, SEGMENT, Table, check_small
from gradproj.triton_kernels.walk import find_segment, is_full, load_row
from gradproj.triton_kernels.weights import METHODS, solve

PASS_ROWS = 9  # rows whose products one pass takes: 45 float64 sums a thread
GROUP_ROWS = 4  # more rows are taken in groups, two groups a pass
FINISH_TILE = tl.constexpr(2048)  # doubles that the finish takes at a time


@triton.jit
def load_rows(
    segment_ptr, first, second, heads: tl.constexpr, dtypes: tl.constexpr, start, full: tl.constexpr,
    instance: tl.constexpr,
):  # fmt: skip
    """A chunk of every row of a pass, [threads, 16 bytes of the narrowest row]; 0 for a row that is absent."""
    shape: tl.constexpr = (instance.threads, instance.chunk // instance.threads)
    values = tl.tuple([])
    position = first
    for k in tl.static_range(len(dtypes)):
        if k == heads:
            position = second
        if dtypes[k] is None:
            values = values + (0,)
        else:
            values = values + (tl.reshape(load_row(segment_ptr, position, dtypes[k], start, full, instance), shape),)
            position += 1
    return values


# Counts are not specialised: a value of 1 would be a constant of another type, and other values another compilation.
@triton.jit(do_not_specialize=["width", "first", "second"])
def gram_kernel(
    segments_ptr, width, programs_ptr, partial_ptr, first, second, heads: tl.constexpr, dtypes: tl.constexpr,
    only_first: tl.constexpr, instance: tl.constexpr,
):  # fmt: skip
    """Reads each row of a pass once, 16 bytes at a time in full chunks; writes a double per program and pair of rows.
    The rows are ``heads`` from position ``first`` on and the others from ``second`` on. Same grid, same bits."""
    program_ptr = programs_ptr + tl.program_id(0) * len(PROGRAM)
    segment_ptr = segments_ptr + tl.load(program_ptr + PROGRAM.segment) * width
    last = tl.load(program_ptr + len(PROGRAM) + PROGRAM.first_chunk)
    threads: tl.constexpr = instance.threads
    sums = tl.tuple([])
    for a in tl.static_range(1 if only_first else len(dtypes)):
        for _ in tl.static_range(a, len(dtypes)):
            sums = sums + (tl.zeros([threads], dtype=tl.float64),)
    for chunk in range(tl.load(program_ptr + PROGRAM.first_chunk), last):
        segment_ptr = find_segment(segment_ptr, width, chunk)
        start = (chunk - tl.load(segment_ptr + SEGMENT.first_chunk)) * instance.chunk
        if instance.ndim == 0 and is_full(segment_ptr, start, instance):
            values = load_rows(segment_ptr, first, second, heads, dtypes, start, True, instance)
        else:
            values = load_rows(segment_ptr, first, second, heads, dtypes, start, False, instance)
        added = tl.tuple([])
        for a in tl.static_range(1 if only_first else len(dtypes)):
            for b in tl.static_range(a, len(dtypes)):
                if dtypes[a] is None or dtypes[b] is None:
                    added = added + (sums[len(added)],)
                else:
                    product = tl.sum(values[a] * values[b], axis=1)
                    added = added + (sums[len(added)] + product.to(tl.float64),)
        sums = added
    partial_ptr += tl.load(program_ptr + PROGRAM.slot) * len(sums)
    for k in tl.static_range(len(sums)):
        tl.store(partial_ptr + k, tl.sum(sums[k], axis=0))


@triton.jit(do_not_specialize=["num_rows", "first", "second"])
def gram_finish_kernel(
    partial_ptr, bounds_ptr, gram_ptr, gram_dd_ptr, weights_ptr, num_rows, first, second, gamma: tl.float64,
    eps: tl.float64, heads: tl.constexpr, count: tl.constexpr, only_first: tl.constexpr, method: tl.constexpr,
    block: tl.constexpr, tableau: tl.constexpr,
):  # fmt: skip
    """One program a part. Adds up what the part's programs wrote for each pair of a pass's ``count`` rows: ``heads`` of
    the Gram's rows from ``first`` on, and the others from ``second`` on. Copies ``gram_dd`` if given; with a ``method``
    solves for the weights."""
    part = tl.program_id(0).to(tl.int64)
    gram_ptr += part * num_rows * num_rows
    pairs: tl.constexpr = count if only_first else count * (count + 1) // 2
    pair = tl.arange(0, block)
    tile = tl.zeros([FINISH_TILE // block, block], dtype=tl.float64)
    end = tl.load(bounds_ptr + part + 1)
    for begin in range(tl.load(bounds_ptr + part), end, FINISH_TILE // block):
        slot = (begin + tl.arange(0, FINISH_TILE // block))[:, None]
        mask = (slot < end) & (pair < pairs)[None, :]
        tile += tl.load(partial_ptr + slot * pairs + pair[None, :], mask=mask, other=0.0)
    total = tl.sum(tile, axis=0)

    a = pair * 0  # pairs are (0, 0), (0, 1), .., (1, 1), (1, 2), ..
    if not only_first:
        for k in tl.static_range(1, count):
            a += (pair >= k * count - k * (k - 1) // 2).to(tl.int32)
    b = pair - (a * count - a * (a - 1) // 2) + a
    i = tl.where(a < heads, first + a, second + a - heads)
    j = tl.where(b < heads, first + b, second + b - heads)
    tl.store(gram_ptr + i * num_rows + j, total, mask=pair < pairs)
    tl.store(gram_ptr + j * num_rows + i, total, mask=pair < pairs)

    if gram_dd_ptr is not None:
        size = num_rows - 1
        gram_dd_ptr += part * size * size
        for begin in range(0, size * size, FINISH_TILE):
            entry = begin + tl.arange(0, FINISH_TILE)
            values = tl.load(gram_dd_ptr + entry, mask=entry < size * size)
            tl.store(gram_ptr + (entry // size + 1) * num_rows + entry % size + 1, values, mask=entry < size * size)
    if method is not None:
        tl.debug_barrier()  # the Gram was written by other threads
        solve(gram_ptr, weights_ptr + part * num_rows, num_rows, gamma, eps, method, tableau)


def passes(num_rows: int, only_first: bool) -> Iterator[tuple[range, range]]:
    """The rows of each pass: two ranges, so that every pair of rows is in one of them."""
    if only_first or num_rows <= PASS_ROWS:
        for k in range(1, max(2, num_rows), PASS_ROWS - 1):
            yield range(1), range(k, min(k + PASS_ROWS - 1, num_rows))
    else:
        groups = [range(k, min(k + GROUP_ROWS, num_rows)) for k in range(0, num_rows, GROUP_ROWS)]
        yield from combinations(groups, 2)


def products(table: Table, gram_dd: Tensor | None, rule: Rule | None = None) -> tuple[Tensor, Tensor | None]:
    """Gram, [R, R] or [P, R, R], and, where one pass does it, the weights of ``rule``, [R] or [P, R]."""
    num_rows, only_first = table.num_rows, gram_dd is not None
    gram = torch.empty(*table.lead, num_rows, num_rows, dtype=torch.float64, device=table.memory.device)
    weights, method, gamma, eps = None, None, 0.0, 0.0
    if rule is not None and rule.name in METHODS and 2 <= num_rows <= PASS_ROWS:
        weights, (method, gamma, eps) = gram.new_empty(gram.shape[:-1]), rule
    tableau = triton.next_power_of_2(max(1, num_rows - 1))
    with torch.cuda.device_of(gram):
        for heads, others in passes(num_rows, only_first):
            count = len(heads) + len(others)
            pairs = count if only_first else count * (count + 1) // 2
            partial = gram.new_empty(table.slots, pairs)
            for at in table.launches:
                dtype_of = dict(zip(at.rows, at.dtypes, strict=True))
                dtypes = tuple(dtype_of.get(row) for row in [*heads, *others])
                if only_first and dtypes[0] is None:
                    dtypes = (None,) * count  # nothing to multiply
                positions = [bisect_left(at.rows, rows.start) for rows in (heads, others)]  # of the first present row
                form = len(heads), dtypes, only_first, at.instance
                at.start(gram_kernel, form, partial, *positions).run()
            gram_finish_kernel[(prod(table.lead),)](
                partial, table.bounds, gram, gram_dd if others.start <= 1 else None, weights, num_rows, heads.start,
                others.start, gamma, eps, len(heads), count, only_first, method, triton.next_power_of_2(pairs), tableau,
            )  # fmt: skip
    return gram, weights


@implement
def gram(
    rows: list[Tensor | None], num_rows: int, gram_dd: Tensor | None = None,
    part: Sequence[int] = (), num_parts: int = 0,
) -> Tensor:  # fmt: skip
    """The op ``gram``; see ``gradproj.kernels.ops``."""
    table = Table.of(rows, num_rows, part, num_parts, written=False)
    check_small(gram_dd, (num_rows - 1, num_rows - 1), table, "gram_dd")
    return products(table, gram_dd)[0]
