"""W <- W - (W U - B) U^T on lists of weights, against float64."""

import gc
import importlib
import weakref
from math import prod

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradproj
from cases import clone, make_buffer
from gradproj import reference
from gradproj.kernels import torch_backend, validate

backends = importlib.import_module("gradproj.kernels.backends")  # gradproj.backends is its function

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 3), (40, 17), (65, 33), (130, 70), (0, 4), (3, 128), (80, 48)]


@pytest.fixture
def on(on):
    if "pin_" not in gradproj.backends()[on.backend].ops:
        pytest.skip(f"backend {on.backend} has no pin_ of its own: torch's runs")
    return on


def orthonormal(inputs, rank, rng, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(inputs, rank, dtype=torch.float64, generator=rng)).Q[:, :rank].to(dtype)


@st.composite
def cases(draw, slow=False):
    """(weights, bases, targets, biases) that differ in everything that may differ."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lists: tuple[list, list, list, list] = ([], [], [], [])
    for _ in range(draw(st.integers(1, 2 if slow else 4))):
        outputs, inputs = draw(st.sampled_from(SHAPES))
        dtype = draw(st.sampled_from(DTYPES))
        biased = draw(st.booleans())
        rank = draw(st.integers(0, min(inputs, 40)))
        layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "misaligned"]))
        high = torch.float64 if dtype == torch.float64 else torch.float32
        lists[0].append(make_buffer((outputs, inputs), dtype, layout, rng))
        lists[1].append(orthonormal(inputs + biased, rank, rng, high))
        target = torch.randn(outputs, rank, generator=rng, dtype=high)
        lists[2].append(target if draw(st.booleans()) else None)
        lists[3].append(make_buffer((outputs,), dtype, "contiguous", rng) if biased else None)
    return lists


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=80)
def test_matches_float64_oracle(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    lists = data.draw(cases(on.slow))
    weights, bases, targets, biases = ([None if t is None else t.to(on.device) for t in row] for row in lists)
    before = clone(weights)
    biases_before = clone(biases)
    moved = gradproj.pin_(weights, bases, targets, biases)
    for k, (w, u, b, c) in enumerate(zip(before, bases, targets, biases_before, strict=True)):
        expected, expected_bias, norm = reference.oracle_pin(w, u, b, c)
        eps = torch.finfo(w.dtype).eps
        scale = float(w.double().norm()) + norm + 1.0
        error = (weights[k].double().cpu() - torch.from_numpy(expected)).abs().max() if w.numel() else 0.0
        assert error <= eps * scale + 2e-6 * scale * (w.dtype != torch.float64)
        if c is not None and c.numel():
            assert (biases[k].double().cpu() - torch.from_numpy(expected_bias)).abs().max() <= (eps + 2e-6) * scale
        assert moved[k].item() == pytest.approx(norm, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 64, 200])
def test_what_is_left_after_a_pin(on, dtype, rank):
    """|W U - B| is the rounding of W U in float32, of W in 16-bit types."""
    rng = torch.Generator().manual_seed(rank)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    w = make_buffer((96, 256), dtype, "contiguous", rng, on.device)
    u = orthonormal(256, rank, rng, high).to(on.device)
    target = w.to(high) @ u + 0.1 * torch.randn(96, rank, generator=rng, dtype=high).to(on.device)
    gradproj.pin_([w], [u], [target])
    left = (w.double() @ u.double() - target.double()).norm() / target.double().norm()
    assert left <= {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)


def test_gradient_form_removes_the_span(on):
    rng = torch.Generator().manual_seed(0)
    g, bias = torch.randn(30, 20, generator=rng).to(on.device), torch.randn(30, generator=rng).to(on.device)
    u = orthonormal(21, 5, rng).to(on.device)
    gradproj.pin_([g], [u], biases=[bias])
    assert (g @ u[:-1] + torch.outer(bias, u[-1])).abs().max() < 1e-5


def test_versions_are_bumped_and_autograd_left_out(on):
    w = torch.nn.Parameter(torch.randn(4, 3, device=on.device))
    version = w._version
    moved = gradproj.pin_([w], [torch.eye(3, 1, device=on.device)])
    assert w._version > version and w.grad_fn is None and not moved.requires_grad


def test_nothing_to_do(on):
    assert gradproj.pin_([], []).numel() == 0
    w = torch.randn(4, 3, device=on.device)
    before = w.clone()
    assert gradproj.pin_([w], [torch.zeros(3, 0, device=on.device)]).item() == 0.0 and torch.equal(w, before)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [((80, 48), "contiguous", "rows"), ((80, 48), "transposed", "columns"), ((80, 48), "misaligned", "strided"),
     ((80, 40), "contiguous", "strided"), ((80, 48), "sliced", "strided")],
)  # fmt: skip
def test_wide_loads_in_triton_where_the_memory_allows(shape, layout, expected):
    """Which of the kernel's forms the shapes above run, by the weight and by the basis."""
    pin_table = pytest.importorskip("gradproj.triton_kernels.pin_table")
    rng = torch.Generator().manual_seed(0)
    w, u = make_buffer(shape, torch.float32, layout, rng), orthonormal(shape[1], 8, rng).T.contiguous().T
    assert pin_table._form(w, u).layout == expected and pin_table._form(w, u).aligned == (expected != "strided")
    assert pin_table._form(w, u.contiguous()).layout == "strided"
    with_bias = orthonormal(shape[1] + 1, 8, rng).T.contiguous().T
    assert pin_table._form(w, with_bias).layout == expected and not pin_table._form(w, with_bias).aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_layers_in_batches(dtype):
    """Alike or not, in any order, more than one batch: every layer gets its own B and its own place in the result."""
    rng = torch.Generator().manual_seed(0)
    high = torch.promote_types(dtype, torch.float32)
    lists: tuple[list, list, list, list] = ([], [], [], [])
    for k in range(150):
        outputs, inputs = [(32, 32), (32, 32), (5, 3), (100, 130)][k % 4] if k < 40 else (64, 64)
        biased, rank = k % 3 == 0, min(inputs, 8)
        lists[0].append(make_buffer((outputs, inputs), dtype, "transposed" if k % 5 == 0 else "contiguous", rng))
        lists[1].append(orthonormal(inputs + biased, rank, rng, high))
        lists[2].append(None if k % 7 == 0 else torch.randn(outputs, rank, generator=rng, dtype=high))
        lists[3].append(torch.randn(outputs, generator=rng).to(dtype) if biased else None)
    before, biases_before = clone(lists[0]), clone(lists[3])
    with gradproj.use_backend("torch"):
        moved = gradproj.pin_(*lists)
    for k, (w, u, b, c) in enumerate(zip(before, lists[1], lists[2], biases_before, strict=True)):
        expected, expected_bias, norm = reference.oracle_pin(w, u, b, c)
        tolerance = 10 * torch.finfo(dtype).eps * (1.0 + abs(expected).max())
        assert abs(lists[0][k].double().numpy() - expected).max() <= tolerance
        if c is not None:
            assert abs(lists[3][k].double().numpy() - expected_bias).max() <= tolerance
        assert moved[k].item() == pytest.approx(norm, rel=1e-5)


