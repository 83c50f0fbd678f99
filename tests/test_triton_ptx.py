"""What the Triton backend launches, compiled without a GPU for sm_90 and sm_80 with the Triton that is installed. With
every Triton and in every form: triton_versions.py.

Full chunks move 16 bytes at a time, sums stay in their threads until all rows are read, registers suffice, nothing is
atomic; ``pin_`` multiplies on tensor cores.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import triton_versions

COMPILE = Path(__file__).parent / "triton_compile.py"
# op,rows,dtype,flags (triton_compile.py says what they mean).
CASES = [
    "project_,2,fp32", "project_,2,bf16,conflict,sm80", "project_,2,fp32,mixed,gram_dd,mix", "project_,9,fp32,conflict",
    "project_,9,bf16,gram_dd", "project_,3,bf16,strided", "combine_,33,bf16", "gram,1,fp64", "gram,12,fp32",
    "weights,2,fp64,conflict", "weights,65,fp64,conflict", "pin_,64,fp32", "pin_,64,bf16", "pin_,64,fp32,sm80",
    "pin_,64,bf16,sm80", "pin_,128,fp32", "pin_,64,bf16,transposed",
]  # fmt: skip
# What of these moves 16 bytes at a time in a full chunk: its loads and stores.
WIDE = {
    "project_,2,fp32,gram_kernel": (2, 0),
    "project_,2,fp32,combine_kernel": (2, 1),
    "project_,2,bf16,conflict,sm80,gram_kernel": (2, 0),
    "project_,2,bf16,conflict,sm80,combine_kernel": (2, 1),
    "project_,2,fp32,mixed,gram_dd,mix,gram_kernel": (3, 0),  # 16 bytes of a bfloat16 row go with 32 of a float32 row
    "project_,2,fp32,mixed,gram_dd,mix,combine_kernel": (3, 2),
    "project_,9,fp32,conflict,gram_kernel": (9, 0),
    "project_,9,bf16,gram_dd,gram_kernel": (9, 0),
    "project_,9,bf16,gram_dd,combine_kernel": (9, 1),
    "gram,12,fp32,gram_kernel": (8, 0),
    "combine_,33,bf16,combine_kernel": (33, 1),
}


class Built(NamedTuple):
    """What the compiler made of a kernel."""

    ptx: str
    usage: str


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Every kernel that the cases launch, from processes of their own: in this one triton is an interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("ptx")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    commands = [[sys.executable, str(COMPILE), str(folder), *CASES[k::2]] for k in range(2)]
    running = [subprocess.Popen(command, **settings) for command in commands]
    for process in running:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    return {p.stem: Built(p.read_text(), p.with_suffix(".usage").read_text()) for p in folder.glob("*.ptx")}


@pytest.mark.parametrize("name", WIDE)
def test_full_chunks_move_16_bytes_at_a_time(built, name):
    wide = r"\.global\S*(?:v4\.b32|v8\.b16)"
    found = (len(re.findall("ld" + wide, built[name].ptx)), len(re.findall("st" + wide, built[name].ptx)))
    assert found == WIDE[name]


@pytest.mark.parametrize("name", [name for name in WIDE if name.endswith("gram_kernel")])
def test_sums_stay_in_their_threads_until_all_rows_are_read(built, name):
    """A barrier for every pair of rows and chunk took most of the time with 9 rows."""
    *_, last_read = re.finditer(r"ld\.global", built[name].ptx)
    first_exchange = re.search(r"bar\.sync|shfl", built[name].ptx)
    assert first_exchange.start() > last_read.start()


@pytest.mark.parametrize("name", WIDE)
def test_registers_suffice(built, name):
    """For two programs on a multiprocessor, whatever the number of rows."""
    assert int(re.search(r"STACK:(\d+)", built[name].usage)[1]) <= 32, built[name].usage
    registers, threads = re.search(r"REG:(\d+)", built[name].usage), re.search(r"\.reqntid (\d+)", built[name].ptx)
    assert 2 * int(registers[1]) * int(threads[1]) <= 1 << 16, built[name].usage


@pytest.mark.parametrize("name", [name for name in WIDE if "bf16" in name and name.endswith("combine_kernel")])
def test_bfloat16_is_rounded_by_hardware(built, name):
    assert "cvt.rn.bf16x2.f32" in built[name].ptx


PINS = [f"{case},pin_kernel" for case in CASES if case.startswith("pin_")]


@pytest.mark.parametrize("name", PINS)
def test_pin_multiplies_on_tensor_cores(built, name):
    instruction = "mma.sync" if "sm80" in name else "wgmma.mma_async"
    numbers = "bf16.bf16" if "bf16" in name else "tf32.tf32"
    assert re.search(rf"{instruction}\S*f32\.{numbers}", built[name].ptx)


@pytest.mark.parametrize("name", PINS)
def test_pin_moves_weight_and_basis_16_bytes_at_a_time(built, name):
    """Ahead of use, past the registers."""
    loads = re.findall(r"cp\.async\.\S*global[^;]*?\], (0x\w+)", built[name].ptx)
    assert loads and set(loads) == {"0x10"}
    stores = re.findall(r"st\.global\S*", built[name].ptx)
    narrow = [s for s in stores if ".v4.b32" not in s]
    assert len(narrow) == 2 and len(stores) > 2  # the bias, which is a column, and |W U - B|^2


@pytest.mark.parametrize("name", PINS)
def test_pin_keeps_everything_in_registers(built, name):
    assert "STACK:0" in built[name].usage and "local" not in built[name].ptx


def test_cases_are_among_those_of_all_versions():
    """What is tested here is compiled with every Triton."""
    assert set(CASES) <= set(triton_versions.CASES)


def test_every_form_of_a_pin_is_compiled():
    cases = [case.split(",") for case in triton_versions.pin_cases()]
    assert len({(*case[1:3], *sorted(case[3:])) for case in cases}) == len(cases) == 2 * 3 * 5 * 3


def test_no_atomics(built):
    """Sums are in fixed order: an atomic on a value would make them depend on timing."""
    kernels = {name.split(",")[-1] for name in built}
    walking = {"gram_kernel", "gram_finish_kernel", "combine_kernel", "weights_kernel"}
    assert kernels == walking | {"pin_kernel", "pin_finish_kernel"}
    assert not [name for name, kernel in built.items() if re.search(r"\b(atom|red)\.", kernel.ptx)]
