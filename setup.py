"""Builds the native kernels; everything else is in pyproject.toml.

GRADPROJ_NATIVE=0   no native kernels at all
GRADPROJ_CUDA=1     the CUDA kernels too, with nvcc (CUDA_HOME, else the one on PATH); architectures from
                    TORCH_CUDA_ARCH_LIST, else those of the GPUs that are there
CXX, CXXFLAGS, LDFLAGS as usual; NVCC_CCBIN is nvcc's own C++ compiler.
Torch must be installed already: pip install --no-build-isolation .
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import setuptools
from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
INSTALL = "pip install --no-build-isolation ."
OR_WITHOUT = "or unset GRADPROJ_CUDA"
HEADERS = (".h", ".cuh")
OLDEST_SETUPTOOLS = (77,)  # reads the licence field of pyproject.toml
OLDEST_TORCH = (2, 10)
OLDEST_NVCC = (12, 8)
# The stable ABI of OLDEST_TORCH: one build runs on every later torch.
DEFINE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG"]
CXX_FLAGS = [*FLAGS, "-fPIC", "-fvisibility=hidden"]
# A symbol that no library has is an error here, not first when the library is loaded.
SHARED = ["-shared", "-Wl,-z,defs"] if sys.platform == "linux" else ["-bundle", "-undefined", "dynamic_lookup"]
# --threads: architectures in parallel. --split-compile: the kernels of one file too, into the same machine code.
NVCC_FLAGS = [*FLAGS, "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0", "--split-compile=0"]
say = functools.partial(print, flush=True)


def numbers(version: str) -> tuple[int, ...]:
    """``"2.11.0+cu130"`` -> ``(2, 11, 0)``."""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0]))


def refuse(problem: str) -> NoReturn:
    raise SystemExit(f"gradproj: {problem}")


def refuse_command(problem: str, command: list[str], advice: str = "") -> NoReturn:
    refuse(f"{problem}; its errors are above, and this is the command:\n    {shlex.join(command)}{advice}")


def switch(name: str, default: str) -> bool:
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        refuse(f"{name}={value} is neither 0 nor 1; set it to one of them or unset it")
    return value == "1"


def find_torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        refuse(
            f"the native kernels are built against torch, and it does not import ({error}); install it with: "
            f"pip install torch, then: {INSTALL} (or go without native kernels: GRADPROJ_NATIVE=0 {INSTALL})"
        )
    if numbers(torch.__version__) < OLDEST_TORCH:
        upgrade = f'pip install "torch>=2.10", then: {INSTALL}'
        refuse(f"torch {torch.__version__} is older than 2.10; upgrade it with: {upgrade}")
    return torch


def environment_words(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_cxx() -> list[str]:
    command = environment_words("CXX") or shlex.split(sysconfig.get_config_var("CXX") or "c++")
    if not shutil.which(command[0]):
        refuse(
            f"there is no C++ compiler {command[0]}; install g++ 11 or clang 14, or a later one (on Debian: apt-get "
            f"install g++), or name yours in CXX, or go without native kernels: GRADPROJ_NATIVE=0 {INSTALL}"
        )
    return command


class Nvcc(NamedTuple):
    path: str
    version: str
    targets: list[str]  # its flags for the architectures
    toolkit: Path


def find_nvcc(torch: ModuleType) -> Nvcc:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    found = shutil.which(path)
    if not found:
        refuse(f"GRADPROJ_CUDA=1 needs nvcc, and there is no {path}; put it on PATH, or set CUDA_HOME, {OR_WITHOUT}")
    if not os.path.exists(f"{torch.__path__[0]}/lib/libtorch_cuda.so"):
        refuse(
            f"GRADPROJ_CUDA=1 needs a CUDA build of torch, and torch {torch.__version__} has no libtorch_cuda.so; "
            f"install one with: pip install --force-reinstall torch, {OR_WITHOUT}"
        )
    release = re.search(r"release (\d+\.\d+)", ask(found, "--version").stdout)
    if not release:
        refuse(f"{found} --version names no release; is it nvcc? Set CUDA_HOME to the CUDA toolkit, {OR_WITHOUT}")
    if numbers(release[1]) < OLDEST_NVCC:
        refuse(f"{found} is nvcc {release[1]}, older than 12.8; set CUDA_HOME to a newer CUDA toolkit, {OR_WITHOUT}")
    return Nvcc(found, release[1], architectures(found, release[1], torch), toolkit(found))


def ask(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def dry_run(nvcc: str, *flags: str) -> subprocess.CompletedProcess:
    return ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull, *flags)


def toolkit(nvcc: str) -> Path:
    """The CUDA toolkit's folder, from nvcc itself: the one on PATH may be a wrapper that lies elsewhere."""
    top = re.search(r"TOP=(.*)", dry_run(nvcc).stderr)
    if not top:
        refuse(f"{nvcc} does not say where its toolkit is; set CUDA_HOME to the CUDA toolkit, {OR_WITHOUT}")
    return Path(top[1].strip())


