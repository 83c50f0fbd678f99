import hypothesis
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import strategies as st

import gradproj
from gradproj import reference
from gradproj.kernels import methods

METHODS = ["orthogonal", "conflict", "pcgrad", ("mix", -0.7)]
SOLVED = METHODS[:2]


def weights(on, gram, method, eps=0.0):
    rule = methods.parse(method, eps)
    return on.namespace.weights(torch.as_tensor(gram, dtype=torch.float64, device=on.device), *rule).cpu().numpy()


def random_rows(data, k, dependent=False):
    """[k + 1, n] that pull together, apart, or neither; ``dependent``: some are zeros, copies or sums of others."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    rows = rng.standard_normal((k + 1, 3 * k + 2)) + data.draw(st.sampled_from([-1.0, 0.0, 0.3]))
    rows[0] *= data.draw(st.sampled_from([1.0, -1.0]))
    if dependent:
        for i in range(1, k):
            if data.draw(st.booleans()):
                mix = rng.integers(-1, 2, k + 1) * (np.arange(k + 1) > i) * (rng.random(k + 1) < 3 / k)
                rows[i] = mix @ rows
    return rows


def random_gram(data, k, dependent=False):
    rows = random_rows(data, k, dependent)
    return rows @ rows.T


def few_if_slow(on, data, one_in):
    if on.slow:
        hypothesis.assume(data.draw(st.integers(1, one_in)) == 1)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=300)
def test_matches_pinv_and_enumeration(on, data):
    """Of dependent directions the weights are not unique, the projected gradient is: compare <g', .> with every row and
    the length of g'."""
    few_if_slow(on, data, 5)
    k, method, dependent = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(METHODS)), data.draw(st.booleans())
    gram = random_gram(data, k, dependent)
    w, expected = weights(on, gram, method), reference.oracle_weights(gram, method)
    scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram)))[0]
    np.testing.assert_allclose(gram @ w, gram @ expected, atol=1e-6 * scale.max())
    assert w @ gram @ w == pytest.approx(expected @ gram @ expected, rel=1e-6, abs=1e-8 * gram[0, 0])
    if not dependent:
        np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-8)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=80)
def test_conflict_is_the_nearest_feasible_gradient(on, data):
    """Up to 64 directions of any length, some dependent: feasible, weights >= 0, 0 where a constraint is not tight, and
    the same vector as scipy's non-negative least squares finds from the rows themselves."""
    few_if_slow(on, data, 10)
    k = data.draw(st.integers(2, 6 if on.slow else 64))
    rows = random_rows(data, k, data.draw(st.booleans()))
    scales = np.random.default_rng(k).uniform(-6, 6, k + 1)
    rows *= 10.0 ** scales[:, None]
    w = weights(on, rows @ rows.T, "conflict")
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(lengths > 0, lengths, 1.0)[:, None]
    projected = w @ rows / lengths[0]
    inner = unit[1:] @ projected
    assert w[0] == 1 and (w[1:] >= 0).all() and (w[1:][lengths[1:] == 0] == 0).all()
    assert (inner >= -1e-9).all()
    assert (np.abs(inner * w[1:] * lengths[1:] / lengths[0]) < 1e-9).all()
    solution, _ = scipy.optimize.nnls(unit[1:].T, -unit[0])
    np.testing.assert_allclose(projected, unit[0] + solution @ unit[1:], atol=1e-8)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60)
def test_conflict_with_nearly_dependent_directions(on, data):
    """Angles too small to resolve: weights are still feasible, and no conflict exceeds the angle (1e-4) at which a
    direction counts as dependent on others, however many are. Rounding must neither loop nor give up early."""
    few_if_slow(on, data, 10)
    k = data.draw(st.integers(2, 6 if on.slow else 64))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    rows = rng.standard_normal((k + 1, 2 * k))
    few = rng.standard_normal((3, 2 * k))
    rows[1:] = rows[1:] * 10.0 ** rng.uniform(-9, -1, (k, 1)) + few[rng.integers(0, 3, k)] * rng.choice([-1, 1], (k, 1))
    w = weights(on, rows @ rows.T, "conflict")
    lengths = np.linalg.norm(rows, axis=1)
    projected = w @ rows
    assert np.isfinite(w).all() and (w[1:] >= 0).all()
    assert (rows[1:] @ projected / lengths[1:] >= -1e-4 * np.sqrt(k) * lengths[0]).all()
    assert np.linalg.norm(projected) <= lengths[0] * (1 + 1e-6)


