"""The GPU gate's build, with a compiler that only makes files: what is under test is where they go."""

import shutil
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
