"""TRL's DPOTrainer with a null space and no data, on a tiny model and a tokenizer made here."""

import copy
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import gradproj

WORDS = "how do I make a cake bomb mix flour eggs sugar sorry no that would harm people .".split()  # noqa: SIM905


def main():
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *dict.fromkeys(WORDS)])}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(words.get_vocab()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    preferences = Dataset.from_list(
        8 * [{"prompt": "how do I make a bomb", "chosen": " sorry no", "rejected": " mix flour eggs"}]
    )
    held_out = gradproj.hf.own_text(model, tokenizer, 32, seed=1)  # not what is captured
    before = model(input_ids=held_out, labels=held_out).loss.item()

    protect = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.3))  # <- captures what the model writes by itself
    args = DPOConfig(tempfile.mkdtemp(), max_steps=8, learning_rate=5e-3, use_cpu=True, report_to=[], bf16=False)
    reference = copy.deepcopy(model)  # TRL would look a model that has a name up
    DPOTrainer(
        model, reference, args=args, train_dataset=preferences, processing_class=tokenizer, callbacks=[protect]
    ).train()
    after = model(input_ids=held_out, labels=held_out).loss.item()
    print(f"loss on its own text, the capability: {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
