import copy
import io
import pickle

import pytest
import torch

import gradproj
from gradproj import Projector


def model_and_batches(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, [torch.randn(6, 5) for _ in range(12)]


def loss(model, x, target=0.0):
    return (model(x) - target).square().mean()


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def inner(a, b):
    return sum(
        float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True) if x is not None and y is not None
    )


def wrap(model, **kwargs):
    return gradproj.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)


def test_gradients_made_inside_are_taken_and_those_before_put_back():
    model, x = model_and_batches()
    opt = wrap(model)
    loss(model, x[0]).backward()
    before = [p.grad for p in model.parameters()]
    with opt.protect():
        assert all(p.grad is None for p in model.parameters())
        loss(model, x[1], 1.0).backward()
        made = [p.grad.data_ptr() for p in model.parameters()]
    assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))
    assert [d.data_ptr() for d in opt.projector._directions._stored[0].values()] == made  # taken, not copied


def test_backward_passes_inside_add_up():
    model, x = model_and_batches()
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0]).backward()
        loss(model, x[1]).backward()
    (loss(model, x[0]) + loss(model, x[1])).backward()
    info = opt.project()
    assert info.cosine.item() == pytest.approx(1.0, abs=1e-6)


def test_step_uses_the_projected_gradient():
    model, x = model_and_batches()
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    direction = list(opt.projector._directions._stored[0].values())
    before = [p.detach().clone() for p in model.parameters()]
    loss(model, x[1]).backward()
    opt.step()
    update = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert abs(inner(update, direction)) < 1e-6 * (inner(update, update) * inner(direction, direction)) ** 0.5 + 1e-9
    assert opt.last.applied and opt.last.weights.shape == (2,)


def test_without_directions_the_step_is_the_plain_step():
    model, x = model_and_batches()
    other = copy.deepcopy(model)
    opt, plain = wrap(model), torch.optim.SGD(other.parameters(), lr=0.1)
    for batch in x[:3]:
        for m, o in ((model, opt), (other, plain)):
            o.zero_grad()
            loss(m, batch).backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert opt.last is None


def test_newest_directions_are_kept():
    model, x = model_and_batches()
    opt = wrap(model, directions=3)
    kept = []
    for i in range(5):
        with opt.protect():
            loss(model, x[i], 1.0).backward()
        kept.append(opt.projector._directions._stored[-1])
    assert len(opt.projector) == 3
    assert all(a is b for a, b in zip(opt.projector._directions._stored, kept[2:], strict=True))
    loss(model, x[5]).backward()
    opt.step()
    assert opt.last.gram.shape == (4, 4)
    opt.unprotect()
    assert len(opt.projector) == 0
    loss(model, x[5]).backward()
    assert opt.project() is None


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_kept_gram_equals_a_fresh_one(method):
    """The Gram of the directions is extended, not recomputed: evictions and None patterns must not leave it stale."""
    model, x = model_and_batches()
    opt = wrap(model, directions=3, method=method)
    for i in range(11):
        if i == 8:
            opt.unprotect()
        if i % 4 != 3:
            with opt.protect():
                loss(model, x[i], 1.0).backward()
        opt.zero_grad()
        loss(model, x[i + 1]).backward()
        if i in (4, 5):
            model[0].bias.grad = None
        if i == 6:
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        fresh = gradproj.gram(
            [None if p.grad is None else p.grad.clone() for p in opt.projector.parameters()],
            *[
                [d.get(p) if p.grad is not None else None for p in opt.projector.parameters()]
                for d in opt.projector._directions._stored
            ],
        )
        opt.step()
        torch.testing.assert_close(opt.last.gram, fresh, rtol=1e-5, atol=1e-9)


def test_exception_inside_changes_nothing():
    model, x = model_and_batches()
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0]).backward()
    loss(model, x[1]).backward()
    before, kept = [p.grad for p in model.parameters()], opt.projector._directions._stored[0]
    with pytest.raises(ZeroDivisionError), opt.protect():
        loss(model, x[2]).backward()
        raise ZeroDivisionError
    assert all(p.grad is b for p, b in zip(model.parameters(), before, strict=True))
    assert len(opt.projector) == 1 and opt.projector._directions._stored[0] is kept


