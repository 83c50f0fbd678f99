"""Directions: what is kept, at which precision, and what a projection against it gives."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import gradproj
from cases import assert_gram_close
from gradproj import reference
from training import (
    assert_same,
    descend,
    direction,
    gradients,
    loss,
    model_and_batches,
    projected,
    protect,
    protecting,
    stored,
    train,
    twins,
    wrapped,
)

DTYPES = [None, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_orthogonal(a, b, tolerance=1e-6):
    product, squares = (
        sum(float((x.double() * y.double()).sum()) for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a))
    )
    assert abs(product) <= tolerance * (squares * sum(float(t.double().square().sum()) for t in b)) ** 0.5


def test_without_directions_the_step_is_the_plain_step():
    model, twin, x = twins()
    opt = projected(model)
    assert_same(train(model, opt, None, x), train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), None, x))
    assert opt.last is None and opt.project() is None


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_the_newest_are_kept_and_their_gram_is_a_fresh_one(method):
    """It is extended, not recomputed: evictions and None patterns must not leave it stale."""
    model, x, opt, _ = protecting(wrapped, 3, method, blocks=0)
    kept = []
    for i in range(11):
        if i == 8:
            opt.unprotect()
            kept = []
        if i % 4 != 3:
            protect(model, opt, x[i])
            kept = [*kept, stored(opt)[-1]][-3:]
        assert len(opt.protection) == len(kept)
        for d, expected in zip(stored(opt), kept, strict=True):
            assert_same(d.values(), expected.values())
        opt.zero_grad()
        loss(model, x[i + 1]).backward()
        if i in (4, 5):
            model[0].bias.grad = None
        if i == 6:
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        mine = opt.protection.parameters()
        fresh = gradproj.gram(
            [None if p.grad is None else p.grad.clone() for p in mine],
            *[[None if p.grad is None else d.get(p) for p in mine] for d in stored(opt)],
        )
        opt.step()
        torch.testing.assert_close(opt.last.gram, fresh, rtol=1e-5, atol=1e-9)


def test_directions_of_parameters_that_left_are_refused():
    model, x, opt, _ = protecting(wrapped, blocks=0)
    model[2].requires_grad_(False)
    protect(model, opt, x[0])
    opt.param_groups[0]["params"] = [*model[2].parameters()]
    with pytest.raises(RuntimeError, match="a direction belongs to none of the optimizer's parameters"):
        descend(model.requires_grad_(), opt, x[0])


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
@every_dtype
def test_a_direction_of_zeros_is_ignored_and_reported(dtype, method):
    model, x, opt, _ = protecting(wrapped, 2, method, dtype=dtype, blocks=0)
    protect(model, opt, x[0], scale=0.0)
    protect(model, opt, x[1], scale=-1.0)
    loss(model, x[2], 1.0).backward()
    opt.step()
    assert opt.last.ignored.tolist() == [True, False]
    assert opt.last.weights[1] == 0 and opt.last.finite and opt.last.applied


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def test_last_says_what_happened(wrapping):
    model, x, opt, protected = protecting(wrapping, 2, blocks=2)
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


@every_dtype
def test_a_projection_is_exact_with_respect_to_what_is_stored(dtype):
    model, x, opt, _ = protecting(wrapped, 3, dtype=dtype, blocks=0)
    for i in range(5):
        exact = direction(model, x[i])
        protect(model, opt, x[i])
        kept = [[*d.values()] for d in stored(opt)]
        assert all(t.dtype == (dtype or torch.float32) for t in kept[-1])
        bound = 0.0 if dtype is None else torch.finfo(dtype).eps / 2
        assert_same([t.float() for t in kept[-1]], exact, rtol=bound, atol=1e-7 * (dtype is not None))
        opt.zero_grad()
        loss(model, x[i + 1]).backward()
        before = gradients(model)
        info = opt.project()
        assert_gram_close(info.gram, reference.oracle_gram(before, *kept))
        for d in kept:
            assert_orthogonal(gradients(model), d, 1e-5)


@every_dtype
def test_complex_parameters(dtype):
    """Directions of another dtype are no complex ones: they were refused with the shapes of their real views."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))
    opt = projected(torch.optim.SGD([p], lr=0.1), 2, dtype=dtype)
    for _ in range(3):
        with opt.protect():
            (p @ torch.randn(4, 3, dtype=torch.complex64)).abs().sum().backward()
    (p @ torch.randn(4, 3, dtype=torch.complex64)).real.square().sum().backward()
    opt.step()
    changed = [torch.view_as_real(p.grad)]
    for d in stored(opt):
        assert d[p].dtype == (dtype or torch.float32) and d[p].shape == (6, 4, 2)
        assert_orthogonal(changed, [d[p]])
    assert opt.last.applied


