"""The CUDA sources compiled for three architectures, without a GPU: no warning, no spill, registers within their budget, and
16-byte accesses in the machine code."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{source name: (object file, ptxas' report)}."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile the CUDA sources with")
    folder = tmp_path_factory.mktemp("cuda")
    flags = ["-std=c++20", "-O3", "-Xptxas=-v", "-Werror=all-warnings", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-isystem={p}" for p in include_paths())]
    flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]

    def build(source):
        target = folder / (source.stem + ".o")
        command = ["nvcc", *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return source.stem, (target, done.stdout + done.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, SOURCES))


def kernels(report):
    return [match.groupdict() for match in ENTRY.finditer(report)]


@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_no_spills_and_no_stack(compiled, source):
    found = kernels(compiled[source][1])
    assert {k["arch"] for k in found} == set(ARCHITECTURES)
    for k in found:
        assert (k["stack"], k["stores"], k["loads"]) == ("0", "0", "0"), k


def registers(compiled, source, *parts):
    found = [k for k in kernels(compiled[source][1]) if all(p in k["name"] for p in parts)]
    assert found, parts
    return max(int(k["registers"]) for k in found)


@pytest.mark.parametrize("rows", ["IfLi4EEE", "INS0_4BF16ELi8EEE", "INS0_3F16ELi8EEE"])
def test_registers_of_the_streaming_kernels(compiled, rows):
    """Half occupancy is 64 registers (1,024 of 2,048 threads), on every architecture and in every type."""
    assert registers(compiled, "gram", f"gram_denseIfNS0_7Uniform{rows}Li2E") <= 64
    assert registers(compiled, "combine", f"combine_denseIfNS0_7Uniform{rows}") <= 64


def disassembler():
    on_path = shutil.which("cuobjdump")
    if on_path:
        return on_path
    triton = pytest.importorskip("triton", reason="no cuobjdump: neither on PATH nor with triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not bundled.exists():
        pytest.skip("no cuobjdump: neither on PATH nor with triton")
    return str(bundled)


def dense_functions(compiled, source):
    """(name, machine code) of every dense instance for rows of one type."""
    command = [disassembler(), "-sass", "-arch", "sm_90", str(compiled[source][0])]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = [f.split("\n", 1) for f in re.split(r"\n\s*Function : ", listing)[1:]]
    found = [(name, code) for name, code in functions if "_dense" in name and "Uniform" in name]
    assert len(found) >= 8
    return found


@pytest.mark.parametrize(("source", "stores"), [("gram", False), ("combine", True)])
def test_machine_code_moves_16_bytes_at_a_time(compiled, source, stores):
    """Every dense instance for rows of one type has 16-byte loads (gram: 8 at nine rows of a 2-byte type)."""
    for name, code in dense_functions(compiled, source):
        assert re.search(r"LDG\.E(\.64|\.128)" if "F16ELi4E" in name else r"LDG\.E\.128", code), name
        if stores:
            assert re.search(r"STG\.E\.128", code), name


def loads_in_flight(code):
    """How many 16-byte loads follow one another, here and there in a function, with nothing between them that could wait for
    the first: no branch, no arithmetic on floats, no conversion, no store."""
    waits = re.compile(r"F(FMA|MUL|ADD)|D(FMA|MUL|ADD)|H(ADD2|FMA2|MUL2)|PRMT|BRA|STG|IMAD\.U32")
    runs = [0]
    for opcode in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", code):
        if opcode.startswith("LDG.E.128"):
            runs[-1] += 1
        elif waits.match(opcode):
            runs.append(0)
    return runs


@pytest.mark.parametrize("source", ["gram", "combine"])
def test_four_loads_are_in_flight_at_k_1(compiled, source):
    streaming = [f for f in dense_functions(compiled, source) if source == "combine" or "ELi2ELb0E" in f[0]]
    assert len(streaming) >= 8
    for name, code in streaming:
        assert max(loads_in_flight(code)) >= 4, name


def test_combine_loads_a_group_of_rows_before_it_waits(compiled):
    """Beside what K = 1 has of its own: groups of 4 and of 3 rows, as which any larger number is taken."""
    for name, code in dense_functions(compiled, "combine"):
        assert {3, 4} <= set(loads_in_flight(code)), name


def test_links_against_the_stable_abi_only(compiled, tmp_path):
    """All torch symbols that the objects need are C shims: no C++ symbol of a torch version."""
    objects = [str(obj) for obj, _ in compiled.values()]
    listing = subprocess.run(
        ["nm", "--undefined-only", "-C", *objects], check=True, capture_output=True, text=True
    ).stdout
    assert "aoti_torch_get_current_cuda_stream" in listing
    foreign = [
        line for line in listing.splitlines() if re.search(r"\b(at|c10|torch)::", line) and "torch::stable" not in line
    ]
    assert not foreign, foreign[:5]
    assert torch.__version__