def test_block_without_backward_is_refused():
    model, _ = model_and_batches()
    opt = wrap(model)
    with pytest.raises(RuntimeError, match="received a gradient"), opt.protect():
        pass


def test_nested_blocks_and_steps_inside_are_refused():
    model, x = model_and_batches()
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0]).backward()
        with pytest.raises(RuntimeError, match="inside another protect"), opt.protect():
            pass
        with pytest.raises(RuntimeError, match="inside protect"):
            opt.step()
    assert len(opt.projector) == 1


def test_parameters_frozen_or_without_gradients():
    model, x = model_and_batches()
    model[0].weight.requires_grad_(False)
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    loss(model, x[1]).backward()
    model[2].bias.grad = None
    opt.step()
    assert opt.last.applied


def test_project_then_clip_then_step_projects_once():
    model, x = model_and_batches()
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    loss(model, x[1]).backward()
    first = opt.project()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = grads(model)
    opt.step()
    assert opt.last is first
    assert all(torch.equal(a, p.grad) for a, p in zip(clipped, model.parameters(), strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_new_gradients_after_project_are_projected(set_to_none):
    """A step that was skipped (a scaler that found an inf) must not leave the next one unprotected."""
    model, x = model_and_batches()
    opt = wrap(model)
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    loss(model, x[1]).backward()
    first = opt.project()
    opt.zero_grad(set_to_none=set_to_none)
    loss(model, x[2]).backward()
    opt.step()
    assert opt.last is not first and opt.last.applied


def test_projection_after_a_later_protect_is_done_again():
    model, x = model_and_batches()
    opt = wrap(model)
    loss(model, x[1]).backward()
    for i in (0, 2):
        with opt.protect():
            loss(model, x[i], 1.0).backward()
        last = opt.project()
    opt.step()
    assert opt.last is last


@pytest.mark.parametrize("build", [
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
], ids=["adamw", "momentum"])  # fmt: skip
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_update_space_projects_what_the_step_did(build, method):
    """Adam and momentum undo the orthogonality of a gradient; in update space it is the update that is orthogonal."""
    model, x = model_and_batches()
    model.double()
    opt = gradproj.ProjectedOptimizer(build(model.parameters()), method=method, directions=2, space="update")
    saw_conflict = False
    for i in range(6):
        with opt.protect():
            loss(model, x[i].double(), 1.0).backward()
        opt.zero_grad()
        loss(model, x[i + 1].double(), -1.0).backward()
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        descent = [b - p.detach() for p, b in zip(model.parameters(), before, strict=True)]
        for direction in opt.projector._directions._stored:
            d = [direction.get(p) for p in model.parameters()]
            cosine = inner(descent, d) / (inner(descent, descent) * inner(d, d)) ** 0.5
            assert abs(cosine) < 1e-9 if method == "orthogonal" else cosine > -1e-9
        saw_conflict = saw_conflict or bool(opt.last.applied)
    assert saw_conflict
    with pytest.raises(RuntimeError, match="inside step"):
        opt.project()


def test_pickle_and_deepcopy_keep_the_protection():
    model, x = model_and_batches()
    opt = wrap(model, method="conflict", directions=2)
    with opt.protect():
        loss(model, x[0], 1.0).backward()
    opt.zero_grad()

    def through_pickle(pair):
        buffer = io.BytesIO()
        torch.save(pair, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), through_pickle):
        twin, twin_opt = copied((model, opt))
        assert twin_opt.projector.parameters()[0] is next(twin.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        results = []
        for m, o in ((model, opt), (twin, twin_opt)):
            o.zero_grad()
            loss(m, x[1]).backward()
            o.step()
            results.append((o.last.weights, [p.detach().clone() for p in m.parameters()]))
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
        with torch.no_grad():
            for p, b in zip(model.parameters(), before, strict=True):
                p.copy_(b)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [({"directions": 0}, "directions must be >= 1"), ({"space": "weights"}, 'space must be "gradient"'),
     ({"method": "pgd"}, "unknown method")],
)  # fmt: skip
def test_bad_settings(kwargs, error):
    with pytest.raises(ValueError, match=error):
        Projector(list, **kwargs)
