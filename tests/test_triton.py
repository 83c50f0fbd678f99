"""What is Triton's own: tables, their cache, launches, and what is refused during capture. Numerics: the shared
tests."""

import math
import os
import threading
import time
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

import gradproj
from gradproj import reference
from gradproj.triton_kernels import cache, combine, gram, project, table, weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs).to(DEVICE)


def table_of(*lists, parts=(), written=False):
    flat = [t for row in lists for t in row]
    return table.Table.of(flat, len(lists), parts, max(parts) + 1 if parts else 0, written)


@pytest.fixture
def four_threads(monkeypatch):
    """For tests of borders: 4 threads have a chunk of 16 float32 elements."""
    monkeypatch.setattr(table, "THREADS", 4)


def segments(*lists, **kwargs):
    """Of the only launch: all but the addresses of two rows, and the entry that only counts chunks."""
    (launch,) = table_of(*lists, **kwargs).launches
    return launch.segments[:-1, :3].tolist()


def test_same_buffers_same_table():
    g, d = randn(4, 25), randn(4, 25)
    first = table_of([g], [d])
    assert table_of([g], [d]) is first
    pairs = [(g, randn(4, 25)), (g.view(25, 4), d.view(25, 4)), (g.t(), d.t()), (g[:2], d[:2]), (g, None)]
    others = [table_of([a], [b]) for a, b in pairs] + [table_of([g], [d], parts=[0]), table_of([g], [d], written=True)]
    assert len({id(t) for t in [first, *others]}) == 8


def test_a_view_of_another_dtype_is_another_table():
    g, d = randn(100), randn(100)
    (launch,) = table_of([g], [d]).launches
    (other,) = table_of([g.view(torch.float16)], [d.view(torch.bfloat16)]).launches
    assert launch.dtypes == (tl.float32, tl.float32) and other.dtypes == (tl.float16, tl.bfloat16)
    assert launch.instance.chunk == 4 * launch.instance.threads and other.instance.chunk == 8 * other.instance.threads


def test_cache_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(cache, "CACHE_BYTES", 1000)
    kept = [randn(8 + i) for i in range(40)]
    for t in kept:
        table_of([t], [t])
    assert 1 < len(cache._tables) < 30 and sum(t.memory.nbytes for t in cache._tables.values()) <= 1000
    table_of(kept, kept)  # too large for the bound: kept alone
    assert len(cache._tables) == 1


