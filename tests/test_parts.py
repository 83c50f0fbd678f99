"""Columns in several parts, each projected by itself in the same passes."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from cases import assert_combined_close, assert_gram_close, clone, make_buffer, rows
from gradproj import reference
from gradproj.kernels import methods
from gradproj.rows import call as calls
from gradproj.rows import functional


def of_part(row, part, p):
    return [t for t, q in zip(row, part, strict=True) if q == p]


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_gram_and_combine_match_float64_oracles(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions = data.draw(rows(device=on.device, max_directions=3, max_buffers=3 if on.slow else 5))
    part = data.draw(st.lists(st.integers(0, 2), min_size=len(grads), max_size=len(grads)))
    lists = [grads, *directions]
    gram = functional.local_gram(lists, None, None, part, 3)
    assert gram.shape == (3, len(lists), len(lists))
    values = st.sampled_from([0.0, 1.0, -0.5, 2.25, 1e-3])
    weights = torch.tensor([[data.draw(values) for _ in lists] for _ in range(3)], dtype=torch.float64)
    written = clone(grads)
    calls.combine(calls.unpack("combine_", [written, *directions], part, 3), weights.to(on.device))
    for p in range(3):
        mine = [of_part(row, part, p) for row in lists]
        assert_gram_close(gram[p], reference.oracle_gram(*mine))
        expected = reference.oracle_combine(mine[0], mine[1:], weights[p].tolist())
        assert_combined_close(of_part(written, part, p), expected, mine, weights[p].tolist())


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_parts_are_projected_each_by_itself(on, method):
    rng = torch.Generator().manual_seed(1)
    shapes, part = [(40,), (5, 3), (70,), (300,)], [1, 0, 1, 3]
    g, *ds = [[make_buffer(s, torch.float32, "contiguous", rng, on.device) for s in shapes] for _ in range(3)]
    rule, together = methods.parse(method), clone(g)
    info = functional.project_rows(together, ds, rule, None, None, part, 4)
    assert info.gram.shape == (4, 3, 3) and info.weights.shape == (4, 3)
    assert info.cosine.shape == (4, 2) and info.removed.shape == (4,)
    assert info.weights[2].tolist() == [1.0, 0.0, 0.0]  # no column belongs to part 2
    for p in (0, 1, 3):
        expected = reference.oracle_project(of_part(g, part, p), [of_part(d, part, p) for d in ds], method)
        for a, b in zip(of_part(together, part, p), expected, strict=True):
            np.testing.assert_allclose(a.cpu().numpy().reshape(-1), b, rtol=1e-4, atol=1e-5)


def test_a_part_that_is_not_finite_leaves_only_itself_alone(on):
    g = [torch.tensor([1.0, 2.0], device=on.device), torch.tensor([1.0, float("inf")], device=on.device)]
    d = [torch.tensor([1.0, 0.0], device=on.device)] * 2
    info = functional.project_rows(g, [d], methods.parse("orthogonal"), None, None, [0, 1], 2)
    assert g[0].tolist() == [0.0, 2.0] and g[1].tolist() == [1.0, float("inf")]
    assert info.applied and not info.finite


def test_kept_gram_of_every_part(on):
    rng = torch.Generator().manual_seed(2)
    lists = [[make_buffer((90,), torch.float32, "contiguous", rng, on.device) for _ in range(2)] for _ in range(3)]
    full = functional.local_gram(lists, None, None, [1, 0], 2)
    again = functional.local_gram(lists, None, full[:, 1:, 1:], [1, 0], 2)
    torch.testing.assert_close(full, again, rtol=1e-6, atol=1e-9)
