"""The store of directions: precision, host memory, averages, one direction per loss, refreshing, parts."""

import copy
import io

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gradproj
from cases import assert_gram_close, clone, make_buffer, rows
from gradproj import float8, offload, reference
from gradproj.directions import Directions

DTYPES = [None, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def model_and_batches(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Tanh(), torch.nn.Linear(30, 3)).to(dtype)
    return model, [torch.randn(6, 40, dtype=dtype) for _ in range(12)]


def loss(model, x, target=0.0):
    return (model(x) - target).square().mean()


def wrap(model, **kwargs):
    return gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)


def protect(model, opt, x, target=1.0):
    with opt.protect():
        loss(model, x, target).backward()


def stored(opt):
    """The directions as the kernels see them, as tensors."""
    return opt.projector._directions.tensors(opt.projector.parameters())


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_is_exact_with_respect_to_what_is_stored(dtype, device):
    model, x = model_and_batches()
    opt = wrap(model, directions=3, store_dtype=dtype, store_device=device)
    for i in range(5):
        protect(model, opt, x[i])
        opt.zero_grad()
        loss(model, x[i + 1]).backward()
        before = [p.grad.clone() for p in model.parameters()]
        info = opt.project()
        directions = stored(opt)
        assert len(directions) == min(i + 1, 3)
        assert_gram_close(info.gram, reference.oracle_gram(before, *directions))
        for d in directions:
            product = sum(
                float((p.grad.double() * t.double()).sum()) for p, t in zip(model.parameters(), d, strict=True)
            )
            scale = sum(float(t.double().square().sum()) for t in (*before, *d))
            assert abs(product) <= 1e-6 * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_values_of_a_stored_direction(dtype):
    model, x = model_and_batches()
    opt = wrap(model, store_dtype=dtype)
    exact = torch.autograd.grad(loss(model, x[0], 1.0), list(model.parameters()))
    protect(model, opt, x[0])
    (direction,) = opt.projector._directions._stored
    taken = list(_flat(direction.values()))
    n = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() * t.element_size() for t in taken) <= n * {None: 4, torch.float8_e4m3fn: 1.1}.get(dtype, 2)
    bound = {None: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float8_e4m3fn: 2**-4}[dtype]
    for t, e in zip(stored(opt)[0], exact, strict=True):
        assert ((t - e).abs() <= bound * e.abs() + bound * 2**-6 * e.abs().max()).all()


def _flat(entries):
    for e in entries:
        yield from [e] if isinstance(e, torch.Tensor) else [e.codes[0], e.scales[0]]


@hypothesis.given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=1100), st.integers(-30, 0))
def test_float8_of_float8_is_the_same(values, exponent):
    """So a direction that goes through a checkpoint is the same, bit by bit."""
    t = torch.tensor(values) * 2.0**exponent
    hypothesis.assume(t.abs().max() == 0 or t.abs().max() > 1e-30)
    row = float8.quantize([t])
    (back,) = float8.dequantize(row)
    (wide,) = float8.dequantize(row, torch.float64)
    assert torch.equal(back.double(), wide)
    again = float8.quantize([back])
    assert torch.equal(again.codes[0].view(torch.uint8), row.codes[0].view(torch.uint8))
    nonzero = [bool(b.any()) for b in back.split(512)]
    assert torch.equal(again.scales[0][nonzero], row.scales[0][nonzero])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_complex_parameters(dtype):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD([p], lr=0.1), store_dtype=dtype)
    with opt.protect():
        (p @ torch.randn(4, 3, dtype=torch.complex64)).abs().sum().backward()
    (p @ torch.randn(4, 3, dtype=torch.complex64)).real.square().sum().backward()
    opt.step()
    ((d,),) = stored(opt)
    assert d.dtype == torch.complex64 and opt.last.applied
    product = (torch.view_as_real(p.grad).double() * torch.view_as_real(d).double()).sum()
    assert abs(float(product)) <= 1e-6 * float(p.grad.norm() * d.norm())