def test_threads_build_a_table_once(monkeypatch):
    """Autograd, and a process with several devices, call from threads of their own."""
    rows, together, built, found = [randn(11), randn(11)], threading.Barrier(3), [], []
    build = table._build

    def slow(*args):
        built.append(args)
        time.sleep(0.05)
        return build(*args)

    monkeypatch.setattr(table, "_build", slow)
    find = lambda: (together.wait(), found.append(table_of(*([t] for t in rows))))
    threads = [threading.Thread(target=find) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and len(found) == 3 and len({id(t) for t in found}) == 1


def test_neighbours_merge_and_heads_are_cut():
    flat = [randn(4000), randn(4000)]
    split = [f.split([1000, 1000, 2000]) for f in flat]
    assert segments(*split) == [[0, 4000, 1]]
    assert segments(*[[f[1:]] for f in flat]) == [[0, 3, 0], [1, 3996, 1]]
    assert segments([flat[0][1:]], [flat[1][:-1]]) == [[0, 3999, 0]]  # off by different amounts: no cut helps
    assert segments([flat[0][1:3]], [flat[1][1:3]]) == [[0, 2, 0]]  # all head
    assert segments(*split, parts=[0, 0, 1]) == [[0, 2000, 1], [2, 2000, 1]]
    # Ordered by part, the first and the last no neighbours.
    assert segments(*split, parts=[1, 0, 1]) == [[0, 1000, 1], [1, 1000, 1], [2, 2000, 1]]


def test_every_program_has_a_slot_of_its_own_and_one_part(four_threads):
    sizes = [1, 16, 17, 100, 5, 48, 33, 7]
    row = [randn(n) for n in sizes]
    other = [t.double() if i % 3 == 0 else t for i, t in enumerate(row)]  # a second launch
    parts = [0, 1, 1, 4, 4, 5, 5, 5]
    found = table_of(row, other, parts=parts)
    assert len(found.launches) == 2
    seen, elements = {}, dict.fromkeys(range(6), 0)
    for launch in found.launches:
        starts = launch.segments[:, 0].tolist()
        programs = launch.programs.tolist()
        for (first, segment, part, slot), (last, *_) in pairwise(programs):
            assert first < last and starts[segment] <= first < starts[segment + 1] and slot not in seen
            seen[slot] = part
            for chunk in range(first, last):
                at = max(s for s in range(len(starts)) if starts[s] <= chunk)
                offset = (chunk - starts[at]) * launch.instance.chunk
                elements[part] += min(launch.instance.chunk, int(launch.segments[at, 1]) - offset)
    assert elements == {p: sum(n for n, q in zip(sizes, parts, strict=True) if q == p) for p in range(6)}
    assert sorted(seen) == list(range(found.slots))
    for part, (begin, end) in enumerate(pairwise(found.bounds.tolist())):
        assert {seen[slot] for slot in range(begin, end)} == ({part} if elements[part] else set())


@pytest.mark.parametrize("parts", [(), (0, 1, 1, 4, 2, 2), (3, 0, 3, 0, 3, 0)], ids=str)
def test_many_programs_chunks_segments_and_parts(four_threads, parts):
    """Small chunks make small buffers cross every border."""
    sizes = [1, 16, 17, 100, 5, 48]
    lists = [[randn(n, seed=i + 10 * r) for i, n in enumerate(sizes)] for r in range(3)]
    found = table_of(*lists, parts=parts, written=True)
    result, _ = gram.products(found, None)
    w = randn(*found.lead, 3, dtype=torch.float64)
    wanted = {}
    for part in range(math.prod(found.lead)):
        here = [i for i in range(len(sizes)) if not parts or parts[i] == part]
        g, *ds = [[row[i] for i in here] for row in lists]
        expected = torch.from_numpy(reference.oracle_gram(g, *ds)) if here else torch.zeros(3, 3, dtype=torch.float64)
        torch.testing.assert_close(result.view(-1, 3, 3)[part].cpu(), expected, rtol=1e-6, atol=1e-5)
        wanted |= dict(zip(here, reference.oracle_combine(g, ds, w.view(-1, 3)[part].tolist()), strict=True))
    combine.combine(found, w)
    for i, t in enumerate(lists[0]):
        torch.testing.assert_close(t.double().cpu(), torch.from_numpy(wanted[i]), rtol=1e-6, atol=1e-6)


class Counted:
    """A kernel that notes its name at every launch."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]

    def warmup(self, *arguments, **options):
        return self.kernel.warmup(*arguments, **options)


@pytest.fixture
def launched(monkeypatch):
    names: list[str] = []
    for module in (gram, combine, weights):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name), names))
    return names


@pytest.mark.parametrize("directions", [1, 8])
@pytest.mark.parametrize("rows", ["plain", "gram_dd", "parts", "strided"])
def test_up_to_8_directions_take_three_launches(launched, directions, rows):
    """Gram, its finish with the weights, combine: whatever the rows are."""
    lists = [[randn(30, seed=k), randn(4, 5, seed=k + 10), randn(7, seed=k + 20)] for k in range(directions + 1)]
    gram_dd, parts = None, ()
    if rows == "gram_dd":
        gram_dd = torch.eye(directions, dtype=torch.float64, device=DEVICE)
    if rows == "parts":
        parts = ([1, 0, 2], 3)
    if rows == "strided":
        lists = [[randn(8, 5).t(), randn(9, 5).t()], *([randn(5, 8), randn(5, 9)] for _ in range(directions))]
    project.project_(lists[0], [t for d in lists[1:] for t in d], "conflict", 0.0, 0.0, gram_dd, *parts)
    assert launched == ["gram_kernel", "gram_finish_kernel", "combine_kernel"]


@pytest.mark.parametrize("rule", [("orthogonal", 0.0, 0.0), ("conflict", 0.0, 0.3), ("mix", 0.1, 0.0)], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0, float("nan")], ids=str)
def test_weights_of_one_direction_come_with_the_gram(rule, sign):
    """gamma and eps are doubles: as a float32, which is what triton makes of a number, 0.1 is something else."""
    g, d = [randn(40)], [sign * randn(40)]
    products, found = project.project_(g, d, *rule)
    name, gamma, eps = rule
    expected = reference.oracle_weights(products.cpu().numpy(), ("mix", gamma) if name == "mix" else name, eps)
    torch.testing.assert_close(found.cpu(), torch.from_numpy(expected), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("num_rows", [1, 9, 10, 13, 33])
@pytest.mark.parametrize("only_first", [False, True])
def test_passes_have_every_pair(num_rows, only_first):
    """No more rows than one pass sums, and with ``gram_dd`` each product with row 0 once."""
    found = [(*a, *b) for a, b in gram.passes(num_rows, only_first)]
    assert all(len(rows) <= gram.PASS_ROWS for rows in found)
    pairs = [(i, j) for rows in found for i in (rows[:1] if only_first else rows) for j in rows if i <= j]
    assert set(pairs) == {(i, j) for i in range(1 if only_first else num_rows) for j in range(i, num_rows)}


def test_gram_dd_comes_through_more_than_one_pass():
    lists = [[randn(20, seed=r)] for r in range(12)]
    flat = [t for row in lists for t in row]
    gram_dd = randn(2, 11, 11, dtype=torch.float64)
    result = gram.gram(flat, 12, gram_dd, (1,), 2)
    assert torch.equal(result[:, 1:, 1:], gram_dd) and torch.equal(result[:, 0], result[:, :, 0])
    assert not result[0, 0].any()  # no column is in part 0
    expected = torch.from_numpy(reference.oracle_gram(*lists)[0])
    torch.testing.assert_close(result[1, 0].cpu(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("num_rows", [3, 10])
def test_rows_that_are_absent_in_places(num_rows):
    """A row has another position in every launch; a product with a row that is not there is 0."""
    lists = [[None if (r + i) % 3 == 0 else randn(30 + i, seed=10 * r + i) for i in range(3)] for r in range(num_rows)]
    flat = [t for row in lists for t in row]
    expected = torch.from_numpy(reference.oracle_gram(*lists))
    torch.testing.assert_close(gram.gram(flat, num_rows).cpu(), expected, rtol=1e-6, atol=1e-5)
    gram_dd = expected[1:, 1:].contiguous().to(DEVICE)
    torch.testing.assert_close(gram.gram(flat, num_rows, gram_dd).cpu(), expected, rtol=1e-6, atol=1e-5)


def test_the_op_refuses_by_itself():
    """It is called without a check: what a table was not built for must be seen here, and nothing written."""
    op = torch.ops.gradproj_triton.combine_.default
    g, d, w = [randn(6), randn(2, 3)], [randn(6), randn(3, 2)], torch.ones(2, dtype=torch.float64, device=DEVICE)
    before = [t.clone() for t in g]
    bad = [
        (r"row 1: buffer\[1\] has shape \(3, 2\) but row 0: buffer\[1\] has shape \(2, 3\)", (g, d, w)),
        (r"row 1: buffer\[0\] has dtype torch.int64", (g[:1], [d[0].long()], w)),
        (r"overlaps itself", ([g[0][:1].expand(6)], d[:1], w)),
        (r"row 0: buffer\[0\] and row 1: buffer\[0\] share memory", ([g[0][:5]], [g[0][1:]], w)),
        (r"rows of different length", (g, d[:1], w)),
        (r"parts: one number per buffer", (g[:1], d[:1], w, [0, 0], 1)),
        (r"a number is not below the number of parts", (g[:1], d[:1], w, [1], 1)),
        (r"weights must be a contiguous float64 tensor of shape \(2,\)", (g[:1], d[:1], w.float())),
    ]
    for message, arguments in bad:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    assert all(map(torch.equal, g, before))


def test_rows_of_a_gram_may_be_what_may_not_be_written():
    """A table built for a Gram says nothing about writing: the same buffers are checked again."""
    g, d = torch.ones(1, device=DEVICE).expand(6), torch.ones(6, device=DEVICE)
    assert gram.gram([g, d], 2)[0, 1].item() == 6.0
    w = torch.ones(2, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="overlaps itself"):
            combine.combine_([g], [d], w)


def test_too_many_dimensions():
    g = randn(*[2] * 9).permute(*range(8, -1, -1))
    d = randn(*[2] * 9)
    with pytest.raises(RuntimeError, match=r"row 0: buffer\[0\] .* needs 9 dimensions"):
        gram.gram([g, d], 2)
    with gradproj.use_backend("triton"), pytest.raises(NotImplementedError, match=r"grads\[0\] .* needs 9 dimensions"):
        gradproj.project_([g], [d])
