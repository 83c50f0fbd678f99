"""Fixtures. Every test that takes ``on`` runs on each backend that can run here; a new backend is tested by adding its
name."""

import importlib.util
import os

import torch

# Without a GPU, triton kernels run in triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import NamedTuple

import hypothesis
import pytest
import torch.distributed as dist

import gradproj
from training import WRAPPINGS

hypothesis.settings.register_profile(
    "gradproj",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("gradproj")


def patch_the_interpreter_once():
    """Triton's interpreter patches its language again before every call of one device function by another; once a
    module is enough, and takes a third of the time."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_the_interpreter_once()


class On(NamedTuple):
    """Where a test runs."""

    backend: str
    device: str

    @property
    def slow(self) -> bool:
        """Interpreted: keep examples few and buffers small."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def namespace(self):
        return getattr(torch.ops, gradproj.backends()[self.backend].namespace)


CPU = [On("cpu", "cpu"), On("torch", "cpu"), On("triton", "cpu")]
GPU = [On("cuda", "cuda"), On("triton", "cuda"), On("torch", "cuda")]


def pytest_generate_tests(metafunc):
    if "on" in metafunc.fixturenames:
        params = [pytest.param(on, id=f"{on.backend}") for on in CPU]
        params += [pytest.param(on, id=f"{on.backend}-gpu", marks=pytest.mark.gpu) for on in GPU]
        metafunc.parametrize("on", params, indirect=True)


# Of these files every test compiles, interprets, or starts processes.
SLOW_FILES = {
    f"test_{name}.py"
    for name in (
        "backends", "benchmarks", "build", "cpu_compile", "cuda_compile", "cuda_emulation", "distributed", "frameworks",
        "gpu_build", "gpu_gate", "gpu_measure", "laboratory_page", "laboratory_tax", "plan", "triton", "triton_launch",
        "triton_ptx",
    )
}  # fmt: skip


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # the workers have the cores between them
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        interpreted = getattr(item, "callspec", None) and item.callspec.params.get("on") == On("triton", "cpu")
        if item.path.name in SLOW_FILES or interpreted or "inductor" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def inductor(inductor_cache, monkeypatch):
    """For tests that compile. Their own cache, since the user's may know an op by a schema that it had before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", inductor_cache)
    # torch.compile links CPU code with unquoted paths.
    if " " in torch.__file__ and not torch.cuda.is_available():
        pytest.skip("torch.compile does not link CPU code where torch's own path has a space")


@pytest.fixture
def on(request):
    backend = gradproj.backends()[request.param.backend]
    if not backend.available:
        pytest.skip(f"backend {backend.name}: {backend.reason}")
    if request.param.device not in backend.device_types:
        pytest.skip(f"backend {backend.name} does not take {request.param.device} tensors here")
    with gradproj.use_backend(backend.name):
        yield request.param


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(params=WRAPPINGS)
def wrapping(request):
    """Tests that take it cover ProjectedOptimizer and attach()."""
    return WRAPPINGS[request.param]


@pytest.fixture
def few():
    """Inputs of twelve features, so few that a basis holds them all."""
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
