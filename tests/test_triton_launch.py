"""Triton: tables that are kept, graphs that are captured, kernels that do not compile."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

import triton

import gradproj
from gradproj import reference
from gradproj.rows import functional
from gradproj.triton_kernels import cache, combine, op, pin, pin_table
from test_triton import DEVICE, randn, table_of


def test_new_buffers_during_capture_are_refused(monkeypatch):
    """A table cannot be copied while a graph records; the graph would replay with the addresses of another step."""
    known, new = [randn(6)], [randn(6)]
    found = table_of(known, known)
    monkeypatch.setattr(cache, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run one step with the same buffers before the capture"):
        table_of(new, known)
    monkeypatch.setattr(cache, "_captured", {})
    assert table_of(known, known) is found and table_of(known, known) is found
    cache._tables.clear()
    assert list(cache._captured.values()) == [found]  # outlives the cache, once


def pin_lists():
    """Of two forms, and one that a BLAS takes."""
    weights = [randn(80, 48), randn(33, 17), randn(20, 10).double()]
    bases = [torch.eye(4, t.shape[1], dtype=t.dtype, device=DEVICE).T for t in weights]
    return weights, bases, [None, torch.ones(33, 4, device=DEVICE), None]


def test_a_pin_has_one_table_for_its_buffers():
    """It was made and uploaded in every step."""
    lists = pin_lists()
    run = lambda *lists: pin.pin_(*lists, [], [])
    run(*lists)
    first = next(reversed(cache._tables.values()))
    run(*([*row] for row in lists))
    assert next(reversed(cache._tables.values())) is first
    assert first.others == first.others_at.tolist() == [2]
    assert len(first.launches) == 2
    for _, layers, _ in first.launches:
        for layer in map(pin_table.Layer._make, layers.tolist()):
            w, u, target = (row[layer.number] for row in lists)
            assert (layer.weight, layer.basis) == (w.data_ptr(), u.data_ptr())
            assert layer.target == (0 if target is None else target.data_ptr())
            assert (layer.outputs, layer.inputs, layer.rank) == (*w.shape, u.shape[1])
            strides = layer.weight_row, layer.weight_column, layer.basis_row, layer.basis_column
            assert strides == (*w.stride(), *u.stride())
    run(lists[0][:2], lists[1][:2], [None, None])
    assert next(reversed(cache._tables.values())) is not first


def experts(count, outputs=24, inputs=32):
    """Slices of one parameter: every third transposed, every fourth strided, of rank 0 up to their width."""
    rng = torch.Generator().manual_seed(0)
    whole = torch.randn(count, outputs, inputs, generator=rng).to(DEVICE, torch.bfloat16)
    across = torch.randn(count, inputs, outputs, generator=rng).to(DEVICE, torch.bfloat16)
    apart = torch.randn(count, outputs, 2 * inputs, generator=rng).to(DEVICE, torch.bfloat16)
    weights = [across[k].T if k % 3 == 2 else apart[k, :, ::2] if k % 4 == 3 else whole[k] for k in range(count)]
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=rng))[0].to(DEVICE)
    pair = functional.split_basis(basis)
    ranks = [k * 7 % (inputs + 1) for k in range(count)]
    targets = [
        w.float() @ basis[:, :r] + 0.1 if k % 5 else None for k, (w, r) in enumerate(zip(weights, ranks, strict=True))
    ]
    return weights, [pair[:, :, :r] for r in ranks], targets


def test_thousands_of_experts_are_a_launch_for_each_form():
    """Each program finds its layer, and its rows of it, by one look at the table."""
    lists = experts(3000)
    found = pin_table.Table.of(*lists, [None] * 3000)
    assert not found.others and sorted(form.layout for form, *_ in found.launches) == ["columns", "rows", "strided"]
    seen = []
    for form, layers, programs in found.launches:
        layers = [*map(pin_table.Layer._make, layers.tolist())]
        for program, number in enumerate(programs.tolist()):
            layer = layers[number]
            assert 0 <= program - layer.first < layer.programs == -(-layer.outputs // form.outputs)
        assert len(programs) == sum(layer.programs for layer in layers)
        seen += [layer.number for layer in layers]
    assert sorted(seen) == [k for k, u in enumerate(lists[1]) if u.shape[2]]


def test_experts_are_each_pinned():
    weights, bases, targets = experts(36)
    before = [w.clone() for w in weights]
    with gradproj.use_backend("triton"):
        moved = gradproj.pin_(weights, bases, targets)
    for k, (w, u, target) in enumerate(zip(before, bases, targets, strict=True)):
        expected, _, norm = reference.oracle_pin(w, u.sum(0, dtype=torch.float32), target)
        torch.testing.assert_close(weights[k].double().cpu(), torch.from_numpy(expected), rtol=1e-2, atol=1e-2)
        assert moved[k].item() == pytest.approx(norm, rel=1e-4, abs=1e-5)


def test_a_null_space_splits_each_basis_once(monkeypatch):
    """q and k have one U, of which each keeps leading columns."""
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(32, 24) for _ in range(2)]).to(DEVICE, torch.bfloat16)
    x = torch.randn(200, 32, device=DEVICE, dtype=torch.bfloat16)
    protection, split, given = gradproj.NullSpace(model, share=0.2), functional.split_basis, []
    monkeypatch.setattr(functional, "split_basis", lambda u: given.append(u) or split(u))
    with protection.capture():
        sum(layer(x).float().square().sum() for layer in model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    with gradproj.use_backend("triton"):
        moved = protection.pin().moved.norm()
        assert protection.pin().moved.norm() < 0.1 * moved
    with gradproj.use_backend("torch"):
        assert protection.pin().moved.norm() < 0.1 * moved
    assert len(given) == 1 and all(u.dim() == 3 for u in protection._lists._bases)
    assert all(b.vectors.dtype == torch.float32 for b in protection.bases.values())


def test_a_pin_of_new_buffers_during_capture_is_refused(monkeypatch):
    lists = pin_lists()
    with gradproj.use_backend("triton"):
        gradproj.pin_(*lists)
        monkeypatch.setattr(cache, "_capturing", lambda device: True)
        monkeypatch.setattr(cache, "_captured", {})
        gradproj.pin_(*lists)
        assert len(cache._captured) == 1
        with pytest.raises(RuntimeError, match="run one step with the same buffers before the capture"):
            gradproj.pin_(*pin_lists())


class Broken:
    """A kernel whose compiler fails as Triton's does: a listing, caused by what is wrong."""

    def warmup(self, *arguments, **options):
        try:
            raise AttributeError("'int' object has no attribute 'type'\nsecond line")
        except AttributeError as error:
            raise RuntimeError("at 12:14:\n    square = tl.zeros([form.rows])") from error


