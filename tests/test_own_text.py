"""What a model writes by itself: drawn from its own distribution, and nothing of the model is changed by it."""

import random

import numpy as np
import pytest
import torch

import gradproj
from distributed import own_text_checks
from distributed.pool import Pool

transformers = pytest.importorskip("transformers")
from gradproj.hf import own_text
from gradproj.integrations import own_text as module
from language import character_tokenizer, language_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_is_drawn_from_the_models_own_distribution():
    """Whatever generation_config says."""
    model, tokenizer = language_model(initializer_range=0.5), character_tokenizer(bos_token="<bos>")
    model.generation_config.update(top_k=1, repetition_penalty=5.0, suppress_tokens=[3], eos_token_id=1, max_length=3)
    for temperature in (1.0, 2.0):
        rows = own_text(model, tokenizer, 4000, 2, temperature=temperature, seed=0, progress=False)
        assert rows.shape == (4000, 2) and rows.dtype == torch.int64 and (rows[:, 0] == tokenizer.bos_token_id).all()
        with torch.no_grad():
            expected = (model(rows[:1, :1]).logits[0, -1] / temperature).softmax(0)
        assert (rows[:, 1].bincount(minlength=50) / 4000 - expected).abs().max() < 0.02


def test_a_seed_repeats_and_none_does_not():
    model, tokenizer = language_model(), character_tokenizer()
    a, b, other, *drawn = (own_text(model, tokenizer, 4, 8, seed=seed) for seed in (3, 3, 4, None, None))
    assert torch.equal(a, b) and not torch.equal(a, other) and not torch.equal(*drawn)


def test_where_a_text_begins():
    model = language_model()
    eos = character_tokenizer()
    assert (own_text(model, eos, 4, 4)[:, 0] == eos.eos_token_id).all()
    neither = own_text(model, character_tokenizer(eos_token=None), 200, 2)[:, 0]
    assert len(neither.unique()) > 20 and neither.max() < len(eos)


def test_a_text_that_ends_is_followed_by_another():
    model, tokenizer = language_model(), character_tokenizer()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    rows = own_text(model, tokenizer, 64, 32, seed=0)
    place = (rows[:, 1:-1] == tokenizer.eos_token_id).nonzero()
    assert len(place) > 5
    following = rows[place[:, 0], place[:, 1] + 2]
    assert len(following.unique()) > 3  # text, no padding


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_everything_as_it_was(fails):
    model, tokenizer = language_model(attention_dropout=0.5), character_tokenizer()
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    config, generation, given = model.config.to_dict(), model.generation_config, model.generation_config.to_dict()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    if fails:
        model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own_text(model, tokenizer, 4, 8)
    else:
        own_text(model, tokenizer, 4, 8)
    assert seen and not any(map(any, seen))  # written in evaluation mode
    assert modes == [m.training for m in model.modules()]
    assert model.config.to_dict() == config and model.generation_config is generation
    assert generation.to_dict() == given
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_a_users_turn():
    model, tokenizer = language_model(), character_tokenizer(chat=True)
    rows = own_text(model, tokenizer, 8, 12, chat="turn")
    assert (rows[:, 0] == tokenizer.convert_tokens_to_ids("<user>")).all() and len(rows[:, 1].unique()) > 1


def test_a_dialogue():
    """A question of the model's own, at most a third, then the template's tokens, then an answer."""
    model, tokenizer = language_model(), character_tokenizer(chat=True)
    user, assistant, end, eos = tokenizer.convert_tokens_to_ids(["<user>", "<assistant>", "<end>", "<eos>"])
    rows = own_text(model, tokenizer, 64, 33, chat="dialogue", seed=0)
    lengths = []
    for row in rows.tolist():
        assert row[0] == user
        length = row.index(end) - 1
        assert 1 <= length <= 10 and row[length + 2] == assistant and eos not in row[1 : length + 1]
        lengths.append(length)
    assert max(lengths) == 10 and min(lengths) < 5
    answers = {tuple(row[length + 3 :]) for row, length in zip(rows.tolist(), lengths, strict=True)}
    assert len(answers) == 64 and {end, eos} & set().union(*answers)  # an answer ends as it likes
    for chat in (None, True):
        assert torch.equal(own_text(model, tokenizer, 64, 33, chat=chat, seed=0), rows)
    assert (own_text(model, tokenizer, 4, 8, chat=False)[:, 0] == eos).all()


def test_questions_are_drawn_as_the_model_would():
    """Whatever ends a text ends the question, with the probability of all its ends together."""
    model, tokenizer = language_model(), character_tokenizer(chat=True)
    model.generation_config.eos_token_id = [1, 5, 6, 7]
    end = tokenizer.convert_tokens_to_ids("<end>")
    rows = own_text(model, tokenizer, 2000, 30, chat="dialogue", seed=0, progress=False)
    assert not torch.isin(rows[:, 1], torch.tensor([1, 5, 6, 7, end])).any()
    assert 0.07 < (rows[:, 2] == end).float().mean() < 0.13  # 5 of 50 tokens of a model that knows nothing