@every_dtype
def test_dtensors_equal_plain_tensors(one_rank, dtype):
    model, twin, x = twins()
    fully_shard(model)
    optimizers = [projected(m, 2, dtype=dtype) for m in (model, twin)]
    results = [train(m, opt, opt, x) for m, opt in zip((model, twin), optimizers, strict=True)]
    assert_same([p.full_tensor() for p in results[0]], results[1], rtol=1e-5, atol=1e-6)
    assert optimizers[0].last.applied
    assert all(
        t.dtype == (dtype or torch.float32) and hasattr(t, "placements") for t in stored(optimizers[0])[1].values()
    )


class Calls(TorchDispatchMode):
    """Names of the ops of this package that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace.startswith("gradproj"):
            self.names.append(op.name().split("::")[1])
        return op(*args, **(kwargs or {}))


def two_groups(model, *settings, **named):
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("per", ["group", "tensor"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_per_group_and_per_tensor(per, method):
    """Each part as if it were projected alone, in one call of one op a step."""
    model, x = model_and_batches()
    opt = projected(two_groups(model), 3, method, per=per)
    part = [0, 0, 1, 1] if per == "group" else [0, 1, 2, 3]
    num_parts = part[-1] + 1
    for i in range(6):
        if i < 4:
            protect(model, opt, x[i])
        opt.zero_grad()
        loss(model, x[i + 1], -1.0).backward()
        if i == 5:
            model[2].bias.grad = None
        alone = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        for number in range(num_parts):
            mine = [
                [t for t, p in zip(row, part, strict=True) if p == number] for row in (alone, *opt.protection.rows())
            ]
            if any(t is not None for t in mine[0]):
                gradproj.project_(*mine, method=method)
        with Calls() as calls:
            opt.step()
        # the Gram of the directions: of all of them, then a row for a new one
        assert calls.names == ["gram"] * (i not in (0, 4)) + ["project_"]
        for p, expected in zip(model.parameters(), alone, strict=True):
            if expected is not None:
                torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)
    assert opt.last.gram.shape == (num_parts, 4, 4) and opt.last.cosine.shape == (num_parts, 3)
    assert opt.last.ignored.shape == (num_parts, 3) and opt.last.removed.shape == (num_parts,)


@pytest.mark.parametrize("per", ["model", "group", "tensor"])
def test_one_collective_whatever_the_parts(one_rank, monkeypatch, per):
    model, x = model_and_batches()
    sharding = gradproj.Sharding(one_rank, "shard")
    opt = gradproj.ProjectedOptimizer(two_groups(model), gradproj.Directions(per=per), sharding=sharding)
    sizes, real = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sizes.append(t.numel()), real(t, *a, **k))[1])
    train(model, opt, opt, x[:2])
    assert sizes == [3 * {"model": 1, "group": 2, "tensor": 4}[per]]
    assert opt.last.applied


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [({"count": 0}, ValueError, "count must be 1 to 64, got 0"), ({"count": 65}, ValueError, "add several up in one"),
     ({"count": "32"}, TypeError, "count must be an int, got '32'"),
     ({"count": 2.5}, TypeError, "count must be an int, got 2.5"),
     ({"count": True}, TypeError, "count must be an int, got True"), ({"method": "pgd"}, ValueError, "unknown method"),
     ({"per": "layer"}, ValueError, 'per must be "model"'),
     ({"dtype": torch.int8}, ValueError, "dtype must be one of")],
)  # fmt: skip
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        gradproj.Directions(**settings)
