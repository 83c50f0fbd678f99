"""What a figure needs beside it. Imports nothing of gradproj and never raises: no table is lost for want of its header.

`python benchmarks/machine.py cuda` is the GPU gate's first stage.
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gpu_stages import tell

PACKAGES = ("triton", "numpy", "setuptools", "pytest", "pytest-xdist", "hypothesis")
TOOLS = ("nvcc", "g++", "compute-sanitizer")


def machine(device: str = "cpu") -> dict[str, str]:
    return {
        "machine": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """GRADPROJ_COMMIT, for a copy of the checkout without its history; else what git says."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return os.environ.get("GRADPROJ_COMMIT") or found or "unknown"


def equipment(device: str) -> dict[str, str]:
    """What a stage of the gate may lack, known before it fails."""
    found = {tool: shutil.which(tool) or "missing" for tool in TOOLS} | dict.fromkeys(PACKAGES, "missing")
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = str(torch.version.cuda)
    return found


def main(device: str) -> int:
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device; run this on a machine with one, or try --device cpu --quick")
        return 2
    tell(machine={**machine(device), **equipment(device)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
