"""FSDP2 with a null space over several processes, on GPUs or the CPU.

torchrun --nproc-per-node=2 docs/examples/fsdp2.py
"""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradproj


def main():
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)  # the same network on every rank
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    torch.manual_seed(1 + dist.get_rank())  # other data on every rank
    anchors = [torch.randn(4, 32, device=device) for _ in range(2)]
    before = [model(x).detach() for x in anchors]

    protection = gradproj.NullSpace(model, share=0.6)  # <-
    with protection.capture():  # <- summed over the ranks when the block ends
        for x in anchors:
            model(x).square().mean().backward()
    opt = gradproj.ProjectedOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), protection)  # <-
    for _ in range(100):
        loss = (model(torch.randn(64, 32, device=device)) - 1.0).square().mean()
        loss.backward()
        opt.step()  # no collective for the protection
        opt.zero_grad()
    moved = max((model(x) - y).abs().max().item() for x, y in zip(anchors, before, strict=True))
    print(f"rank {dist.get_rank()}: loss {loss.item():.3f}; outputs on the anchors moved by {moved:.1e}")
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads drop their last tensors; after Python's end torch 2.13 aborts over that


if __name__ == "__main__":
    main()
