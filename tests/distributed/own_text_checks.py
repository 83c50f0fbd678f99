"""Own text on several ranks."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import gradproj
from gradproj.hf import own_text
from language import character_tokenizer, language_model


def model(way):
    made = language_model()
    if way == "fsdp2 with an adapter":
        import peft

        made = peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules="all-linear"))
    return made


def shard(made):
    for layer in made.get_decoder().layers:
        fully_shard(layer)
    fully_shard(made)


def writes(rank, world, way, expected):
    made = model(way)
    if way == "ddp":
        made = torch.nn.parallel.DistributedDataParallel(made)
    if "fsdp2" in way:
        shard(made)
    for _ in range(2):
        rows = own_text(made, character_tokenizer(), 4, 8, seed=7)
        assert torch.equal(rows, expected[rank]), (rows, expected[rank])
        made(input_ids=rows, labels=rows).loss.backward()
    assert "generate" not in vars(made)
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def protects(rank, world):
    tokenizer, made, fresh = character_tokenizer(), language_model(hidden_size=256), language_model(hidden_size=256)
    texts = [None] * world
    dist.all_gather_object(texts, own_text(fresh, tokenizer, 17, seed=42))
    shard(made)
    callback = gradproj.hf.Protect(gradproj.NullSpace(made, share=0.9), own=1)
    opt = torch.optim.AdamW(made.parameters(), lr=0.01)
    args = SimpleNamespace(seed=42, disable_tqdm=True)
    state = SimpleNamespace(global_step=0, log_history=[])
    callback.on_train_begin(args, state, None, model=made, optimizer=opt, processing_class=tokenizer)
    other = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        made(input_ids=other, labels=other).loss.backward()
        opt.step()
        opt.zero_grad()
    callback.on_log(args, state, None, model=made, logs={"train_loss": 0.0})
    with torch.no_grad():
        moved = (made(other).logits - fresh(other).logits).abs().max()
        for text in texts:
            assert (made(text[16:]).logits - fresh(text[16:]).logits)[:, :-1].abs().max() < 0.02 * moved
        losses = [model(input_ids=texts[0][:16], labels=texts[0][:16]).loss.item() for model in (fresh, made)]
    assert moved > 0.03
    assert abs(callback._retention.before - losses[0]) < 1e-3
    assert abs(state.log_history[-1]["gradproj/retention_change"] - losses[1] + losses[0]) < 1e-3
