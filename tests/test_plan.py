"""Compiles and runs the unit tests of the pure host code, under AddressSanitizer and UBSan."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_plan(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-array-bounds"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    binary = tmp_path / "test_plan"
    source = ROOT / "tests" / "native" / "test_plan.cpp"
    subprocess.run([compiler, *flags, *sanitizers, f"-I{ROOT / 'csrc'}", str(source), "-o", str(binary)], check=True)
    done = subprocess.run([str(binary)], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "checks passed" in done.stdout, done.stdout + done.stderr
