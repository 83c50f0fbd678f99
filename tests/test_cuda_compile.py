"""The CUDA sources compiled for three architectures, without a GPU: no warning, no spill, registers within their
budget, and 16-byte accesses in the machine code."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
SOURCES = ("gram", "combine", "ops", "weights", "project")  # the longest first
ARCHITECTURES = ("80", "90", "100")
# As mangled: what row 0 and the other rows store. Two rows of doubles take more registers.
PAIRS = ("Iff", "I6__halfS2_", "I13__nv_bfloat16S2_", "If6__half", "If13__nv_bfloat16", "Idd")
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

    def build(name):
        target = folder / f"{name}.o"
        command = ["nvcc", *flags, "-c", str(ROOT / "csrc" / "cuda" / f"{name}.cu"), "-o", str(target)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return name, (target, done.stdout + done.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, SOURCES))


def kernels(compiled, source, *parts):
    """The reports of all kernels whose names contain ``parts``, of every architecture."""
    found = [match.groupdict() for match in ENTRY.finditer(compiled[source][1])]
    found = [k for k in found if all(p in k["name"] for p in parts)]
    assert {k["arch"] for k in found} == set(ARCHITECTURES), parts
    return found


def test_every_source_is_compiled(compiled):
    assert {s.stem for s in (ROOT / "csrc" / "cuda").glob("*.cu")} == set(compiled)


@pytest.mark.parametrize("source", ["gram", "combine", "weights"])
def test_no_spills_and_no_stack(compiled, source):
    for k in kernels(compiled, source):
        assert (k["stack"], k["stores"], k["loads"]) == ("0", "0", "0"), k


@pytest.mark.parametrize("pair", PAIRS)
def test_registers_of_the_streaming_kernels(compiled, pair):
    """Half occupancy is 64 registers (1,024 of 2,048 threads), on every architecture and in every type but double."""
    most = 80 if pair == "Idd" else 64
    for k in kernels(compiled, "gram", f"gram_dense{pair}Li2E") + kernels(compiled, "combine", f"combine_dense{pair}"):
        assert int(k["registers"]) <= most, k


def test_instances_stay_few(compiled):
    """Each costs build time and size, and has to earn both: a pair of types and a number of rows, nothing else."""
    dense = kernels(compiled, "gram", "gram_dense") + kernels(compiled, "combine", "combine_dense")
    assert len(dense) == len(ARCHITECTURES) * (4 * len(PAIRS) - 1 + len(PAIRS))
    assert sum(len(kernels(compiled, source)) for source in ("gram", "combine", "weights")) <= len(ARCHITECTURES) * 36


def disassembler():
    on_path = shutil.which("cuobjdump")
    if on_path:
        return on_path
    triton = pytest.importorskip("triton", reason="no cuobjdump: neither on PATH nor with triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not bundled.exists():
        pytest.skip("no cuobjdump: neither on PATH nor with triton")
    return str(bundled)


@pytest.fixture(scope="module")
def machine_code(compiled):
    """{source name: {kernel name: code for sm_90}} of the dense instances."""

    def disassemble(source):
        command = [disassembler(), "-sass", "-arch", "sm_90", str(compiled[source][0])]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        functions = dict(f.split("\n", 1) for f in re.split(r"\n\s*Function : ", listing)[1:])
        dense = {name: code for name, code in functions.items() if "_dense" in name}
        assert len(dense) >= len(PAIRS)
        return dense

    return {source: disassemble(source) for source in ("gram", "combine")}


def test_machine_code_moves_16_bytes_at_a_time(machine_code):
    """And none of unknown kind of memory."""
    for name, code in [*machine_code["gram"].items(), *machine_code["combine"].items()]:
        assert re.search(r"LDG\.E\.128", code), name
        assert not re.search(r"\bLD\.E\.128", code), name
    for name, code in machine_code["combine"].items():
        assert re.search(r"STG\.E\.128", code), name


def test_combine_starts_while_gram_ends_and_waits_for_it(machine_code):
    """Programmatic dependent launch. Nothing is read from global memory before the wait."""
    assert all("PREEXIT" in code for code in machine_code["gram"].values())
    for name, code in machine_code["combine"].items():
        assert 0 <= code.find("ACQBULK") < code.find("LDG"), name


def loads_in_flight(code):
    """How many vector loads follow one another, here and there in a function, with nothing between them that could wait
    for the first: no branch, no arithmetic on floats, no conversion, no store."""
    waits = re.compile(r"F(FMA|MUL|ADD)|D(FMA|MUL|ADD)|H(ADD2|FMA2|MUL2)|PRMT|BRA|STG|IMAD\.U32")
    runs = [0]
    for opcode in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", code):
        if opcode.startswith(("LDG.E.128", "LDG.E.64")):
            runs[-1] += 1
        elif waits.match(opcode):
            runs.append(0)
    return runs


def test_four_loads_are_in_flight_at_k_1(machine_code):
    streaming = [f for f in machine_code["gram"].items() if "Li2ELb0E" in f[0]] + [*machine_code["combine"].items()]
    assert len(streaming) == 2 * len(PAIRS)
    for name, code in streaming:
        assert max(loads_in_flight(code)) >= 4, name


def test_combine_loads_a_group_of_rows_before_it_waits(machine_code):
    """Groups of 4, and of the 1 to 3 rows that are left."""
    for name, code in machine_code["combine"].items():
        assert {2, 3, 4} <= set(loads_in_flight(code)), name


def test_links_against_the_stable_abi_only(compiled):
    """All torch symbols that the objects need are C shims: no C++ symbol of a torch version."""
    objects = [str(obj) for obj, _ in compiled.values()]
    command = ["nm", "--undefined-only", "-C", *objects]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in listing
    of_torch = [line for line in listing.splitlines() if re.search(r"\b(at|c10|torch)::", line)]
    foreign = [line for line in of_torch if "torch::stable" not in line]
    assert not foreign, foreign[:5]
