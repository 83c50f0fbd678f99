"""The CUDA kernels' own source, executed on the CPU: against the float64 oracle, and under sanitizers.

tests/emulation/cuda_emulation.h stands in for the runtime, csrc/cuda is compiled as it is. Blocks of 64 threads and grids of a
few blocks make small buffers cross every border: several chunks a warp, several blocks, several launches.
"""

import itertools
import random
import subprocess

import numpy as np
import pytest
import torch

from cases import DTYPES, assert_combined_close, assert_gram_close, make_buffer
from cuda_emulation import (
    COMBINE,
    GRAM,
    GRAM_ROW,
    METHODS,
    PROJECT,
    PROJECT_ONE,
    SANITIZERS,
    WEIGHTS,
    Case,
    compile_driver,
    dense_rows,
    random_cases,
    random_rows,
    run,
    serialise,
    verify,
)
from gradproj import float8, methods, reference


@pytest.fixture(scope="session", params=list(SANITIZERS))
def driver(request, tmp_path_factory):
    return request.param, compile_driver(
        tmp_path_factory.mktemp(request.param), "-Wall", "-Werror", *SANITIZERS[request.param]
    )


def test_random_cases(driver, tmp_path):
    """Fewer under the sanitizers, which are after memory and races, not after numbers."""
    name, binary = driver
    cases = random_cases(len(name), {"plain": 50, "address": 16, "thread": 14}[name])
    results = run(binary, cases, tmp_path)
    for case, result in zip(cases, results, strict=True):
        verify(case, result)
    if name != "plain":
        return
    again = run(binary, cases[:20], tmp_path)
    for first, second in zip(results, again, strict=False):
        assert torch.equal(first.gram.view(torch.int64), second.gram.view(torch.int64))
        assert first.weights.tobytes() == second.weights.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alignment_of_both_rows(driver, tmp_path, dtype):
    """Heads, tails, and rows that are misaligned differently: every pair of offsets within 16 bytes."""
    name, binary = driver
    size = torch.empty(0, dtype=dtype).element_size()
    offsets = range(16 // size) if name == "plain" else (0, 1)
    generator = torch.Generator().manual_seed(0)
    cases = []
    for a, b in itertools.product(offsets, offsets):
        for n in (1, 63, 64, 700) if name == "plain" else (700,):
            g, d = (make_buffer((n + offset,), dtype, "contiguous", generator)[offset:] for offset in (a, b))
            cases += [Case(PROJECT_ONE, [[g], [d]], [0.0, 0.0]), Case(COMBINE, [[g], [d]], [0.5, 2.0])]
    for case, result in zip(cases, run(binary, cases, tmp_path), strict=True):
        verify(case, result)


def test_a_whole_model_is_two_launches(driver, tmp_path):
    """1,500 tensors at K = 1: one Gram and one combine. The small parameters need more, and give the same sums."""
    _, binary = driver
    rows = dense_rows(2, [1 + i % 5 for i in range(1500)])
    one, many = run(binary, [Case(PROJECT_ONE, rows, [0, 0]), Case(PROJECT_ONE, rows, [0, 0], large=False)], tmp_path)
    assert one.launches == 2 and many.launches > 10
    for result in (one, many):
        verify(Case(PROJECT_ONE, rows, [0, 0]), result)


def test_a_part_for_every_tensor_is_one_launch_a_pass(driver, tmp_path):
    """One Gram, one adding up, the weights of all parts, one combine. (params.h asserts the room for 1,500.)"""
    name, binary = driver
    parts = 300 if name == "plain" else 40
    rows = dense_rows(2, [1 + i % 5 for i in range(parts)])
    for row in rows:
        row[7].mul_(3)
    case = Case(PROJECT, rows, [0.0, 0.0] * parts, parts=list(range(parts)))
    result = run(binary, [case], tmp_path)[0]
    assert result.launches == 4
    verify(case, result)


def test_parts_far_apart_and_in_few_parameters(driver, tmp_path):
    """A segment's part is a byte from the first of 32: what is further away goes into the next launch. A part may span
    several blocks, and several parts may share one."""
    _, binary = driver
    rows = dense_rows(3, [70, 5, 900, 64, 3, 200])
    cases = [
        Case(GRAM, rows, [0.0] * 3 * 301, blocks=8, parts=[0, 300, 3, 3, 255, 256]),
        Case(PROJECT, rows, [0.0] * 3 * 2, blocks=8, large=False, parts=[1, 0, 1, 0, 1, 1]),
        Case(PROJECT, dense_rows(2, [9] * 170), [0.0] * 2 * 9, large=False, parts=[i % 9 for i in range(170)]),
    ]
    for case, result in zip(cases, run(binary, cases, tmp_path), strict=True):
        verify(case, result)


def test_64_directions_read_the_gradient_once_per_group(driver, tmp_path):
    """65 rows do not fit one pass. With the directions' own products known, 8 passes take row 0 against 8 others each."""
    _, binary = driver
    rows = dense_rows(65, [70, 9])
    weights = [1.0] + [(-0.5) ** (k % 7) for k in range(64)]
    cases = [Case(GRAM_ROW, rows, weights, known=np.arange(64.0 * 64).reshape(1, 64, 64)), Case(COMBINE, rows, weights)]
    row, combined = run(binary, cases, tmp_path)
    verify(cases[0], row)
    verify(cases[1], combined)
    assert row.launches == 2 * 8  # sums, and adding up


def test_64_directions_with_everything(driver, tmp_path):
    """65 rows, most in float8, counted from a base, in three parts, strided too: the most addresses that anything has."""
    _, binary = driver
    rng = random.Random(1)
    rows = random_rows(rng, 65, DTYPES[2:3], [(70,), (9, 4), (5, 3, 2)])
    scales: list = [[None] * 3 for _ in rows]
    for r in range(1, 64):
        rows[r], scales[r] = float8.quantize(rows[r])
    (base,) = random_rows(rng, 1, DTYPES[:1], [(70,), (9, 4), (5, 3, 2)])
    weights = [rng.choice([0.0, 1.0, -0.5]) for _ in range(3 * 65)]
    known = np.zeros((3, 64, 64))
    cases = [
        Case(op, rows, weights, base=base, scales=scales, parts=[2, 0, 1], known=known) for op in (GRAM_ROW, COMBINE)
    ]
    for case, result in zip(cases, run(binary, cases, tmp_path), strict=True):
        verify(case, result)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_many_parts(driver, tmp_path, method):
    """A block per part, all its threads at one tableau: K = 1, K larger than a warp, dependent directions, a part of NaN."""
    name, binary = driver
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for k in (1, 2, 7, 40) if name == "plain" else (1, 5):
        rows = rng.standard_normal((3, k + 1, 50)) - 0.2
        rows[:, 0] *= -1
        rows[0, k] = rows[0, 1]
        gram = rows @ rows.transpose(0, 2, 1)
        gram[2, 0, k] = float("nan")
        expected.append(gram)
        out = torch.full((3, k + 1), float("nan"), dtype=torch.float64)
        cases.append(Case(WEIGHTS, [[out], [torch.from_numpy(gram.copy())]], [0, 0], method=method))
    for gram, result in zip(expected, run(binary, cases, tmp_path), strict=True):
        weights = result.grads[0].numpy()
        assert weights[2].tolist() == [1.0] + [0.0] * (gram.shape[1] - 1)
        wanted = methods.solve(torch.from_numpy(gram), *methods.parse(method)).numpy()
        # Of dependent directions the weights are not unique; what they make is.
        np.testing.assert_allclose(
            (gram[:2] @ weights[:2, :, None]), gram[:2] @ wanted[:2, :, None], rtol=1e-9, atol=1e-9
        )
        assert result.launches == 1


@pytest.mark.parametrize("method", ["orthogonal", "conflict", "pcgrad"])
def test_weights_of_64_directions(driver, tmp_path, method):
    """As many as the shared memory holds."""
    name, binary = driver
    if name == "thread":
        pytest.skip("ThreadSanitizer has seen every barrier at fewer directions, in a tenth of the time")
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((65, 200)) * 10.0 ** rng.uniform(-6, 6, (65, 1))
    gram = torch.from_numpy(rows @ rows.T)
    out = torch.full((1, 65), float("nan"), dtype=torch.float64)
    result = run(binary, [Case(WEIGHTS, [[out], [gram[None].clone()]], [0, 0], method=method)], tmp_path)[0]
    np.testing.assert_allclose(result.grads[0][0], methods.solve(gram, *methods.parse(method)), rtol=1e-9, atol=1e-15)


def test_neighbours_in_memory_are_one_segment(driver, tmp_path):
    _, binary = driver
    flat = [torch.randn(3000, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    rows = [list(f.split([7, 1, 992, 2000])) for f in flat]
    case = Case(PROJECT_ONE, rows, [0, 0])
    verify(case, run(binary, [case], tmp_path)[0])


def test_every_float8_code_at_every_alignment(driver, tmp_path):
    """All codes but NaN, across a border of scales that a lane's elements straddle."""
    name, binary = driver
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(3)
    cases = []
    for dtype in DTYPES[:2]:
        for offset in range(4) if name == "plain" else (1,):
            g = torch.zeros(len(codes) + offset, dtype=dtype)[offset:]
            storage = torch.zeros(len(codes) + 1, dtype=torch.uint8)
            storage[1:] = codes
            d = storage[1:].view(float8.DTYPE)
            scales = [[None], [torch.tensor([0.5, 3.0])]]
            cases.append(Case(COMBINE, [[g], [d]], [0.0, 1.0], scales=scales))
    for case, result in zip(cases, run(binary, cases, tmp_path), strict=True):
        assert torch.equal(result.grads[0].double(), case.meant()[1][0])


def test_a_float8_nan_is_seen(driver, tmp_path):
    _, binary = driver
    for code in (0x7F, 0xFF):
        codes = torch.full((600,), 0x38, dtype=torch.uint8)
        codes[590] = code
        rows = [[torch.ones(600)], [codes.view(float8.DTYPE)]]
        case = Case(PROJECT_ONE, rows, [0.0, 0.0], scales=[[None], [torch.ones(2)]])
        result = run(binary, [case], tmp_path)[0]
        assert result.gram[0].isnan().tolist() == [[False, True], [True, True]]
        assert result.weights.tolist() == [[1.0, 0.0]] and result.grads[0].eq(1).all()


def test_float8_neighbours_share_their_scales(driver, tmp_path):
    """Pieces that touch in memory, codes and scales both, are one segment: the scale of an element is still its own."""
    _, binary = driver
    sizes = [512, 1024, 600]
    (codes,), (scale,) = float8.quantize([torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))])
    scales = list(scale.split([-(-n // 512) for n in sizes]))
    rows = [list(torch.ones(sum(sizes)).split(sizes)), list(codes.split(sizes))]
    case = Case(PROJECT_ONE, rows, [0.0, 0.0], scales=[[None] * 3, scales])
    verify(case, run(binary, [case], tmp_path)[0])


def test_refused_before_the_first_launch(driver, tmp_path):
    """A strided buffer of too many dimensions comes last and is refused first: nothing has been written by then."""
    _, binary = driver
    g, d = torch.ones(3), torch.ones(3)
    nine = [torch.randn([3] * 9)[(slice(0, 2),) * 9] for _ in range(2)]
    codes = torch.ones(3).to(float8.DTYPE)
    bad = [
        Case(COMBINE, [[g, nine[0]], [d, nine[1]]], [2.0, 1.0]),
        Case(PROJECT_ONE, [[g, nine[0]], [d, torch.ones([2] * 9)]], [0.0, 0.0]),
        Case(COMBINE, [[g, codes], [d, d]], [2.0, 1.0], scales=[[None, torch.ones(1)], [None, None]]),
        Case(COMBINE, [[g]] + [[d]] * 65, [1.0] * 66),
        Case(COMBINE, [[torch.ones(4, 4)[:3, :3]]] + [[torch.ones(3, 3)]] * 50, [1.0] * 51, large=False),
    ]
    for case, result in zip(bad, run(binary, bad, tmp_path), strict=True):
        assert result.launches == -1
        for a, b in zip(result.grads, case.rows[0], strict=True):
            assert torch.equal(a.double(), b.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 1])
def test_non_finite_input_leaves_every_bit(driver, tmp_path, bad, row):
    _, binary = driver
    rows = dense_rows(2, [900, 5])
    rows[row][0][3] = bad
    before = [t.clone() for t in rows[0]]
    result = run(binary, [Case(PROJECT_ONE, rows, [0, 0])], tmp_path)[0]
    assert result.weights.tolist() == [[1.0, 0.0]]
    for a, b in zip(result.grads, before, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_row_of_weight_zero_is_not_read(driver, tmp_path):
    _, binary = driver
    rows = dense_rows(4, [900, 5])
    for t in rows[2]:
        t.fill_(float("nan"))
    case = Case(COMBINE, rows, [1.0, 0.5, 0.0, -1.0])
    clean = [rows[0], rows[1], [torch.zeros_like(t) for t in rows[2]], rows[3]]
    expected = reference.oracle_combine(rows[0], clean[1:], case.weights)
    assert_combined_close(run(binary, [case], tmp_path)[0].grads, expected, clean, case.weights)


def test_any_number_of_rows_is_taken_in_groups(driver, tmp_path):
    """Groups of 1 to 4 rows, in whole steps, heads and tails; rows that are not read lie between those that are."""
    name, binary = driver
    cases = []
    for dtype in DTYPES[::2] if name == "plain" else DTYPES[:1]:
        for used in range(1, 10) if name == "plain" else (3, 5):
            rows = [[t.to(dtype) for t in row] for row in dense_rows(2 * used, [1203, 700])]
            weights = [(0.5 + k // 2 if k % 2 == 0 else 0.0) for k in range(2 * used)]
            cases.append(Case(COMBINE, rows, weights))
            if used > 1:
                cases.append(Case(COMBINE, rows, [0.0, *weights[1:]]))
    for case, result in zip(cases, run(binary, cases, tmp_path), strict=True):
        verify(case, result)


def test_direction_that_is_the_gradient_itself(driver, tmp_path):
    _, binary = driver
    g = torch.arange(1000.0)
    result = run(binary, [Case(COMBINE, [[g], [g], [g]], [0.5, 0.25, 1.0])], tmp_path)[0]
    assert torch.equal(result.grads[0], 1.75 * torch.arange(1000.0))


def test_error_does_not_grow_with_length(driver, tmp_path):
    name, binary = driver
    if name != "plain":
        pytest.skip("about numbers, not memory")
    rows = [[torch.rand(600_000, generator=torch.Generator().manual_seed(i))] for i in range(2)]
    result = run(binary, [Case(GRAM, rows, [0, 0], blocks=1)], tmp_path)[0]
    assert_gram_close(result.gram[0], reference.oracle_gram(*rows), 1e-7)


def test_equal_elements_round_the_same_way(driver, tmp_path):
    """Then every addition to a float32 sum may be off in the same direction."""
    name, binary = driver
    if name != "plain":
        pytest.skip("about numbers, not memory")
    values = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = [[[torch.full((12_000,), x)] for x in v[: 2 + i % 3 * 3].tolist()] for i, v in enumerate(values)]
    cases = [Case(GRAM, r, [0.0] * len(r)) for r in rows]
    for case, result in zip(cases, run(binary, cases, tmp_path), strict=True):
        assert_gram_close(result.gram[0], reference.oracle_gram(*case.rows), 8e-7)


@pytest.mark.parametrize("operation", [GRAM, WEIGHTS])
def test_the_harness_sees_a_missing_barrier(driver, tmp_path, monkeypatch, operation):
    """Without __syncthreads the last sum of a block is a race. A harness that cannot see that proves nothing. "pcgrad", because
    the loops of the other methods need not end when threads disagree."""
    name, binary = driver
    if name != "thread":
        pytest.skip("ThreadSanitizer's part")
    monkeypatch.setenv("GRADPROJ_WITHOUT_BARRIERS", "1")
    gram = torch.eye(9, dtype=torch.float64)[None] - 0.1
    rows = dense_rows(2, [3000]) if operation == GRAM else [[torch.zeros(1, 9, dtype=torch.float64)], [gram]]
    with pytest.raises(AssertionError, match="data race"):
        run(binary, [Case(operation, rows, [0, 0], method="pcgrad")], tmp_path)


def test_the_harness_sees_a_read_past_the_end(driver, tmp_path):
    """One element more than the storage holds: AddressSanitizer must stop."""
    name, binary = driver
    if name != "address":
        pytest.skip("AddressSanitizer's part")
    words = np.frombuffer(serialise([Case(GRAM, dense_rows(2, [3000]), [0, 0])]), np.int64).copy()
    words[words == 3000] = 3001  # the two sizes
    (tmp_path / "in").write_bytes(words.tobytes())
    done = subprocess.run([binary, tmp_path / "in", tmp_path / "out"], check=False, capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
