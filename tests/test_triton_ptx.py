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

import triton_sass
import triton_versions

COMPILE = Path(__file__).parent / "triton_compile.py"
# op,rows,dtype,flags (triton_compile.py says what they mean).
CASES = [
    "project_,2,fp32", "project_,2,bf16,conflict,sm80", "project_,2,fp32,mixed,gram_dd,mix", "project_,9,fp32,conflict",
    "project_,9,bf16,gram_dd", "project_,3,bf16,strided", "combine_,33,bf16", "gram,1,fp64", "gram,12,fp32",
    "weights,2,fp64,conflict", "weights,65,fp64,conflict", "pin_,64,bf16,pair", "pin_,128,bf16,pair",
    "pin_,256,bf16,pair", "pin_,64,bf16,pair,transposed", "pin_,256,bf16,pair,bias", "pin_,64,bf16,pair,strided",
    "pin_,64,bf16,pair,sm80", "pin_,256,bf16,pair,sm80", "pin_,256,bf16,pair,sm100", "pin_,64,fp32", "pin_,128,fp32",
    "pin_,128,fp32,transposed,bias", "pin_,64,fp32,sm80", "pin_,64,bf16",
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
    code: list[triton_sass.Instruction]


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
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = {}
    for path in folder.glob("*.ptx"):
        code = triton_sass.instructions(cuobjdump, path.with_suffix(".cubin"))
        found[path.stem] = Built(path.read_text(), path.with_suffix(".usage").read_text(), code)
    return found


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


class Most(NamedTuple):
    """Upper bounds of a pin. A warp's instructions in a tile of both loops, W U and the update; barriers and drains of
    tensor cores in both; programs that registers and shared memory let share a multiprocessor: exactly so many."""

    instructions: tuple[int, int]
    barriers: int
    drains: int
    programs: int = 1


PINS = {
    "pin_,64,bf16,pair": Most((145, 225), 6, 2, 2),
    "pin_,128,bf16,pair": Most((175, 250), 6, 2, 2),
    "pin_,256,bf16,pair": Most((225, 290), 6, 2),
    "pin_,64,bf16,pair,transposed": Most((120, 190), 11, 2, 2),
    "pin_,256,bf16,pair,bias": Most((140, 205), 6, 2),
    "pin_,64,bf16,pair,strided": Most((235, 235), 21, 3),
    "pin_,64,bf16,pair,sm80": Most((170, 160), 4, 0, 2),
    "pin_,256,bf16,pair,sm80": Most((275, 165), 4, 0),
    "pin_,256,bf16,pair,sm100": Most((255, 345), 16, 0),
    "pin_,64,fp32": Most((465, 665), 6, 6, 2),
    "pin_,128,fp32": Most((615, 730), 33, 6),
    "pin_,128,fp32,transposed,bias": Most((410, 630), 29, 6),
    "pin_,64,fp32,sm80": Most((225, 500), 4, 0),
    "pin_,64,bf16": Most((510, 600), 6, 6),
}
SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10}  # bytes of a multiprocessor that programs get


def registers_and_bytes(usage):
    registers, static, dynamic = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "SHARED", "BYTES"))
    return -(-registers // 8) * 8, static + dynamic


@pytest.mark.parametrize("name", PINS)
def test_pin_does_no_more_than_it_has_to(built, name):
    """More instructions in the loops, a barrier or a drain more, a spill: each would cost what was gained by splitting
    U beforehand and by two programs on a multiprocessor."""
    found, most = built[f"{name},pin_kernel"], PINS[name]
    loops = triton_sass.loops(found.code)
    assert len(loops) == 2
    assert all(loop["instructions"] <= bound for loop, bound in zip(loops, most.instructions, strict=True)), loops
    assert sum(loop["barriers"] for loop in loops) <= most.barriers, loops
    assert sum(loop["drains"] for loop in loops) <= most.drains, loops
    registers, size = registers_and_bytes(found.usage)
    threads = int(re.search(r"\.reqntid (\d+)", found.ptx)[1])
    architecture = next((a for a in SHARED if a in name.split(",")), "sm90")
    assert min((1 << 16) // (registers * threads), SHARED[architecture] // size) >= most.programs, found.usage


@pytest.mark.parametrize("name", PINS)
def test_pin_keeps_everything_in_registers(built, name):
    """In the loops always; before them all but a bias, whose row of U takes as many registers as half the sums."""
    code = built[f"{name},pin_kernel"].code
    assert not sum(loop["spills"] for loop in triton_sass.loops(code))
    assert "bias" in name or not triton_sass.count(code)["spills"]


@pytest.mark.parametrize("name", PINS)
def test_pin_multiplies_on_tensor_cores(built, name):
    instruction = "mma.sync" if "sm80" in name else "tcgen05.mma" if "sm100" in name else "wgmma.mma_async"
    numbers = "kind::f16" if "sm100" in name else "bf16.bf16" if "pair" in name else "tf32.tf32"
    assert re.search(rf"{instruction}\S*{numbers}", built[f"{name},pin_kernel"].ptx)


@pytest.mark.parametrize("name", [name for name in PINS if "strided" not in name])
def test_pin_moves_weight_and_basis_16_bytes_at_a_time(built, name):
    """Ahead of use, past the registers. 8 bytes of a 16-bit W go with 16 of a float32 U; some of a transposed W are
    read by 4."""
    ptx = built[f"{name},pin_kernel"].ptx
    loads = set(re.findall(r"cp\.async\.\S*global[^;]*?\], (0x\w+)", ptx))
    assert loads - {{"pin_,64,bf16": "0x8"}.get(name, "0x4" if "transposed" in name else "")} == {"0x10"}
    stores = re.findall(r"st\.global\S*", ptx)
    narrow = [s for s in stores if ".v4.b32" not in s]
    assert len(stores) > len(narrow) and (len(narrow) == 1 or "bias" in name)  # |W U - B|^2


def test_cases_are_among_those_of_all_versions():
    """What is tested here is compiled with every Triton."""
    assert set(CASES) <= set(triton_versions.CASES)


def test_every_form_of_a_pin_is_compiled():
    cases = [case.split(",") for case in triton_versions.pin_cases()]
    # Biased or not: three dtypes whose U is float32, of one or two tiles, and pairs of three, in two dense layouts and
    # strided.
    older, newer = (3 * (2 * tiles + 1) + 2 * 3 + 1 for tiles in (1, 2))
    assert len({(*case[1:3], *sorted(case[3:])) for case in cases}) == len(cases) == 2 * (older + 2 * newer)


def test_no_atomics(built):
    """Sums are in fixed order: an atomic on a value would make them depend on timing."""
    kernels = {name.split(",")[-1] for name in built}
    walking = {"gram_kernel", "gram_finish_kernel", "combine_kernel", "weights_kernel"}
    assert kernels == walking | {"pin_kernel", "pin_finish_kernel"}
    assert not [name for name, kernel in built.items() if re.search(r"\b(atom|red)\.", kernel.ptx)]