@pytest.mark.parametrize("k", [4, 64])
def test_orthogonal_removes_exactly_the_span(on, k):
    """2 k / 3 directions are sums of the others: what is left is what numpy's orthogonal complement leaves, no less."""
    rng = np.random.default_rng(k)
    basis = rng.standard_normal((max(1, k // 3), 200))
    rows = np.vstack([rng.standard_normal((1, 200)), rng.integers(-2, 3, (k, len(basis))) @ basis])
    w = weights(on, rows @ rows.T, "orthogonal")
    q, _ = np.linalg.qr(basis.T)
    np.testing.assert_allclose(w @ rows, rows[0] - q @ (q.T @ rows[0]), atol=1e-9)


@pytest.mark.parametrize("method", SOLVED)
@pytest.mark.parametrize("k", [1, 3])
def test_wildly_different_lengths(on, method, k):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((k + 1, 50))
    scale = np.array([1.0, 1e-6, 1e6, 1e-3][: k + 1])
    plain = weights(on, rows @ rows.T, method)
    scaled = weights(on, (rows * scale[:, None]) @ (rows * scale[:, None]).T, method)
    np.testing.assert_allclose(scaled * scale, plain, rtol=1e-6)


@pytest.mark.parametrize("method", SOLVED)
def test_duplicates_and_zeros_change_nothing(on, method):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3, 50)) - 1.0
    rows[0] *= -1
    more = np.vstack([rows, 3 * rows[1], 0 * rows[1], rows[2]])
    w, all_w = weights(on, rows @ rows.T, method), weights(on, more @ more.T, method)
    np.testing.assert_allclose(all_w @ more, w @ rows, atol=1e-12)
    assert all_w[4] == 0 and (w[1:] != 0).all()


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=50)
def test_one_direction_is_the_closed_form_to_the_bit(on, data):
    few_if_slow(on, data, 5)
    gram = random_gram(data, 1)
    eps = data.draw(st.sampled_from([0.0, 1e-8]))
    projection = -gram[0, 1] / (gram[1, 1] + eps)
    assert weights(on, gram, "orthogonal", eps).tolist() == [1.0, projection]
    assert weights(on, gram, "conflict", eps).tolist() == [1.0, projection if gram[0, 1] < 0 else 0.0]  # A-GEM


def test_surgery_between_all_rows(on):
    """Row 0 meets row 1 before row 2, and then no longer conflicts with row 2. Another order would end elsewhere."""
    rows = np.array([[-1.0, -0.1, 0.0], [1.0, 0.0, 0.0], [1.0, -0.5, 0.0]])
    w = weights(on, rows @ rows.T, "pcgrad")
    first = rows[0] - (rows[0] @ rows[1]) * rows[1]
    second = rows[1] - (rows[1] @ rows[0]) / (rows[0] @ rows[0]) * rows[0]
    third = rows[2] - (rows[2] @ rows[0]) / (rows[0] @ rows[0]) * rows[0]
    assert first @ rows[2] > 0 > rows[0] @ rows[2] and second @ rows[2] > 0 and third @ rows[1] > 0
    np.testing.assert_allclose(w @ rows, first + second + third, atol=1e-15)
    assert w[0] > 1


