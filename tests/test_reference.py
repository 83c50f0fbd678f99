"""The naive algorithm against the oracle: what everything else is compared with must itself be right."""

import numpy as np
import pytest
import torch
from torch import nn

from gradproj import NullSpace, reference


def test_naive_projection_matches_the_oracle():
    torch.manual_seed(0)
    shapes = [(4, 5), (), (0, 2), (2, 3, 2)]
    g, d = ([torch.randn(s) for s in shapes] for _ in range(2))
    expected = reference.oracle_project(g, [d], eps=1e-8)
    reference.project_(g, d)
    for a, b in zip(g, expected, strict=True):
        np.testing.assert_allclose(a.double().reshape(-1).numpy(), b, rtol=1e-5, atol=1e-6)


def test_oracle_by_hand():
    g, a, b = ([torch.tensor([x, y, z])] for x, y, z in [(1.0, 2.0, 3.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 2.0)])
    assert reference.oracle_gram(g, a, b).tolist() == [[14, -1, 6], [-1, 1, 0], [6, 0, 4]]
    assert reference.oracle_project(g, [a, b])[0].tolist() == pytest.approx([0, 2, 0])
    assert reference.oracle_project(g, [a, b], "conflict")[0].tolist() == pytest.approx([0, 2, 3])
    assert reference.oracle_project(g, [a, b], ("mix", 0.5))[0].tolist() == pytest.approx([0.5, 2, 4])


def test_naive_loop_refuses_what_would_shift_its_slices():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="every parameter needs a gradient"):
        reference.orthogonal_gradient_projection(
            model, lambda m: m[0](torch.ones(2)).sum(), lambda m: m[1](torch.ones(2)).sum()
        )


class Attention(nn.Module):
    """q, k and v have the same input; some layers have a bias."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(20, 12, bias=False) for _ in range(3))
        self.out, self.last = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.out(torch.tanh(self.q(x) * self.k(x)) + self.v(x))))


@pytest.mark.parametrize("sketched", [False, True], ids=["exact", "sketched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_null_space_is_the_naive_one(dtype, sketched, monkeypatch):
    """All ranks, spans and targets, and the learning rates of the layers."""
    torch.manual_seed(0)
    model = Attention().to(dtype)
    dimensions = torch.linalg.qr(torch.randn(20, 20)).Q * 0.7 ** torch.arange(20.0)  # a spectrum that falls
    batches = [(torch.randn(2, 9, 20) @ dimensions.T).to(dtype) for _ in range(3)]

    def loss(model, x):
        return model(x)[:, :-1].square().sum()  # the last token does not count

    naive = reference.null_space(model, loss, batches, share=0.3)
    model.zero_grad()
    if sketched:  # more than 16 inputs; ten of their directions are more than are kept
        monkeypatch.setattr("gradproj.nullspace.moments.WIDE", 16)
        monkeypatch.setattr("gradproj.nullspace.moments.SKETCH", 10)
    protection = NullSpace(model, share=0.3)
    with protection.capture():
        for x in batches:
            loss(model, x).backward()
    ranks = {name: basis.rank for name, basis in protection.bases.items()}
    assert ranks == {name: basis.basis.shape[1] for name, basis in naive.items()} and min(ranks.values()) > 0
    exact = 1e-10 if dtype == torch.float64 and not sketched else 1e-3 if not sketched else 0.02
    for name, (basis, target, left) in naive.items():
        mine = protection.bases[name]
        vectors, products = mine.vectors.double(), mine.target.double()
        assert (vectors @ vectors.T - basis @ basis.T).norm() < exact * ranks[name] ** 0.5
        assert (products @ vectors.T - target @ basis.T).norm() < exact * target.norm()
        assert mine.left == pytest.approx(left, rel=max(exact, 1e-6) * 10)

    left = [naive[layer.name].left for layer in protection.matrices]
    weights = [layer.numel for layer in protection.matrices]
    rates = reference.damped_rates(left, weights, 0.3)
    assert sum((1 - r) * w for r, w in zip(rates, weights, strict=True)) / sum(weights) == pytest.approx(0.3)
    expected = {id(layer.weight): 0.1 * rate for layer, rate in zip(protection.matrices, rates, strict=True)}
    for group in protection.param_groups(lr=0.1, damping=0.3):
        for p in group["params"]:  # each group has the mean rate of its layers
            if id(p) in expected:
                assert group["lr"] == pytest.approx(expected[id(p)], rel=0.15)
