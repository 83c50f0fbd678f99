"""The callback inside the real ``transformers.Trainer``, on models made from a configuration."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import gradproj

transformers = pytest.importorskip("transformers")
from gradproj.hf import own_text
from language import character_tokenizer, language_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def batches(count, seed, size=1):
    tokens = torch.randint(50, (count, size, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": t, "labels": t} for t in tokens]


def trainer(
    model, folder, callback, steps=6, optimizer_cls_and_kwargs=None, tokenizer=None, model_init=None, **settings
):
    examples = [{k: t[0] for k, t in batch.items()} for batch in batches(48, seed=1)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=2, save_steps=3,
        use_cpu=True, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:4],
        processing_class=tokenizer,
        callbacks=[callback] if callback else [],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        model_init=model_init,
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def protections(model):
    return {"directions": gradproj.Directions(3, "conflict"), "null space": gradproj.NullSpace(model, share=0.3)}


def test_null_space_keeps_what_the_model_says(tmp_path):
    """And learns; the log says how far steps had moved it."""
    model, (anchor,) = language_model(), batches(1, seed=2)
    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.95), [anchor])
    before = model(**anchor).logits.detach()
    made = trainer(model, tmp_path, callback, gradient_accumulation_steps=2, max_grad_norm=0.5)
    made.train()
    assert (model(**anchor).logits - before)[:, :-1].abs().max() < 1e-4  # the last token predicts nothing
    assert (weights(model) - weights(language_model())).abs().max() > 1e-3
    logged = [entry["gradproj/moved"] for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 3 and min(logged) > 0


def test_the_trainer_makes_the_optimizer_from_a_class_and_a_file(tmp_path):
    (anchor,) = batches(1, seed=2)
    protection = gradproj.NullSpace(language_model(), share=0.95)
    with protection.capture():
        protection.model(**anchor).loss.backward()
    protection.save(tmp_path / "anchor.safetensors")
    model = language_model()
    before = model(**anchor).logits.detach()
    arguments = {"model": model, "protection": tmp_path / "anchor.safetensors", "lr": 0.01}
    made = trainer(model, tmp_path, None, optimizer_cls_and_kwargs=(gradproj.ProjectedAdamW, arguments))
    made.train()
    assert (model(**anchor).logits - before)[:, :-1].abs().max() < 1e-4
    assert (weights(model) - weights(language_model())).abs().max() > 1e-3


def test_directions_are_fresh_every_so_many_steps(tmp_path):
    """From all batches but the first, which is held out."""
    model, seen = language_model(), []

    def loss(model, batch):
        if torch.is_grad_enabled():
            seen.append(batch["input_ids"])
        return model(**batch).loss

    data = batches(3, seed=2)
    callback = gradproj.hf.Protect(gradproj.Directions(8), data, loss, every=2)
    made = trainer(model, tmp_path, callback)
    made.train()
    assert len(seen) == 3 and all(torch.equal(t, data[1 + i % 2]["input_ids"]) for i, t in enumerate(seen))
    assert len(callback.protection) == 3
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert all(entry["gradproj/removed"] > 0 and "gradproj/cosine_min" in entry for entry in logged)


def test_directions_from_own_text(tmp_path, monkeypatch):
    """Another one before every step, in the model's words of that time."""
    model, tokenizer, written = language_model(), character_tokenizer(), []

    def spy(model, *arguments, **settings):
        rows = own_text(model, *arguments, **settings)
        written.append((rows, weights(model).clone()))
        return rows

    monkeypatch.setattr("gradproj.integrations.hf.own_text", spy)
    callback = gradproj.hf.Protect(gradproj.Directions(8), every=2)
    made = trainer(model, tmp_path, callback, tokenizer=tokenizer)
    made.train()
    assert [len(rows) for rows, _ in written] == [16, 8, 8, 8] and len(callback.protection) == 3
    (held_out, _), (first, _), (second, then), _ = written
    assert not torch.equal(first, second) and not torch.equal(first, held_out[:8])
    assert not torch.equal(then, weights(language_model()))
    assert all(entry["gradproj/removed"] > 0 for entry in made.state.log_history if "loss" in entry)


def wide_model(**settings):
    """One row of own text spans less than what its layers read."""
    return language_model(hidden_size=128, intermediate_size=160, **settings)


def retention(made):
    return [entry for entry in made.state.log_history if "gradproj/retention" in entry]


def captured_text(tokenizer, sequences):
    """What Protect captures: the rows after those that are held out, from the trainer's default seed."""
    return own_text(wide_model(), tokenizer, 16 + sequences, seed=42)[16:]


