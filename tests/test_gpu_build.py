"""The GPU gate's build, with a compiler that only makes files: what is under test is where they go."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_build

COMPILER = """#!/bin/sh
echo "$@" >> "$COMPILER_LOG"
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_build, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_build, "MADE", tmp_path / "work" / "triton-cache")
    monkeypatch.setattr(gpu_build, "TRITON", tmp_path / "work" / "triton")
    monkeypatch.setattr(sys, "argv", ["gpu_build.py", "--device", "cpu"])
    return tmp_path


def test_the_build_goes_through_setup_py_and_is_found_again(work, monkeypatch):
    """Without pip, and without a pyproject.toml that an older setuptools cannot read."""
    compiler, log = work / "compiler", work / "log"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    for name, value in {"CC": compiler, "CXX": compiler, "COMPILER_LOG": log, "GRADPROJ_CUDA": "1"}.items():
        monkeypatch.setenv(name, str(value))
    assert gpu_build.main() == 0
    assert "gram.cpp" in log.read_text() and ".cu " not in log.read_text()
    (found,) = work.glob("work/*/lib/gradproj/_cpu.so")
    assert (work / "site" / "gradproj" / "_cpu.so").exists() and not list(work.rglob("pyproject.toml"))
    assert (work / "site" / "gradproj" / "triton_kernels" / "gram.py").exists()
    log.unlink()
    assert gpu_build.main() == 0 and not log.exists()
    found.parent.parent.rename(found.parent.parent.with_name("unfinished"))  # as a build that was cut off leaves it
    assert gpu_build.main() == 0 and log.exists()


def test_without_a_build_the_rest_is_there(work, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert gpu_build.main() == 1
    assert "setup.py failed" in capfd.readouterr().out
    assert (work / "site" / "gradproj" / "__init__.py").exists() and not list(work.rglob("*.so"))


def test_a_library_of_ones_own(work, monkeypatch):
    library = work / "_cpu.so"
    library.write_text("a library")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--library", str(library)])
    assert gpu_build.main() == 0
    assert (work / "site" / "gradproj" / "_cpu.so").read_text() == "a library"
    library.rename(work / "cpu.so")
    for name in ("cpu.so", "_cpu.so"):  # would not be found, is not there
        monkeypatch.setattr(sys, "argv", ["gpu_build.py", "--device", "cpu", "--library", str(work / name)])
        with pytest.raises(SystemExit):
            gpu_build.main()


def test_the_key_is_of_all_that_a_library_is_made_of(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    here = gpu_build.key("cpu", "")
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    keys = [gpu_build.key("cpu", ""), gpu_build.key("cuda", "9.0"), gpu_build.key("cuda", "8.0")]
    assert keys[0] == here
    for path in (tmp_path / "csrc" / "plan.h", tmp_path / "setup.py"):
        path.write_text(path.read_text() + " ")
        keys.append(gpu_build.key("cpu", ""))
    monkeypatch.setattr(gpu_build.importlib.metadata, "version", lambda name: "9.9")
    keys.append(gpu_build.key("cpu", ""))
    assert len(set(keys)) == 6


COMPILE = [sys.executable, str(ROOT / "benchmarks" / "gpu_compile.py"), "9.0", "124M bf16"]


def compile_into(folder):
    """In a process of its own, as on another day: what it said of the kernels."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(COMPILE, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_finds_what_was_compiled_without_a_gpu(work, monkeypatch):
    """Triton looks for a kernel's files where they were written, so that a cache which was taken along was compiled
    anew."""
    pytest.importorskip("triton")
    assert "3 kernels compiled, 0 found" in compile_into(gpu_build.MADE)
    (work / "work").rename(work / "moved")
    monkeypatch.setattr(gpu_build, "MADE", work / "moved" / "triton-cache")
    monkeypatch.setattr(gpu_build, "TRITON", work / "moved" / "triton")
    unfinished = gpu_build.TRITON / f"{next(gpu_build.MADE.iterdir()).name}.unfinished"
    unfinished.mkdir(parents=True)  # as a copy that was cut off leaves it
    gpu_build.take_triton()
    gpu_build.take_triton()  # of a second call
    shutil.rmtree(gpu_build.MADE)
    files = sorted(gpu_build.TRITON.rglob("*"))
    assert "0 kernels compiled, 3 found" in compile_into(gpu_build.TRITON)
    assert sorted(gpu_build.TRITON.rglob("*")) == files


@pytest.mark.parametrize(("arguments", "compiled"), [([], ["9.0"]), (["--no-triton"], [])])
def test_triton_is_compiled_beforehand_and_not_on_the_gpu(work, monkeypatch, arguments, compiled):
    library = work / "_cuda.so"
    library.touch()
    monkeypatch.setattr(sys, "argv", ["gpu_build.py", "--arch", "9.0", "--library", str(library), *arguments])
    asked = []
    monkeypatch.setattr(gpu_build, "compile_triton", lambda arch: asked.append(arch) or 0)
    assert gpu_build.main() == 0 and asked == compiled
