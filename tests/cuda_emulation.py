"""Cases for the CUDA kernels' own source on the CPU: handed to tests/emulation/driver.cpp, read back, and verified."""

import random
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cases import DTYPES, LAYOUTS, assert_gram_close, make_buffer
from gradproj import float8, reference

ROOT = Path(__file__).parent.parent
GRAM, COMBINE, PROJECT_ONE, GRAM_ROW, PROJECT, WEIGHTS = range(6)
METHODS = {"orthogonal": 0, "conflict": 1, ("mix", 0.25): 2, "pcgrad": 3}
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, float8.DTYPE: 4}
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


class Case(NamedTuple):
    """``rows``: lists of tensors or None. ``scales``: one list per row. ``weights``: [parts * rows]. ``known``: [parts, K, K]."""

    operation: int
    rows: list
    weights: list[float]
    blocks: int = 3
    large: bool = True
    method: str | tuple[str, float] = "orthogonal"
    base: list | None = None
    scales: list | None = None
    parts: list[int] | None = None
    known: np.ndarray | None = None

    @property
    def num_parts(self) -> int:
        return 1 + max(self.parts or [0])

    @property
    def buffers(self) -> list:
        """What lies in memory, with the base as the last row."""
        return [t for row in [*self.rows, *([] if self.base is None else [self.base])] for t in row]

    @property
    def flat_scales(self) -> list:
        scales = [] if self.scales is None else [t for row in self.scales for t in row]
        return scales + [None] * (len(self.buffers) - len(scales))

    def meant(self) -> list:
        """The rows as numbers, in float64: float8 scaled, row 0 counted from the base."""
        rows = [[None if t is None else t.double() for t in row] for row in self.rows]
        for row, codes, scales in zip(rows, self.rows, self.scales or [[]] * len(rows), strict=True):
            for i, scale in enumerate(scales):
                if scale is not None:
                    (row[i],) = float8.dequantize(float8.Float8Row([codes[i]], [scale]), torch.float64)
        if self.base is not None:
            rows[0] = [None if b is None else b.double() - g for b, g in zip(self.base, rows[0], strict=True)]
        return rows


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


def serialise(cases: list[Case]) -> bytes:
    words: list[bytes] = []

    def put(*values):
        words.append(np.asarray(values, dtype=np.int64).tobytes())

    put(len(cases))
    for case in cases:
        flat, scales = case.buffers, case.flat_scales
        storages = storages_of(case)
        keys = list(storages)
        put(case.operation, len(case.rows) + (case.base is not None), case.base is not None, case.num_parts, len(flat))
        put(case.blocks, case.large, METHODS[case.method], len(storages))
        for storage in storages.values():
            data = bytes(storage)
            put(len(data))
            words.append(data + b"\0" * (-len(data) % 8))
        for t, scale in zip(flat, scales, strict=True):
            if t is None:
                put(0)
                continue
            put(1, CODES[t.dtype], keys.index(t.untyped_storage().data_ptr()), t.storage_offset() * t.element_size())
            if scale is None or not t.numel():
                put(-1, 0)
            else:
                put(keys.index(scale.untyped_storage().data_ptr()), scale.storage_offset() * scale.element_size())
            put(t.is_contiguous(), t.dim(), *t.shape, *t.stride())
        put(len(case.parts or []), *(case.parts or []))
        words.append(np.asarray(case.weights, dtype=np.float64).tobytes())
        known = np.zeros(0) if case.known is None else case.known
        put(known.size)
        words.append(known.astype(np.float64).tobytes())
    return b"".join(words)


def storages_of(case):
    tensors = [*case.buffers, *case.flat_scales]
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t is not None}


