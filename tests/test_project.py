import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import gradproj
from cases import clone, make_buffer, rows
from gradproj import reference
from gradproj.kernels import methods
from gradproj.rows import call as calls
from gradproj.rows import functional

METHODS = ["orthogonal", "conflict", ("mix", 0.3)]


def flat(buffers):
    return np.concatenate([np.zeros(0), *(b.double().cpu().reshape(-1).numpy() for b in buffers if b is not None)])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_matches_float64_oracle(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions = data.draw(rows(max_directions=4, device=on.device, max_buffers=3 if on.slow else 5))
    method = data.draw(st.sampled_from(METHODS))
    hypothesis.assume(well_posed(grads, directions))
    expected = reference.oracle_project(grads, directions, method)
    written = clone(grads)
    info = gradproj.project_(written, *directions, method=method)
    assert info.backend in (on.backend, "none")
    total = flat(grads)
    wanted = np.concatenate([np.zeros(0), *(e for e in expected if e is not None)])
    coarsest = max([torch.finfo(g.dtype).eps for g in grads if g is not None], default=0.0)
    scale = np.linalg.norm(total) + np.linalg.norm(wanted)
    assert np.linalg.norm(flat(written) - wanted) <= (coarsest + 3e-5) * scale


def well_posed(grads, directions):
    """Nearly dependent directions amplify the Gram's rounding: those cases have tests of their own."""
    kept = [i for i, g in enumerate(grads) if g is not None]
    gram = reference.oracle_gram(*[[d[i] for i in kept] for d in directions])
    lengths = np.sqrt(np.diag(gram))
    if not (lengths > 0).all():
        return len(directions) == 1
    return np.linalg.eigvalsh(gram / np.outer(lengths, lengths))[0] > 1e-2


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_result_is_orthogonal(on, k):
    rng = torch.Generator().manual_seed(k)
    shapes = [(30, 20), (77,), ()] if on.slow else [(300, 200), (7,), (), (1234,)]
    g, *ds = [[make_buffer(s, torch.float32, "contiguous", rng, on.device) for s in shapes] for _ in range(k + 1)]
    gradproj.project_(g, *ds)
    after = reference.oracle_gram(g, *ds)
    lengths = np.sqrt(np.diag(after))
    assert (np.abs(after[0, 1:]) <= 2e-6 * lengths[0] * lengths[1:]).all()


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("scale", [1e-12, 3e-5, 1e9])
def test_length_of_the_direction_changes_nothing(on, scale, eps):
    """With |d| = 3e-5 the usual eps of 1e-8 leaves a cosine of 0.04 behind, as it does in the naive algorithm."""
    rng = torch.Generator().manual_seed(0)
    g, d = (make_buffer((400,), torch.float32, "contiguous", rng, on.device) for _ in range(2))
    d = d / d.norm() * scale
    naive = g.clone()
    gradproj.project_([g], [d], eps=eps)
    if eps:
        reference.project_([naive], [d], eps=eps)
        torch.testing.assert_close(g, naive, rtol=1e-4, atol=1e-5)
    else:
        cosine = (g.double() @ d.double()) / (g.double().norm() * d.double().norm())
        assert abs(cosine.item()) < 1e-6


def doubled(gram):
    """A callable gets the Gram and gives weights."""
    assert gram.tolist() == [[5.0, 3.0], [3.0, 9.0]]
    return gram.new_tensor([2.0, 1.0])


@pytest.mark.parametrize(
    ("g", "d", "method", "expected", "gram", "weights"),
    [([[3.0, 4.0]], [[2.0, 0.0]], "orthogonal", [[0.0, 4.0]], [[25.0, 6.0], [6.0, 4.0]], [1.0, -1.5]),
     ([[1.0, 2.0]], [[0.0, 0.0]], "orthogonal", [[1.0, 2.0]], [[5.0, 0.0], [0.0, 0.0]], [1.0, 0.0]),
     ([[1.0, 2.0]], [[1.0, 0.0]], "conflict", [[1.0, 2.0]], [[5.0, 1.0], [1.0, 1.0]], [1.0, 0.0]),  # helpful
     ([[1.0, 2.0]], [[-1.0, 0.0]], "conflict", [[0.0, 2.0]], [[5.0, -1.0], [-1.0, 1.0]], [1.0, 1.0]),
     ([[1.0, 2.0]], [[3.0, 0.0]], doubled, [[5.0, 4.0]], [[5.0, 3.0], [3.0, 9.0]], [2.0, 1.0]),
     # Under a None nothing can be acted on: counting the direction's part there would leave a conflict behind.
     ([[1.0, 1.0], None], [[1.0, 0.0], [100.0]], "orthogonal",
      [[0.0, 1.0], None], [[2.0, 1.0], [1.0, 1.0]], [1.0, -1.0]),
     ([None], [[1.0, 1.0]], "orthogonal", [None], [[0.0, 0.0], [0.0, 0.0]], [1.0, 0.0])],
    ids=["orthogonal", "of zeros", "no conflict", "conflict", "callable", "None in places", "None"],
)  # fmt: skip
def test_what_happened_by_hand(on, g, d, method, expected, gram, weights):
    rows = [[None if t is None else torch.tensor(t, device=on.device) for t in row] for row in (g, d)]
    before = clone(rows[0])
    info = gradproj.project_(*rows, method=method)
    assert [None if t is None else t.tolist() for t in rows[0]] == expected
    assert info.gram.tolist() == gram and info.weights.tolist() == weights
    assert info.applied == (expected != g) and info.finite
    (gg, gd), (_, dd) = gram
    assert info.cosine.tolist() == pytest.approx([gd / (gg * dd) ** 0.5 if gg * dd else float("nan")], nan_ok=True)
    moved = np.linalg.norm(flat(rows[0]) - flat(before))
    assert info.removed.item() == pytest.approx(moved / gg**0.5 if moved else 0.0)
    if g != [None]:
        assert info.backend == on.backend
        assert all(
            t.device.type == on.device for t in (info.gram, info.weights, info.cosine, info.removed, info.applied)
        )


def test_a_callable_that_gives_something_else_is_named(on):
    g, d = [torch.tensor([1.0, 2.0], device=on.device)], [torch.tensor([3.0, 0.0], device=on.device)]
    with pytest.raises(ValueError, match=r"must return a tensor of shape \(2,\), got \(1,\)"):
        gradproj.project_(g, d, method=lambda gram: gram[0, :1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "direction"])
@pytest.mark.parametrize(
    "method", [*METHODS, lambda gram: gram.new_ones(2)], ids=["orthogonal", "conflict", "mix", "call"]
)
def test_non_finite_input_leaves_every_bit(on, bad, where, method):
    g, d = torch.randn(300, device=on.device), torch.randn(300, device=on.device)
    (g if where == "gradient" else d)[17] = bad
    before = g.clone()
    info = gradproj.project_([g], [d], method=method)
    assert torch.equal(g.view(torch.int32), before.view(torch.int32))
    assert not info.applied and not info.finite and info.weights.tolist() == [1.0, 0.0]


def test_dependent_directions_remove_their_span(on):
    rng = torch.Generator().manual_seed(2)
    g, a, b = ([make_buffer((500,), torch.float32, "contiguous", rng, on.device)] for _ in range(3))
    once = clone(g)
    gradproj.project_(once, a, b)
    gradproj.project_(g, a, b, a, [2 * b[0]], [torch.zeros_like(a[0])])
    torch.testing.assert_close(g[0], once[0], rtol=1e-5, atol=1e-5)


def test_complex_gradient(on):
    rng = torch.Generator().manual_seed(3)
    g, d = (torch.randn(6, 4, dtype=torch.complex64, generator=rng).to(on.device) for _ in range(2))
    gradproj.project_([g], [d])
    inner = torch.view_as_real(g).double().flatten() @ torch.view_as_real(d).double().flatten()
    assert abs(inner.item()) < 1e-5


def test_gradients_in_the_training_graph_are_left_out_of_autograd(on):
    g = torch.ones(3, device=on.device, requires_grad=True)
    gradproj.project_([g.detach()], [torch.ones(3, device=on.device)])
    leaf = torch.ones(3, device=on.device, requires_grad=True)
    gradproj.project_([leaf], [torch.tensor([1.0, 0.0, 0.0], device=on.device)])
    assert leaf.grad_fn is None and leaf.tolist() == [0.0, 1.0, 1.0]


def test_clone_in_front_of_the_op_under_compile(on, inductor):
    """Inductor may elide the clone, so that a direction is the gradient's own memory (pytorch#198031)."""

    def step(x):
        g = x.clone()
        gradproj.combine_([g], [[x]], torch.tensor([1.0, -0.25], dtype=torch.float64, device=x.device))
        return g, x * 1

    x = torch.arange(1300.0, device=on.device)
    g, same = torch.compile(step)(x)
    torch.testing.assert_close(g, 0.75 * torch.arange(1300.0, device=on.device))
    torch.testing.assert_close(same, torch.arange(1300.0, device=on.device))


def test_fused_form_of_the_naive_algorithm():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    losses = (lambda m: m(x).square().mean(), lambda m: (m(y) - 1).abs().mean())
    reference.orthogonal_gradient_projection(model, *losses)
    expected = [p.grad.clone() for p in model.parameters()]
    info = gradproj.orthogonal_gradient_projection(model, *losses)
    assert info.applied
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)
    shared = model(x)  # losses that share a graph
    gradproj.orthogonal_gradient_projection(model, shared.square().mean(), shared.abs().mean())
    assert all(p.grad is not None for p in model.parameters())


