"""The GPU gate's build: the native kernels, and the package around them, for which build/gpu_gate/site on PYTHONPATH is
enough.

    build/gpu_gate/KEY/lib        the libraries. KEY is a hash of what they are made of: a second call finds them.
    build/gpu_gate/site           the Python sources as they are now, and those libraries.
    build/gpu_gate/triton-cache   the Triton kernels that the gate launches, compiled without a GPU by gpu_compile.py.
    build/gpu_gate/triton         what the gate uses: those, and what is compiled there beyond them.

Nothing else is written, and nothing is installed. setup.py runs on a copy of the sources without pyproject.toml, whose
licence field needs setuptools >= 77. `python benchmarks/gpu_build.py --device cuda --arch 9.0` needs nvcc but no GPU:
build/gpu_gate can be taken along. The libraries are found on a machine with the same version of torch, Triton's kernels
on one with the same Triton, from the same package, and the same minor version of Python.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_stages import ROOT, SITE, WORK

HERE = Path(__file__).resolve().parent
MADE, TRITON = WORK / "triton-cache", WORK / "triton"


def key(device: str, arch: str) -> str:
    digest = hashlib.sha256()
    torch_version = importlib.metadata.version("torch").split("+")[0]
    digest.update(f"{device} {arch} {torch_version} {platform.machine()}".encode())
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()) + [ROOT / "setup.py"]:
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(device: str, arch: str) -> list[Path]:
    """The libraries, found or made."""
    folder = WORK / key(device, arch)
    done, source, unfinished = folder / "lib", folder / "source", folder / "unfinished"
    if done.exists():
        print(f"found: {done}")
        return sorted(done.rglob("*.so"))
    for left in (source, unfinished):  # of a build that was cut off
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "setup.py", source)
    environment = {**os.environ, "GRADPROJ_NATIVE": "1", "GRADPROJ_CUDA": "1" if device == "cuda" else "0"}
    if device == "cuda":
        environment["TORCH_CUDA_ARCH_LIST"] = arch
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", unfinished, "--build-temp", folder / "objects"]
    subprocess.run(command, cwd=source, env=environment, check=True)
    unfinished.rename(done)  # only now: a build that was cut off is not found
    return sorted(done.rglob("*.so"))


def copy_package() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    package = SITE / "gradproj"
    without = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
    shutil.copytree(ROOT / "python" / "gradproj", package, ignore=without)
    shutil.copytree(ROOT / "triton_kernels", package / "triton_kernels", ignore=without)


def compile_triton(arch: str) -> int:
    if not importlib.util.find_spec("triton"):
        print("triton is not installed: its kernels will be compiled when they are launched")
        return 0
    environment = {**os.environ, "TRITON_CACHE_DIR": str(MADE), "TRITON_STORE_BINARY_ONLY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, HERE / "gpu_compile.py", arch], check=False, env=environment).returncode


def take_triton() -> None:
    """Copies what was compiled beforehand. Triton writes down where a kernel's files lie, so a copy has to be told
    anew."""
    for kernel in MADE.iterdir() if MADE.exists() else ():
        done, unfinished = TRITON / kernel.name, TRITON / f"{kernel.name}.unfinished"
        if done.exists():
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(kernel, unfinished)
        for group in unfinished.glob("__grp__*"):
            names = json.loads(group.read_text())["child_paths"]
            group.write_text(json.dumps({"child_paths": {name: str(done / name) for name in names}}))
        unfinished.rename(done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--arch", default="", help="compute capability, such as 9.0")
    parser.add_argument("--library", type=Path, action="append", help="take this one instead of building")
    parser.add_argument("--package", action="store_true", help="nothing is built: Triton and plain torch need no more")
    parser.add_argument("--no-triton", action="store_true", help="take the Triton kernels that there are, compile none")
    options = parser.parse_args()
    if options.device == "cuda" and not (options.arch or options.package):
        parser.error("--device cuda needs --arch")
    for library in options.library or ():
        if not library.name.startswith(("_cpu", "_cuda")) or not library.exists():
            parser.error(f"--library: {library} is no file named _cpu.so or _cuda.so")
    copy_package()  # first: Triton and plain torch need no libraries and run even if the build fails
    if options.no_triton or options.package:
        take_triton()
    if options.package:
        return 0
    if not options.library and not importlib.util.find_spec("setuptools"):
        print("setuptools is not installed: setup.py needs it to build the kernels")
        return 1
    try:
        libraries = options.library or build(options.device, options.arch)
    except subprocess.CalledProcessError as error:
        print(f"setup.py failed: exit code {error.returncode}")
        return 1
    for library in libraries:
        print(f"taken: {shutil.copy(library, SITE / 'gradproj')}")
    return 0 if options.no_triton or options.device == "cpu" else compile_triton(options.arch)


if __name__ == "__main__":
    sys.exit(main())
