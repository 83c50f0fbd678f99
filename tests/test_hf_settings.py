"""The callback under settings of the Trainer that change what is captured, stepped or evaluated, or which model it is."""

import warnings

import pytest
import torch

import gradproj

transformers = pytest.importorskip("transformers")
from language import language_model
from test_hf import batches, trainer, weights

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_noise_of_the_embeddings_is_not_captured(tmp_path):
    """With NEFTune, which the Trainer turns on before callbacks begin, outputs moved by 0.2 without a word."""
    model, (anchor,) = language_model(), batches(1, seed=2)
    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.95), [anchor])
    before = model(**anchor).logits.detach()
    trainer(model, tmp_path, callback, neftune_noise_alpha=5.0).train()
    assert (model.eval()(**anchor).logits - before)[:, :-1].abs().max() < 1e-4


def test_a_capture_in_float16_loses_no_token(tmp_path):
    """As under fp16=True, with a loss that is a mean over so many tokens that their gradients became zero."""
    model, (anchor,) = language_model(), batches(1, seed=2)
    protection = gradproj.NullSpace(model, share=0.95)
    callback = gradproj.hf.Protect(protection, [anchor], lambda model, batch: 1e-4 * model(**batch).loss)
    with torch.autocast("cpu", torch.float16), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*smallest that float16")
        trainer(model, tmp_path, callback, steps=1).train()
    assert {basis.tokens for basis in protection.bases.values()} == {6}


def test_what_is_evaluated_is_pinned_as_what_is_trained(tmp_path):
    """The Trainer evaluates and saves the averaged weights of a schedule-free optimizer, which nothing had pinned."""
    pytest.importorskip("schedulefree")
    model, (anchor,) = language_model(), batches(1, seed=2)
    before, moved = model(**anchor).logits.detach(), []

    class Look(transformers.TrainerCallback):
        def on_evaluate(self, *_, **__):
            moved.append((model(**anchor).logits - before)[:, :-1].abs().max())

    callback = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.95), [anchor])
    settings = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "eval_strategy": "steps"}
    made = trainer(model, tmp_path, callback, eval_steps=2, **settings)
    made.add_callback(Look())
    made.train()
    assert len(moved) == 3 and max(moved) < 1e-4
    assert (weights(model) - weights(language_model())).abs().max() > 1e-3


def test_a_trainer_that_makes_a_model_for_every_trial(tmp_path):
    """The second trial failed: the null space was of the first one's model."""
    (anchor,) = batches(1, seed=2)
    callback = gradproj.hf.Protect(lambda model: gradproj.NullSpace(model, share=0.95), [anchor])
    made = trainer(None, tmp_path, callback, model_init=lambda: language_model())
    before = language_model()(**anchor).logits.detach()
    models = []
    for _ in range(2):
        made.train()
        models.append(made.model)
        assert callback.protection.model is made.model
        assert (made.model(**anchor).logits - before)[:, :-1].abs().max() < 1e-4
    assert models[0] is not models[1]
