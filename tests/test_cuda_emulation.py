"""The CUDA kernels' own source, executed on the CPU: against the float64 oracle, and under sanitizers.

tests/emulation/cuda_emulation.h stands in for the runtime, csrc/cuda is compiled as it is. Blocks of 64 threads and
grids of a few blocks make small buffers cross every border: several chunks a warp, several blocks, several launches.
"""

import itertools
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cases import DTYPES, assert_combined_close, assert_gram_close, make_buffer, placed
from cuda_emulation import (
    COMBINE,
    GRAM,
    METHODS,
    PAIRS,
    PROJECT,
    SANITIZERS,
    SEGMENTS,
    WEIGHTS,
    Case,
    compile_driver,
    dense_rows,
    execute,
    random_cases,
    random_rows,
    run,
    serialise,
    verify,
)
from gradproj import reference
from gradproj.kernels import methods


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """A driver for every sanitizer, compiled side by side."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    folder = tmp_path_factory.mktemp("emulation")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(compile_driver, folder, name) for name in ("thread", "address", "plain")}


@pytest.fixture(params=list(SANITIZERS))
def driver(request, builds):
    return builds[request.param].result()


def verified(driver, cases, folder):
    results = run(driver, cases, folder)
    for case, result in zip(cases, results, strict=True):
        verify(case, result)
    return results


def test_random_cases(driver, tmp_path):
    cases = random_cases(len(driver.name), 200)
    results = verified(driver, cases, tmp_path)
    again = run(driver, cases[:20], tmp_path)
    for first, second in zip(results, again, strict=False):
        assert torch.equal(first.gram.view(torch.int64), second.gram.view(torch.int64))
        assert first.weights.tobytes() == second.weights.tobytes()


def test_every_alignment_of_both_rows(driver, tmp_path):
    """Heads, tails, and rows that are misaligned differently: every pair of offsets within 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for g_type, d_type in PAIRS:
        for a, b in itertools.product(range(16 // g_type.itemsize), range(16 // d_type.itemsize)):
            for n in (1, 63, 64, 700):
                g, d = (make_buffer((n + o,), t, "contiguous", generator)[o:] for o, t in ((a, g_type), (b, d_type)))
                cases += [Case(PROJECT, [[g], [d]]), Case(COMBINE, [[g], [d]], [0.5, 2.0])]
    verified(driver, cases, tmp_path)


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: " with ".join(str(t)[6:] for t in pair))
def test_tensors_at_16_bytes_give_the_same_bits_anywhere(builds, tmp_path, dtypes):
    """Touching or apart, as torch's allocator may place them; and the product of two rows is the same for any number of
    rows, in one pass or several, and if only the gradient's are wanted."""
    driver, whole = builds["plain"].result(), dense_rows(13, [304, 64, 1904, 16], *dtypes)
    for count in (2, 3, 5, 9, 13):
        rows = whole[:count]
        places = [
            rows,
            [placed(row, 0, 0) for row in rows],
            [placed(row, 16 * r % 64, 8) for r, row in enumerate(rows)],
        ]
        results = run(driver, [Case(PROJECT, place) for place in places], tmp_path)
        if count == 2:
            first = results[0].gram[0]
        for result in results:
            assert torch.equal(result.gram, results[0].gram) and torch.equal(result.gram[0, :2, :2], first)
            assert result.weights.tobytes() == results[0].weights.tobytes()
            assert all(map(torch.equal, result.grads, results[0].grads))
        (row_only,) = run(driver, [Case(GRAM, rows, gram_dd=results[0].gram[:, 1:, 1:].numpy().copy())], tmp_path)
        assert torch.equal(row_only.gram, results[0].gram)


def test_pairs_of_types_have_instances(driver, tmp_path):
    """Then three tensors are one launch a pass; in any other mixture each tensor is a launch of its own."""
    mixtures = list(itertools.product(DTYPES, DTYPES))
    cases = [Case(PROJECT, dense_rows(2, [300, 5, 64], g_type, d_type)) for g_type, d_type in mixtures]
    for mixture, result in zip(mixtures, verified(driver, cases, tmp_path), strict=True):
        assert result.launches == (2 if mixture in PAIRS else 6)


def test_float64_is_rounded_to_16_bits_once(driver, tmp_path):
    """By way of float32 these would become ties, and go to the even neighbour."""
    for dtype in (torch.float16, torch.bfloat16):
        tie = 1 + torch.finfo(dtype).eps / 2
        d = torch.tensor([tie + 2**-40, tie - 2**-40, -tie - 2**-40, 2.0**-140, float("inf"), float("nan")]).double()
        d[:3] += torch.tensor([tie + 2**-40, tie - 2**-40, -tie - 2**-40], dtype=torch.float64) - d[:3]
        case = Case(COMBINE, [[torch.zeros(6, dtype=dtype)], [d]], [0.0, 1.0])
        (result,) = run(driver, [case], tmp_path)
        eps = torch.finfo(dtype).eps
        wanted = torch.tensor([1 + eps, 1, -1 - eps, 2.0**-140, float("inf"), float("nan")], dtype=dtype)
        torch.testing.assert_close(result.grads[0], wanted, rtol=0, atol=0, equal_nan=True)


def test_a_model_is_two_launches(driver, tmp_path):
    """At K = 1: one Gram and one combine. What does not fit one launch's parameters needs more, and sums alike."""
    one, many = (Case(PROJECT, dense_rows(2, [1 + i % 5 for i in range(n)])) for n in (SEGMENTS, 2 * SEGMENTS + 1))
    results = verified(driver, [one, many], tmp_path)
    assert [r.launches for r in results] == [2, 6]


def test_a_part_for_every_tensor_is_one_launch_a_pass(driver, tmp_path):
    """Zeros, Gram, adding up; the weights of all parts; combine."""
    rows = dense_rows(2, [1 + i % 5 for i in range(SEGMENTS)])
    for row in rows:
        row[7].mul_(3)
    (result,) = verified(driver, [Case(PROJECT, rows, parts=list(range(SEGMENTS)))], tmp_path)
    assert result.launches == 5


def test_parts_meet_blocks_and_launches_anyhow(driver, tmp_path):
    """A part of several blocks, several parts in one block, parts without a buffer, parts that launches share."""
    rows = dense_rows(3, [70, 5, 1900, 64, 3, 2000])
    cases = [
        Case(GRAM, rows, blocks=8, parts=[0, 300, 3, 3, 255, 256]),
        Case(PROJECT, rows, blocks=8, parts=[1, 0, 1, 0, 1, 1]),
        Case(PROJECT, rows, blocks=1, parts=[1, 0, 1, 0, 1, 1]),
        Case(PROJECT, dense_rows(2, [9] * 170), parts=[i % 9 for i in range(170)]),
        Case(PROJECT, dense_rows(2, [9] * 120, torch.float32, torch.float16), parts=[i // 110 for i in range(120)]),
    ]
    for row in cases[-1].rows:
        row[:60:2] = [t.float() for t in row[:60:2]]
    verified(driver, cases, tmp_path)


def test_64_directions_read_the_gradient_once_per_group(driver, tmp_path):
    """65 rows do not fit one pass. With the directions' products known, 8 passes take row 0 against 8 others each."""
    rows = dense_rows(65, [70, 9, 1200])
    weights = [1.0] + [(-0.5) ** (k % 7) for k in range(64)]
    cases = [Case(GRAM, rows, gram_dd=np.arange(64.0 * 64).reshape(1, 64, 64)), Case(COMBINE, rows, weights)]
    assert [r.launches for r in verified(driver, cases, tmp_path)] == [2 * 8, 1]


def test_64_directions_of_every_form(driver, tmp_path):
    """65 rows in three parts, strided and of several types: the most addresses that anything has."""
    rng = random.Random(1)
    rows = random_rows(rng, 65, [(70,), (9, 4), (5, 3, 2)])
    weights = [rng.choice([0.0, 1.0, -0.5]) for _ in range(3 * 65)]
    cases = [
        Case(GRAM, rows, parts=[2, 0, 1], gram_dd=np.zeros((3, 64, 64))),
        Case(COMBINE, rows, weights, parts=[2, 0, 1]),
    ]
    verified(driver, cases, tmp_path)


def test_many_rows_without_known_products(driver, tmp_path):
    """Every group of four rows with every other: K = 11 is 3 passes, K = 32 is 36, which read 264 N. A group without
    row 0 has another instance where that is of another type."""
    for num_rows, passes in ((12, 3), (33, 36)):
        rows = dense_rows(num_rows, [300, 7], torch.float32, torch.bfloat16)
        rows[1][0] = rows[-1][1] = None
        doubles = [[t if t is None else t.double() for t in row] for row in rows]
        parts = [Case(GRAM, rows, parts=[1, 0])]
        results = verified(driver, [Case(GRAM, rows), Case(GRAM, doubles), *parts], tmp_path)
        assert results[1].launches == 2 * passes


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_many_parts(driver, tmp_path, method):
    """A block per part, all its threads at one tableau: K = 1, K above a warp, dependent directions, a part of NaN."""
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for k in (1, 2, 7, 40):
        rows = rng.standard_normal((3, k + 1, 50)) - 0.2
        rows[:, 0] *= -1
        rows[0, k] = rows[0, 1]
        gram = rows @ rows.transpose(0, 2, 1)
        gram[2, 0, k] = float("nan")
        expected.append(gram)
        out = torch.full((3, k + 1), float("nan"), dtype=torch.float64)
        cases.append(Case(WEIGHTS, [[out], [torch.from_numpy(gram.copy())]], method=method))
    for gram, result in zip(expected, run(driver, cases, tmp_path), strict=True):
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
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((65, 200)) * 10.0 ** rng.uniform(-6, 6, (65, 1))
    gram = torch.from_numpy(rows @ rows.T)
    out = torch.full((1, 65), float("nan"), dtype=torch.float64)
    result = run(driver, [Case(WEIGHTS, [[out], [gram[None].clone()]], method=method)], tmp_path)[0]
    np.testing.assert_allclose(result.grads[0][0], methods.solve(gram, *methods.parse(method)), rtol=1e-9, atol=1e-15)


def test_refused_before_the_first_launch(driver, tmp_path):
    """A strided buffer of too many dimensions comes last and is refused first: nothing has been written by then."""
    g, d = torch.ones(3), torch.ones(3)
    nine = [torch.randn([3] * 9)[(slice(0, 2),) * 9] for _ in range(2)]
    bad = [
        Case(COMBINE, [[g, nine[0]], [d, nine[1]]], [2.0, 1.0]),
        Case(PROJECT, [[g, nine[0]], [d, torch.ones([2] * 9)]]),
        Case(COMBINE, [[g]] + [[d]] * 65, [1.0] * 66),
        Case(WEIGHTS, [[torch.ones(1, 66).double()], [torch.ones(1, 66, 66).double()]]),
    ]
    for case, result in zip(bad, run(driver, bad, tmp_path), strict=True):
        assert result.launches == -1
        for a, b in zip(result.grads, case.rows[0], strict=True):
            assert torch.equal(a, b)


def test_non_finite_input_leaves_every_bit(driver, tmp_path):
    cases = []
    for (g_type, d_type), bad, row in itertools.product(PAIRS, (float("nan"), float("inf")), (0, 1)):
        rows = dense_rows(2, [900, 5], g_type, d_type)
        rows[row][0][3] = bad
        cases.append(Case(PROJECT, rows))
    for case, result in zip(cases, run(driver, cases, tmp_path), strict=True):
        assert result.weights.tolist() == [[1.0, 0.0]]
        for a, b in zip(result.grads, case.rows[0], strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_row_of_weight_zero_is_not_read(driver, tmp_path):
    """Row 0 neither."""
    for unread in (0, 2):
        rows = dense_rows(4, [900, 5])
        for t in rows[unread]:
            t.fill_(float("nan"))
        case = Case(COMBINE, rows, [w * (r != unread) for r, w in enumerate([1.0, 0.5, 0.25, -1.0])])
        clean = [[torch.zeros_like(t) if r == unread else t for t in row] for r, row in enumerate(rows)]
        expected = reference.oracle_combine(clean[0], clean[1:], case.weights)
        assert_combined_close(run(driver, [case], tmp_path)[0].grads, expected, clean, case.weights)


def test_any_number_of_rows_is_taken_in_groups(driver, tmp_path):
    """Groups of 1 to 4 rows, in whole steps, heads and tails; rows that are not read lie between those that are."""
    cases = []
    for (g_type, d_type), used in itertools.product(PAIRS, range(1, 10)):
        rows = dense_rows(2 * used, [1203, 700], g_type, d_type)
        weights = [(0.5 + k // 2 if k % 2 == 0 else 0.0) for k in range(2 * used)]
        cases.append(Case(COMBINE, rows, weights))
        if used > 1:
            cases.append(Case(COMBINE, rows, [0.0, *weights[1:]]))
    verified(driver, cases, tmp_path)


def test_any_number_of_rows_in_one_gram(driver, tmp_path):
    """Up to nine rows are one pass, whichever of them a column lacks."""
    cases = []
    for (g_type, d_type), num_rows in itertools.product(PAIRS, range(1, 10)):
        rows = dense_rows(num_rows, [700, 300, 1203], g_type, d_type)
        for r, row in enumerate(rows[2:]):
            row[r % 2] = None
        cases.append(Case(GRAM, rows))
    for result in verified(driver, cases, tmp_path):
        assert result.launches == 2


def test_direction_that_is_the_gradient_itself(driver, tmp_path):
    g = torch.arange(1000.0)
    result = run(driver, [Case(COMBINE, [[g], [g], [g]], [0.5, 0.25, 1.0])], tmp_path)[0]
    assert torch.equal(result.grads[0], 1.75 * torch.arange(1000.0))


def test_error_does_not_grow_with_length(builds, tmp_path):
    rows = [[torch.rand(600_000, generator=torch.Generator().manual_seed(i))] for i in range(2)]
    result = run(builds["plain"].result(), [Case(GRAM, rows, blocks=1)], tmp_path)[0]
    assert_gram_close(result.gram[0], reference.oracle_gram(*rows), 1e-7)


def test_equal_elements_round_the_same_way(builds, tmp_path):
    """Then every addition to a float32 sum may be off in the same direction."""
    values = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    cases = [
        Case(GRAM, [[torch.full((12_000 + offset,), x)[offset:]] for x in v[: 2 + i % 3 * 3].tolist()])
        for i, v in enumerate(values)
        for offset in (0, 3)
    ]
    for case, result in zip(cases, run(builds["plain"].result(), cases, tmp_path), strict=True):
        assert_gram_close(result.gram[0], reference.oracle_gram(*case.rows), 8e-7)


@pytest.mark.parametrize("operation", [GRAM, WEIGHTS])
def test_the_harness_sees_a_missing_barrier(builds, tmp_path, operation):
    """Without __syncthreads the last sum of a block is a race. A harness that cannot see that proves nothing. "pcgrad",
    because the loops of the other methods need not end when threads disagree."""
    gram = torch.eye(9, dtype=torch.float64)[None] - 0.1
    rows = dense_rows(2, [3000]) if operation == GRAM else [[torch.zeros(1, 9, dtype=torch.float64)], [gram]]
    data = serialise([Case(operation, rows, method="pcgrad")])
    done = execute(builds["thread"].result(), data, tmp_path, GRADPROJ_WITHOUT_BARRIERS="1")
    assert done.returncode != 0 and "data race" in done.stderr


@pytest.mark.parametrize("operation", [GRAM, COMBINE])
def test_the_harness_sees_two_blocks_at_one_address(builds, tmp_path, operation):
    """Every block believes that it is block 0: they write the same slot, or the same elements."""
    data = serialise([Case(operation, dense_rows(2, [3000]), [0.5, 2.0])])
    done = execute(builds["thread"].result(), data, tmp_path, GRADPROJ_SAME_BLOCK="1")
    assert done.returncode != 0 and "data race" in done.stderr


@pytest.mark.parametrize("operation", [GRAM, COMBINE])
def test_the_harness_sees_a_read_past_the_end(builds, tmp_path, operation):
    """One element more than the storage holds: AddressSanitizer must stop."""
    words = np.frombuffer(serialise([Case(operation, dense_rows(2, [3000]), [0.5, 2.0])]), np.int64).copy()
    words[words == 3000] = 3001  # the two sizes
    done = execute(builds["address"].result(), words.tobytes(), tmp_path)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_the_harness_sees_a_misaligned_vector(builds, tmp_path):
    """Rows that begin 2 bytes past a multiple of 4, which torch never does: UBSan must stop."""
    g, d = (torch.zeros(1001)[1:] for _ in range(2))
    words = np.frombuffer(serialise([Case(GRAM, [[g], [d]])]), np.int64).copy()
    words[words == 4] = 2  # the two offsets
    done = execute(builds["address"].result(), words.tobytes(), tmp_path)
    assert done.returncode != 0 and "misaligned address" in done.stderr
