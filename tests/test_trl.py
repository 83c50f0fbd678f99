"""The callback inside TRL's trainers."""

import pytest

import gradproj

transformers = pytest.importorskip("transformers")
from language import character_tokenizer
from test_hf import assert_kept, batches, captured_text, retention, wide_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("own", [False, True], ids=["data", "own text"])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl(tmp_path, kind, own):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer, (anchor,) = wide_model(), character_tokenizer(), batches(1, seed=2)
    texts = {"text": ["hello there. how are you", "what is this"]}
    pairs = {"prompt": ["how are you ", "what is "], "chosen": ["fine.", "this."], "rejected": ["bad.", "that was."]}
    prompts = {"prompt": ["how are you ", "what is ", "who ", "where am i "]}
    rewards = {
        "reward_funcs": lambda completions, **_: [float(text.count("a")) - len(text) / 9 for text in completions]
    }
    config, examples, arguments, more = {
        "SFT": (trl.SFTConfig, texts, {}, {}),
        "DPO": (trl.DPOConfig, pairs, {}, {"ref_model": wide_model()}),
        "GRPO": (trl.GRPOConfig, prompts, {"num_generations": 2, "max_completion_length": 12}, rewards),
    }[kind]
    protection = gradproj.NullSpace(model, share=0.9)
    protect = gradproj.hf.Protect(protection, own=1) if own else gradproj.hf.Protect(protection, [anchor])
    made = getattr(trl, f"{kind}Trainer")(
        model,
        args=config(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1,
            use_cpu=True, bf16=False, report_to=[], save_strategy="no", **arguments,
        ),
        train_dataset=datasets.Dataset.from_dict(examples), processing_class=tokenizer, callbacks=[protect], **more,
    )  # fmt: skip
    made.train()
    assert_kept(model, captured_text(tokenizer, 1) if own else anchor["input_ids"], wide_model())
    assert [entry["gradproj/moved"] > 0 for entry in made.state.log_history if "loss" in entry] == [True] * 3
    assert len(retention(made)) == 2
