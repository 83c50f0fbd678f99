"""Cases for the CUDA kernels' own source on the CPU: handed to tests/emulation/driver.cpp, read back, and verified."""

import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cases import DTYPES, LAYOUTS, assert_gram_close, make_buffer
from gradproj import reference

ROOT = Path(__file__).parent.parent
GRAM, COMBINE, PROJECT, WEIGHTS = range(4)
METHODS = {"orthogonal": 0, "conflict": 1, ("mix", 0.25): 2, "pcgrad": 3}
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# What instances are compiled for, by what the gradient and the directions store. All else goes element by element.
PAIRS = [(t, t) for t in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
SEGMENTS = 100  # of one launch at K = 1: kMostSegments of the emulation
# Unoptimised, the checks of "address" compile in a third of the time.
SANITIZERS = {
    "plain": ["-O1"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}


class Case(NamedTuple):
    """``rows``: lists of tensors or None. ``weights``: [parts * rows], what combine takes. ``gram_dd``: [parts, K,
    K]."""

    operation: int
    rows: list
    weights: Sequence[float] = ()
    blocks: int = 3
    method: str | tuple[str, float] = "orthogonal"
    parts: list[int] | None = None
    gram_dd: np.ndarray | None = None

    @property
    def num_parts(self) -> int:
        return 1 + max(self.parts or [0])

    @property
    def buffers(self) -> list:
        return [t for row in self.rows for t in row]

    @property
    def storages(self) -> dict:
        return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self.buffers if t is not None}


class Result(NamedTuple):
    launches: int  # negative: refused
    gram: torch.Tensor
    weights: np.ndarray
    grads: list


def compile_driver(folder: Path, sanitizer: str) -> Path:
    compiler = shutil.which("g++")
    assert compiler is not None, "no g++ to compile the emulation with"
    binary = folder / sanitizer
    header = ROOT / "tests" / "emulation" / "cuda_emulation.h"
    command = [compiler, "-std=c++20", "-g1", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [f'-DGRADPROJ_EMULATION="{header}"', *SANITIZERS[sanitizer]]
    subprocess.run([*command, str(ROOT / "tests" / "emulation" / "driver.cpp"), "-o", str(binary)], check=True)
    return binary


def serialise(cases: list[Case]) -> bytes:
    words: list[bytes] = []

    def put(*values):
        words.append(np.asarray(values, dtype=np.int64).tobytes())

    def put_doubles(values):
        values = np.asarray(values, dtype=np.float64)
        put(values.size)
        words.append(values.tobytes())

    put(len(cases))
    for case in cases:
        put(case.operation, len(case.rows), case.num_parts, case.blocks, METHODS[case.method], len(case.storages))
        for storage in case.storages.values():
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
            put(len(data))
            words.append(data + b"\0" * (-len(data) % 8))
        keys = list(case.storages)
        put(len(case.buffers))
        for t in case.buffers:
            put(t is not None)
            if t is not None:
                put(CODES[t.dtype], keys.index(t.untyped_storage().data_ptr()), t.storage_offset() * t.element_size())
                put(t.is_contiguous(), t.dim(), *t.shape, *t.stride())
        put(len(case.parts or []), *(case.parts or []))
        put_doubles(case.weights or [float("nan")] * (case.num_parts * len(case.rows)))
        put_doubles([] if case.gram_dd is None else case.gram_dd)
    return b"".join(words)


def execute(binary: Path, data: bytes, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    (folder / "in").write_bytes(data)
    command = [str(binary), str(folder / "in"), str(folder / "out")]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def run(binary: Path, cases: list[Case], folder: Path) -> list[Result]:
    done = execute(binary, serialise(cases), folder)
    assert done.returncode == 0, done.stderr[:4000]
    data, at = (folder / "out").read_bytes(), 0
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
        for key, storage in case.storages.items():
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


def random_rows(rng: random.Random, num_rows: int, shapes) -> list:
    """Rows of every form: a pair of types or any mixture, contiguous or any layouts, with holes."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    plain, pair = rng.random() < 0.4, rng.choice([None, *PAIRS])
    rows = []
    for r in range(num_rows):
        row = []
        for shape in shapes:
            layouts = ["contiguous", "misaligned", *LAYOUTS, *(["expanded"] if r else [])]
            dtype = pair[min(r, 1)] if pair else rng.choice(DTYPES)
            gone = r and rng.random() < 0.15
            row.append(
                None if gone else make_buffer(shape, dtype, "contiguous" if plain else rng.choice(layouts), generator)
            )
        rows.append(row)
    return rows


def random_cases(seed: int, count: int) -> list[Case]:
    """Every operation, up to tens of parts in any order, and as many rows as choose every instance."""
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        operation, parts = rng.choice([GRAM, GRAM, COMBINE, PROJECT, PROJECT]), None
        if rng.random() < 0.4:
            shapes = rng.choices(SMALL_SHAPES, k=rng.randint(1, 10))
            if rng.random() < 0.5:
                parts = rng.sample(range(len(shapes)), len(shapes))  # one for each buffer
            else:
                parts = [rng.randrange(rng.choice([1, 3, 20])) for _ in shapes]
        else:
            shapes = rng.choices(SHAPES, k=rng.randint(1, 4))
        num_rows = rng.choice([1, 2, 2, 2, 3, 4, 6, 10])
        case = Case(
            operation, random_rows(rng, num_rows, shapes), (), rng.choice([1, 3, 8]), rng.choice(list(METHODS)), parts
        )
        if operation == COMBINE:
            case = case._replace(weights=[rng.choice([0.0, 1.0, -0.5, 2.25]) for _ in range(case.num_parts * num_rows)])
        elif rng.random() < 0.3:
            x = np.random.default_rng(seed).standard_normal((case.num_parts, num_rows - 1, 60))
            case = case._replace(gram_dd=x @ x.transpose(0, 2, 1))
        cases.append(case)
    return cases


def verify(case: Case, result: Result) -> None:
    assert result.launches >= 0
    parts = case.parts or [0] * len(case.rows[0])
    for part in range(case.num_parts):
        columns = [i for i, p in enumerate(parts) if p == part]
        rows = [[None if row[i] is None else row[i].double() for i in columns] for row in case.rows]
        weights = [1.0] + [0.0] * (len(rows) - 1)
        if case.operation == COMBINE:
            weights = result.weights[part].tolist()
        else:
            verify_gram(case, part, result.gram[part], reference.oracle_gram(*rows))
        if case.operation == PROJECT:
            weights = result.weights[part].tolist()
            if len(rows) == 2:
                wanted = reference.oracle_weights(result.gram[part].numpy(), case.method)
                np.testing.assert_allclose(weights, wanted, rtol=1e-12)
        for i, column in enumerate(columns):
            verify_combined(case.rows[0][column], [row[i] for row in rows], weights, result.grads[column])


def verify_gram(case: Case, part: int, found: torch.Tensor, expected: np.ndarray) -> None:
    assert torch.equal(found, found.T) or case.gram_dd is not None
    if case.gram_dd is None:
        return assert_gram_close(found, expected)
    lengths = np.sqrt(np.diag(expected))
    assert (np.abs(found[0].numpy() - expected[0]) <= 1e-6 * lengths[0] * lengths + 1e-300).all()
    assert torch.equal(found[1:, 0], found[0, 1:])
    assert np.array_equal(found[1:, 1:].numpy(), case.gram_dd[part])
    return None


def verify_combined(before, column: list, weights: list[float], actual) -> None:
    """One rounding to the dtype of the gradient, plus float32 arithmetic on the terms."""
    if weights[0] == 1 and not any(w for w, t in zip(weights[1:], column[1:], strict=True) if t is not None):
        assert before is None or torch.equal(actual, before)
        return
    (expected,) = reference.oracle_combine(column[:1], [[t] for t in column[1:]], weights)
    terms = [(abs(w), t) for w, t in zip(weights, column, strict=True) if t is not None and w != 0]
    size = sum(w * t.abs().numpy().reshape(-1) for w, t in terms)
    info, wide = torch.finfo(before.dtype), before.dtype == torch.float64  # wide: everything is computed in float64
    bound = 1.01 * info.eps / 2 * np.abs(expected) + info.smallest_normal * info.eps + (1e-14 if wide else 1e-6) * size
    error = np.abs(actual.double().numpy().reshape(-1) - expected)
    assert (error <= bound).all(), (error.max(), before.dtype, before.shape, before.stride())


def dense_rows(num_rows, sizes, dtype=torch.float32, directions=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [dtype] + [directions or dtype] * (num_rows - 1)
    return [[make_buffer((n,), t, "contiguous", generator) for n in sizes] for t in dtypes]