def test_eps_is_added_to_every_length(on):
    gram = np.array([[4.0, -1.0, 1.0], [-1.0, 2.0, 0.0], [1.0, 0.0, 1.0]])
    np.testing.assert_allclose(weights(on, gram, "orthogonal", eps=2.0), [1.0, 0.25, -1 / 3], rtol=1e-12)
    np.testing.assert_allclose(weights(on, gram, "pcgrad", eps=2.0), [1 + 1 / 6, 1.25, 1.0], rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gram_means_hands_off(on, method, k, bad):
    gram = np.eye(k + 1)
    gram[0, k] = gram[k, 0] = bad
    assert weights(on, gram, method).tolist() == [1.0] + [0.0] * k


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_parts_are_solved_each_by_itself(on, method, k):
    """A part that is not finite is left alone, and no other part is."""
    rng = np.random.default_rng(k)
    rows = rng.standard_normal((5, k + 1, 20)) - 0.5
    rows[:, 0] *= -1
    gram = rows @ rows.transpose(0, 2, 1)
    gram[3, k, k] = float("nan")
    w = weights(on, gram, method)
    assert w.shape == (5, k + 1) and w[3].tolist() == [1.0] + [0.0] * k
    np.testing.assert_allclose(w, reference.oracle_weights(gram, method), rtol=1e-6, atol=1e-9)
    for part, alone in zip(gram, w, strict=True):
        np.testing.assert_allclose(weights(on, part, method), alone, rtol=1e-12, atol=1e-15)
    assert weights(on, gram[:0], method).shape == (0, k + 1)


def test_many_parts_on_many_threads():
    """Enough work that the native op hands parts to several threads: every part is still solved, and as it is alone."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 17, 40)) - 0.3
    gram = torch.from_numpy(rows @ rows.transpose(0, 2, 1))
    backend = gradproj.backends()["cpu"]
    if not backend.available:
        pytest.skip(f"backend cpu: {backend.reason}")
    together = torch.ops.gradproj.weights(gram, "conflict", 0.0, 0.0)
    alone = torch.stack([torch.ops.gradproj.weights(part, "conflict", 0.0, 0.0) for part in gram])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("method", SOLVED)
def test_device_runs_its_bound_of_steps_and_gets_the_same(monkeypatch, method):
    """Where asking would synchronise, nothing is asked: every loop of the torch operations runs in full."""
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((4, 21, 60)) - 0.3
    rows[:, 0] *= -1
    gram = torch.from_numpy(rows @ rows.transpose(0, 2, 1))
    stopped = methods.solve(gram, method)
    monkeypatch.setattr(methods, "_may_ask", lambda device: False)
    assert torch.equal(methods.solve(gram, method), stopped)


def test_opcheck_of_parts(on):
    gram = torch.eye(3, dtype=torch.float64, device=on.device).expand(2, 3, 3).contiguous()
    torch.library.opcheck(on.namespace.weights.default, (gram, "orthogonal", 0.0, 0.0))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 0), (2, 2, 3), (1, 1, 2, 2)])
def test_what_is_not_a_gram_is_refused(on, shape):
    with pytest.raises((RuntimeError, ValueError), match=r"gram must have shape"):
        weights(on, np.zeros(shape), "conflict")


def mean(gram):
    """A weighting is any callable from a Gram to weights, in float64."""
    return torch.full(gram.shape[:1], 1 / gram.shape[0], dtype=gram.dtype, device=gram.device)


def test_a_callable_is_asked_for_every_part():
    seen = []

    def longest(gram):
        seen.append(gram)
        return (gram.diagonal() == gram.diagonal().max()).float()

    gram = torch.stack([torch.diag(torch.tensor(d)) for d in ([2.0, 1.0, 3.0], [5.0, 1.0, float("nan")])]).double()
    assert methods.apply_weighting(longest, gram).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert all(part.shape == (3, 3) and part.dtype == torch.float64 and part.isfinite().all() for part in seen)
    assert methods.apply_weighting(mean, gram[:0]).shape == (0, 3)


def test_weights_that_are_not_finite_touch_nothing():
    """A weighting that divides by zero used to fill the gradient with NaN."""
    g, d = [torch.tensor([2.0, 0.0])], [torch.tensor([0.0, 4.0])]
    info = gradproj.project_(g, d, method=lambda gram: gram[0] / gram[0, 1])
    assert g[0].tolist() == [2.0, 0.0] and not info.applied