# --- host memory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(offload, "BUCKET_BYTES", 3 << 10)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100)
def test_rows_in_host_memory_give_the_same(on, small_buckets, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions = data.draw(rows(device=on.device, max_directions=3, max_buffers=4))
    forms = [float8.quantize(d) if data.draw(st.booleans()) else d for d in directions]
    brought = [offload.HostRow(d) if data.draw(st.booleans()) else d for d in forms]
    parts = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=len(grads), max_size=len(grads)))
    base = [None if g is None else clone([g])[0].mul_(0.5) for g in grads] if data.draw(st.booleans()) else None
    expected = gradproj.gram(grads, *forms, parts=parts, base=base)
    result = gradproj.gram(grads, *brought, parts=parts, base=base)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    weights = torch.randn(expected.shape[:-1], dtype=torch.float64, device=on.device)
    a, b = clone(grads), clone(grads)
    gradproj.combine_(a, forms, weights, parts=parts, base=base)
    gradproj.combine_(b, brought, weights, parts=parts, base=base)
    for x, y in zip(a, b, strict=True):
        if x is not None:
            # A bucket without float64 is computed in float32: a tie of the rounding may fall the other way.
            torch.testing.assert_close(x, y, rtol=1e-5 + torch.finfo(x.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("numel", [767, 768, 769, 512, 2048, 5000])
def test_borders_of_buckets(on, small_buckets, layout, numel):
    """A cut falls between elements that share nothing: neither a float8 scale nor an element."""
    rng = torch.Generator().manual_seed(0)
    shape = (numel // 8, 8) if numel % 8 == 0 else (numel,)
    g, d, e = ([make_buffer(shape, torch.float32, layout, rng, on.device)] for _ in range(3))
    row = float8.quantize(d)
    one, other = clone(g), clone(g)
    expected = gradproj.project_(one, row, e)
    info = gradproj.project_(other, offload.HostRow(row), offload.HostRow(e))
    torch.testing.assert_close(info.gram, expected.gram, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_buckets_cover_every_element_once_and_stay_small(monkeypatch):
    monkeypatch.setattr(offload, "BUCKET_BYTES", 1 << 14)
    d = [torch.randn(n) for n in (3, 100_000, 0, 700, 4096, 1)] + [torch.randn(700, 9)[:, ::2]]
    lists = [offload.Buffers(d, True), offload.Buffers([t.bfloat16() for t in d], True)]
    seen = [torch.zeros(t.numel(), dtype=torch.int) for t in d]
    sizes = []
    for cuts, buffers in offload.walk(lists, torch.device("cpu")):
        sizes.append(sum(t.numel() * t.element_size() for row in buffers for t in row))
        for cut, t in zip(cuts, buffers[0], strict=True):
            stop = d[cut.column].numel() if cut.stop is None else cut.stop
            seen[cut.column][cut.start : stop] += 1
            assert torch.equal(t.reshape(-1), d[cut.column].reshape(-1)[cut.start : stop])
    assert all((s == 1).all() for s in seen)
    assert len(sizes) > 30 and max(sizes[:-1]) <= 1 << 14  # the last one is a view with gaps, which is not cut


def test_nothing_is_written_if_a_later_bucket_is_refused(small_buckets):
    g = [torch.ones(2000), torch.ones(2000)]
    d = offload.HostRow([torch.ones(2000), torch.ones(1000)])
    with pytest.raises(ValueError, match=r"directions\[0\]\[1\] has shape \(1000,\)"):
        gradproj.combine_(g, [d], torch.tensor([1.0, 1.0]))
    assert all(t.eq(1).all() for t in g)
    with pytest.raises(TypeError, match="grads is a HostRow"):
        gradproj.project_(d, g)


def test_version_counters_see_what_buckets_write(small_buckets):
    g = torch.ones(2000)
    before = g._version
    gradproj.project_([g], offload.HostRow([torch.ones(2000)]))
    assert g._version > before and not g.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_in_host_memory_train_like_the_others(small_buckets, dtype):
    """The Gram of the directions comes out of the projection's own walk: a stale one would show in the weights."""
    model, x = model_and_batches()
    twin = copy.deepcopy(model)
    a = wrap(model, directions=3, store_dtype=dtype, method="conflict")
    b = wrap(twin, directions=3, store_dtype=dtype, method="conflict", store_device="cpu")
    for i in range(8):
        for m, opt in ((model, a), (twin, b)):
            if i % 3 != 2:
                protect(m, opt, x[i])
            opt.zero_grad()
            loss(m, x[i + 1], -1.0).backward()
            if i == 5:
                m[0].bias.grad = None
            opt.step()
        torch.testing.assert_close(a.last.gram, b.last.gram, rtol=1e-5, atol=1e-9)
        # Buckets add up in another order: the float32 rounding of eight steps, where a stale Gram would be off by a hundredth.
        torch.testing.assert_close([*model.parameters()], [*twin.parameters()], rtol=1e-5, atol=1e-5)
    assert a.last.weights[1:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pinned_memory_and_prefetch(monkeypatch, dtype):
    """More buckets than slots, the host far ahead of the device: a slot that is overwritten too early shows."""
    monkeypatch.setattr(offload, "BUCKET_BYTES", 1 << 18)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1 << 20, device="cuda"))
    opt = gradproj.ProjectedOptimizer(torch.optim.SGD([p], lr=0.1), directions=4, store_dtype=dtype, store_device="cpu")
    for _ in range(4):
        with opt.protect():
            (p * torch.randn_like(p)).sum().backward()
    directions = stored(opt)
    assert all(t.device.type == "cpu" for row in directions for t in row)
    for direction in opt.projector._directions._stored:
        assert all(t.is_pinned() for t in _flat(direction.values()))
    opt.zero_grad()
    (p * torch.randn_like(p)).sum().backward()
    g = p.grad.clone()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info = opt.project()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4 << 20
    assert_gram_close(info.gram, reference.oracle_gram([g], *directions))
    (expected,) = reference.oracle_project([g], directions)
    torch.testing.assert_close(p.grad.cpu().double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_average(dtype, device):
    """The first is not pulled towards zero, a missing gradient counts as zeros."""
    model, x = model_and_batches()
    opt = wrap(model, average=0.75, store_dtype=dtype, store_device=device)
    expected = None
    for i in range(4):
        model[0].bias.requires_grad_(i != 2)
        made = torch.autograd.grad(loss(model, x[i], 1.0), [p for p in model.parameters() if p.requires_grad])
        if i == 2:
            made = (made[0], torch.zeros(30), *made[1:])
        expected = made if expected is None else [0.75 * e + 0.25 * t for e, t in zip(expected, made, strict=True)]
        protect(model, opt, x[i])
        (row,) = stored(opt)
        off = sum(float((a - b).square().sum()) for a, b in zip(row, expected, strict=True)) ** 0.5
        length = sum(float(b.square().sum()) for b in expected) ** 0.5
        assert off <= length * {None: 1e-6, torch.float8_e4m3fn: 0.06}.get(dtype, 0.01)
    assert len(opt.projector) == 1


@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_is_not_finite_is_left_out_of_the_average(device):
    """An inf averaged once is in the average for good."""
    model, x = model_and_batches()
    opt = wrap(model, average=0.5, store_device=device)
    protect(model, opt, x[0])
    before = stored(opt)
    with pytest.warns(RuntimeWarning, match="left out of the average"):
        protect(model, opt, x[1], float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(*before, *stored(opt), strict=True))
    opt.unprotect()
    protect(model, opt, x[0], float("inf"))
    protect(model, opt, x[0])
    for a, b in zip(*before, *stored(opt), strict=True):
        torch.testing.assert_close(a, b)


# --- refreshing -------------------------------------------------------------------------------------------------------


def test_protect_each():
    model, x = model_and_batches()
    opt = wrap(model, directions=6)
    for count in (6, 2):
        losses = (model(x[0]) - 1.0).square().mean(dim=1)
        opt.protect_each(losses if count == 6 else list(losses[:2]))
        assert len(opt.projector) == 6
    for k, row in enumerate(stored(opt)[4:]):
        alone = torch.autograd.grad((model(x[0]) - 1.0).square().mean(dim=1)[k], list(model.parameters()))
        torch.testing.assert_close(row, list(alone), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="7 losses, but directions=6"):
        opt.protect_each([losses[0]] * 7)
    with pytest.raises(ValueError, match="0 losses"):
        opt.protect_each([])
    average = wrap(model, average=0.5)
    average.protect_each((model(x[1]) - 1.0).square().mean(dim=1))
    assert len(average.projector) == 1


def test_protect_each_keeps_the_graph_no_longer_than_needed():
    model, x = model_and_batches()
    opt = wrap(model, directions=2)
    losses = (model(x[0])[:2] - 1.0).square().mean(dim=1)
    opt.protect_each(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


def test_protection_is_due_every_r_steps():
    model, x = model_and_batches()
    opt = wrap(model, refresh_every=3, directions=2)
    refreshed = []
    for i in range(9):
        if opt.protection_due:
            protect(model, opt, x[i])
            refreshed.append(i)
        opt.zero_grad()
        loss(model, x[i]).backward()
        opt.step()
    assert refreshed == [0, 3, 6]
    opt.unprotect()
    assert opt.protection_due


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint_restores_what_was_stored(dtype, device):
    model, x = model_and_batches()
    kwargs = {"directions": 3, "store_dtype": dtype, "store_device": device, "save_directions": True}
    opt = wrap(model, **kwargs)
    for i in range(4):
        protect(model, opt, x[i])
    opt.zero_grad()
    loss(model, x[4]).backward()
    opt.step()
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    twin = wrap(copy.deepcopy(model), **kwargs)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for a, b in zip(opt.projector._directions._stored, twin.projector._directions._stored, strict=True):
        for s, t in zip(_in_order(a, opt), _in_order(b, twin), strict=True):
            assert s.dtype == t.dtype and torch.equal(s.view(torch.uint8), t.view(torch.uint8))
    pickled = copy.deepcopy(opt)
    assert len(pickled.projector) == 3


def _in_order(direction, opt):
    return _flat([direction[p] for p in opt.projector.parameters()])


def test_checkpoint_of_an_average_is_not_averaged():
    model, x = model_and_batches()
    opt, twin = (wrap(model, average=0.5, save_directions=True) for _ in range(2))
    protect(model, opt, x[0])
    protect(model, twin, x[1])
    twin.load_state_dict(opt.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*stored(opt), *stored(twin), strict=True))


# --- parts ------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the ops of this package that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "gradproj":
            self.names.append(op.name().split("::")[1])
        return op(*args, **(kwargs or {}))


def two_groups(model, **kwargs):
    first, second = list(model[0].parameters()), list(model[2].parameters())
    inner = torch.optim.SGD([{"params": first}, {"params": second, "lr": 0.01}], lr=0.1)
    return gradproj.ProjectedOptimizer(inner, **kwargs)


@pytest.mark.parametrize("per", ["group", "tensor"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_per_group_and_per_tensor(per, method):
    """Each part as if it were projected alone, in one call of one op a step."""
    model, x = model_and_batches()
    opt = two_groups(model, per=per, method=method, directions=3)
    parts = [0, 0, 1, 1] if per == "group" else [0, 1, 2, 3]
    for i in range(6):
        if i < 4:
            protect(model, opt, x[i])
        opt.zero_grad()
        loss(model, x[i + 1], -1.0).backward()
        if i == 5:
            model[2].bias.grad = None
        alone = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        for part in range(parts[-1] + 1):
            mine = [[t for t, p in zip(row, parts, strict=True) if p == part] for row in (alone, *stored(opt))]
            if any(t is not None for t in mine[0]):
                gradproj.project_(*mine, method=method)
        with Calls() as calls:
            opt.step()
        # the Gram of the directions: of all of them, then a row for a new one
        assert calls.names[-1] == "project_" and calls.names.count("project_") == 1
        assert calls.names[:-1] == (["gram"] if i not in (0, 4) else [])
        for p, expected in zip(model.parameters(), alone, strict=True):
            if expected is not None:
                torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)
    assert opt.last.gram.shape == (parts[-1] + 1, 4, 4) and opt.last.cosine.shape == (parts[-1] + 1, 3)
    assert opt.last.ignored.shape == (parts[-1] + 1, 3) and opt.last.removed.shape == (parts[-1] + 1,)


@pytest.fixture
def alone_in_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("per", ["model", "group", "tensor"])
def test_one_collective_whatever_the_parts(alone_in_a_group, monkeypatch, per):
    model, x = model_and_batches()
    opt = two_groups(model, per=per, group=alone_in_a_group, plain="sharded")
    sizes, real = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sizes.append(t.numel()), real(t, *a, **k))[1])
    protect(model, opt, x[0])
    opt.zero_grad()
    loss(model, x[1]).backward()
    opt.step()
    assert sizes == [3 * {"model": 1, "group": 2, "tensor": 4}[per]]
    assert opt.last.applied


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"directions": 65}, "takes up to 64: add up several losses"), ({"store_dtype": torch.int8}, "store_dtype must be one of"),
     ({"store_device": "cuda"}, 'must be None .* or "cpu"'), ({"average": 1.0}, "between 0 and 1"),
     ({"average": 0.5, "directions": 2}, "keeps a single direction"), ({"per": "layer"}, 'per must be "model"'),
     ({"refresh_every": 0}, "refresh_every must be >= 1")],
)  # fmt: skip
def test_bad_settings(kwargs, message):
    model, _ = model_and_batches()
    with pytest.raises(ValueError, match=message):
        wrap(model, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direction_of_another_model(dtype):
    model, _ = model_and_batches()
    other = torch.nn.Linear(40, 3)
    directions = Directions(2, dtype)
    directions.add({p: torch.ones_like(p) for p in other.parameters()})
    with pytest.raises(RuntimeError, match="belongs to none of the optimizer's parameters"):
        directions.rows(list(model.parameters()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_direction_that_is_not_finite_is_dropped(dtype, device):
    """On the CPU at once: the step is projected against the others."""
    model, x = model_and_batches()
    opt = wrap(model, directions=3, store_dtype=dtype, store_device=device)
    protect(model, opt, x[0])
    protect(model, opt, x[1], float("nan"))
    opt.zero_grad()
    loss(model, x[2]).backward()
    with pytest.warns(RuntimeWarning, match=r"1 of 2 protected directions \(number 1"):
        opt.step()
    assert len(opt.projector) == 1 and opt.last.applied and opt.last.gram.shape == (2, 2)


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direction_of_zeros_is_ignored_and_reported(dtype, method):
    model, x = model_and_batches()
    opt = wrap(model, directions=2, store_dtype=dtype, method=method)
    with opt.protect():
        (loss(model, x[0]) * 0.0).backward()
    protect(model, opt, x[1], -1.0)
    opt.zero_grad()
    loss(model, x[2], 1.0).backward()
    opt.step()
    assert opt.last.ignored.tolist() == [True, False]
    assert opt.last.weights[1] == 0 and opt.last.finite and opt.last.applied