@pytest.mark.parametrize("broken", ["pin_kernel", "pin_finish_kernel"])
def test_a_pin_that_does_not_compile_says_so_and_writes_nothing(monkeypatch, broken):
    monkeypatch.setattr(op, "_compiled", set())
    monkeypatch.setattr(pin, broken, Broken())
    lists = pin_lists()
    before = [t.clone() for t in lists[0]]
    message = (
        rf"^pin_: a Triton kernel does not compile or start \(Triton {triton.__version__}, .*\): AttributeError: 'int' "
        r"object has no attribute 'type'; use gradproj.use_backend\('torch'\), or install another Triton$"
    )
    with gradproj.use_backend("triton"), pytest.raises(RuntimeError, match=message) as caught:
        gradproj.pin_(*lists)
    assert "at 12:14" in str(caught.value.__cause__)
    assert all(map(torch.equal, before, lists[0]))


def test_a_projection_that_does_not_compile_writes_nothing(monkeypatch):
    """The second kind of columns is found out before the first is written."""
    kernel, compiled = combine.combine_kernel, []

    class SecondIsBroken(Broken):
        def __getitem__(self, grid):
            return kernel[grid]

        def warmup(self, *arguments, **options):
            compiled.append(arguments)
            return super().warmup() if len(compiled) == 2 else kernel.warmup(*arguments, **options)

    monkeypatch.setattr(op, "_compiled", set())
    monkeypatch.setattr(combine, "combine_kernel", SecondIsBroken())
    g, d = [randn(40), randn(40).double()], [randn(40, seed=1), randn(40, seed=1).double()]
    before = [t.clone() for t in g]
    with (
        gradproj.use_backend("triton"),
        pytest.raises(RuntimeError, match="^project_: a Triton kernel does not compile"),
    ):
        gradproj.project_(g, d)
    assert len(compiled) == 2 and all(map(torch.equal, before, g))
    monkeypatch.setattr(combine, "combine_kernel", kernel)
    with gradproj.use_backend("triton"):
        gradproj.project_(g, d)
    assert not any(map(torch.equal, before, g))


@pytest.mark.gpu
def test_captured_pin_follows_the_contents():
    lists = pin_lists()
    for name in ("triton", "torch"):
        with gradproj.use_backend(name):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                gradproj.pin_(*lists)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                moved = gradproj.pin_(*lists)
            for seed in (5, 6):
                for t in lists[0]:
                    t.copy_(randn(*t.shape, seed=seed))
                before = [t.cpu() for t in lists[0]]
                graph.replay()
                for k, (w, t) in enumerate(zip(before, lists[0], strict=True)):
                    u, target = lists[1][k].cpu(), lists[2][k]
                    expected, _, norm = reference.oracle_pin(w, u, None if target is None else target.cpu(), None)
                    torch.testing.assert_close(t.double().cpu(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
                    assert moved[k].item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.gpu
def test_captured_step_follows_the_contents():
    """Replayed after the gradients' contents changed, a captured projection projects the new ones."""
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


@pytest.mark.gpu
def test_a_table_is_used_on_another_stream_after_its_upload():
    """The upload is queued on the stream of the first call; a second stream would overtake it."""
    g, d = [randn(100_000)], [randn(100_000, seed=1)]
    expected = torch.from_numpy(reference.oracle_gram([t.cpu() for t in g], [t.cpu() for t in d]))
    with gradproj.use_backend("triton"):
        gradproj.gram(g, d)  # compiles
        cache._tables.clear()
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        gradproj.gram(g, d)
        with torch.cuda.stream(torch.cuda.Stream()):
            result = gradproj.gram(g, d)
            cache._tables.clear()
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-4)
