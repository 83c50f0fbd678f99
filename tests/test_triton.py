"""What is Triton's own: tables, their cache, and what is refused during capture. Numerics: the shared tests."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from gradproj import reference
from gradproj.triton_kernels import combine, gram, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs).to(DEVICE)


def test_same_buffers_same_table():
    rows = [randn(100), randn(100)]
    first = table.launches(rows, 2, (0, 1))
    assert table.launches(rows, 2, (0, 1)) is first
    assert table.launches([rows[0], randn(100)], 2, (0, 1)) is not first
    assert table.launches([rows[0], rows[1][:50].repeat(2)], 2, (0, 1)) is not first


def test_cache_is_bounded():
    for i in range(2 * table.CACHE_SIZE):
        table.launches([randn(8 + i), randn(8 + i)], 2, (0, 1))
    assert len(table._cache) == table.CACHE_SIZE


def test_neighbours_merge_and_heads_are_cut():
    flat = [randn(4000), randn(4000)]
    parts = [t for f in flat for t in f.split([1000, 1000, 2000])]
    (launch,) = table.launches(parts, 2, (0, 1))
    assert launch.segments == 1
    (launch,) = table.launches([f[1:] for f in flat], 2, (0, 1))
    width = len(launch.rows) + 3
    lines = launch.table.view(-1, width).tolist()
    assert [line[2] for line in lines] == [3, 3996] and [line[-1] for line in lines] == [0, 1]
    (launch,) = table.launches([flat[0][1:], flat[1][:-1]], 2, (0, 1))  # off by different amounts: no cut helps
    assert launch.segments == 1 and launch.table.view(-1, width)[0, -1] == 0


def test_many_programs_blocks_and_segments():
    """A block size of 16 makes small buffers cross every border."""
    sizes = [1, 16, 17, 100, 5, 48]
    rows = [randn(n, seed=i + 10 * r) for r in range(3) for i, n in enumerate(sizes)]
    expected = reference.oracle_gram(rows[:6], rows[6:12], rows[12:])
    result = gram.gram(rows, 3, block=16)
    torch.testing.assert_close(result.cpu(), torch.from_numpy(expected), rtol=1e-6, atol=1e-5)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64, device=DEVICE)
    wanted = reference.oracle_combine(rows[:6], [rows[6:12], rows[12:]], weights.tolist())
    combine.combine_(rows[:6], rows[6:], weights, block=16)
    for t, w in zip(rows[:6], wanted, strict=True):
        torch.testing.assert_close(t.double().cpu(), torch.from_numpy(w), rtol=1e-6, atol=1e-6)


def test_too_many_dimensions():
    g = randn(*[2] * 9).permute(*range(8, -1, -1))
    d = randn(*[2] * 9)
    with pytest.raises(NotImplementedError, match=r"buffer 0 with shape .* needs 9 dimensions"):
        gram.gram([g, d], 2)


def test_new_buffers_during_capture_are_refused(monkeypatch):
    """A table cannot be copied while a graph records; the graph would replay with the addresses of another step."""
    table._cache.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    real = table._build
    monkeypatch.setattr(table, "_build", lambda *a: pytest.fail("built during capture"))

    class OnCuda:
        """A buffer that says it is on a CUDA device."""

        device = torch.device("cuda", 0)
        dtype = torch.float32

        def data_ptr(self):
            return 4096

        def numel(self):
            return 4

        def is_contiguous(self):
            return True

    with pytest.raises(RuntimeError, match="run one step with the same buffers before the capture"):
        table.launches([OnCuda(), OnCuda()], 2, (0, 1))
    assert real is not table._build and not table._cache


@pytest.mark.gpu
def test_captured_step_follows_the_contents():
    """Replayed after the gradients' contents changed, a captured projection projects the new ones."""
    import gradproj

    for name in [
        n for n, b in gradproj.backends().items() if b.available and "cuda" in b.device_types and n != "torch"
    ]:
        with gradproj.use_backend(name):
            g, d = [randn(3000), randn(7)], [randn(3000, seed=1), randn(7, seed=2)]
            gradproj.project_([t.clone() for t in g], d)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                gradproj.project_(g, d)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                info = gradproj.project_(g, d)
            for seed in (5, 6):
                for i, t in enumerate(g):
                    t.copy_(randn(*t.shape, seed=seed + i))
                wanted = reference.oracle_project([t.cpu() for t in g], [[t.cpu() for t in d]])
                graph.replay()
                torch.cuda.synchronize()
                assert info.applied
                for t, w in zip(g, wanted, strict=True):
                    torch.testing.assert_close(t.double().cpu(), torch.from_numpy(w), rtol=1e-5, atol=1e-5)
