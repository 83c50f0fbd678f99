"""What people look at: opt.last, and log_to."""

import copy
from types import SimpleNamespace

import pytest
import torch

import gradproj
from gradproj import diagnostics, directions
from training import WRAPPINGS, descend, gradients, loss, model_and_batches, projected, protect, stored, train

NAMES = {"removed", "applied", "cosine/1", "cosine/2", "weight/0", "weight/1", "weight/2"}


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


def run(wrapping, sink, steps=6, **settings):
    model, x = model_and_batches()
    opt, protected = wrapping(model, 2)
    protect(model, protected, x[11])
    gradproj.log_to(protected, sink, **settings)
    train(model, opt, protected, x[: 2 * steps])
    return protected.last


def test_a_callable_gets_floats(wrapping):
    seen = []
    last = run(wrapping, lambda values, step: seen.append((step, values)))
    assert [step for step, _ in seen] == list(range(6))
    values = seen[-1][1]
    assert values.keys() == NAMES and all(type(v) is float for v in values.values())
    assert values["cosine/2"] == last.cosine[1] and values["weight/0"] == last.weights[0]
    assert values["removed"] == last.removed and values["applied"] == 1.0


def test_a_projection_in_parts_has_the_part_in_its_names():
    parts = SimpleNamespace(
        removed=torch.tensor([0.1, 0.2]),
        applied=torch.tensor(True),
        cosine=torch.tensor([[0.3, 0.4], [0.5, 0.6]], dtype=torch.float64),
        weights=torch.tensor([[1.0, 0.7, 0.8], [1.0, 0.9, 1.1]], dtype=torch.float64),
    )
    values = diagnostics.scalars(parts)
    assert values.keys() == {"removed/0", "removed/1", "applied"} | {
        f"{name}/{p}/{k}" for p in range(2) for name, ks in (("cosine", (1, 2)), ("weight", (0, 1, 2))) for k in ks
    }
    assert values["cosine/1/1"] == 0.5 and values["weight/1/2"] == 1.1 and values["applied"] == 1.0


@pytest.mark.parametrize(("every", "start", "steps"), [(3, 0, [0, 3]), (4, 10, [12])])
def test_every_so_many_steps(every, start, steps, wrapping):
    seen = []
    run(wrapping, lambda _, step: seen.append(step), every=every, start=start)
    assert seen == steps


def test_a_summary_writer_gets_scalars(wrapping):
    """As torch.utils.tensorboard.SummaryWriter takes them."""
    seen = []
    writer = SimpleNamespace(add_scalar=lambda tag, scalar_value, global_step=None: seen.append((tag, global_step)))
    run(wrapping, writer, every=5)
    assert set(seen) == {(f"gradproj/{n}", s) for n in NAMES for s in (0, 5)}


def test_one_read_every_so_many_steps(monkeypatch, wrapping):
    """Each way from a tensor to the host is counted, as on a GPU, where none of them is free."""
    reads = []

    def counted(name):
        original = getattr(torch.Tensor, name)
        return lambda self, *args, **kwargs: (reads.append(name), original(self, *args, **kwargs))[1]

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    monkeypatch.setattr(directions._OnHost, "read", lambda self: [])  # reads on the CPU, where it is free
    model, x = model_and_batches()
    opt, protected = wrapping(model, 2)
    protect(model, protected, x[0])

    def steps(count):
        reads.clear()
        for batch in x[:count]:
            descend(model, opt, batch)
        return len(reads)

    assert steps(8) == 0
    stop = gradproj.log_to(protected, lambda *_: None, every=4)
    assert steps(8) == 2
    stop()
    assert steps(8) == 0


def test_steps_without_a_projection_report_nothing(wrapping):
    model, x = model_and_batches()
    opt, protected = wrapping(model)
    seen = []
    what = protected if wrapping is WRAPPINGS["wrapped"] else protected.protection
    gradproj.log_to(what, lambda _, step: seen.append(step))
    train(model, opt, None, x[:4])
    assert seen == []
    train(model, opt, protected, x[4:8])
    protected.unprotect()
    train(model, opt, None, x[8:])
    assert seen == [2, 3]


def test_copies_do_not_report():
    """A sink is often a file or a connection, which can be neither copied nor pickled."""
    model, x = model_and_batches()
    opt = projected(model)
    seen = []
    gradproj.log_to(opt, lambda _, step: seen.append(step))
    twin, twin_opt = copy.deepcopy((model, opt))
    train(twin, twin_opt, twin_opt, x[:4])
    assert seen == []
    train(model, opt, opt, x[:4])
    assert seen == [0, 1]


def test_bad_arguments():
    opt = projected(model_and_batches()[0])
    with pytest.raises(TypeError, match="pass a ProjectedOptimizer or what attach"):
        gradproj.log_to(opt.optimizer, print)
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        gradproj.log_to(opt, print, every=0)
    with pytest.raises(TypeError, match="callable or have add_scalar"):
        gradproj.log_to(opt, "a file")
