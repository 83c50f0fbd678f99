"""The laboratory's K-FAC reference against the Kronecker product of its moments written out."""

import copy

import pytest
import torch

from laboratory import kfac, tiny_lm
from laboratory import small_texts as data


def test_kfac_scales_updates_as_its_formula_says():
    """Against the Kronecker product written out; the mean over all weights of what is lost is the damping."""
    torch.manual_seed(0)
    model = tiny_lm.TinyLM(16, 2, 2)
    reference = kfac.Kfac(model, 0.3)
    windows = data.pretraining_batch(4, torch.Generator().manual_seed(0))
    layer, seen = model.blocks[1].merge, {}
    handles = [
        layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0].detach(), y=out)),
        layer.register_forward_hook(lambda *_: seen["y"].retain_grad()),
    ]
    with reference.capture():
        tiny_lm.loss(model, windows).backward()
    for handle in handles:
        handle.remove()
    lost = 1 - torch.cat([k.flatten() for k in reference.kept])
    assert lost.mean().item() == pytest.approx(0.3, abs=1e-4)
    x = torch.cat([seen["x"], torch.ones(*seen["x"].shape[:-1], 1)], -1).flatten(0, 1).double()
    g = seen["y"].grad.flatten(0, 1).double()
    curvature = torch.kron(g.T @ g, x.T @ x)
    i = reference.layers.index(layer)
    a, s = (torch.linalg.eigvalsh(m).clamp(min=0) for m in (x.T @ x, g.T @ g))
    kept = reference.kept[i].double()
    c = (torch.outer(s, a) * kept)[-1, -1] / (1 - kept[-1, -1])
    update = 0.01 * torch.randn(layer.out_features, layer.in_features + 1, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.solve(torch.eye(len(curvature)) + curvature / c, update.double().flatten()).view_as(update)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += update[:, :-1]
        layer.bias += update[:, -1]
    reference.scale()
    torch.testing.assert_close((layer.weight - before).double(), expected[:, :-1], rtol=2e-3, atol=2e-6)


def test_elastic_scales_the_distance_from_the_start():
    """Of two steps along one direction that is scaled by k, K-FAC keeps k + k, an elastic pull k^2 + k."""
    torch.manual_seed(0)
    windows = data.pretraining_batch(4, torch.Generator().manual_seed(0))
    moved = {}
    for elastic in (False, True):
        model = tiny_lm.TinyLM(16, 2, 2)
        model.load_state_dict(moved.setdefault("start", copy.deepcopy(model.state_dict())))
        reference = kfac.Kfac(model, 0.3, elastic)
        with reference.capture():
            tiny_lm.loss(model, windows).backward()
        layer, (left, right), kept = reference.layers[0], reference.bases[0], reference.kept[0]
        j = (kept[-1] - 0.5).abs().argmin()  # neither held nor free
        k, start = kept[-1, j], layer.weight.detach().clone()
        step = torch.outer(left[:, -1], right[:, j])
        for _ in range(2):
            with torch.no_grad():
                layer.weight += step[:, :-1]
                layer.bias += step[:, -1]
            reference.scale()
        expected = (k * k + k if elastic else 2 * k) * step[:, :-1]
        torch.testing.assert_close(layer.weight.detach() - start, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 0.6, 1.0])
def test_damping_that_no_weights_can_give_is_refused(damping):
    with pytest.raises(
        ValueError, match="K-FAC: damping must be above 0 and below the share of weights with curvature"
    ):
        kfac.kept_shares([torch.tensor([0.0, 0.0, 1.0, 2.0])], damping)
