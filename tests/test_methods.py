import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import gradproj
from gradproj import methods, reference

METHODS = ["orthogonal", "conflict", ("mix", -0.7)]


def weights(on, gram, method, eps=0.0):
    rule = methods.parse(method, eps)
    return on.namespace.weights(torch.as_tensor(gram, dtype=torch.float64, device=on.device), *rule).cpu().numpy()


def random_gram(data, k, dependent=False):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    rows = rng.standard_normal((k + 1, 3 * k + 2)) + data.draw(st.sampled_from([-1.0, 0.0, 0.3]))
    if dependent and k > 1:
        for i in range(1, k):
            if data.draw(st.booleans()):
                mix = rng.integers(-1, 2, k + 1) * (np.arange(k + 1) > i)
                rows[i] = mix @ rows if mix.any() else 0
    return rows @ rows.T


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_matches_pinv_and_enumeration(on, data):
    if on.slow:
        hypothesis.assume(data.draw(st.integers(0, 4)) == 0)
    k, method = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(METHODS))
    gram = random_gram(data, k)
    expected = reference.oracle_weights(gram, method)
    np.testing.assert_allclose(weights(on, gram, method), expected, rtol=1e-6, atol=1e-8)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_dependent_directions(on, data):
    """The weights are not unique, the projected gradient is: compare <g', .> with every row and the length of g'."""
    if on.slow:
        hypothesis.assume(data.draw(st.integers(0, 4)) == 0)
    k, method = data.draw(st.integers(2, 6)), data.draw(st.sampled_from(METHODS[:2]))
    gram = random_gram(data, k, dependent=True)
    w, expected = weights(on, gram, method), reference.oracle_weights(gram, method)
    scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))[0]
    np.testing.assert_allclose(gram @ w, gram @ expected, atol=1e-6 * scale.max())
    assert w @ gram @ w == pytest.approx(expected @ gram @ expected, rel=1e-6, abs=1e-8 * gram[0, 0])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_conflict_satisfies_the_optimality_conditions(on, data):
    """Feasible, non-negative, and a direction is used only where its constraint is tight."""
    if on.slow:
        hypothesis.assume(data.draw(st.integers(0, 9)) == 0)
    k = data.draw(st.integers(2, 6 if on.slow else 40))
    gram = random_gram(data, k)
    w = weights(on, gram, "conflict")
    lengths = np.sqrt(np.diag(gram))
    inner = (gram @ w / lengths / lengths[0])[1:]
    assert w[0] == 1 and (w[1:] >= 0).all()
    assert (inner >= -1e-8).all()
    assert (np.abs(inner * w[1:] * lengths[1:] / lengths[0]) < 1e-7).all()


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("k", [1, 3])
def test_wildly_different_lengths(on, method, k):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((k + 1, 50))
    scale = np.array([1.0, 1e-6, 1e6, 1e-3][: k + 1])
    plain = weights(on, rows @ rows.T, method)
    scaled = weights(on, (rows * scale[:, None]) @ (rows * scale[:, None]).T, method)
    np.testing.assert_allclose(scaled * scale, plain, rtol=1e-6)


def test_one_conflicting_direction_is_a_gem(on):
    gram = np.array([[4.0, -1.0], [-1.0, 2.0]])
    assert weights(on, gram, "conflict").tolist() == [1.0, 0.5]
    assert weights(on, gram * np.array([[1, -1], [-1, 1]]), "conflict").tolist() == [1.0, 0.0]


def test_eps_is_added_to_every_length(on):
    gram = np.array([[4.0, -1.0, 1.0], [-1.0, 2.0, 0.0], [1.0, 0.0, 1.0]])
    np.testing.assert_allclose(weights(on, gram, "orthogonal", eps=2.0), [1.0, 0.25, -1 / 3], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gram_means_hands_off(on, method, k, bad):
    gram = np.eye(k + 1)
    gram[0, k] = gram[k, 0] = bad
    assert weights(on, gram, method).tolist() == [1.0] + [0.0] * k


def test_a_torchjd_style_weighting_plugs_in():
    """A weighting is any callable from a Gram to weights, in float64."""

    def mean(gram):
        return torch.full(gram.shape[:1], 1 / gram.shape[0], dtype=gram.dtype, device=gram.device)

    g, d = [torch.tensor([2.0, 0.0])], [torch.tensor([0.0, 4.0])]
    gradproj.project_(g, d, method=mean)
    assert g[0].tolist() == [1.0, 2.0]
