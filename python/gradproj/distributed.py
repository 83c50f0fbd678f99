"""Sharded rows: the one collective of a projection."""

import torch
import torch.distributed as dist
from torch import Tensor


def device(group) -> torch.device:
    """The device on which ``group`` communicates."""
    return dist.distributed_c10d._get_pg_default_device(group)


def reduce_gram(gram: Tensor, group) -> Tensor:
    """Sum the Gram of every rank's shards: one all_reduce of (K + 1)(K + 2) / 2 float64 numbers per part.

    Every rank of ``group`` must call it, one that owns nothing included.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group= was given but torch.distributed is not initialised; call init_process_group() first")
    i, j = torch.triu_indices(*gram.shape[-2:], device=gram.device)
    packed = gram[..., i, j]
    dist.all_reduce(packed, group=group)
    total = torch.empty_like(gram)
    total[..., i, j] = packed
    total[..., j, i] = packed
    return total