def architectures(nvcc: str, version: str, torch: ModuleType) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX where it ends in +PTX."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if wanted in ([], ["native"]):
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = [f"{major}.{minor}" for major, minor in sorted(gpus)]
    if not wanted:
        refuse(
            "GRADPROJ_CUDA=1, and there is no GPU to build for; name the architectures, for example: "
            f'TORCH_CUDA_ARCH_LIST="8.0 9.0" GRADPROJ_CUDA=1 {INSTALL}'
        )
    flags = []
    for arch in wanted:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        number = match[1] + match[2] if match else ""
        target = f"-gencode=arch=compute_{number},code=sm_{number}"
        if not match or dry_run(nvcc, target).returncode != 0:
            listed = sorted(re.findall(r"compute_(\d+)", ask(nvcc, "--list-gpu-arch").stdout), key=int)
            known = ", ".join(f"{number[:-1]}.{number[-1]}" for number in listed)
            refuse(
                f"TORCH_CUDA_ARCH_LIST: nvcc {version} knows no architecture {arch}; it knows {known}, each with or "
                "without +PTX; for example: TORCH_CUDA_ARCH_LIST=9.0"
            )
        flags.append(target)
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


class Library(Extension):
    """One library of native kernels: its files, and the commands that make it."""

    def __init__(self, name: str, files: list[str], cxx: list[str], torch: ModuleType, nvcc: Nvcc | None = None):
        super().__init__(name, files, depends=sources("csrc", *HEADERS))
        self.cxx, self.torch, self.nvcc = cxx, torch, nvcc
        self.includes = ["-isystem", f"{torch.__path__[0]}/include"]
        # torch's libraries by the names of those that have the symbols: where the linker defaults to --as-needed, as on
        # Ubuntu, it drops libtorch.so, which has none itself and would bring the others along.
        self.links = [f"-L{torch.__path__[0]}/lib", "-ltorch_cpu"]
        if nvcc:
            self.includes += ["-isystem", str(nvcc.toolkit / "include"), "-DUSE_CUDA"]
            folders = [nvcc.toolkit / "lib64", nvcc.toolkit / "lib", *sorted(nvcc.toolkit.glob("targets/*/lib"))]
            self.links += ["-ltorch_cuda", *(f"-L{folder}" for folder in folders if folder.is_dir())]
            self.links += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    def compile_command(self, source: str, target: Path) -> list[str]:
        if source.endswith(".cu"):
            command = [self.nvcc.path, *NVCC_FLAGS, *self.nvcc.targets]
        else:
            command = [*self.cxx, *CXX_FLAGS, *environment_words("CXXFLAGS")]
        return [*command, DEFINE, *self.includes, "-c", source, "-o", str(target)]

    def link_command(self, objects: list[Path], target: Path) -> list[str]:
        return [*self.cxx, *SHARED, *environment_words("LDFLAGS"), *map(str, objects), *self.links, "-o", str(target)]


def libraries() -> list[Library]:
    native, cuda = switch("GRADPROJ_NATIVE", "1"), switch("GRADPROJ_CUDA", "0")
    if cuda and not native:
        refuse("GRADPROJ_CUDA=1 contradicts GRADPROJ_NATIVE=0; unset one of them")
    if not native:
        return []
    torch, cxx = find_torch(), find_cxx()
    found = [Library("gradproj._cpu", sources("csrc/cpu", ".cpp"), cxx, torch)]
    if cuda:  # first: its files take the longest
        found.insert(0, Library("gradproj._cuda", sources("csrc/cuda", ".cpp", ".cu"), cxx, torch, find_nvcc(torch)))
    return found