def test_in_batches_that_fit(monkeypatch, capsys):
    """No more at once than AT_ONCE tokens, and half of them where the memory does not suffice."""
    model, tokenizer, sizes = language_model(), character_tokenizer(), []
    generate = model.generate

    def limited(input_ids, **settings):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("too much")
        return generate(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", limited)
    monkeypatch.setattr(module, "AT_ONCE", 50)
    assert own_text(model, tokenizer, 7, 8).shape == (7, 8) and sizes == [6, 3, 3, 1]
    assert "own text" in capsys.readouterr().err
    own_text(model, tokenizer, 3, 8, progress=False)
    assert "own text" not in capsys.readouterr().err


def test_wrapped_models_are_unwrapped(one_rank):
    model, tokenizer = language_model(), character_tokenizer()
    rows = own_text(model, tokenizer, 4, 8, seed=0)
    for wrapped in (torch.compile(model), torch.nn.parallel.DistributedDataParallel(model)):
        assert torch.equal(own_text(wrapped, tokenizer, 4, 8, seed=0), rows)
    model.model.layers[0].compile(backend=None)  # would raise if it were compiled
    assert torch.equal(own_text(model, tokenizer, 4, 8, seed=0), rows)


def test_an_adapter_writes():
    peft = pytest.importorskip("peft")
    model, tokenizer = language_model(), character_tokenizer()
    rows = own_text(model, tokenizer, 4, 8, seed=0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(own_text(adapted, tokenizer, 4, 8, seed=0), rows)


def test_bad_input(one_rank):
    model, tokenizer = language_model(), character_tokenizer()
    for settings, message in (
        ({"sequences": 0}, "sequences must be >= 1, got 0"),
        ({"tokens": 1}, "tokens must be >= 2, got 1"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"chat": "always"}, "chat must be None, True, False"),
        ({"chat": "turn"}, "chat='turn', but the tokenizer has no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            own_text(model, tokenizer, **settings)
    with pytest.raises(ValueError, match="tokens=4 leaves no room.*the chat template alone takes 3"):
        own_text(model, character_tokenizer(chat=True), tokens=4)
    one_text = character_tokenizer(chat=True)
    one_text.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="does not tell a user's words from the answer"):
        own_text(model, one_text)
    with pytest.raises(TypeError, match="tokenizer must be the model's tokenizer, got NoneType"):
        own_text(model, None)
    with pytest.raises(TypeError, match=r"LlamaModel has no generate\(\)"):
        own_text(model.model, tokenizer)
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        own_text(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)), tokenizer)
    sharded = torch.distributed.fsdp.FullyShardedDataParallel(language_model(), device_id=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"FSDP1.*fully_shard"):
        own_text(sharded, tokenizer)
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is tensor parallel"):
        own_text(model, tokenizer)


def test_a_collapsed_model_is_named():
    """A capture of it would see next to nothing, and protect next to nothing."""
    model, tokenizer = language_model(), character_tokenizer()
    with pytest.raises(ValueError, match="again and again.*the temperature is too low"):
        own_text(model, tokenizer, 8, 16, temperature=1e-6)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(2, torch.tensor([7]), 1e4))
    for sequences in (1, 8):
        with pytest.raises(ValueError, match="writes 'e e e e.*' again and again: it has collapsed"):
            own_text(model, character_tokenizer(), sequences, 20)


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["alone", "ddp", "fsdp2", "fsdp2 with an adapter"])
def test_every_rank_writes_its_own(pool, way):
    """From its own seed, whether or not its weights are gathered for it; and a training step works afterwards."""
    expected = [own_text(own_text_checks.model(way), character_tokenizer(), 4, 8, seed=7 + rank) for rank in range(2)]
    pool(2, own_text_checks.writes, way, expected)


@pytest.mark.slow
def test_in_a_capture_of_ones_own(tmp_path):
    """The recipe for plain PyTorch: what was written stays, what was not moves."""
    model, tokenizer = language_model(), character_tokenizer()
    rows = own_text(model, tokenizer, 2, 8, seed=0)
    before = model(rows).logits.detach()
    protection = gradproj.NullSpace(model, share=0.95)
    with protection.capture():
        for batch in rows.split(8):
            model(input_ids=batch, labels=batch).loss.backward()
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), protection)
    other = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        model(input_ids=other, labels=other).loss.backward()
        opt.step()
        opt.zero_grad()
    assert (model(rows).logits - before)[:, :-1].abs().max() < 1e-4
    assert (model(other).logits - language_model()(other).logits).abs().max() > 0.01
