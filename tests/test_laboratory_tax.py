"""The laboratory's promises: the same runs from a second command, no finished run lost, nothing mixed, figures that are
measured."""

import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import laboratory.__main__ as command
from laboratory import (
    report,
    runs,
    small,
    small_texts,
    tax,
    tax_cures,
    texts,
    tiny_lm,
    train,
)  # fmt: skip
from laboratory.cures import NONE, Cure
from laboratory.figure import STYLES
from laboratory.model import fingerprint
from laboratory.points import points
from laboratory.small import OBJECTIVES, SCALES
from laboratory.store import Store
from laboratory.tax_cures import CURES, GRIDS

QUICK = SCALES["quick"]
FEW = [
    NONE,
    Cure("KL penalty", "beta 0.1", kl=0.1),
    Cure("PTX", "gamma 1", gamma=1.0),
    Cure("interpolation", "alpha 0.5", alpha=0.5),
    Cure("conflict", "2 directions", method="conflict", directions=2),
    Cure("NullSpace", "share 0.1", share=0.1, fill=2),
    Cure("damping alone", "damping 0.3", share=0.001, damping=0.3, pinned=False, fill=2),
    Cure("EWC", "lambda 1", ewc=1.0, fill=2),
    Cure("K-FAC, two-sided", "damping 0.3", kfac=0.3, fill=2),
    Cure("K-FAC, elastic", "damping 0.3", kfac=0.3, fill=2, elastic=True),
    Cure("distilled", "weight 1", distil=1.0, text="own"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model whose base model is there already."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "base.safetensors"
    tiny_lm.save_base(path, tiny_lm.TinyLM(QUICK.width, QUICK.layers, QUICK.heads), QUICK.identity)
    return small.Small(QUICK, path, name="quick")


@pytest.fixture
def plan(tmp_path, model):
    return runs.Plan(model, tmp_path / "work")


def quiet(_, milestone=False):
    pass


def test_command_runs_through_and_a_second_one_makes_nothing_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tax_cures, "GRIDS", dict.fromkeys(OBJECTIVES, FEW))
    work, out = tmp_path / "work", tmp_path / "out"
    arguments = ["tax", "--quick", "--seeds", "2", "--choosing-seeds", "1", "--workers", "1"]
    arguments += ["--work", str(work), "--out", str(out)]
    command.main(arguments)
    made = {
        p: p.stat().st_mtime_ns for kind in ("json", "pt", "safetensors") for p in work.rglob(f"*.{kind}")
    }  # not the page
    assert made
    found = json.loads((out / "runs.json").read_text())
    # A family of one setting is reported whatever it did; none of it on a seed that chose.
    assert len(found["chosen_from"]) == len(FEW) * len(OBJECTIVES) and len(found["runs"]) == 2 * len(FEW) * len(
        OBJECTIVES
    )
    assert {r["seed"] for r in found["chosen_from"]} == {0} and min(r["seed"] for r in found["runs"]) == 1000
    assert [p.cure for p in points(found["runs"])] == FEW * len(OBJECTIVES)
    assert len(found["found"]) == 3 and found["made"]["command"].startswith("make tax")
    assert (out / "figure.png").stat().st_size > 10_000 and "| base model |" in (out / "table.md").read_text()
    command.main([*arguments, "--page"])
    assert (work / "index.html").read_text().count('"reported seeds":2') == 1
    (work / "quick-of-another-time").mkdir()
    capsys.readouterr()
    command.main(arguments)
    printed = capsys.readouterr().out
    assert "34 of 34 runs are finished already" in printed and "66 of 66" in printed
    assert "ignored, made with other settings or versions" in printed and "quick-of-another-time" in printed
    assert {p: p.stat().st_mtime_ns for p in made} == made


def test_workers_make_the_same_runs(plan):
    """Two processes and one thread: the same figures, time aside."""
    todo = [runs.Run("sft", cure, 0) for cure in FEW[:3]]
    runs.make_all(plan, todo[:2], 2, quiet)
    apart = [plan.store.load(*r)["measured"] for r in todo[:2]]
    for r in todo[:2]:
        plan.store.path(*r).unlink()
    runs.make_all(plan, todo, 1, quiet)
    for a, b in zip(apart, (plan.store.load(*r)["measured"] for r in todo[:2]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_interrupted_run_loses_nothing(plan, monkeypatch):
    todo = [runs.Run("sft", cure, 0) for cure in FEW]
    make, made = runs.make, []

    def interrupted(plan, run):
        if len(made) == 2:
            raise KeyboardInterrupt
        make(plan, run)
        made.append(run)

    monkeypatch.setattr(runs, "make", interrupted)
    with pytest.raises(runs.Stopped, match="interrupted\nFinished runs are kept in .*goes on from there"):
        runs.make_all(plan, todo, 1, quiet)
    assert [r for r in todo if plan.store.has(*r)] == made and len(made) == 2
    monkeypatch.setattr(runs, "make", make)
    runs.make_all(plan, todo, 1, quiet)
    assert all(plan.store.load(*r) for r in todo)
    assert not list(plan.store.folder.glob("*.part"))


def test_loss_that_is_not_finite_ends_with_the_run_and_step(plan, monkeypatch):
    todo = [runs.Run("dpo", cure, 1) for cure in (NONE, FEW[2], FEW[4])]
    real = train.loss
    calls = []

    def diverges(*arguments):
        calls.append(None)
        value = real(*arguments)
        return value * float("nan") if len(calls) == QUICK.steps + 3 else value

    monkeypatch.setattr(train, "loss", diverges)
    with pytest.raises(runs.Stopped, match="dpo, PTX, gamma 1, seed 1: the loss of step 2 is nan"):
        runs.make_all(plan, todo, 1, quiet)
    assert plan.store.has(*todo[0]) and not plan.store.has(*todo[1])


@pytest.mark.parametrize("key, value", [("version", 0), ("fingerprint", "other"), ("seed", 7), ("cure", {})])
def test_file_that_is_not_what_its_name_says_is_refused(tmp_path, key, value):
    store = Store(tmp_path, "quick", "abc")
    store.save("sft", NONE, 0, {"measured": {}, "cost": None})
    path = store.path("sft", NONE, 0)
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, key: value}))
    with pytest.raises(ValueError, match=f"{path.name}: {key} is .*expected.*move the file away"):
        store.load("sft", NONE, 0)
    assert path.exists()


