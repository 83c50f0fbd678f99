"""Sums of the CPU kernels have the same bits wherever rows lie in memory, for any number of threads and of other rows.

What went wrong: columns that touch in memory in every row were walked as one, so the allocator decided where partial
sums end; and the product of two rows was summed in another order where more rows, or only one, were multiplied with
them. A resumed run computes the Gram of its directions anew where an uninterrupted one has extended it row by row, so
its weights differed in the last bit."""

import os
import subprocess
import sys

import pytest
import torch

import gradproj
from cases import placed
from gradproj.directions.kept_gram import KeptGram
from gradproj.rows import functional

SHAPES = [(1,), (7,), (64,), (33, 9), (0,), (257,), (1040,), (), (3, 22_001), (16, 64)]  # two chunks
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "float32 with bfloat16": [torch.float32, *[torch.bfloat16] * 32],
    "mixed": [torch.float32, torch.bfloat16, torch.float16, torch.float32],
    "mixed with float64": [torch.float32, torch.float64, torch.bfloat16],
}
SHIFTS = (4, 8, 16, 32, 60)
INSTRUCTION_SETS = ("portable", "avx2", "avx512")


@pytest.fixture(autouse=True)
def cpu_kernels():
    threads = torch.get_num_threads()
    if not gradproj.backends()["cpu"].available:
        pytest.skip("no native kernels")
    with gradproj.use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def make_rows(count, dtypes, shapes=SHAPES):
    generator = torch.Generator().manual_seed(count)
    return [[torch.randn(s, generator=generator).to(dtypes[r % len(dtypes)]) for s in shapes] for r in range(count)]


def placements(rows):
    """The same rows elsewhere: shifted together, each by another shift, touching, and only some of them touching."""
    yield "separate tensors", [[t.clone() for t in row] for row in rows]
    for shift in SHIFTS:
        yield f"touching, {shift} bytes", [placed(row, shift, 0) for row in rows]
    yield "apart", [placed(row, 4, 3) for row in rows]
    yield "each by another shift", [placed(row, SHIFTS[r % 5], 0) for r, row in enumerate(rows)]
    yield "only the gradient in a bucket", [placed(rows[0], 0, 0), *rows[1:]]
    yield "only the directions touch", [[t.clone() for t in rows[0]], *(placed(row, 0, 0) for row in rows[1:])]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


CASES = [(dtypes, count) for dtypes in DTYPES for count in (2, 9)]
CASES += [(dtypes, count) for dtypes in ("float32", "bfloat16") for count in (1, 8, 32)]


@pytest.mark.parametrize(("dtypes", "count"), CASES)
def test_any_placement(dtypes, count):
    """Gram, weights and result of a projection, and a weighted sum, by one thread and by two."""
    rows = make_rows(1 + count, DTYPES[dtypes])
    w = torch.linspace(-1, 1, 1 + count, dtype=torch.float64)
    expected = None
    for number, (name, (grads, *directions)) in enumerate(placements(rows)):
        torch.set_num_threads(1 + number % 2)
        gram = gradproj.gram(grads, *directions)
        combined = placed(grads, SHIFTS[number % 5], 0)
        gradproj.combine_(combined, directions, w)
        done = gradproj.project_(grads, *directions)
        found = [gram, done.gram, done.weights, *grads, *combined]
        expected = expected or found
        assert equal(found, expected), name


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float64", "float32 with bfloat16"])
def test_strided_rows_are_summed_as_contiguous_ones(dtypes):
    """Where the gradient is contiguous; it is the order of its elements in memory that all rows follow."""
    shapes = [(33, 65), (5, 2, 300), (7,)]
    grads, *directions = make_rows(4, DTYPES[dtypes], shapes)
    strided = [[t.mT.contiguous().mT if t.ndim > 1 else t for t in row] for row in directions]
    assert not strided[0][0].is_contiguous()
    copy = [t.clone() for t in grads]
    done, other = gradproj.project_(grads, *directions), gradproj.project_(copy, *strided)
    assert torch.equal(done.gram, other.gram) and torch.equal(done.weights, other.weights) and equal(grads, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_product_depends_on_its_two_rows_only(dtype):
    """Not on how many others there are, on their order, or on whether theirs are wanted."""
    rows = make_rows(12, [dtype])
    whole = gradproj.gram(*rows)
    for count in (1, 2, 3, 4, 5, 6, 9, 10, 11):
        assert torch.equal(gradproj.gram(*rows[:count]), whole[:count, :count]), count
        dd = gradproj.gram(*rows[1 : 1 + count])
        row_only = torch.ops.gradproj.gram([t for row in rows[: 1 + count] for t in row], 1 + count, dd)
        assert torch.equal(row_only, whole[: 1 + count, : 1 + count]), count
    assert torch.equal(gradproj.gram(*rows[::-1]), whole.flip(0, 1))
    assert torch.equal(gradproj.gram(rows[2], rows[9])[0, 1], whole[2, 9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_absent_tensor_of_another_row_changes_nothing(dtype):
    rows = make_rows(4, [dtype])
    missing = [t if i % 2 else None for i, t in enumerate(rows[3])]
    assert torch.equal(gradproj.gram(*rows[:3], missing)[:3, :3], gradproj.gram(*rows[:3]))


def test_a_direction_with_another_dtype_is_multiplied_as_in_float32():
    """By the kernel that decodes directions in registers, and through tiles."""
    grads, *directions = make_rows(4, [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16])
    whole = gradproj.gram(grads, *directions)
    row_only = torch.ops.gradproj.gram([t for row in (grads, *directions) for t in row], 4, whole[1:, 1:].contiguous())
    assert torch.equal(row_only, whole)


def test_tasks_of_several_chunks():
    """Of so many elements there are more chunks than tasks with 65 rows, but not with 3. Rows repeat to save memory."""
    rows = make_rows(3, [torch.float32], [(64, 32_900), (33,)])
    whole = gradproj.gram(*(rows[r % 3] for r in range(65)))
    assert torch.equal(whole[:3, :3], gradproj.gram(*rows)) and torch.equal(whole[60:63, 60:63], whole[:3, :3])


def test_parts_are_summed_alike_in_any_placement():
    rows = make_rows(3, [torch.float32])
    part = [i // 3 for i in range(len(SHAPES))]
    grams = [functional.local_gram(r, None, None, part, 4) for _, r in placements(rows)]
    assert equal(grams, grams[:1] * len(grams))


def test_a_kept_gram_is_what_computing_it_anew_gives():
    """After directions came and went, as in a run that was not interrupted."""
    rows = make_rows(7, [torch.float32])
    grads = [torch.empty_like(t) for t in rows[0]]

    def of(kept, some):
        return kept.of(some, rows[0], grads, None, ((), 0))

    kept = KeptGram()
    for newest in range(2, 8):
        if newest > 4:
            kept.evict()
        some = rows[max(0, newest - 4) : newest]
        elsewhere = [placed(row, 60, 0) for row in some]
        assert torch.equal(of(kept, some), of(KeptGram(), elsewhere)), newest


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name):
    """All of the above, in a process of its own: the kernels are chosen once."""
    if os.environ.get("GRADPROJ_CPU"):
        pytest.skip("a process of this test")
    env = {**os.environ, "GRADPROJ_CPU": name}
    probe = "import torch, gradproj; gradproj.backends(); torch.ops.gradproj.gram([torch.ones(1)], 1)"
    if (
        "not supported"
        in subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=False).stderr
    ):
        pytest.skip(f"this processor does not run {name}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
