"""Train a small network over several processes with FSDP2 on one task, then on another, protected by the first.

torchrun --nproc-per-node=2 benchmarks/torchrun_example.py

On GPUs if there is one for each process, else on the CPU. The lines marked with # <- are what a training script gains.
"""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradproj  # <-

WIDTH, BATCH, STEPS, REFRESH = 64, 64, 100, 4


def main():
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    torch.manual_seed(0)  # the same networks on every rank
    teachers = [nn.Linear(WIDTH, WIDTH).to(device).requires_grad_(False) for _ in range(2)]
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)).to(device)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    opt = gradproj.ProjectedOptimizer(opt, gradproj.Directions(16, "conflict"))  # <-
    torch.manual_seed(1 + dist.get_rank())  # other data on every rank

    def loss(task):
        x = torch.randn(BATCH, WIDTH, device=device) + 2 * task  # each task has inputs of its own
        return (model(x) - teachers[task](x)).square().mean()

    for task in (0, 1):
        for step in range(STEPS):
            if task == 1 and step % REFRESH == 0:
                with opt.protect():  # <-
                    loss(0).backward()  # <-
            loss(task).backward()
            opt.step()
            opt.zero_grad()
        losses = torch.stack([loss(0), loss(1)]).detach()
        dist.all_reduce(losses)
        if dist.get_rank() == 0:
            old, new = (losses / dist.get_world_size()).tolist()
            print(f"after task {task}: loss {old:.3f} on task 0, {new:.3f} on task 1")
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads drop their last tensors; after Python's end torch 2.13 aborts over that


if __name__ == "__main__":
    main()
