"""Weightings of TorchJD as methods: the projection equals TorchJD's own aggregator on the concatenated Jacobian."""

import pytest
import torch

import gradproj
from gradproj import reference
from training import loss, model_and_batches, parameters, projected

aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")

SHAPES = [(4, 5), (7,), (), (2, 3, 2)]
AGGREGATORS = {
    "UPGrad": aggregation.UPGrad,
    "MGDA": aggregation.MGDA,
    "DualProj": aggregation.DualProj,
    "AlignedMTL": aggregation.AlignedMTL,
    "IMTLG": aggregation.IMTLG,
}


def conflicting_rows(k, dtype=torch.float64, device="cpu", seed=0):
    """k + 1 lists; the directions lean against the gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES] for _ in range(k + 1)]
    for d in rows[1:]:
        for t, g in zip(d, rows[0], strict=True):
            t -= 0.4 * g
    return [[t.to(device, dtype) for t in row] for row in rows]


def jacobian(rows):
    return torch.stack([reference.flatten(row) for row in rows])


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_projection_equals_the_aggregator(on, name, k):
    aggregator = AGGREGATORS[name]()
    rows = conflicting_rows(k, device=on.device)
    expected = aggregator(jacobian(rows))
    info = gradproj.project_(*rows, method=aggregator.gramian_weighting)
    torch.testing.assert_close(reference.flatten(rows[0]), expected, rtol=1e-9, atol=1e-12)
    assert info.weights.dtype == torch.float64 and info.weights.device == info.gram.device


def test_pcgrad_in_our_order_equals_the_aggregator(on, monkeypatch):
    """Their loop with the shuffle taken out is ours."""
    rows = conflicting_rows(5, device=on.device)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    expected = aggregation.PCGrad()(jacobian(rows))
    info = gradproj.project_(*rows, method="pcgrad")
    torch.testing.assert_close(reference.flatten(rows[0]), expected, rtol=1e-9, atol=1e-12)
    assert info.weights[0] > 1


def test_conflict_is_dual_projection_of_the_gradient_alone(on):
    """TorchJD's DualProj with all preference on row 0 and no regularisation solves the problem of "conflict", with one
    more constraint, that g' does not oppose g, which holds by itself."""
    from torchjd.linalg import QuadprogProjector

    rows = conflicting_rows(5, device=on.device)
    preference = torch.eye(6, dtype=torch.float64, device=on.device)[0]
    projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-14)
    expected = aggregation.DualProj(preference, projector=projector)(jacobian(rows))
    gradproj.project_(*rows, method="conflict")
    torch.testing.assert_close(reference.flatten(rows[0]), expected, rtol=1e-6, atol=1e-8)


def test_non_finite_gram_is_not_shown_to_the_weighting():
    """quadprog refuses NaN with an exception; a projection must leave the gradient alone instead."""
    rows = conflicting_rows(2)
    rows[1][0][0, 0] = float("nan")
    before = reference.flatten(rows[0])
    info = gradproj.project_(*rows, method=aggregation.UPGradWeighting())
    assert torch.equal(reference.flatten(rows[0]), before) and not info.applied


def test_optimizer_takes_a_weighting():
    """End to end: the gradient that the inner optimizer sees is the aggregator's."""
    model, x = model_and_batches(dtype=torch.float64)
    opt = projected(torch.optim.SGD(model.parameters(), lr=1.0), 2, aggregation.UPGradWeighting())
    losses = [lambda x=x, sign=sign: sign * loss(model, x) for x, sign in zip(x, (1.0, -0.5, -0.3), strict=False)]
    rows = [torch.autograd.grad(value(), list(model.parameters())) for value in losses]
    before = parameters(model)
    for value in losses[1:]:
        with opt.protect():
            value().backward()
    losses[0]().backward()
    opt.step()
    moved = reference.flatten([a - p.detach() for a, p in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved, aggregation.UPGrad()(jacobian(rows)))