def test_cut_off_file_is_refused(tmp_path):
    store = Store(tmp_path, "quick", "abc")
    store.path("sft", NONE, 0).write_text('{"version": 1,')
    with pytest.raises(ValueError, match="is not JSON.*delete it"):
        store.load("sft", NONE, 0)


def test_nothing_half_written_takes_a_name(tmp_path):
    """JSON has no NaN: such a result is refused, and the file of an earlier run stays as it was."""
    store = Store(tmp_path, "quick", "abc")
    store.save("sft", NONE, 0, {"measured": {"loss": 1.0}})
    with pytest.raises(ValueError):
        store.save("sft", NONE, 0, {"measured": {"loss": float("nan")}})
    assert store.load("sft", NONE, 0)["measured"] == {"loss": 1.0}
    with pytest.raises(Exception, match="pickle"):
        store.save_weights("base", {"w": lambda: None})
    assert [p.name for p in store.folder.iterdir()] == ["sft-none-lr-x-1-seed0.json"]


def test_other_settings_have_another_folder(model):
    others = [model, *(dataclasses.replace(model, **o) for o in ({"device": "cuda"}, {"settings": SCALES["cpu"]}))]
    others.append(dataclasses.replace(model, path=small.SHIPPED))
    assert len({fingerprint(m) for m in others}) == len(others)
    assert len({c.slug for c in CURES}) == len(CURES)
    assert all(NONE in grid for grid in GRIDS.values())
    assert {c.family for grid in GRIDS.values() for c in grid} == STYLES.keys()


def test_laboratory_starts_from_the_shipped_base_model(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "retrain", lambda *_: pytest.fail("trained"))
    model = small.small("cpu", "cpu", tmp_path, quiet)
    weights = tiny_lm.load_base(small.SHIPPED)[0].state_dict()
    torch.testing.assert_close(dict(model.base().state_dict()), dict(weights), rtol=0, atol=0)
    monkeypatch.setitem(SCALES, "cpu", dataclasses.replace(SCALES["cpu"], width=16))
    with pytest.raises(ValueError, match="width is 96, expected 16"):
        small.small("cpu", "cpu", tmp_path, quiet)


def test_costs_are_counted(model):
    size = sum(4 * p.numel() for p in model.base().parameters())

    def cost(objective="sft", **cure):
        _, cost = train.train(model, objective, Cure("some", **cure), 0)
        return cost.capability_backwards, cost.extra_bytes / size

    assert QUICK.steps == 4
    assert cost(gamma=0.5) == (4, 0)
    assert cost("prose", gamma=0.5, steps=1.5) == (6, 0)
    assert cost(ewc=0.5, fill=3) == (3 * QUICK.capability_batch, 2)
    assert cost(share=0.1, pinned=False, damping=0.3, fill=3) == (3, 0)
    assert cost(gamma=0.5, every=3) == (2, 0)
    assert cost(kl=0.5) == (0, 1) == cost("dpo")  # the base model
    assert cost(distil=0.5, every=2, text="own") == (2, 1)
    assert cost(method="orthogonal") == (4, 1)
    assert cost(method="conflict", directions=3, fill=3) == (6, 3)
    assert cost(method="conflict", directions=8, every=2, fill=4) == (5, 5)


