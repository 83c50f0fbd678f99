"""transformers.Trainer with a null space. The model is tiny and made from a configuration; put yours in its place."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gradproj


def batches(count, seed):
    tokens = torch.randint(50, (count, 2, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": t, "labels": t} for t in tokens]


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    capability, examples = batches(1, seed=1), [{k: t[0] for k, t in b.items()} for b in batches(64, seed=2)]
    before = torch.stack([model(**batch).loss.detach() for batch in capability]).mean()

    protect = gradproj.hf.Protect(gradproj.NullSpace(model, share=0.7), capability)  # <-
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=20, learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=examples, callbacks=[protect]).train()

    after = torch.stack([model(**batch).loss.detach() for batch in capability]).mean()
    print(f"loss on the capability: {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
