"""Builds the native kernels; everything else is in pyproject.toml.

GRADPROJ_NATIVE=0   no native kernels at all
GRADPROJ_CUDA=1     the CUDA kernels too, with nvcc (CUDA_HOME, else the one on PATH); architectures from
                    TORCH_CUDA_ARCH_LIST, else those of the GPUs that are there
Torch must be installed already: pip install --no-build-isolation .
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
NATIVE = os.environ.get("GRADPROJ_NATIVE", "1") != "0"
CUDA = os.environ.get("GRADPROJ_CUDA", "0") == "1"
# The stable ABI of torch 2.10: one build runs on every later torch.
DEFINES = [("TORCH_TARGET_VERSION", "0x020a000000000000")]


def torch_paths():
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError as error:
        raise SystemExit(
            "gradproj: building the native kernels needs the torch they will run with. Install torch first, then:\n"
            "    pip install --no-build-isolation .\n"
            "or go without native kernels:\n"
            "    GRADPROJ_NATIVE=0 pip install ."
        ) from error
    return [path for path in include_paths() if os.path.isdir(path)], str(Path(torch.__file__).parent / "lib")


def sources(folder, *suffixes):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes)


def headers():
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh"))


def nvcc_path():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not os.path.exists(nvcc):
        raise SystemExit(
            "gradproj: GRADPROJ_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME; or unset GRADPROJ_CUDA"
        )
    return nvcc


def toolkit(nvcc):
    """The CUDA toolkit's folder, from nvcc itself: the one on PATH may be a wrapper that lies elsewhere."""
    done = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True)
    return next(line.split("TOP=", 1)[1].strip() for line in done.stderr.splitlines() if "TOP=" in line)


def architectures():
    """nvcc's -gencode flags: machine code for each architecture, and PTX where it ends in +PTX."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        import torch

        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(capabilities)]
    if not wanted:
        raise SystemExit(
            "gradproj: GRADPROJ_CUDA=1, but there is no GPU to build for. Name the architectures, for example:\n"
            '    TORCH_CUDA_ARCH_LIST="8.0 9.0" GRADPROJ_CUDA=1 pip install --no-build-isolation .'
        )
    flags = []
    for arch in wanted:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildExt(build_ext):
    """setuptools' build_ext, taught .cu files, and to name the library without a Python version: it has no Python in it."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self):
        if self.parallel is None:
            self.parallel = os.cpu_count()
        self.compiler.src_extensions.append(".cu")
        compile_host = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
            if ext != ".cu":
                return compile_host(obj, src, ext, cc_args, extra_postargs, pp_opts)
            self.spawn([nvcc_path(), "-c", src, "-o", obj, *pp_opts, *extra_postargs["nvcc"]])

        def compile_dispatch(obj, src, ext, cc_args, extra_postargs, pp_opts):
            host = extra_postargs["host"] if isinstance(extra_postargs, dict) else extra_postargs
            compile_one(obj, src, ext, cc_args, extra_postargs if ext == ".cu" else host, pp_opts)

        self.compiler._compile = compile_dispatch
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f"gradproj: the native kernels did not build: {error}\n"
                "They need a C++20 compiler (g++ >= 11 or clang >= 14; on Debian: apt-get install g++). Without them:\n"
                "    GRADPROJ_NATIVE=0 pip install --no-build-isolation ."
            ) from error


def extensions():
    if not NATIVE:
        if CUDA:
            raise SystemExit("gradproj: GRADPROJ_CUDA=1 contradicts GRADPROJ_NATIVE=0: unset one of them")
        return []
    include, lib = torch_paths()
    host = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall"]
    common = {
        "include_dirs": include,
        "library_dirs": [lib],
        "libraries": ["torch", "torch_cpu", "c10"],
        "define_macros": DEFINES,
        "depends": headers(),
        "language": "c++",
    }
    found = [Extension("gradproj._cpu", sources("cpu", ".cpp"), extra_compile_args=host, **common)]
    if CUDA:
        root = toolkit(nvcc_path())
        nvcc = ["-std=c++20", "-O3", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden", *architectures()]
        common |= {"define_macros": [*DEFINES, ("USE_CUDA", "1")], "include_dirs": [*include, f"{root}/include"]}
        common["library_dirs"] = [lib, *(f"{root}/{name}" for name in ("lib64", "lib", "targets/x86_64-linux/lib"))]
        common["libraries"] = ["torch", "torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"]
        found.append(
            Extension(
                "gradproj._cuda",
                sources("cuda", ".cpp", ".cu"),
                extra_compile_args={"host": host, "nvcc": nvcc},
                **common,
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