def test_null_space_is_captured_once_and_its_memory_counted(model):
    cure = Cure("NullSpace", "share 0.1", share=0.1, fill=3)
    pupil, cost = train.train(model, "sft", cure, 0)
    assert cost.capability_backwards == 3
    twin = copy.deepcopy(model.base())
    _, protection = train.optimizer_of(twin, cure, 1e-3, train.Capability(model, twin, small.LEARNED, 0))
    layers = {
        b.vectors.untyped_storage().data_ptr(): b.vectors.untyped_storage().nbytes() for b in protection.bases.values()
    }
    assert cost.extra_bytes == sum(layers.values()) + sum(4 * b.target.numel() for b in protection.bases.values()) > 0
    for name, basis in protection.bases.items():
        layer, before = pupil.get_submodule(name), model.base().get_submodule(name)
        assert not torch.equal(layer.weight, before.weight)
        kept = torch.cat([layer.weight, layer.bias[:, None]], 1) @ basis.vectors
        torch.testing.assert_close(kept, basis.target, rtol=1e-4, atol=1e-6)


def test_cures_change_the_run_and_the_base_model_is_left_alone(model):
    before = {k: v.clone() for k, v in model.base().state_dict().items()}
    ends = {}
    for cure in FEW:
        if cure.alpha is None:
            pupil, _ = train.train(model, "dpo", cure, 0)
            ends[cure.name] = torch.cat([p.detach().flatten() for p in pupil.parameters()])
    del ends["conflict, 2 directions"]  # nothing conflicts in these few steps
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(ends.values(), 2))
    assert all(torch.equal(before[k], v) for k, v in model.base().state_dict().items())


@pytest.mark.parametrize("cure", [Cure("frozen", frozen=True), FEW[5], FEW[6], FEW[8]])
def test_what_is_not_linear_is_held(model, cure):
    base, (pupil, _) = model.base(), train.train(model, "prose", cure, 0)
    assert torch.equal(pupil.token.weight, base.token.weight) and torch.equal(pupil.norm.weight, base.norm.weight)
    assert not torch.equal(pupil.blocks[0].merge.weight, base.blocks[0].merge.weight)


def test_missing_package_or_text_is_named_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="lacks the module pydoc_data.topics.*install the whole standard library"):
        small_texts.prose.__wrapped__(held_out=True)
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no argparse.py"):
        tiny_lm.code()
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        command.main(["tax", "--quick", "--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_page_of_other_results_is_refused(tmp_path):
    source = tmp_path / "runs.json"
    for text, reason in ((None, "does not exist"), ("{", "is not JSON"), ('{"version": 1}', "is of version 1, not")):
        if text:
            source.write_text(text)
        with pytest.raises(SystemExit, match=f"runs.json {reason}.*with `make tax`"):
            command.main(["tax", "--page", "--out", str(tmp_path), "--work", str(tmp_path / "work")])


def test_bad_arguments_are_named(capsys):
    for arguments, reason in (
        (["--seeds", "0"], "--seeds must be >= 1"),
        (["--choosing-seeds", "0"], "--choosing-seeds must be >= 1"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit) as e:
            command.main(["tax", *arguments])
        assert reason in f"{e.value} {capsys.readouterr().err}"


def test_committed_runs_give_the_committed_report():
    """runs.json has six digits of every figure: a last digit of the table may differ, where it was rounded twice."""
    folder = ROOT / "benchmarks" / "results" / "alignment_tax"
    kept = tax.read(folder / "runs.json")
    of = points(kept["runs"])
    assert tax.sentences(kept["base"], of) == kept["found"]
    committed = (folder / "table.md").read_text().split("\n\n", 1)[1].split("\n\n- ")[0]
    for a, b in zip(tax.table(kept["base"], of).split(), committed.split(), strict=True):
        digits = len(b.partition(".")[2])
        assert a == b or float(a) == pytest.approx(float(b), abs=1.01 * 10**-digits)
    facts = {k: v for k, v in kept.items() if k not in ("version", "runs", "chosen_from")}
    dumped = report.dump(facts, runs=kept["runs"], chosen_from=kept["chosen_from"])
    assert dumped == (folder / "runs.json").read_text()
