"""What people look at: opt.last."""

import pytest
import torch

from training import gradients, loss, model_and_batches, protect, stored


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def test_last_says_what_happened(wrapping):
    model, x = model_and_batches()
    opt, protected = wrapping(model, 2)
    for batch in x[:2]:
        protect(model, protected, batch)
    loss(model, x[2]).backward()
    before, rows = flat(gradients(model)), [flat(d.values()) for d in stored(protected)]
    opt.step()
    after, last = flat(gradients(model)), protected.last
    for k, d in enumerate(rows):
        assert last.cosine[k].item() == pytest.approx(torch.cosine_similarity(before, d, dim=0).item(), abs=1e-6)
    assert last.removed.item() == pytest.approx(((after - before).norm() / before.norm()).item(), abs=1e-5)
    rebuilt = last.weights[0] * before + last.weights[1] * rows[0] + last.weights[2] * rows[1]
    torch.testing.assert_close(rebuilt, after, rtol=1e-5, atol=1e-6)
    assert last.applied and last.finite
