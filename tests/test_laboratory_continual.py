"""`make continual` on images of noise: nothing is downloaded."""

import functools
import gzip
import json

import numpy as np
import pytest
import torch

from laboratory import __main__ as command
from laboratory import continual, continual_tasks, formulas
from laboratory.continual_methods import METHODS, Ewc, Gpm, Pinned, grown, learn, summary
from laboratory.continual_tasks import Mlp, Sequences, idx, load, tasks
from laboratory.cures import Cure
from laboratory.runs import FIRST_REPORTED

# Of every method one setting; a share that leaves curvature for the layers' rates to go by.
SMALL = [next(c for c in continual.grid("permuted") if c.family == family) for family in METHODS]
SMALL = [c._replace(share=0.05) if c.damping else c for c in SMALL]


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def of(tmp_path, monkeypatch):
    """400 images of 16 pixels, 300 of them learned, and 200 test images: the first pixel says which of the three."""
    random = np.random.default_rng(0)
    monkeypatch.setattr(continual_tasks, "LEARNED", 300)
    monkeypatch.setattr(continual_tasks, "PIXELS", 16)
    for part, count in (("train", 400), ("t10k", 200)):
        images = random.integers(0, 200, (count, 4, 4))
        images[:, 0, 0] = 255 if part == "t10k" else np.where(np.arange(count) < 300, 0, 128)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return Sequences(tmp_path, images=40, held_out=20, width=12, kept=20, memory=30)


def network(of, kind="permuted"):
    torch.manual_seed(0)
    return Mlp(of.width, kind), next(tasks(of, kind, 0))


def test_idx_files_are_read_and_others_refused(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    write_idx(tmp_path / "file.gz", values)
    assert idx(tmp_path / "file.gz").tolist() == values.tolist()
    (tmp_path / "file.gz").write_bytes(gzip.compress(b"\0\0\x0d\1\0\0\0\0"))
    with pytest.raises(ValueError, match=r"file.gz is no idx file of bytes: it begins with 00000d01"):
        idx(tmp_path / "file.gz")


def test_without_data_the_package_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"has no train-images.*apt-get install dataset-fashion-mnist.*--data FOLDER"):
        command.main(["continual", "--data", str(tmp_path)])


def test_what_is_measured_was_not_learned(of):
    corner = load(of.data)[0][:, 0].unique().tolist()
    test_corner = load(of.data)[2][:, 0].unique().tolist()
    for kind, count in (("split", 5), ("permuted", 10)):
        for seed, held_out in ((0, corner[1:]), (FIRST_REPORTED, test_corner)):
            found = list(tasks(of, kind, seed))
            assert len(found) == count and all(len(t.images) == 40 for t in found)
            assert all(len(t.held_out_labels) == (10 if seed == 0 else 20) for t in found)
            assert all((t.labels < (2 if kind == "split" else 10)).all() for t in found)
            if kind == "split":
                assert found[1].images[:, 0].unique().tolist() == corner[:1]
                assert found[1].held_out_images[:, 0].unique().tolist() == held_out
    first, second, *_ = tasks(of, "permuted", 0)
    assert not torch.equal(first.images.mean(0), second.images.mean(0))


def test_accuracies_are_summed_up_by_their_definitions():
    found = summary([[0.9], [0.7, 0.8], [0.5, 0.9, 1.0]])
    assert found == pytest.approx({"acc": 2.4 / 3, "bwt": (-0.4 + 0.1) / 2, "learned": 2.7 / 3})


def test_gpm_bases_hold_the_threshold_with_as_few_columns_as_possible():
    torch.manual_seed(0)
    first, second = torch.randn(30, 12), torch.randn(30, 12) + 1
    basis = grown(torch.zeros(30, 0), first, 0.8)
    wider = grown(basis, second, 0.8)
    assert torch.equal(wider[:, : basis.shape[1]], basis)
    for u, start, inputs in ((basis, 0, first), (wider, basis.shape[1], second)):
        torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]), atol=1e-5, rtol=0)
        kept = [(u[:, :r] @ u[:, :r].T @ inputs).norm() ** 2 / inputs.norm() ** 2 for r in (u.shape[1] - 1, u.shape[1])]
        assert kept[0] < 0.8 <= kept[1] and u.shape[1] > start


def test_gpm_projects_the_gradient_off_the_bases(of):
    model, task = network(of)
    method = Gpm(model, Cure("GPM", lr=0.1, share=0.9), of, 0)
    method.finish(task)
    method.number = 1
    method.loss(task.images[20:30], task.labels[20:30]).backward()
    wanted = []
    for name, layer in method.layers.items():
        weight = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        basis = method.bases[name]
        wanted.append(weight - 0.1 * grad @ (torch.eye(len(basis)) - basis @ basis.T))
    method.step()
    assert all(rank > 0 for rank in method.ranks().values())
    for layer, after in zip(method.layers.values(), wanted, strict=True):
        torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], 1).detach(), after)


def test_ewc_adds_the_gradient_of_its_penalty(of):
    model, task = network(of)
    method = Ewc(model, Cure("EWC", lr=0.1, ewc=3.0), of, 0)
    method.finish(task)
    method.number = 1
    before = [p.detach() + 0.01 for p in model.parameters()]
    for p, b in zip(model.parameters(), before, strict=True):
        p.data.copy_(b)
    value = method.loss(*task[:2])
    penalty = formulas.ewc_penalty([*model.parameters()], method.start, method.importance, 3.0)
    grads = torch.autograd.grad(value + penalty, [*model.parameters()], retain_graph=True)
    value.backward()
    method.step()
    for p, b, grad in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * grad)


def test_null_space_heads_of_other_tasks_are_free(of):
    model, task = network(of, "split")
    method = Pinned(model, Cure("NullSpace", lr=0.1, share=0.1, allocation="a task"), of, 0)
    for method.number in (0, 1):
        method.finish(task)
        ranks = method.ranks()
        assert ranks["heads.0"] and [ranks[f"heads.{n}"] > 0 for n in range(1, 5)] == [method.number == 1, *[False] * 3]
    assert method.protection.share == pytest.approx(0.2)


def test_table_and_figure_and_an_interrupted_command_goes_on(of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continual, "GRID", SMALL)
    monkeypatch.setattr(Sequences, "__init__", functools.partialmethod(Sequences.__init__, width=12, kept=30))
    arguments = ["continual", "--data", str(of.data), "--images", "30", "--seeds", "2", "--choosing-seeds", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "1"]

    def fails(of, kind, cure, seed):
        if cure.family == "GPM":
            raise FloatingPointError("no basis")
        return learn(of, kind, cure, seed)

    monkeypatch.setattr(continual, "learn", fails)
    with pytest.raises(SystemExit, match="no basis\nFinished runs are kept"):
        command.main(arguments)
    monkeypatch.setattr(continual, "learn", learn)
    command.main(arguments)
    assert "4 of 16 runs are finished already" in capsys.readouterr().out
    text = (tmp_path / "out" / "table.md").read_text()
    assert "task-incremental" in text and "domain-incremental" in text and (tmp_path / "out" / "figure.png").exists()
    assert all(text.count(f"| {family} | {SMALL[n].strength} |") == 3 for n, family in enumerate(METHODS))
    kept = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert len(kept["runs"]) == 32 and len(kept["chosen_from"]) == 16
    command.main(arguments)
    assert "32 of 32 runs are finished already" in capsys.readouterr().out
