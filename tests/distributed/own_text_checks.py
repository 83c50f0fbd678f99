"""Own text on several ranks."""

import torch
from torch.distributed.fsdp import fully_shard

from gradproj.hf import own_text
from language import character_tokenizer, language_model


def model(way):
    made = language_model()
    if way == "fsdp2 with an adapter":
        import peft

        made = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules="all-linear"))
    return made


def writes(rank, world, way, expected):
    made = model(way)
    if way == "ddp":
        made = torch.nn.parallel.DistributedDataParallel(made)
    if "fsdp2" in way:
        layers = made.get_base_model().model.layers if "adapter" in way else made.model.layers
        for layer in layers:
            fully_shard(layer)
        fully_shard(made)
    for _ in range(2):
        rows = own_text(made, character_tokenizer(), 4, 8, seed=7)
        assert torch.equal(rows, expected[rank]), (rows, expected[rank])
        made(input_ids=rows, labels=rows).loss.backward()
    assert "generate" not in vars(made)
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
