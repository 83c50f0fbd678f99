"""How pin_ is called: again and again, in any surroundings, on any device, by the backend that is there."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradproj
from cases import clone
from gradproj.kernels import backends, torch_backend, validate
from test_pin import orthonormal, skip_without_pin


@pytest.fixture
def on(on):
    skip_without_pin(on)
    return on


class Ops(TorchDispatchMode):
    """Notes the names of the ops that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        self.names.append(str(function))
        return function(*arguments, **(settings or {}))


def test_a_large_layer_takes_few_launches_off_the_cpu():
    w, u = torch.empty(4096, 4096, device="meta"), torch.empty(4096, 64, device="meta")
    with Ops() as ops:
        torch_backend.pin_([w], [u], [None], [], [])
    assert len(ops.names) < 12


def make_layers(count, device="cpu", biased=False, shape=(80, 48)):
    rng = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=rng).to(device) for _ in range(count)]
    bases = [orthonormal(shape[1] + biased, 8, rng).to(device) for _ in range(count)]
    targets = [torch.randn(shape[0], 8, generator=rng).to(device) for _ in range(count)]
    biases = [torch.randn(shape[0], generator=rng).to(device) for _ in range(count)] if biased else None
    return weights, bases, targets, biases


@pytest.mark.parametrize("biased", [False, True])
def test_a_repeated_call_waits_for_nothing(on, biased, monkeypatch):
    """An index from a Python list was copied to the device in every call, which waits, and which no graph captures."""
    w, u, b, c = make_layers(3, on.device, biased)
    w.append(torch.randn(70, 48, dtype=torch.float64, device=on.device))  # on Triton a BLAS takes it
    u.append(torch.eye(48, 4, dtype=torch.float64, device=on.device))
    b.append(None)
    op_biases = list(c or [])
    if on.backend == "triton":
        from gradproj.triton_kernels import pin

        function = pin.pin_
        if on.slow:
            monkeypatch.setattr(pin, "launch", lambda device, starts: None)
    else:
        function = torch_backend.pin_
    biased_at = list(range(len(op_biases)))
    if biased:
        c.append(None)
    gradproj.pin_(w, u, b, c)

    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(validate, "check_pin", fail)
    if on.backend == "triton":
        monkeypatch.setattr("gradproj.triton_kernels.pin_table.upload", fail)
    with Ops() as inside, torch.no_grad():
        function(w, u, b, op_biases, biased_at)
    with Ops() as outside:
        gradproj.pin_(w, u, b, c)
    waits = ("index", "_local_scalar_dense", "item", "nonzero", "lift_fresh", "pin_memory")
    names = [name for name in inside.names + outside.names if name != "aten.index_copy_.default"]
    assert inside.names and not [name for name in names if any(word in name for word in waits)]
    copies = [name for name in inside.names if "_to_copy" in name or name == "aten.copy_.default"]
    assert not copies or on.backend == "torch"
    assert len(outside.names) == 2  # the op, and a square root


def test_checked_once_for_a_set_of_addresses(monkeypatch):
    w, u, b, c = make_layers(2, biased=True)
    check, checked = validate.check_pin, []
    monkeypatch.setattr(validate, "check_pin", lambda *lists: checked.append(lists) or check(*lists))
    with gradproj.use_backend("torch"):
        for _ in range(3):
            gradproj.pin_(list(w), u, b, c)
            gradproj.pin_([t.view(80, 48) for t in w], u, b, c)
        assert len(checked) == 1
        gradproj.pin_([w[0][:, :40].T, w[1][:, :40].T], [t[:81] for t in make_layers(2, shape=(48, 80))[1]])
        gradproj.pin_(w, u, None, c)
        gradproj.pin_(w, [t[:-1] for t in u], b)
        assert len(checked) == 4
        for _ in range(2):  # what is refused is refused again
            with pytest.raises(ValueError, match="shares memory"):
                gradproj.pin_([w[0], w[0]], u, b, c)


