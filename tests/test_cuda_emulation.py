"""The CUDA kernels' own source, executed on the CPU: against the float64 oracle, and under sanitizers.

tests/emulation/cuda_emulation.h stands in for the runtime, csrc/cuda is compiled as it is. Blocks of 64 threads and grids of a
few blocks make small buffers cross every border: several chunks a warp, several blocks, several launches.
"""

import itertools
import random
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cases import DTYPES, LAYOUTS, assert_combined_close, assert_gram_close, make_buffer
from gradproj import methods, reference

ROOT = Path(__file__).parent.parent
GRAM, COMBINE, PROJECT_ONE, GRAM_ROW, PROJECT, WEIGHTS = range(6)
METHODS = {"orthogonal": 0, "conflict": 1, ("mix", 0.25): 2, "pcgrad": 3}
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


class Case(NamedTuple):
    operation: int
    rows: list  # of lists of tensors or None
    weights: list[float]
    blocks: int = 3
    large: bool = True
    method: str | tuple[str, float] = "orthogonal"


class Result(NamedTuple):
    launches: int
    gram: torch.Tensor
    weights: np.ndarray
    grads: list


def compile_driver(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulation with")
    binary = folder / "driver"
    header = ROOT / "tests" / "emulation" / "cuda_emulation.h"
    command = [compiler, "-std=c++20", "-g", "-pthread", "-Wno-unknown-pragmas", "-Wno-tsan", *flags]
    command += [f'-DGRADPROJ_EMULATION="{header}"', "-DGRADPROJ_EMULATED_THREADS=64"]
    subprocess.run([*command, str(ROOT / "tests" / "emulation" / "driver.cpp"), "-o", str(binary)], check=True)
    return binary


@pytest.fixture(scope="session", params=list(SANITIZERS))
def driver(request, tmp_path_factory):
    return request.param, compile_driver(
        tmp_path_factory.mktemp(request.param), "-Wall", "-Werror", *SANITIZERS[request.param]
    )


def serialise(cases: list[Case]) -> bytes:
    words: list[bytes] = []

    def put(*values):
        words.append(np.asarray(values, dtype=np.int64).tobytes())

    put(len(cases))
    for case in cases:
        flat = [t for row in case.rows for t in row]
        storages = storages_of(flat)
        put(case.operation, len(case.rows), len(flat), case.blocks, case.large, METHODS[case.method], len(storages))
        for storage in storages.values():
            data = bytes(storage)
            put(len(data))
            words.append(data + b"\0" * (-len(data) % 8))
        for t in flat:
            if t is None:
                put(0)
                continue
            where = list(storages).index(t.untyped_storage().data_ptr())
            offset = t.storage_offset() * t.element_size()
            put(1, CODES[t.dtype], where, offset, t.is_contiguous(), t.dim(), *t.shape, *t.stride())
        words.append(np.asarray(case.weights, dtype=np.float64).tobytes())
    return b"".join(words)


def storages_of(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}


def run(binary: Path, cases: list[Case], folder: Path) -> list[Result]:
    source, target = folder / "in", folder / "out"
    source.write_bytes(serialise(cases))
    done = subprocess.run([str(binary), str(source), str(target)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data, at = target.read_bytes(), 0
    results = []
    for case in cases:
        num = len(case.rows)
        launches = int(np.frombuffer(data, np.int64, 1, at)[0])
        gram = np.frombuffer(data, np.float64, num * num, at + 8).reshape(num, num).copy()
        weights = np.frombuffer(data, np.float64, num, at + 8 + 8 * num * num)
        at += 8 + 8 * num * num + 8 * num
        flat = [t for row in case.rows for t in row]
        after = {}
        for key, storage in storages_of(flat).items():
            size = len(storage)
            after[key] = torch.frombuffer(bytearray(data[at : at + size] or b"\0"), dtype=torch.uint8)
            at += size
        grads = []
        for t in case.rows[0]:
            if t is None or not t.numel():
                grads.append(t)
                continue
            whole = after[t.untyped_storage().data_ptr()]
            whole = whole[: len(whole) // t.element_size() * t.element_size()].view(t.dtype)
            grads.append(whole.as_strided(t.shape, t.stride(), t.storage_offset()))
        results.append(Result(launches, torch.from_numpy(gram), weights, grads))
    assert at == len(data)
    return results


def random_rows(rng: random.Random, num_rows: int, dtypes, absent=True):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shapes = rng.choices(
        [(), (1,), (0,), (5, 3), (4, 6, 3, 5), (257,), (33, 9), (2050,), (130, 63), (4099,)], k=rng.randint(1, 4)
    )
    plain, one = rng.random() < 0.4, rng.choice([None, *dtypes])
    rows = []
    for r in range(num_rows):
        row = []
        for shape in shapes:
            layout = (
                "contiguous"
                if plain
                else rng.choice(["contiguous", "misaligned", *LAYOUTS, *(["expanded"] if r else [])])
            )
            gone = absent and r and rng.random() < 0.15
            row.append(None if gone else make_buffer(shape, one or rng.choice(dtypes), layout, generator))
        rows.append(row)
    return rows


def random_cases(seed: int, count: int) -> list[Case]:
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        operation = rng.choice([GRAM, COMBINE, PROJECT_ONE, GRAM_ROW, PROJECT])
        num_rows = (
            2
            if operation == PROJECT_ONE
            else rng.choice([1, 2, 2, 3, 4, 6, 9, 11] if operation == GRAM else [2, 3, 5, 9, 12])
        )
        rows = random_rows(rng, num_rows, DTYPES if rng.random() < 0.5 else DTYPES[:1] + DTYPES[2:])
        weights = [rng.choice([0.0, 1.0, -0.5, 2.25]) for _ in range(num_rows)]
        cases.append(
            Case(operation, rows, weights, rng.choice([1, 3, 8]), rng.random() < 0.5, rng.choice(list(METHODS)))
        )
    return cases


def verify(case: Case, result: Result) -> None:
    before = [[None if t is None else t.clone() for t in row] for row in case.rows]
    gram = reference.oracle_gram(*before)
    if case.operation in (GRAM, PROJECT_ONE, PROJECT):
        assert_gram_close(result.gram, gram)
        assert torch.equal(result.gram, result.gram.T)
    if case.operation == GRAM_ROW:
        lengths = np.sqrt(np.diag(gram))
        assert (np.abs(result.gram[0].numpy() - gram[0]) <= 1e-6 * lengths[0] * lengths + 1e-300).all()
    if case.operation in (PROJECT_ONE, PROJECT) and len(before) == 2:
        np.testing.assert_allclose(
            result.weights, reference.oracle_weights(result.gram.numpy(), case.method), rtol=1e-12
        )
    if case.operation in (COMBINE, PROJECT_ONE, PROJECT):
        weights = result.weights.tolist()
        expected = reference.oracle_combine(before[0], before[1:], weights)
        assert_combined_close(result.grads, expected, before, weights)
    else:
        for a, b in zip(result.grads, before[0], strict=True):
            assert a is None or torch.equal(a, b)


def test_random_cases(driver, tmp_path):
    """Fewer under the sanitizers, which are after memory and races, not after numbers."""
    name, binary = driver
    cases = random_cases(len(name), {"plain": 80, "address": 25, "thread": 20}[name])
    results = run(binary, cases, tmp_path)
    for case, result in zip(cases, results, strict=True):
        verify(case, result)
    if name != "plain":
        return
    again = run(binary, cases, tmp_path)
    for first, second in zip(results, again, strict=True):
        assert torch.equal(first.gram.view(torch.int64), second.gram.view(torch.int64))
        assert first.weights.tobytes() == second.weights.tobytes()


def dense_rows(num_rows, sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[make_buffer((n,), dtype, "contiguous", generator) for n in sizes] for _ in range(num_rows)]


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


def test_64_directions_read_the_gradient_once_per_group(driver, tmp_path):
    """65 rows do not fit one pass. With the directions' own products known, 8 passes take row 0 against 8 others each."""
    _, binary = driver
    rows = dense_rows(65, [70, 9])
    weights = [1.0] + [(-0.5) ** (k % 7) for k in range(64)]
    row, combined = run(binary, [Case(GRAM_ROW, rows, weights), Case(COMBINE, rows, weights)], tmp_path)
    verify(Case(GRAM_ROW, rows, weights), row)
    verify(Case(COMBINE, rows, weights), combined)
    assert row.launches == 2 * 8  # sums, and adding up


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 1])
def test_non_finite_input_leaves_every_bit(driver, tmp_path, bad, row):
    _, binary = driver
    rows = dense_rows(2, [900, 5])
    rows[row][0][3] = bad
    before = [t.clone() for t in rows[0]]
    result = run(binary, [Case(PROJECT_ONE, rows, [0, 0])], tmp_path)[0]
    assert result.weights.tolist() == [1.0, 0.0]
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
    assert_gram_close(result.gram, reference.oracle_gram(*rows), 1e-7)


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