@pytest.fixture
def two_devices(monkeypatch):
    """Columns of odd and of even length as if they were on two devices."""
    monkeypatch.setattr(calls, "_device", lambda t: t.numel() % 2)
    monkeypatch.setattr(calls, "spans_devices", lambda call: True)


@pytest.mark.parametrize(
    "method", [*METHODS, lambda gram: gram[0] / gram[0, 0]], ids=["orthogonal", "conflict", "mix", "call"]
)
@pytest.mark.parametrize("known", [False, True])
def test_columns_on_several_devices(on, two_devices, method, known):
    """Each device has its own passes, the Grams add up, and every device gets the weights."""
    rng = torch.Generator().manual_seed(4)
    g, *ds = [
        [make_buffer((n,), torch.float32, "contiguous", rng, on.device) for n in (40, 7, 33, 2)] for _ in range(3)
    ]
    expected = reference.oracle_project(g, ds, method) if not callable(method) else None
    gram = reference.oracle_gram(g, *ds)
    info = functional.project_rows(g, ds, methods.parse(method), None, gradproj.gram(*ds) if known else None)
    torch.testing.assert_close(info.gram.cpu(), torch.from_numpy(gram), rtol=1e-6, atol=1e-5)
    for a, b in zip(g, expected or (), strict=bool(expected)):
        np.testing.assert_allclose(a.cpu().numpy(), b, rtol=1e-4, atol=1e-5)


def test_a_device_that_refuses_leaves_the_others_unwritten(on, two_devices):
    g = [torch.ones(4, device=on.device), torch.ones(3, dtype=torch.int64, device=on.device)]
    with pytest.raises(TypeError, match=r"grads\[1\] has dtype torch.int64 \(shape \(3,\)"):
        gradproj.project_(g, [torch.ones(4, device=on.device), torch.ones(3, device=on.device)])
    assert g[0].eq(1).all()


@pytest.mark.gpu
def test_cpu_and_gpu_in_one_call():
    rng = torch.Generator().manual_seed(5)
    rows = [[make_buffer((n,), torch.float32, "contiguous", rng) for n in (40, 7, 33)] for _ in range(3)]
    expected = clone(rows[0])
    gradproj.project_(expected, *rows[1:])
    g, *ds = [[t.to(device) for t, device in zip(row, ("cuda", "cpu", "cuda"), strict=True)] for row in rows]
    info = gradproj.project_(g, *ds)
    assert info.gram.device.type == "cuda"
    for a, b in zip(g, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)