def temporaries(device_type, dtype, outputs, inputs, rank):
    """Blocks that torch takes a layer in, and the bytes that one needs."""
    rows = torch_backend._block_rows(torch_backend._pin_bytes(device_type), rank, inputs, dtype)
    held = 4 * (rank + inputs) if dtype.itemsize == 2 else dtype.itemsize * rank
    return -(-outputs // rows), min(rows, outputs) * held


@pytest.mark.parametrize("rank", [1, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (256, 256)], ids=str)
def test_blocks_fit_a_cache_on_a_cpu_and_are_large_elsewhere(shape, dtype, rank):
    """A 4096 x 4096 layer took 440 launches on a GPU, in blocks for a CPU's cache."""
    blocks, held = temporaries("cpu", dtype, *shape, rank)
    assert held <= 1 << 20
    blocks, held = temporaries("cuda", dtype, *shape, rank)
    assert held <= 32 << 20 and blocks <= 1 + prod(shape) * 4 // (16 << 20)


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
    """An index from a Python list was copied to the device in every call, which waits for it and cannot be captured."""
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
    assert (
        not [name for name in inside.names if "_to_copy" in name or name == "aten.copy_.default"]
        or on.backend == "torch"
    )
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
    """What was found out about this machine is found out again."""
    backends._best.cache_clear()
    yield
    backends._best.cache_clear()


@pytest.mark.parametrize("triton", ["", "triton is not installed"])
def test_on_cuda_triton_pins_where_it_is_there(monkeypatch, fresh_backends, triton):
    """`use_backend("cuda")` landed on plain torch."""
    cuda = backends.TABLE["cuda"]._replace(load=lambda: "")
    made = backends.TABLE["triton"]._replace(device_types=("cuda",), load=lambda: triton, on_request=False)
    monkeypatch.setitem(backends.TABLE, "cuda", cuda)
    monkeypatch.setitem(backends.TABLE, "triton", made)
    wanted = "torch" if triton else "triton"
    assert backends.select("cuda", "pin_").name == wanted
    with gradproj.use_backend("cuda"):
        assert backends.select("cuda", "pin_").name == wanted and backends.select("cuda").name == "cuda"


def test_triton_says_that_it_does_not_run_on_rocm(monkeypatch, fresh_backends):
    """An AMD architecture is a string, gfx942, of which a kernel's tile was to be computed."""
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
    """ "mps" was announced, and every op needs float64."""
    assert "mps" not in gradproj.backends()["torch"].device_types
    with pytest.raises(ValueError, match=f"{op}: no backend takes tensors on mps.*move them to the CPU"):
        backends.select("mps", op)


def test_strides_beyond_32_bits_go_to_a_blas(on):
    """Offsets within a tile are 32-bit in Triton. One row, whose stride no element uses."""
    w = torch.randn(1, 4, device=on.device).as_strided((1, 4), (1 << 40, 1))
    gradproj.pin_([w], [torch.eye(4, 2, device=on.device)])
    assert (w[0, :2] == 0).all() and (w[0, 2:] != 0).all()


ONES = torch.ones
BUFFER = torch.ones(100)
WHOLE = BUFFER[:12].view(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([ONES(4, 3)], []), ValueError, "bases has 0 entries but weights has 1"),
        (([ONES(4)], [ONES(4, 1)]), ValueError, r"weights\[0\] has shape \(4,\); pass a matrix"),
        (([ONES(4, 3)], [ONES(4, 1)]), ValueError, r"bases\[0\] has shape \(4, 1\).*pass \[3, rank\]"),
        (([ONES(4, 3)], [ONES(3, 1)], None, [ONES(4)]), ValueError, r"its bias counted as an input: pass \[4, rank\]"),
        (([ONES(4, 3)], [ONES(3, 1)], [ONES(4, 2)]), ValueError, r"targets\[0\] has shape \(4, 2\)"),
        (([ONES(4, 3)], [ONES(4, 1)], None, [ONES(3)]), ValueError, r"biases\[0\] has shape \(3,\)"),
        (([ONES(4, 3).long()], [ONES(3, 1)]), TypeError, r"weights\[0\] has dtype torch.int64"),
        (([ONES(4, 3)], [ONES(3, 1, device="meta")]), ValueError, r"bases\[0\] is on meta"),
        (([ONES(1, 3).expand(4, 3)], [ONES(3, 1)]), ValueError, r"weights\[0\] overlaps itself"),
        (([None], [ONES(3, 1)]), TypeError, r"weights\[0\] is a NoneType"),
        (([ONES(4, 3)], [ONES(3, 1)], []), ValueError, "targets has 0 entries"),
        (([ONES(4, 3).to_sparse()], [ONES(3, 1)]), NotImplementedError, r"weights\[0\] has layout torch.sparse"),
        (
            ([WHOLE, WHOLE], [ONES(3, 1)] * 2),
            ValueError,
            r"weights\[0\] .* shares memory with weights\[1\]; pass each once",
        ),
        (
            ([ONES(4, 3), WHOLE, BUFFER[9:15].view(2, 3)], [ONES(3, 1)] * 3),
            ValueError,
            r"weights\[1\] .* with weights\[2\]",
        ),
        (([WHOLE], [ONES(4, 1)], None, [BUFFER[8:12]]), ValueError, r"weights\[0\] .* with biases\[0\]"),
        (([WHOLE], [ONES(3, 1)], [WHOLE[:, :1]]), ValueError, r"weights\[0\] .* with targets\[0\]; clone targets\[0\]"),
        (
            ([ONES(4, 3), WHOLE], [WHOLE[:3, :1], ONES(3, 1)]),
            ValueError,
            r"weights\[1\] .* with bases\[0\]; clone bases",
        ),
        (
            ([ONES(4, 3)], [ONES(4, 1)], [BUFFER[:4, None]], [BUFFER[:4]]),
            ValueError,
            r"biases\[0\] .* with targets\[0\]",
        ),
    ],
)
def test_refused_by_name(on, arguments, error, message):
    for _ in range(2):
        with pytest.raises(error, match=message):
            gradproj.pin_(*arguments)
    assert (BUFFER == 1).all()


def test_what_may_share_memory(on):
    """One basis for several weights, and weights side by side in one buffer."""
    buffer = torch.ones(4, 6, device=on.device)
    u, target = torch.eye(3, 1, device=on.device), torch.zeros(4, 1, device=on.device)
    gradproj.pin_([buffer[:, :3], buffer[:, 3:]], [u, u], [target, target])
    assert buffer.tolist() == [[0.0, 1.0, 1.0] * 2] * 4
