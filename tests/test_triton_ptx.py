"""The Triton kernels compiled without a GPU: full blocks load and store 16 bytes at a time, and nothing is atomic."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).parent / "triton_compile.py"
# kernel, rows, dtype, flags; triton_compile.py says what they mean. Rows of 16-byte and of 8-byte loads in a full block.
CASES = {
    "gram,2,fp32": (2, 0),
    "gram,2,bf16": (2, 0),
    "gram,9,fp32": (9, 0),
    "gram,9,bf16,row_only": (9, 0),
    "gram,2,fp32,base": (3, 0),
    "gram,2,fp32,parts": (2, 0),
    "gram,3,fp32,fp8,base,parts": (2, 2),
    "gram,2,bf16,fp8,sm80": (1, 1),
    "combine,2,fp32": (2, 0),
    "combine,2,bf16": (2, 0),
    "combine,9,bf16": (9, 0),
    "combine,2,bf16,base": (3, 0),
    "combine,2,fp32,parts": (2, 0),
    "combine,3,fp32,fp8,base,parts": (2, 2),
    "combine,2,bf16,fp8,sm80": (1, 1),
}
# Compiled, and nothing more asked of them than to have no atomics.
OTHERS = [
    "gram,1,fp32",
    "gram,3,fp32,strided,fp8,base,parts",
    "gram,9,bf16,strided,row_only",
    "combine,3,bf16,strided,fp8,base,parts",
    "finish,2,fp32,conflict",
    "finish,2,fp32,row_only,known,mix",
    "finish,9,fp32,row_only,known",
    "finish,9,fp32",
    "weights_one,2,fp32,conflict",
    "weights_many,9,fp32,conflict",
    "weights_many,65,fp32,conflict",
]


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """PTX of every case, from a process of its own: in this one triton is an interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    cases = [*CASES, *OTHERS]
    done = subprocess.run(
        [sys.executable, str(COMPILE), str(folder), *cases],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {case: (folder / f"{case}.ptx").read_text() for case in cases}


@pytest.mark.parametrize("case", CASES)
def test_full_blocks_move_16_bytes_at_a_time(listings, case):
    """A program's 256 threads have 8 elements each: 8 bytes of a float8 row, 16 or more of any other."""
    wide, codes = CASES[case]
    ptx = listings[case]
    per_row = 2 if "fp32" in case else 1
    loads = re.findall(r"ld\.global\S*", ptx)
    assert sum("v4.b32" in load or "v8.b16" in load for load in loads) == wide * per_row, sorted(set(loads))
    assert sum("v2.b32" in load for load in loads) == codes
    if case.startswith("combine"):
        stores = re.findall(r"st\.global\S*", ptx)
        assert sum("v4.b32" in store or "v8.b16" in store for store in stores) == per_row, sorted(set(stores))


def test_a_scale_is_loaded_once_for_8_elements(listings):
    """Not once an element: that would be more loads than the row itself takes."""
    rows = re.findall(r"ld\.global\.b32", listings["gram,2,bf16,fp8,sm80"])
    assert len(rows) == 8 + 1  # the masked block's own, and one in a full block


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_no_atomics(listings, case):
    """Sums are in fixed order: an atomic on a value would make them depend on timing."""
    assert not re.search(r"\b(atom|red)\.", listings[case])
