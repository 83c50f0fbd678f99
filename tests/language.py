"""A tiny language model and its tokenizer, made here, so that nothing is downloaded."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def language_model(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **{**sizes, **settings}))


def character_tokenizer(chat=False, **special):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<unk>", *map(chr, range(97, 123)), " ", ".", "<bos>", "<user>", "<assistant>", "<end>"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.add_special_tokens(["<user>", "<assistant>", "<end>"])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), behavior="isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer
