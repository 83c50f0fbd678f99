"""The CPU sources compiled for another processor: nothing in them is tied to x86."""

import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
CROSS = "aarch64-linux-gnu-g++"
ELF_AARCH64 = 183


def test_builds_for_aarch64(tmp_path):
    if shutil.which(CROSS) is None:
        pytest.skip(f"no {CROSS} (on Debian: apt-get install g++-aarch64-linux-gnu)")
    flags = ["-std=c++20", "-O3", "-Wall", "-Werror", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-isystem{path}" for path in include_paths()]

    def build(source: Path) -> Path:
        target = tmp_path / (source.stem + ".o")
        done = subprocess.run(
            [CROSS, *flags, "-c", str(source), "-o", str(target)], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))))
    library = tmp_path / "_cpu.so"
    subprocess.run([CROSS, "-shared", *map(str, objects), "-o", str(library)], check=True)
    machine = struct.unpack_from("<H", library.read_bytes(), 18)[0]
    assert machine == ELF_AARCH64
