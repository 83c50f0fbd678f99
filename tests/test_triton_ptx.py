"""The Triton kernels compiled for sm_90 without a GPU: full blocks load and store 16 bytes at a time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = Path(__file__).parent / "triton_compile.py"
# (kernel, rows, dtype, row_only)
CASES = [
    ("gram", 2, "fp32", False),
    ("gram", 2, "bf16", False),
    ("gram", 9, "fp32", False),
    ("gram", 9, "bf16", True),
    ("combine", 2, "fp32", False),
    ("combine", 2, "bf16", False),
    ("combine", 9, "bf16", False),
]
# Compiled, and nothing more asked of them.
OTHERS = [
    ("gram", 1, "fp32", False),
    ("gram_strided", 2, "fp32", False),
    ("gram_strided", 9, "bf16", True),
    ("gram_finish", 2, "fp32", False),
    ("gram_finish", 9, "fp32", True),
    ("combine_strided", 2, "bf16", False),
    ("weights_one", 2, "fp32", False),
    ("weights_many", 9, "fp32", False),
    ("weights_many", 65, "fp32", False),
]


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    """PTX of every case, from a process of its own: in this one triton is an interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    arguments = [",".join(map(str, case)) for case in CASES + OTHERS]
    command = [sys.executable, str(COMPILE), str(folder), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {case: (folder / f"{name}.ptx").read_text() for case, name in zip(CASES + OTHERS, arguments, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_blocks_move_16_bytes_at_a_time(listings, case):
    kernel, rows, _dtype, _row_only = case
    ptx = listings[case]
    wide = re.compile(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v8\.b16|ld\.global\S*\.v2\.b64")
    assert len(wide.findall(ptx)) >= rows, (case, sorted(set(re.findall(r"ld\.global\S*", ptx))))
    if kernel == "combine":
        assert re.search(r"st\.global\S*\.v4\.b32|st\.global\S*\.v8\.b16|st\.global\S*\.v2\.b64", ptx), case


@pytest.mark.parametrize("case", CASES + OTHERS, ids=str)
def test_no_atomics(listings, case):
    """Sums are in fixed order: an atomic on a value would make them depend on timing."""
    assert not re.search(r"\b(atom|red)\.", listings[case])
