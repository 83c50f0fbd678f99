"""What is Triton's own: tables, their cache, launches, and what is refused during capture. Numerics: the shared tests."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl

import gradproj
from gradproj import float8, reference
from gradproj.triton_kernels import combine, gram, ops, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs).to(DEVICE)


def plan(*lists, base=None, scales=None, parts=(), block=table.BLOCK):
    """The one pass over all rows."""
    flat = [t for row in lists for t in row]
    num_parts = max(parts) + 1 if parts else 0
    rows = table.Rows(flat, len(lists), base, scales, parts, num_parts, written=False, block=block)
    return rows.walk(tuple(range(len(lists))))


def test_same_buffers_same_table():
    g, d = randn(4, 25), randn(4, 25)
    first = plan([g], [d])
    assert plan([g], [d]) is first
    others = [
        plan([g], [randn(4, 25)]),
        plan([g.view(25, 4)], [d.view(25, 4)]),
        plan([g.t()], [d.t()]),
        plan([g.view(torch.int32).view(torch.float32)[:2]], [d[:2]]),
        plan([g], [d], base=[d]),
        plan([g], [d], parts=[0]),
        plan([g], [None]),
    ]
    assert len({id(p) for p in [first, *others]}) == 8


def test_a_view_of_another_dtype_is_another_table():
    g, d = randn(100), randn(100)
    (launch,) = plan([g], [d]).launches
    (other,) = plan([g.view(torch.float16)], [d.view(torch.bfloat16)]).launches
    assert launch.form.dtypes == (tl.float32, tl.float32) and other.form.dtypes == (tl.float16, tl.bfloat16)


def test_cache_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(table, "CACHE_BYTES", 1000)
    kept = [randn(8 + i) for i in range(40)]
    for t in kept:
        plan([t], [t])
    assert 1 < len(table._cache) < 30 and sum(entry.bytes for entry in table._cache.values()) <= 1000
    plan(kept, kept)  # too large for the bound: kept alone
    assert len(table._cache) == 1


def test_neighbours_merge_and_heads_are_cut():
    flat = [randn(4000), randn(4000)]
    pieces = [f.split([1000, 1000, 2000]) for f in flat]
    (launch,) = plan(*pieces).launches
    assert launch.table[:, 2:].tolist() == [[4000, 2, 1]]
    (launch,) = plan(*[[f[1:]] for f in flat]).launches
    assert launch.table[:, 2:].tolist() == [[3, 1, 0], [3996, 3, 1]]
    (launch,) = plan([flat[0][1:]], [flat[1][:-1]]).launches  # off by different amounts: no cut helps
    assert launch.table[:, 2:].tolist() == [[3999, 2, 0]]


def test_neighbours_merge_within_a_part():
    flat = [randn(4000), randn(4000)]
    pieces = [f.split([1000, 1000, 2000]) for f in flat]
    (launch,) = plan(*pieces, parts=[0, 0, 1]).launches
    assert launch.table[:, [2, 5]].tolist() == [[2000, 0], [2000, 1]]
    (launch,) = plan(*pieces, parts=[1, 0, 1]).launches  # ordered by part, the first and the last no neighbours
    assert launch.table[:, [2, 5]].tolist() == [[1000, 0], [1000, 1], [2000, 1]]


def test_float8_neighbours_merge_where_their_scale_blocks_line_up():
    """A segment that starts inside a block of another segment's scales would be read with the wrong ones."""
    g, codes, scales = randn(2048), randn(2048).to(torch.float8_e4m3fn), randn(5)

    def numels(*sizes):
        counts = [-(-n // float8.BLOCK) for n in sizes]
        own = scales[: sum(counts)].split(counts)
        found = plan(g.split(sizes), codes.split(sizes), scales=[*[None] * len(sizes), *own])
        return found.launches[0].table[:, 2].tolist()

    assert numels(1024, 512, 512) == [2048]
    assert numels(1500, 548)[:2] == [1500, 548]


def test_every_program_and_part_has_a_slot_of_its_own():
    sizes = [1, 16, 17, 100, 5, 48, 33, 7]
    row = [randn(n) for n in sizes]
    other = [t.double() if i % 3 == 0 else t for i, t in enumerate(row)]  # a second launch
    found = plan(row, other, parts=[0, 1, 1, 4, 4, 5, 5, 5], block=16)
    assert len(found.launches) == 2
    taken = [slot for spans in found.spans.tolist() for begin, end in spans for slot in range(begin, end)]
    assert len(taken) == len(set(taken)) and max(taken) < found.slots
    there = [[end > begin for begin, end in spans] for spans in found.spans.tolist()]
    nowhere = [False, False]
    assert there == [[True, False], [False, True], nowhere, nowhere, [True, True], [True, True]]


@pytest.mark.parametrize("parts", [(), (0, 1, 1, 4, 2, 2), (3, 0, 3, 0, 3, 0)], ids=str)
def test_many_programs_blocks_segments_and_parts(parts):
    """A block size of 16 makes small buffers cross every border."""
    sizes = [1, 16, 17, 100, 5, 48]
    lists = [[randn(n, seed=i + 10 * r) for i, n in enumerate(sizes)] for r in range(3)]
    num_parts = max(parts) + 1 if parts else 0
    flat = [t for row in lists for t in row]
    rows = table.Rows(flat, 3, None, None, parts, num_parts, written=True, block=16)
    result, _ = gram.products(rows, None)
    weights = randn(*rows.lead, 3, dtype=torch.float64)
    wanted = {}
    for part in range(max(1, num_parts)):
        here = [i for i in range(len(sizes)) if not parts or parts[i] == part]
        g, *ds = [[row[i] for i in here] for row in lists]
        expected = torch.from_numpy(reference.oracle_gram(g, *ds)) if here else torch.zeros(3, 3, dtype=torch.float64)
        torch.testing.assert_close(result.view(-1, 3, 3)[part].cpu(), expected, rtol=1e-6, atol=1e-5)
        wanted |= dict(zip(here, reference.oracle_combine(g, ds, weights.view(-1, 3)[part].tolist()), strict=True))
    combine.combine(rows, weights)
    for i, t in enumerate(lists[0]):
        torch.testing.assert_close(t.double().cpu(), torch.from_numpy(wanted[i]), rtol=1e-6, atol=1e-6)


class Counted:
    """A kernel that notes its name at every launch."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch):
    names: list[str] = []
    for module, name in [(gram, "gram_kernel"), (gram, "gram_finish_kernel"), (combine, "combine_kernel")]:
        monkeypatch.setattr(module, name, Counted(name, getattr(module, name), names))
    return names


@pytest.mark.parametrize("form", ["plain", "known", "parts", "base", "strided"])
def test_one_direction_takes_three_launches(launched, form):
    """Gram, its finish with the weights, combine: whatever the rows are, and however many."""
    g, d, base = ([randn(300, seed=s), randn(4, 5, seed=s + 1), randn(70, seed=s + 2)] for s in (0, 10, 20))
    kwargs = {}
    if form == "known":
        kwargs["known"] = gradproj.gram(d)
    if form == "parts":
        kwargs["parts"] = [1, 0, 2]
    if form == "base":
        kwargs["base"] = base
    if form == "strided":
        g, d = [randn(8, 5).t(), randn(9, 5).t()], [randn(5, 8), randn(5, 9)]
    del launched[:]
    with gradproj.use_backend("triton"):
        info = gradproj.project_(g, d, **kwargs)
    assert launched == ["gram_kernel", "gram_finish_kernel", "combine_kernel"] and info.applied


@pytest.mark.parametrize("rule", [("orthogonal", 0.0, 0.0), ("conflict", 0.0, 0.3), ("mix", 0.1, 0.0)], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0, float("nan")], ids=str)
def test_weights_of_one_direction_come_with_the_gram(rule, sign):
    """gamma and eps are doubles: as a float32, which is what triton makes of a number, 0.1 is something else."""
    g, d = [randn(40)], [sign * randn(40)]
    products, weights = ops.project_(g, d, *rule)
    name, gamma, eps = rule
    expected = reference.oracle_weights(products.cpu().numpy(), ("mix", gamma) if name == "mix" else name, eps)
    torch.testing.assert_close(weights.cpu(), torch.from_numpy(expected), rtol=1e-14, atol=0.0)


def test_known_gram_comes_through_more_than_one_pass():
    lists = [[randn(200, seed=r)] for r in range(12)]
    flat = [t for row in lists for t in row]
    known = randn(2, 11, 11, dtype=torch.float64)
    result = gram.gram(flat, 12, known, None, None, (1,), 2)
    assert torch.equal(result[:, 1:, 1:], known) and torch.equal(result[:, 0], result[:, :, 0])
    assert not result[0, 0].any()  # no column is in part 0
    expected = torch.from_numpy(reference.oracle_gram(*lists)[0])
    torch.testing.assert_close(result[1, 0].cpu(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [tl.uint8, tl.float8e4nv], ids=str)
def test_both_ways_to_decode_float8(monkeypatch, dtype):
    """All codes: from the bits, and by triton's type, which targets before sm_89 do not have."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    if dtype == tl.float8e4nv:
        if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("no float8 on this device")
        if DEVICE == "cpu":
            codes = codes[(codes & 0x7F) != 0x7F]  # triton's interpreter takes the NaN of its type for 480
    monkeypatch.setattr(table, "float8_type", lambda device: dtype)
    codes = codes.view(torch.float8_e4m3fn).repeat(9)[:2100]
    g = [torch.empty(2100, device=DEVICE)]
    scales = torch.tensor([0.5, 3.0, 1.0, 1e-30, 7.0], device=DEVICE)
    combine.combine_(g, [codes], torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE), scales=[scales])
    assert torch.equal(g[0].nan_to_num(1e9), float8.dequantize(float8.Float8Row([codes], [scales]))[0].nan_to_num(1e9))


def test_a_float8_row_of_weight_zero_is_not_read_nor_are_its_scales():
    """0 * inf is NaN."""
    g, codes = [randn(600)], [torch.ones(600, device=DEVICE).to(torch.float8_e4m3fn)]
    before, scales = g[0].clone(), [torch.full((2,), float("inf"), device=DEVICE)]
    combine.combine_(g, codes, torch.tensor([2.0, 0.0], dtype=torch.float64, device=DEVICE), scales=scales)
    assert torch.equal(g[0], 2 * before)


def test_the_op_refuses_by_itself():
    """It is called without a check: what a table was not built for must be seen here, and nothing written."""
    op = torch.ops.gradproj_triton.combine_.default
    g, d, w = [randn(6), randn(2, 3)], [randn(6), randn(3, 2)], torch.ones(2, dtype=torch.float64, device=DEVICE)
    before = [t.clone() for t in g]
    codes = randn(6).to(torch.float8_e4m3fn)
    bad = [
        (r"row 1: buffer\[1\] has shape \(3, 2\) but row 0: buffer\[1\] has shape \(2, 3\)", (g, d, w)),
        (r"row 1: buffer\[0\] has dtype torch.int64", (g[:1], [d[0].long()], w)),
        (r"row 1: buffer\[0\] .* needs \(1,\) float32 scales", (g[:1], [codes], w, None, [randn(2)])),
        (r"row 1: buffer\[0\] has dtype torch.float8_e4m3fn", (g[:1], [codes], w)),
        (r"overlaps itself", ([g[0][:1].expand(6)], d[:1], w)),
        (r"base\[0\] is absent where row 0 is not", (g[:1], d[:1], w, [None])),
        (r"rows of different length", (g, d[:1], w)),
        (r"parts: one number per buffer", (g[:1], d[:1], w, None, None, [0, 0], 1)),
        (r"a number is not below the number of parts", (g[:1], d[:1], w, None, None, [1], 1)),
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
    weights = torch.ones(2, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="overlaps itself"):
            combine.combine_([g], [d], weights)


def test_too_many_dimensions():
    g = randn(*[2] * 9).permute(*range(8, -1, -1))
    d = randn(*[2] * 9)
    with pytest.raises(RuntimeError, match=r"row 0: buffer\[0\] .* needs 9 dimensions"):
        gram.gram([g, d], 2)
    with gradproj.use_backend("triton"), pytest.raises(NotImplementedError, match=r"grads\[0\] .* needs 9 dimensions"):
        gradproj.project_([g], [d])


def test_directions_that_are_absent_in_places_with_more_than_one_pass():
    """A pass of one row against others leaves out what that row does not have."""
    lists = [[None if (r + i) % 3 == 0 else randn(30 + i, seed=10 * r + i) for i in range(3)] for r in range(11)]
    result = gram.gram([t for row in lists for t in row], 11)
    expected = torch.from_numpy(reference.oracle_gram(*lists))
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-5)


def test_new_buffers_during_capture_are_refused(monkeypatch):
    """A table cannot be copied while a graph records; the graph would replay with the addresses of another step."""
    known, new = [randn(6)], [randn(6)]
    found = plan(known, known)
    monkeypatch.setattr(table, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run one step with the same buffers before the capture"):
        plan(new, known)
    monkeypatch.setattr(table, "_captured", {})
    assert plan(known, known) is found and plan(known, known) is found
    table._cache.clear()
    assert list(table._captured.values()) == [found]  # outlives the cache, once


@pytest.mark.gpu
def test_captured_step_follows_the_contents():
    """Replayed after the gradients' contents changed, a captured projection projects the new ones."""
    for name in [
        n for n, b in gradproj.backends().items() if b.available and "cuda" in b.device_types and n != "torch"
    ]:
        with gradproj.use_backend(name):
            g, d = [randn(3000), randn(7)], [randn(3000, seed=1), randn(7, seed=2)]
            gradproj.project_([t.clone() for t in g], d)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                gradproj.project_(g, d)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                info = gradproj.project_(g, d)
            for seed in (5, 6):
                for i, t in enumerate(g):
                    t.copy_(randn(*t.shape, seed=seed + i))
                wanted = reference.oracle_project([t.cpu() for t in g], [[t.cpu() for t in d]])
                graph.replay()
                torch.cuda.synchronize()
                assert info.applied
                for t, w in zip(g, wanted, strict=True):
                    torch.testing.assert_close(t.double().cpu(), torch.from_numpy(w), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_table_is_used_on_another_stream_after_its_upload():
    """The upload is queued on the stream of the first call; a second stream would overtake it."""
    g, d = [randn(100_000)], [randn(100_000, seed=1)]
    expected = torch.from_numpy(reference.oracle_gram([t.cpu() for t in g], [t.cpu() for t in d]))
    with gradproj.use_backend("triton"):
        gradproj.gram(g, d)  # compiles
        table._cache.clear()
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        gradproj.gram(g, d)
        with torch.cuda.stream(torch.cuda.Stream()):
            result = gradproj.gram(g, d)
            table._cache.clear()
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-4)
