"""What a pin leaves where tensor cores truncate their sums: emulated in float64, in the order of the Triton kernel."""

import pytest
import torch

from gradproj.rows.functional import split_basis
from test_pin import orthonormal, whole

pin_table = pytest.importorskip("gradproj.triton_kernels.pin_table")

OUTPUTS, INPUTS = 48, 2048
STEP = 8  # terms that a tensor core adds at once, at the least: fewer truncations follow from more


def truncated(x):
    """float64 cut to the 24 bits of a float32, towards zero."""
    return (x.view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


def accumulated(sums, a, b):
    """sums + a b, truncated after every step."""
    for k in range(0, a.shape[1], STEP):
        sums = truncated(sums + a[:, k : k + STEP] @ b[k : k + STEP])
    return sums


def tf32(x):
    """High and low, as the kernel's ``split``; tensor cores ignore what TF32 has no bits for."""
    cut = lambda bits: (bits & ~0x1FFF).view(torch.float32).double()
    high = cut(x.float().view(torch.int32) + 0x1000)
    return high, cut((x - high).float().view(torch.int32))


def three_products(a, b):
    (a_high, a_low), (b_high, b_low) = tf32(a), tf32(b)
    sums = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for one, other in ((a_low, b_high), (a_high, b_low), (a_high, b_high)):
        sums = accumulated(sums, one, other)
    return sums.float()


def tiles(size, width):
    return [slice(start, start + width) for start in range(0, size, width)]


def pinned_float32(w, u, target, tile):
    for ranks in tiles(u.shape[1], tile.ranks):
        moved = -target[:, ranks]
        for inputs in tiles(INPUTS, tile.inputs):
            moved = moved + three_products(w[:, inputs].double(), u[inputs, ranks].double())
        w = w + three_products(-moved.double(), u[:, ranks].T.double())
    return w


def pinned_bfloat16(w, u, target, tile):
    """With a pair: two products, then one, whose sums go on from W's."""
    high, low = split_basis(u).double()
    for ranks in tiles(u.shape[1], tile.ranks):
        moved = -target[:, ranks].double()
        for inputs in tiles(INPUTS, tile.inputs):
            moved = accumulated(moved, w[:, inputs].double(), low[inputs, ranks])
            moved = accumulated(moved, w[:, inputs].double(), high[inputs, ranks])
        w = accumulated(w.double(), -moved.bfloat16().double(), high[:, ranks].T).bfloat16()
    return w


def exact(w, u, target):
    u = u.double()
    return w.double() - (w.double() @ u - target.double()) @ u.T


def left(w, u, target):
    """|W U - B| / |B|."""
    return float((w.double() @ u.double() - target.double()).norm() / target.double().norm())


@pytest.fixture
def layer(request):
    """W a step away from where W U = B, with r = 512."""
    rng = torch.Generator().manual_seed(0)
    u = orthonormal(INPUTS, 512, rng)
    before = torch.randn(OUTPUTS, INPUTS, generator=rng).to(request.param)
    target = (before.double() @ u.double()).float()
    return (before + 0.01 * torch.randn(OUTPUTS, INPUTS, generator=rng)).to(request.param), u, target


@pytest.mark.parametrize("layer", [torch.float32], indirect=True, ids=str)
@pytest.mark.parametrize("tile", [*pin_table.FLOATS[True], *pin_table.FLOATS[False]], ids=str)
def test_float32_is_pinned_to_1e_6(layer, tile):
    w, u, target = layer
    assert left(w, u, target) > 1e-3
    assert left(pinned_float32(w, u, target, tile), u, target) <= 1e-6


@pytest.mark.parametrize("layer", [torch.float32], indirect=True, ids=str)
def test_one_tf32_product_would_not_do(layer):
    w, u, target = layer
    once = tf32(w.double())[0] @ tf32(u.double())[0]
    assert (once - w.double() @ u.double()).norm() > 1e-4 * target.norm()


@pytest.mark.parametrize("layer", [torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize(("rank", "most"), [(64, 1.02), (256, 1.02), (512, 1.25)])
def test_bfloat16_is_pinned_to_its_own_rounding(layer, rank, most):
    """One product for the update rounds as exact arithmetic does: what is left is the rounding of W. Above 256 ranks W
    is rounded again after every block."""
    w, u, target = layer[0], layer[1][:, :rank], layer[2][:, :rank]
    tile = next((tile for tile in pin_table.PAIRS[True] if rank <= tile.ranks), pin_table.PAIRS[True][-1])
    rounded = left(exact(w, u, target).bfloat16(), u, target)
    found = left(pinned_bfloat16(w, u, target, tile), u, target)
    assert 1e-4 < rounded < 4e-3 and found <= most * rounded


@pytest.mark.parametrize("layer", [torch.bfloat16], indirect=True, ids=str)
def test_without_the_low_part_w_u_is_another(layer):
    w, u, _ = layer
    product = w.double() @ u.double()
    found = [w.double() @ u.double() for u in (split_basis(u)[0], whole(split_basis(u)))]
    error = [float((other - product).norm() / product.norm()) for other in found]
    assert error[0] > 1e-3 and error[1] < 1e-5