def assert_kept(model, rows, fresh):
    """On ``rows``, up to the last token, which predicts nothing; and elsewhere the model has learned."""
    other = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        moved = (model(other).logits - fresh(other).logits).abs().max()
        assert moved > 0.03
        assert (model(rows).logits - fresh(rows).logits)[:, :-1].abs().max() < 0.02 * moved


def test_without_data_own_text_is_kept(tmp_path):
    model, tokenizer = wide_model(), character_tokenizer()
    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.9), own=1)
    trainer(model, tmp_path, callback, tokenizer=tokenizer).train()
    assert_kept(model, captured_text(tokenizer, 1), wide_model())
    assert gradproj.hf.Protect(gradproj.NullSpace(wide_model())).own == 128


def test_data_and_own_text_are_mixed(tmp_path):
    """All of data then, and each with its own loss: held out is own text."""
    model, tokenizer, data, seen = wide_model(), character_tokenizer(), batches(2, seed=2), []

    def loss(model, batch):
        seen.append(batch["input_ids"])
        return 2 * model(**batch).loss

    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.95), data, loss, own=1)
    trainer(model, tmp_path, callback, tokenizer=tokenizer).train()
    assert len(seen) == 2 and all(torch.equal(t, batch["input_ids"]) for t, batch in zip(seen, data, strict=True))
    assert_kept(model, captured_text(tokenizer, 1), wide_model())
    for batch in data:
        assert_kept(model, batch["input_ids"], wide_model())


def test_a_trainer_that_makes_the_model(tmp_path):
    """Then the null space is made of what is trained, and needs no name before."""
    model, tokenizer = wide_model(), character_tokenizer()
    callback = gradproj.hf.Protect(lambda model: gradproj.NullSpace(model, share=0.9), own=1)
    trainer(model, tmp_path, callback, tokenizer=tokenizer).train()
    assert callback.protection.model is model
    assert_kept(model, captured_text(tokenizer, 1), wide_model())


@pytest.mark.parametrize("kind", ["directions", "null space"])
def test_resumed_is_uninterrupted_without_data(tmp_path, kind):
    """Bit for bit, and retention is compared with what it was before the interrupted run."""
    tokenizer, whole, model = character_tokenizer(), wide_model(), wide_model()
    first = trainer(whole, tmp_path, gradproj.hf.Protect(protections(whole)[kind]), tokenizer=tokenizer)
    first.train()
    made = trainer(model, tmp_path, gradproj.hf.Protect(protections(model)[kind]), tokenizer=tokenizer)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(model), weights(whole))
    assert retention(made)[-1]["gradproj/retention_change"] == retention(first)[-1]["gradproj/retention_change"] != 0


def test_resumed_with_batches_of_another_kind(tmp_path):
    """Which a checkpoint does not keep: held out is the first of them again."""
    data = [batch["input_ids"].numpy() for batch in batches(3, seed=2)]

    def loss(model, batch):
        return model(input_ids=torch.as_tensor(batch), labels=torch.as_tensor(batch)).loss

    changes = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = language_model()
        made = trainer(model, tmp_path, gradproj.hf.Protect(gradproj.NullSpace(model, share=0.3), data, loss))
        made.train(resume_from_checkpoint=checkpoint)
        changes.append(retention(made)[-1]["gradproj/retention_change"])
    assert changes[0] == changes[1] != 0
    with pytest.raises(FileNotFoundError, match="checkpoint-3.*does not exist"):
        (tmp_path / "checkpoint-3" / "gradproj.pt").unlink()
        made.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("kind", ["directions", "null space"])
def test_resumed_is_uninterrupted(tmp_path, kind):
    """Bit for bit."""
    data, whole, model = batches(4, seed=2), language_model(), language_model()
    trainer(whole, tmp_path, gradproj.hf.Protect(protections(whole)[kind], data)).train()
    callback = gradproj.hf.Protect(protections(model)[kind], data)
    trainer(model, tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(model), weights(whole))


@pytest.mark.parametrize("kind", ["directions", "null space"])
def test_training_twice_attaches_once(tmp_path, kind):
    model = language_model()
    callback = gradproj.hf.Protect(protections(model)[kind], batches(2, seed=2))
    made = trainer(model, tmp_path, callback, steps=2)
    made.train()
    made.train()
    assert len(callback.protection)


def test_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(language_model(), peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    (anchor,) = batches(1, seed=2)
    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.9), [anchor])
    before = model(**anchor).logits.detach()
    trainer(model, tmp_path, callback).train()
    assert (model(**anchor).logits - before)[:, :-1].abs().max() < 1e-4  # the last token predicts nothing
    with model.disable_adapter(), torch.no_grad():
        base = model(**batches(1, seed=3)[0]).logits
    assert (model(**batches(1, seed=3)[0]).logits - base).abs().max() > 1e-3


