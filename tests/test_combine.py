import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import gradproj
from cases import DTYPES, assert_combined_close, clone, make_buffer, rows
from gradproj import reference

NAN = float("nan")


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=120)
def test_matches_float64_oracle(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions = data.draw(rows(3 if on.slow else 8, max_buffers=3 if on.slow else 5, device=on.device))
    weights = [data.draw(st.sampled_from([0.0, 1.0, -0.5, 2.25, 1e-3])) for _ in (grads, *directions)]
    expected = reference.oracle_combine(grads, directions, weights)
    written = clone(grads)
    gradproj.combine_(written, directions, torch.tensor(weights, dtype=torch.float64, device=on.device))
    assert_combined_close(written, expected, [grads, *directions], weights)


@pytest.mark.parametrize("k", [*range(1, 9), 11, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_directions(on, k, dtype):
    if on.slow and (k, dtype) not in [(1, torch.bfloat16), (3, torch.float32), (8, torch.float16), (11, torch.float32)]:
        pytest.skip("interpreted: a sample of the cases")
    rng = torch.Generator().manual_seed(k)
    shapes = [(40, 30), (17,), (2050,)]
    g, *ds = [[make_buffer(s, dtype, "contiguous", rng, on.device) for s in shapes] for _ in range(k + 1)]
    weights = np.linspace(-1, 1, k + 1).tolist()
    expected = reference.oracle_combine(g, ds, weights)
    before = clone(g)
    gradproj.combine_(g, ds, torch.tensor(weights, device=on.device, dtype=torch.float64))
    assert_combined_close(g, expected, [before, *ds], weights)


def test_row_of_weight_zero_is_not_read(on):
    g, good, bad = ([torch.full((1100,), v, device=on.device)] for v in (1.0, 2.0, NAN))
    gradproj.combine_(g, [bad, good], torch.tensor([1.0, 0.0, 0.5], device=on.device))
    assert torch.equal(g[0], torch.full_like(g[0], 2.0))
    gradproj.combine_(bad, [good, good], torch.tensor([0.0, 1.0, 1.0], device=on.device))
    assert torch.equal(bad[0], torch.full_like(g[0], 4.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_weights_leave_every_bit(on, dtype):
    """0 * inf is NaN: a coefficient of zero is not enough to leave a gradient alone."""
    values = torch.tensor([1.0, NAN, float("inf"), -0.0, 1e-7], dtype=dtype, device=on.device)
    g, d = [values.clone()], [torch.full_like(values, float("inf"))]
    gradproj.combine_(g, [d], torch.tensor([1.0, 0.0], device=on.device))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert torch.equal(g[0].view(bits), values.view(bits))


def test_all_weights_zero_and_no_direction_present(on):
    g = [torch.full((5,), NAN, device=on.device)]
    gradproj.combine_(g, [[None]], torch.tensor([0.0, 3.0], device=on.device))
    assert torch.equal(g[0], torch.zeros(5, device=on.device))


def test_direction_that_is_the_gradient_itself(on):
    """All rows of an element are loaded before it is stored."""
    for k in (1, 12):
        g = [torch.arange(2500.0, device=on.device)]
        gradproj.combine_(g, [g] * k, torch.full((k + 1,), 0.5, device=on.device))
        torch.testing.assert_close(g[0], torch.arange(2500.0, device=on.device) * (k + 1) / 2)


def test_bfloat16_is_rounded_once(on):
    """Ten steps of half a unit in the last place: rounding after each would lose them all."""
    unit = 2.0**-8
    g = [torch.ones(64, dtype=torch.bfloat16, device=on.device)]
    d = [torch.full((64,), unit / 2, device=on.device, dtype=torch.bfloat16)]
    gradproj.combine_(g, [d] * 8, torch.ones(9, device=on.device))
    assert torch.equal(g[0].float(), torch.full((64,), 1 + 4 * unit, device=on.device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_to_nearest_even_like_torch(on, dtype):
    """Every float16 or bfloat16 pattern, and sums that fall between two of them, overflow and subnormals included."""
    patterns = torch.arange(-(2**15), 2**15, 97 if on.slow else 1, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype).to(on.device)
    values = values[values.isfinite()]
    g, d = [values.clone()], [values.flip(0).contiguous()]
    gradproj.combine_(g, [d], torch.tensor([1.0, 0.37109375], device=on.device))
    expected = (values.float() + 0.37109375 * values.flip(0).float()).to(dtype)
    assert torch.equal(g[0], expected)


def test_versions_are_bumped(on):
    """Autograd must see the write, or a saved tensor is used after it changed."""
    g = [torch.ones(3, device=on.device)]
    before = g[0]._version
    gradproj.combine_(g, [[torch.ones(3, device=on.device)]], torch.tensor([1.0, 1.0], device=on.device))
    assert g[0]._version > before
