"""PEFT's LoRA with a null space: the adapters become blind to what the capability uses."""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradproj


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    capability, data = torch.randint(50, (4, 2, 16)), torch.randint(50, (20, 4, 16))

    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    before = [model(input_ids=t, labels=t).loss.item() for t in capability]
    protection = gradproj.NullSpace(model, share=0.5)  # <- after the adapters were added
    with protection.capture():  # <-
        for tokens in capability:
            model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(trained, lr=1e-2), protection)  # <-
    for tokens in data:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
    after = [model(input_ids=t, labels=t).loss.item() for t in capability]
    print(f"loss on the new data: {loss.item():.3f}")
    print(f"loss on the capability: {sum(before) / 4:.4f} before, {sum(after) / 4:.4f} after")


if __name__ == "__main__":
    main()