def test_a_trainer_that_drops_its_callbacks():
    """Nothing was protected, and nobody said so. It may have freed them too."""

    def told(model, protection=None):
        opt = torch.optim.SGD(model.parameters())
        if protection is not None:
            gradproj.attach(opt, protection)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step()
        return sum("has stepped, but no trainer" in str(w.message) for w in caught)

    model = language_model()
    gradproj.hf.Protect(gradproj.NullSpace(model, share=0.3), batches(2, seed=2))
    gradproj.hf.Protect(gradproj.Directions(), [])  # of nobody knows which model: freed, it says nothing
    protection = gradproj.NullSpace(model, share=0.3)
    assert told(torch.nn.Linear(2, 2)) == 0 and told(model, protection) == 0
    assert told(model) == 1 and told(model) == 0
    directions = gradproj.hf.Protect(gradproj.Directions(), [])
    assert told(model) == 1 and directions is not None


def test_ordinary_use_warns_of_nothing(tmp_path, recwarn):
    model, tokenizer = language_model(), character_tokenizer()
    made = trainer(model, tmp_path, gradproj.hf.Protect(gradproj.NullSpace(model, share=0.3)), tokenizer=tokenizer)
    recwarn.clear()
    made.train()
    assert not [w for w in recwarn if "gradproj" in f"{w.message} {w.filename}"]


def test_a_capture_of_few_tokens_is_told(tmp_path):
    for size, told in ((2, True), (4, False)):  # times 6 tokens that predict another, of a layer with 160 inputs
        model = wide_model()
        protect = gradproj.hf.Protect(gradproj.NullSpace(model), batches(1, seed=2, size=size))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(model, tmp_path, protect, steps=1).train()
        words = [str(w.message) for w in caught if "an eighth of the 160 inputs" in str(w.message)]
        assert bool(words) == told and all("12 tokens were captured" in text for text in words)


@pytest.mark.parametrize("kind", ["directions", "null space", "own text"])
def test_ranks_stay_equal_under_ddp(tmp_path, kind):
    """The model that a callback is given is the one inside DDP, through which no gradient is averaged."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path), kind], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (a, kept), (b, as_kept) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(a, b) and not torch.equal(a, weights(language_model()))
    assert kept == as_kept and len(kept) == 2  # measured on the same sequences


def test_bad_arguments(tmp_path):
    protection, data = gradproj.Directions(), batches(1, seed=2)
    with pytest.raises(TypeError, match="must be a NullSpace or Directions, got int"):
        gradproj.hf.Protect(3, data)
    with pytest.raises(TypeError, match="a list of batches or a DataLoader"):
        gradproj.hf.Protect(protection, iter(data))
    with pytest.raises(ValueError, match="every must be >= 1"):
        gradproj.hf.Protect(protection, data, every=0)
    with pytest.raises(ValueError, match="captured once"):
        gradproj.hf.Protect(gradproj.NullSpace(language_model()), data, every=2)
    for settings, message in (({"own": 0}, "own must be >= 1, got 0"), ({"data": data, "own": -1}, "own must be >= 0")):
        with pytest.raises(ValueError, match=message):
            gradproj.hf.Protect(gradproj.NullSpace(language_model()), **settings)
    with pytest.raises(ValueError, match="own= is for a NullSpace"):
        gradproj.hf.Protect(protection, data, own=8)
    with pytest.raises(ValueError, match="loss= is of data"):
        gradproj.hf.Protect(protection, loss=lambda model, batch: 0)
    model = language_model()
    with pytest.raises(ValueError, match="needs a tokenizer: pass processing_class=tokenizer to the trainer"):
        trainer(model, tmp_path, gradproj.hf.Protect(gradproj.NullSpace(model))).train()
    without_labels = [{"input_ids": data[0]["input_ids"]}]
    for given, message in ((without_labels, "no labels"), ([], "no batch")):
        with pytest.raises(ValueError, match=message):
            trainer(language_model(), tmp_path, gradproj.hf.Protect(gradproj.Directions(), given)).train()


def one_rank(folder, kind):
    """Each rank captures batches of its own."""
    model = language_model()
    data = None if kind == "own text" else batches(2, seed=2 + int(os.environ["RANK"]))
    protection = gradproj.Directions(3, "conflict") if kind == "directions" else gradproj.NullSpace(model, share=0.3)
    settings = {"save_strategy": "no", "ddp_backend": "gloo", "tokenizer": character_tokenizer()}
    made = trainer(model, folder / "out", gradproj.hf.Protect(protection, data), **settings)
    made.train()
    kept = [entry["gradproj/retention"] for entry in retention(made)]
    torch.save((weights(model), kept), folder / f"{os.environ['RANK']}.pt")
    time.sleep(0.5)  # gloo's threads must end before Python does: see benchmarks/torchrun_example.py


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), sys.argv[2])
