"""The callback inside the real ``transformers.Trainer``, on models made from a configuration."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gradproj

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def language_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def batches(count, seed, size=1):
    tokens = torch.randint(50, (count, size, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": t, "labels": t} for t in tokens]


def trainer(model, folder, callback, steps=6, optimizer_cls_and_kwargs=None, **settings):
    examples = [{k: t[0] for k, t in batch.items()} for batch in batches(48, seed=1)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=2, save_steps=3,
        use_cpu=True, report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=examples,
        callbacks=[callback] if callback else [],
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
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
    model, seen = language_model(), []

    def loss(model, batch):
        seen.append(batch["input_ids"])
        return model(**batch).loss

    data = batches(2, seed=2)
    callback = gradproj.hf.Protect(gradproj.Directions(8), data, loss, every=2)
    made = trainer(model, tmp_path, callback)
    made.train()
    assert len(seen) == 3 and all(torch.equal(t, data[i % 2]["input_ids"]) for i, t in enumerate(seen))
    assert len(callback.protection) == 3
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert all(entry["gradproj/removed"] > 0 and "gradproj/cosine_min" in entry for entry in logged)


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


def character_tokenizer():
    """Made here, so that nothing is downloaded."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<unk>", *map(chr, range(97, 123)), " ", "."]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), behavior="isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(tmp_path, kind):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, (anchor,) = language_model(), batches(1, seed=2)
    before = model(**anchor).logits.detach()
    texts = {"text": ["hello there. how are you", "what is this"]}
    pairs = {"prompt": ["how are you ", "what is "], "chosen": ["fine.", "this."], "rejected": ["bad.", "that was."]}
    settings = {"SFT": (trl.SFTConfig, texts, {}), "DPO": (trl.DPOConfig, pairs, {"ref_model": language_model()})}
    make_arguments, examples, more = settings[kind]
    arguments = make_arguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no",
    )  # fmt: skip
    made = getattr(trl, f"{kind}Trainer")(
        model, args=arguments, train_dataset=datasets.Dataset.from_dict(examples), processing_class=character_tokenizer(),
        callbacks=[gradproj.hf.Protect(gradproj.NullSpace(model, share=0.9), [anchor])], **more,
    )  # fmt: skip
    made.train()
    assert (model(**anchor).logits - before)[:, :-1].abs().max() < 1e-4
    assert (weights(model) - weights(language_model())).abs().max() > 1e-3
    assert [entry["gradproj/moved"] > 0 for entry in made.state.log_history if "loss" in entry] == [True] * 3


@pytest.mark.parametrize("kind", ["directions", "null space"])
def test_ranks_stay_equal_under_ddp(tmp_path, kind):
    """The model that a callback is given is the one inside DDP, through which no gradient is averaged."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path), kind], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(a, b) and not torch.equal(a, weights(language_model()))


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
    without_labels = [{"input_ids": data[0]["input_ids"]}]
    for given, message in ((without_labels, "no labels"), ([], "no batch")):
        with pytest.raises(ValueError, match=message):
            trainer(language_model(), tmp_path, gradproj.hf.Protect(gradproj.Directions(), given)).train()


def one_rank(folder, kind):
    """Each rank captures batches of its own."""
    model = language_model()
    callback = gradproj.hf.Protect(protections(model)[kind], batches(2, seed=2 + int(os.environ["RANK"])))
    made = trainer(model, folder / "out", callback, save_strategy="no", ddp_backend="gloo")
    made.train()
    torch.save(weights(model), folder / f"{os.environ['RANK']}.pt")
    time.sleep(0.5)  # gloo's threads must end before Python does: see benchmarks/torchrun_example.py


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), sys.argv[2])
