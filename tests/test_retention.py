"""The loss of held-out sequences in a Trainer's log: what a model has forgotten."""

import pytest
import torch

import gradproj

pytest.importorskip("transformers")
from gradproj.hf import own_text
from language import character_tokenizer, language_model
from test_hf import batches, retention, trainer, weights, wide_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("own", [0, 1])
def test_retention_is_in_the_log(tmp_path, own):
    """Before training, at every evaluation and at the end; of a batch that was not captured, and without dropout."""
    model, tokenizer, data = wide_model(attention_dropout=0.5), character_tokenizer(), batches(3, seed=2)
    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.5), data, own=own)
    held_out = own_text(model, tokenizer, 16 + own, seed=42)[:16] if own else data[0]["input_ids"]

    def measured():
        model.eval()
        with torch.no_grad():
            loss = model(input_ids=held_out, labels=held_out).loss.item()
        model.train()
        return loss

    before = measured()
    made = trainer(model, tmp_path, callback, tokenizer=tokenizer, eval_strategy="steps", eval_steps=4)
    made.train()
    entries = retention(made)
    assert [entry["step"] for entry in entries] == [0, 4, 6, 6]
    assert ["eval_loss" in entry for entry in entries] == [False, True, True, False] and "train_loss" in entries[-1]
    first, *_, last = entries
    assert first["gradproj/retention"] == pytest.approx(before, abs=1e-5) and first["gradproj/retention_change"] == 0
    assert last["gradproj/retention"] == pytest.approx(measured(), abs=1e-5)
    assert last["gradproj/retention_change"] == pytest.approx(measured() - before, abs=1e-5) != 0


def test_retention_does_not_disturb_training(tmp_path):
    """With dropout, whose masks would be others if it drew, and which would end if evaluation mode stayed."""
    trained = []
    for measures in (True, False):
        model, data = language_model(attention_dropout=0.5), batches(3, seed=2)

        def loss(model, batch):
            torch.rand(1)
            return model(**batch).loss

        callback = gradproj.hf.Protect(
            gradproj.NullSpace(model, share=0.3), data[0 if measures else 1 :], loss, retention=measures
        )
        made = trainer(model, tmp_path, callback, eval_strategy="steps", eval_steps=2)
        made.train()
        trained.append(weights(model))
        assert bool(retention(made)) == measures
    assert torch.equal(*trained)