class Job(NamedTuple):
    """One source file to compile. ``key`` is all that its object file depends on besides files of csrc/."""

    source: str
    target: Path
    command: list[str]
    key: str
    key_file: Path

    def is_current(self, newest_header: float) -> bool:
        """The object file that an earlier build left is what this command would make."""
        if not self.target.exists() or not self.key_file.exists() or self.key_file.read_text() != self.key:
            return False
        return self.target.stat().st_mtime > max(newest_header, os.path.getmtime(self.source))


def compile_all(jobs: list[Job], workers: int) -> None:
    """Compile ``workers`` files at a time; a line for each when it is done, and one every 20 seconds in between."""
    started: dict[str, float] = {}

    def run(job: Job) -> subprocess.CompletedProcess:
        started[job.source] = time.monotonic()
        job.key_file.unlink(missing_ok=True)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            job.command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )

    pool = ThreadPoolExecutor(workers)
    try:
        pending = {pool.submit(run, job): job for job in jobs}
        while pending:
            ready = wait(pending, timeout=20, return_when=FIRST_COMPLETED).done
            now = time.monotonic()
            if not ready:
                running = [job.source for future, job in pending.items() if future.running()]
                say("  ...  " + ", ".join(f"{source} {now - started[source]:.0f} s" for source in running))
            for future in ready:
                job, done = pending.pop(future), future.result()
                tool, count = Path(job.command[0]).name, len(jobs) - len(pending)
                say(f"  {tool:4} {job.source}  ({count} of {len(jobs)})  {now - started[job.source]:.0f} s")
                if done.stdout.strip():
                    say(done.stdout.rstrip())
                if done.returncode != 0:
                    advice = (
                        "\nThe kernels need g++ 11, clang 14 or a later one; nvcc takes the one that NVCC_CCBIN names."
                    )
                    refuse_command(f"{job.source} did not compile", job.command, advice)
                job.key_file.write_text(job.key)
    finally:
        pool.shutdown(cancel_futures=True)


def remove_libraries(folder: Path) -> None:
    """What an earlier build left and this one does not make would be used with sources it was not built from."""
    for library in folder.glob("_*.so"):
        library.unlink()


class BuildExt(build_ext):
    """setuptools' build_ext with a queue of its own for the files of all libraries. Each leaves ``NAME.so``, without a
    Python version, because it has no Python in it."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self):
        start = time.monotonic()
        jobs = {library.name: [self.job(library, source) for source in library.sources] for library in self.extensions}
        newest_header = max(os.path.getmtime(header) for header in sources("csrc", *HEADERS))
        stale = [job for group in jobs.values() for job in group if not job.is_current(newest_header)]
        workers = int(self.parallel or os.cpu_count() or 1)
        total = sum(map(len, jobs.values()))
        say(f"gradproj: {describe(self.extensions[0])}; {len(stale)} of {total} files to compile, {workers} at a time")
        compile_all(stale, workers)
        remove_libraries(Path(self.build_lib, "gradproj"))
        for library in self.extensions:
            target = Path(self.get_ext_fullpath(library.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            command = library.link_command([job.target for job in jobs[library.name]], target)
            if subprocess.run(command, check=False).returncode != 0:
                refuse_command(f"{library.name} did not link", command)
        say(f"  built {' and '.join(library.name for library in self.extensions)} in {time.monotonic() - start:.0f} s")

    def copy_extensions_to_source(self):
        remove_libraries(ROOT / "python" / "gradproj")
        super().copy_extensions_to_source()

    def job(self, library: Library, source: str) -> Job:
        target = Path(self.build_temp, source + ".o")
        command = library.compile_command(source, target)
        key = f"{describe(library)}\n{shlex.join(command)}\n"
        return Job(source, target, command, key, target.with_suffix(".key"))


def describe(library: Library) -> str:
    """What a library is built for, on one line."""
    version, nvcc = library.torch.__version__, library.nvcc
    if not nvcc:
        return f"torch {version}"
    targets = " ".join(dict.fromkeys(re.findall(r",code=(\w+)", " ".join(nvcc.targets))))
    return f"torch {version}, nvcc {nvcc.version} for {targets}"


if __name__ == "__main__":
    if (ROOT / "pyproject.toml").exists() and numbers(setuptools.__version__) < OLDEST_SETUPTOOLS:
        refuse(
            f"setuptools {setuptools.__version__} cannot read the licence field of pyproject.toml; upgrade it with: "
            'pip install "setuptools>=77,<82"'
        )
    setuptools.setup(ext_modules=libraries(), cmdclass={"build_ext": BuildExt})