def run(binary: Path, cases: list[Case], folder: Path) -> list[Result]:
    source, target = folder / "in", folder / "out"
    source.write_bytes(serialise(cases))
    done = subprocess.run([str(binary), str(source), str(target)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data, at = target.read_bytes(), 0
    results = []
    for case in cases:
        num, parts = len(case.rows), case.num_parts
        launches = int(np.frombuffer(data, np.int64, 1, at)[0])
        at += 8
        gram = np.frombuffer(data, np.float64, parts * num * num, at).reshape(parts, num, num).copy()
        at += gram.nbytes
        weights = np.frombuffer(data, np.float64, parts * num, at).reshape(parts, num)
        at += weights.nbytes
        after = {}
        for key, storage in storages_of(case).items():
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


SHAPES = [(), (1,), (0,), (5, 3), (4, 6, 3, 5), (257,), (33, 9), (2050,), (130, 63), (4099,)]
SMALL_SHAPES = [(), (1,), (0,), (5, 3), (70,), (257,), (33, 9)]


def random_rows(rng: random.Random, num_rows: int, dtypes, shapes):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
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
            gone = r and rng.random() < 0.15
            row.append(None if gone else make_buffer(shape, one or rng.choice(dtypes), layout, generator))
        rows.append(row)
    return rows


def random_cases(seed: int, count: int) -> list[Case]:
    """Every form that rows may have, there or not: a base, float8 directions, up to tens of parts in any order."""
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        operation = rng.choice([GRAM, COMBINE, PROJECT_ONE, GRAM_ROW, PROJECT])
        parts = None
        if rng.random() < 0.4:
            operation = PROJECT if operation == PROJECT_ONE else operation
            shapes = rng.choices(SMALL_SHAPES, k=rng.randint(1, 10))
            if rng.random() < 0.5:
                parts = rng.sample(range(len(shapes)), len(shapes))  # one for each buffer
            else:
                parts = [rng.randrange(rng.choice([1, 3, 20])) for _ in shapes]
        else:
            shapes = rng.choices(SHAPES, k=rng.randint(1, 4))
        num_rows = (
            2
            if operation == PROJECT_ONE
            else rng.choice([1, 2, 2, 3, 4, 6, 10] if operation == GRAM and not parts else [2, 2, 3, 5, 10])
        )
        dtypes = DTYPES if rng.random() < 0.5 else DTYPES[:1] + DTYPES[2:]
        rows = random_rows(rng, num_rows, dtypes, shapes)
        scales = None
        if rng.random() < 0.4:
            scales = [[None] * len(shapes) for _ in rows]
            for r in range(0 if operation == GRAM else 1, num_rows):
                if rng.random() < 0.6:
                    rows[r], scales[r] = float8.quantize(rows[r])
        base = None
        if rng.random() < 0.3:
            (base,) = random_rows(rng, 1, dtypes, shapes)
        case = Case(operation, rows, [], rng.choice([1, 3, 8]), rng.random() < 0.5, rng.choice(list(METHODS)))
        case = case._replace(base=base, scales=scales, parts=parts)
        count_of = case.num_parts
        weights = [rng.choice([0.0, 1.0, -0.5, 2.25]) for _ in range(count_of * num_rows)]
        known = np.random.default_rng(seed).standard_normal((count_of, num_rows - 1, num_rows - 1))
        cases.append(case._replace(weights=weights, known=known if operation == GRAM_ROW else None))
    return cases


def verify(case: Case, result: Result) -> None:
    meant, parts = case.meant(), case.parts or [0] * len(case.rows[0])
    for part in range(case.num_parts):
        columns = [i for i, p in enumerate(parts) if p == part]
        rows = [[row[i] for i in columns] for row in meant]
        gram, found = reference.oracle_gram(*rows), result.gram[part]
        if case.operation in (GRAM, PROJECT_ONE, PROJECT):
            assert_gram_close(found, gram)
            assert torch.equal(found, found.T)
        if case.operation == GRAM_ROW:
            lengths = np.sqrt(np.diag(gram))
            assert (np.abs(found[0].numpy() - gram[0]) <= 1e-6 * lengths[0] * lengths + 1e-300).all()
            assert torch.equal(found[1:, 0], found[0, 1:])
            assert np.array_equal(found[1:, 1:].numpy(), case.known[part])
        weights = result.weights[part].tolist()
        if case.operation in (PROJECT_ONE, PROJECT) and len(rows) == 2:
            np.testing.assert_allclose(weights, reference.oracle_weights(found.numpy(), case.method), rtol=1e-12)
        if case.operation not in (COMBINE, PROJECT_ONE, PROJECT):
            weights = [1.0] + [0.0] * (len(rows) - 1)
        for i in columns:
            verify_combined(case, i, [row[i] for row in meant], weights, result.grads[i])


def verify_combined(case: Case, i: int, column: list, weights: list[float], actual) -> None:
    """One rounding to the dtype of the gradient, plus float32 arithmetic on the terms."""
    before = case.rows[0][i]
    if weights[0] == 1 and not any(w for w, t in zip(weights[1:], column[1:], strict=True) if t is not None):
        assert before is None or torch.equal(actual.double(), before.double())
        return
    (expected,) = reference.oracle_combine(column[:1], [[t] for t in column[1:]], weights)
    terms = [(abs(w), t) for w, t in zip(weights, column, strict=True) if t is not None and w != 0]
    if case.base is not None:
        expected = case.base[i].double().numpy().reshape(-1) - expected
        terms += [(1.0, case.base[i]), (abs(weights[0]), case.base[i]), (abs(weights[0]), before)]
    size = sum(w * t.double().abs().numpy().reshape(-1) for w, t in terms)
    wide = before.dtype == torch.float64  # then everything is computed in it
    info = torch.finfo(before.dtype)
    bound = 1.01 * info.eps / 2 * np.abs(expected) + info.smallest_normal * info.eps + (1e-14 if wide else 1e-6) * size
    error = np.abs(actual.double().numpy().reshape(-1) - expected)
    assert (error <= bound).all(), (i, error.max(), before.dtype, before.shape, before.stride())


def dense_rows(num_rows, sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[make_buffer((n,), dtype, "contiguous", generator) for n in sizes] for _ in range(num_rows)]
