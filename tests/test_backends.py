"""Which backend runs, and the package with nothing built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradproj
from gradproj.__main__ import doctor

ROOT = Path(__file__).parent.parent


def test_every_backend_says_why_it_is_missing():
    for name, backend in gradproj.backends().items():
        assert backend.name == name
        assert backend.available or len(backend.reason) > 10


def test_best_backend_is_the_native_one():
    info = gradproj.project_([torch.ones(3)], [torch.ones(3)])
    assert info.backend == ("cpu" if gradproj.backends()["cpu"].available else "torch")


def test_request_ends_with_its_block():
    g, d = [torch.ones(3)], [torch.ones(3)]
    with gradproj.use_backend("torch"):
        assert gradproj.project_(g, d).backend == "torch"
        with gradproj.use_backend("torch"):
            pass
        assert gradproj.project_(g, d).backend == "torch"
    assert gradproj.project_(g, d).backend != "torch" or not gradproj.backends()["cpu"].available


def run(*arguments, **environment):
    settings = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *arguments], check=False, env={**os.environ, **environment}, **settings)


@pytest.mark.parametrize("command", [(), ("doctor",)])
def test_doctor(command):
    done = run("-m", "gradproj", *command, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    for name in gradproj.backends():
        assert f"  {name} " in done.stdout
    assert "cpu tensors run on: " in done.stdout


def test_doctor_says_where_the_libraries_are_and_how_to_get_the_others(monkeypatch, capsys, tmp_path):
    library = tmp_path / "_cpu.so"
    library.touch()
    monkeypatch.setattr("gradproj.__main__.library", lambda name: tmp_path / f"_{name}.so")
    doctor()
    printed = capsys.readouterr().out
    assert f"  cpu    {library}, for torch 2.10 and later\n" in printed
    assert "  cuda   not built: GRADPROJ_CUDA=1 pip install --no-build-isolation .\n" in printed


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_each_instruction_set_gives_the_right_answer(isa):
    """The best one runs in all other tests; the others run here, in a process of their own."""
    if not gradproj.backends()["cpu"].available:
        pytest.skip("backend cpu is not built")
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in ("gram", "combine")]
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "[cpu", *tests]
    done = run(*arguments, GRADPROJ_CPU=isa, TRITON_INTERPRET="0")
    if "not supported by this processor" in done.stdout:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_unknown_instruction_set_is_refused():
    code = "import torch, gradproj; gradproj.project_([torch.ones(3)], [torch.ones(3)])"
    if not gradproj.backends()["cpu"].available:
        pytest.skip("backend cpu is not built")
    done = run("-c", code, GRADPROJ_CPU="sse9", TRITON_INTERPRET="0")
    assert done.returncode != 0 and "GRADPROJ_CPU=sse9" in done.stderr


def test_install_with_nothing_built(tmp_path):
    """GRADPROJ_NATIVE=0 installs pure Python, and everything runs on the torch backend."""
    source = tmp_path / "a checkout with spaces"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "python", "triton_kernels", "csrc"):
        (source / name).symlink_to(ROOT / name)
    target = tmp_path / "site"
    wheel = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(target), str(source)]
    done = run(*wheel, GRADPROJ_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert (target / "gradproj" / "triton_kernels" / "__init__.py").exists()
    for library in target.rglob("*.so"):
        library.unlink()
    code = (
        "import torch, gradproj; g = [torch.tensor([3.0, 4.0])]\n"
        "i = gradproj.project_(g, [torch.tensor([1.0, 0.0])]); print(gradproj.__file__, i.backend, g[0].tolist())\n"
        "print(gradproj.backends()['cpu'].reason)"
    )
    done = run("-c", code, PYTHONPATH=str(target), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout and "torch [0.0, 4.0]" in done.stdout
    assert "pip install --no-build-isolation" in done.stdout
