"""Where the rank goes, and the learning rates of the layers."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradproj.nullspace import allocation
from gradproj.nullspace.allocation import Curvature


def layer(scale, values, outputs, inputs, trace=None):
    values = torch.tensor(values, dtype=torch.float64)
    return Curvature(scale, values, float(values.sum()) if trace is None else trace, outputs, inputs)


def test_the_largest_curvature_over_all_layers_first():
    layers = [layer(1.0, [5.0, 3.0, 1.0], 10, 10), layer(10.0, [1.0, 0.2], 10, 10)]  # curvatures 5 3 1, 10 2
    assert allocation.ranks(layers, 0.05) == [0, 1]
    assert allocation.ranks(layers, 0.10) == [1, 1]
    assert allocation.ranks(layers, 0.20) == [2, 2]
    assert allocation.ranks(layers, 0.99) == [3, 2]  # never one without curvature


@given(st.data())
def test_share_is_never_exceeded(data):
    sizes = st.integers(1, 30)
    layers = []
    for _ in range(data.draw(st.integers(1, 6))):
        outputs, inputs = data.draw(sizes), data.draw(sizes)
        values = sorted(data.draw(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=inputs)), reverse=True)
        layers.append(layer(data.draw(st.floats(0.0, 10.0)), values, outputs, inputs))
    share = data.draw(st.floats(0.01, 0.99))
    ranks = allocation.ranks(layers, share)
    fixed = sum(r * x.outputs for r, x in zip(ranks, layers, strict=True))
    assert fixed <= share * sum(x.outputs * x.inputs for x in layers) + 1e-9
    kept = [x.scale * float(x.values[r - 1]) for r, x in zip(ranks, layers, strict=True) if r]
    assert all(c > 0 for c in kept)


@given(
    st.lists(st.tuples(st.floats(1e-9, 1e3), st.integers(1, 10**6)), min_size=1, max_size=60),
    st.floats(0.0, 0.9),
)
def test_the_mean_of_what_is_slowed_is_damping(layers, damping):
    left, weights = zip(*layers, strict=True)
    rates = allocation.rates(left, weights, damping)
    mean = sum((1 - m) * w for m, w in zip(rates, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(damping, abs=1e-6)
    assert len(set(rates)) <= allocation.STEPS and all(0 < m <= 1 + 1e-12 for m in rates)
    order = sorted(range(len(left)), key=left.__getitem__)
    assert all(rates[a] >= rates[b] - 1e-9 for a, b in itertools.pairwise(order))


def test_no_damping_is_exactly_one():
    assert allocation.rates([1.0, 2.0], [3, 4], 0.0) == [1.0, 1.0]


def test_where_nothing_is_left_nothing_is_slowed():
    """All that was captured of some layers, or of all, may be kept."""
    assert allocation.rates([1.0, 0.0], [1, 3], 0.6) == pytest.approx([0.4, 1.0])
    assert allocation.rates([0.0, 0.0], [1, 1], 0.3) == [1.0, 1.0]


@pytest.mark.parametrize("damping", [1.0, -0.1])
def test_refused(damping):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        allocation.rates([1.0, 0.0], [1, 1], damping)
