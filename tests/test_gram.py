import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import gradproj
from cases import DTYPES, assert_gram_close, make_buffer, rows
from gradproj import reference
from gradproj.rows import functional


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=120)
def test_matches_float64_oracle(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions = data.draw(rows(3 if on.slow else 8, max_buffers=3 if on.slow else 5, device=on.device))
    assert_gram_close(gradproj.gram(grads, *directions), reference.oracle_gram(grads, *directions))


@pytest.mark.parametrize("num_rows", [*range(1, 10), 12, 17, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(on, num_rows, dtype):
    """Above nine, in more than one pass."""
    sample = [(1, torch.float32), (2, torch.bfloat16), (4, torch.float32), (9, torch.float16), (12, torch.float32)]
    if on.slow and (num_rows, dtype) not in sample:
        pytest.skip("interpreted: a sample of the cases")
    rng = torch.Generator().manual_seed(num_rows)
    shapes = [(40, 30), (17,), (2050,)]
    lists = [[make_buffer(s, dtype, "contiguous", rng, on.device) for s in shapes] for _ in range(num_rows)]
    assert_gram_close(gradproj.gram(*lists), reference.oracle_gram(*lists))


def test_error_does_not_grow_with_length(on):
    """Sums in float32 all the way would be off by 1e-4 here: same sign, four million terms."""
    n = 20_000 if on.slow else 4_000_000
    g = torch.rand(n, generator=torch.Generator().manual_seed(0)).to(on.device)
    d = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(on.device)
    assert_gram_close(gradproj.gram([g], [d]), reference.oracle_gram([g], [d]), 1e-7)


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_elements_round_the_same_way(on, k, dtype):
    """Every addition to a float32 sum may then be off in the same direction; 128 in a row were off by 2e-6."""
    n = 4096 if on.slow else 65_536
    rng = torch.Generator().manual_seed(k)
    for _ in range(3 if on.slow else 20):
        values = (torch.rand(k + 1, generator=rng) + 0.5).tolist()
        g, *ds = [[torch.full((n,), v, device=on.device)] for v in values]
        rows = [g, *([t.to(dtype) for t in d] for d in ds)]
        expected = reference.oracle_gram(*rows)
        assert_gram_close(gradproj.gram(*rows), expected)
        gram_dd = torch.from_numpy(expected[1:, 1:]).to(on.device)
        assert_gram_close(functional.local_gram(rows, None, gram_dd), expected)


def test_same_bits_on_every_run(on):
    rng = torch.Generator().manual_seed(3)
    sizes = [300, 1025, 7] if on.slow else [300_000, 1025, 7, 90_001]
    lists = [[make_buffer((n,), torch.float32, "misaligned", rng, on.device) for n in sizes] for _ in range(4)]
    first = gradproj.gram(*lists)
    for _ in range(3):
        assert torch.equal(first, gradproj.gram(*lists))


def test_same_bits_for_any_number_of_threads():
    if not gradproj.backends()["cpu"].available:
        pytest.skip("backend cpu is not built")
    rng = torch.Generator().manual_seed(4)
    lists = [[make_buffer((700_001,), torch.float32, "contiguous", rng), torch.ones(5)] for _ in range(3)]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(gradproj.gram(*lists))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_gram_of_the_directions_is_not_computed_again(on):
    rng = torch.Generator().manual_seed(5)
    lists = [[make_buffer((500,), torch.float32, "contiguous", rng, on.device)] for _ in range(4)]
    flat = [t for row in lists for t in row]
    marker = torch.full((3, 3), 7.0, dtype=torch.float64, device=on.device)
    result = on.namespace.gram(flat, 4, marker)
    assert torch.equal(result[1:, 1:], marker)
    full = on.namespace.gram(flat, 4, None)
    assert torch.equal(result[:, 0], result[0])
    result[1:, 1:] = full[1:, 1:]
    assert_gram_close(result, full.cpu().numpy())


def test_nothing_to_add_up(on):
    empty = torch.empty(0, 3, device=on.device)
    for lists in ([[]], [[None, None]] * 2, [[empty]] * 2):
        assert torch.equal(gradproj.gram(*lists).cpu(), torch.zeros(len(lists), len(lists), dtype=torch.float64))


def test_complex_counts_as_its_real_view(on):
    rng = torch.Generator().manual_seed(6)
    g = torch.randn(9, 5, dtype=torch.complex64, generator=rng).to(on.device)
    d = torch.randn(5, 9, dtype=torch.complex64, generator=rng).to(on.device).t().conj()
    assert_gram_close(gradproj.gram([g], [d]), reference.oracle_gram([g], [d]))
    assert gradproj.gram([g], [g])[0, 1].item() == pytest.approx(torch.linalg.vector_norm(g).item() ** 2, rel=1e-5)