def test_what_is_remembered_is_bounded_and_keeps_nothing_alive(monkeypatch):
    monkeypatch.setattr(validate, "CHECKED", 20)
    for _ in range(10):
        lists = make_layers(2)
        with gradproj.use_backend("torch"):
            gradproj.pin_(*lists)
    assert sum(validate._checked.values()) <= 20
    left = [weakref.ref(t) for t in lists[0]]
    del lists
    gc.collect()
    assert not any(ref() is not None for ref in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_under_autocast(on, dtype):
    w, u, b, c = make_layers(2, on.device, True)
    w, c = [t.to(dtype) for t in w], [t.to(dtype) for t in c]
    others, biases = clone(w), clone(c)
    moved = gradproj.pin_(w, u, b, c)
    with torch.autocast(on.device, dtype=torch.bfloat16):
        again = gradproj.pin_(others, u, b, biases)
    assert torch.equal(moved, again) and all(map(torch.equal, [*w, *c], [*others, *biases]))


@pytest.fixture
def precision():
    yield torch.backends.cuda.matmul
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("where", ["matmul", "backends"])
def test_products_are_float32_on_a_gpu_whatever_is_set(precision, where):
    setting = precision if where == "matmul" else torch.backends
    setting.fp32_precision = "tf32"
    with torch_backend._exact_products("cuda"):
        assert precision.fp32_precision == "ieee"
    assert precision.fp32_precision == "tf32"
    with pytest.raises(KeyError), torch_backend._exact_products("cuda"):
        raise KeyError
    with torch_backend._exact_products("cpu"):
        assert precision.fp32_precision == "tf32"
    setting.fp32_precision = "none"
    assert precision.fp32_precision == "none"  # still inherited, where it was


def test_several_devices(monkeypatch):
    """Everything is checked before anything is written; results come in the order of the weights."""
    w, u, b, _ = make_layers(4)
    expected = gradproj.pin_(clone(w), u, b)
    lists = [[t.to("meta") if k == 1 else t for k, t in enumerate(row)] for row in (w, u, b)]
    assert gradproj.pin_(*lists).device.type == "meta"
    with monkeypatch.context() as pretend:
        pretend.setattr("gradproj.rows.call._device", lambda t: torch.device("cpu", len(t) % 2))
        torch.testing.assert_close(gradproj.pin_(*make_layers(4)[:3]), expected)
    before = clone(w)
    lists[1][1] = lists[1][1][:7]
    with pytest.raises(ValueError, match=r"bases\[1\] has shape \(7, 8\)"):
        gradproj.pin_(*lists)
    assert all(map(torch.equal, before[2:], w[2:]))


def test_compiles_into_one_graph():
    w, u, b, c = make_layers(2, biased=True)
    others, biases = clone(w), clone(c)
    expected = gradproj.pin_(w, u, b, c)
    moved = torch.compile(gradproj.pin_, fullgraph=True, backend="aot_eager")(others, u, b, biases)
    torch.testing.assert_close(moved, expected)
    assert all(map(torch.equal, [*w, *c], [*others, *biases]))


@pytest.fixture
def fresh_backends():
    """The best backends of this machine are looked up anew."""
    backends._best.cache_clear()
    yield
    backends._best.cache_clear()


@pytest.mark.parametrize("triton", ["", "triton is not installed"])
def test_on_cuda_triton_pins_where_it_is_there(monkeypatch, fresh_backends, triton):
    """`use_backend("cuda")` took plain torch for pin_ even where Triton was installed."""
    cuda = backends.TABLE["cuda"]._replace(load=lambda: "")
    made = backends.TABLE["triton"]._replace(device_types=("cuda",), load=lambda: triton, on_request=False)
    monkeypatch.setitem(backends.TABLE, "cuda", cuda)
    monkeypatch.setitem(backends.TABLE, "triton", made)
    wanted = "torch" if triton else "triton"
    assert backends.select("cuda", "pin_").name == wanted
    with gradproj.use_backend("cuda"):
        assert backends.select("cuda", "pin_").name == wanted and backends.select("cuda").name == "cuda"


def test_triton_says_that_it_does_not_run_on_rocm(monkeypatch, fresh_backends):
    """A kernel's tile was computed from the architecture, which on AMD is a string such as gfx942."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setitem(
        backends.TABLE,
        "triton",
        backends.TABLE["triton"]._replace(device_types=("cuda",), load=lambda: backends._load_triton()),
    )
    assert "ROCm is not supported" in backends._load_triton()
    assert backends.select("cuda", "pin_").name == "torch"


@pytest.mark.parametrize("op", ["gram", "pin_"])
def test_devices_without_float64_are_refused(op):
    """mps was listed as supported, but every op needs float64."""
    assert "mps" not in gradproj.backends()["torch"].device_types
    with pytest.raises(ValueError, match=f"{op}: no backend takes tensors on mps.*move them to the CPU"):
        backends.select("mps", op)
