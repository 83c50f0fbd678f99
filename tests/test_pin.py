"""W <- W - (W U - B) U^T on lists of weights, against float64."""

import functools
import importlib
from math import prod

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import gradproj
from cases import clone, make_buffer
from gradproj import reference
from gradproj.kernels import torch_backend
from gradproj.rows.functional import split_basis

backends = importlib.import_module("gradproj.kernels.backends")  # gradproj.backends is its function

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 3), (40, 17), (65, 33), (130, 70), (0, 4), (3, 128), (80, 48)]


def skip_without_pin(on):
    if "pin_" not in gradproj.backends()[on.backend].ops:
        pytest.skip(f"backend {on.backend} has no pin_ of its own: torch's runs")


@pytest.fixture
def on(on):
    skip_without_pin(on)
    return on


def whole(basis):
    """Of a pair what it sums to."""
    return basis.sum(0, dtype=torch.float32) if basis.dim() == 3 else basis


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
        basis = orthonormal(inputs + biased, rank, rng, high)
        lists[1].append(split_basis(basis) if dtype == torch.bfloat16 and draw(st.booleans()) else basis)
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
        expected, expected_bias, norm = reference.oracle_pin(w, whole(u), b, c)
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
    for basis in [u, split_basis(u)] if dtype == torch.bfloat16 else [u]:
        pinned = w.clone()
        gradproj.pin_([pinned], [basis], [target])
        left = (pinned.double() @ u.double() - target.double()).norm() / target.double().norm()
        assert left <= {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)


def test_a_pair_is_its_basis_to_16_bits():
    u = orthonormal(37, 9, torch.Generator().manual_seed(0))
    pair = split_basis(u)
    assert pair.dtype == torch.bfloat16 and pair.shape == (2, 37, 9)
    assert ((whole(pair) - u).abs() <= 2.0**-16 * u.abs()).all()
    for part in pair:
        assert part.stride(0) == 1 and part.stride(1) % 8 == 0 and part.data_ptr() % 16 == 0


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
    ("shape", "layout_of_weight", "expected"),
    [((80, 48), "contiguous", "rows"), ((80, 48), "transposed", "columns"), ((80, 48), "misaligned", "strided"),
     ((80, 36), "contiguous", "strided"), ((80, 48), "sliced", "strided"), ((80, 36), "transposed", "strided")],
)  # fmt: skip
def test_wide_loads_in_triton_where_the_memory_allows(shape, layout_of_weight, expected):
    """Which of the kernel's forms the shapes above run, by the weight and by the basis."""
    pin_table = pytest.importorskip("gradproj.triton_kernels.pin_table")
    rng = torch.Generator().manual_seed(0)
    w, u = make_buffer(shape, torch.float32, layout_of_weight, rng), orthonormal(shape[1], 8, rng).T.contiguous().T
    layout = lambda *operands: pin_table._form(*operands).layout
    assert layout(w, u, None, None) == expected and layout(w, u.contiguous(), None, None) == "strided"
    target = torch.zeros(shape[0], 8)
    assert layout(w, u, target, None) == expected and layout(w, u, target.T.contiguous().T, None) == "strided"
    pair = split_basis(orthonormal(shape[1] + 1, 8, rng))
    w = make_buffer(shape, torch.bfloat16, layout_of_weight, rng)
    assert layout(w, pair, target, torch.zeros(shape[0])) == expected


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


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_columns_of_a_wide_weight_are_widened_some_at_a_time(dtype, target, monkeypatch):
    """With a bias, in several blocks of rows; whole rows in float32 left a BLAS 45 of them at a time."""
    rng = torch.Generator().manual_seed(0)
    w, bias = make_buffer((300, 2000), dtype, "contiguous", rng), make_buffer((300,), dtype, "contiguous", rng)
    u = orthonormal(2001, 256, rng)
    b = torch.randn(300, 256, generator=rng) if target else None
    widened = []
    columns = torch_backend._pin_columns
    monkeypatch.setattr(torch_backend, "_pin_columns", lambda *args: widened.append(len(args[0])) or columns(*args))
    expected, expected_bias, norm = reference.oracle_pin(w, u, b, bias)
    with gradproj.use_backend("torch"):
        moved = gradproj.pin_([w], [u], None if b is None else [b], [bias])
    eps = torch.finfo(dtype).eps
    assert len(widened) > 1 and sum(widened) == 300 and moved.item() == pytest.approx(norm, rel=1e-4)
    for found, exact in ((w, expected), (bias, expected_bias)):
        torch.testing.assert_close(found.double(), torch.from_numpy(exact), rtol=eps, atol=eps * 4)


def test_strides_beyond_32_bits_go_to_a_blas(on):
    """Offsets within a tile are 32-bit in Triton. One row, whose stride no element uses."""
    w = torch.randn(1, 4, device=on.device).as_strided((1, 4), (1 << 40, 1))
    gradproj.pin_([w], [torch.eye(4, 2, device=on.device)])
    assert (w[0, :2] == 0).all() and (w[0, 2:] != 0).all()


ONES = torch.ones
HALF = functools.partial(torch.ones, dtype=torch.bfloat16)
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
        (([ONES(4, 3)], [ONES(2, 3, 1)]), TypeError, r"bases\[0\] .* a pair .* weights\[0\] is torch.float32"),
        (([HALF(4, 3)], [ONES(2, 3, 1)]), TypeError, r"bases\[0\] .* dtype torch.float32, a pair"),
        (([HALF(4, 3)], [HALF(3, 3, 1)]), ValueError, r"bases\[0\] has shape \(3, 3, 1\).*pass \[3, rank\]"),
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
