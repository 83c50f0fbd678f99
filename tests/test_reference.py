"""The naive algorithm against the oracle: what everything else is compared with must itself be right."""

import numpy as np
import pytest
import torch

from gradproj import reference


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
