"""A null space under DeepSpeed's ZeRO, stages 0 to 3, where the engine owns the optimizer and the gradients."""

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradproj.capture import SCALE
from gradproj.nullspace import NullSpace
from gradproj.nullspace.matrices import Matrix
from gradproj.rows import functional


def protect(protection: NullSpace, tokenizer: Any = None) -> list[RemovableHandle]:
    """Take out of each layer's gradient what would change the layer's outputs on the protected inputs.

    That is G <- G - (G U) U^T. DeepSpeed steps copies of the weights, in pieces, so that there is no weight to pin. But
    the projection is linear, and each rank has whole gradients before the engine reduces them: projected there, on
    every backward pass, their sum over micro-batches and ranks is projected too. There is no collective, and nothing to
    wrap around the engine.

    All ranks must hold the same bases: capture the same batches on every rank before ``torch.distributed`` is
    initialised, or each its own afterwards under ``NullSpace(group=torch.distributed.group.WORLD)``, which sums them.

    Call it after ``capture()`` and before ``deepspeed.initialize()``, and give the engine the parameters that then
    train: with ``rest="hold"`` all others are frozen here. As always in gradient space, Adam's scaling and weight decay
    leak a little.

    Args:
        protection: made with ``space="gradient"``, and captured; or, with a tokenizer, not captured yet.
        tokenizer: the model's. What the model itself writes is then captured (:func:`gradproj.hf.own_text`), unless the
            protection has captured something. With several processes make it with ``group=``, as above.
    Returns:
        handles, whose ``remove()`` takes the protection off.
    Raises:
        TypeError, ValueError: not such a null space; a layer's bias trains, whose gradient arrives apart from its
        weight's.
        RuntimeError: nothing has been captured; the engine has prepared the model already; own text is to be captured
        by several processes before ``torch.distributed`` is initialised.

    Example::

        from gradproj.integrations.deepspeed import protect

        deepspeed.init_distributed()
        protection = gradproj.NullSpace(model, space="gradient", group=torch.distributed.group.WORLD)
        protect(protection, tokenizer)  # or capture data, and then protect(protection)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)

    Tried with DeepSpeed 0.19.8.
    """
    if not hasattr(protection, "bases"):
        raise TypeError(f"deepspeed.protect() takes a gradproj.NullSpace, got {type(protection).__name__}")
    if protection.space != "gradient":
        raise ValueError('deepspeed.protect(): DeepSpeed steps copies of the weights: use NullSpace(space="gradient")')
    for name, p in protection.model.named_parameters():
        if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
            raise RuntimeError(
                f"deepspeed.protect(): DeepSpeed has prepared {name} already; call this before deepspeed.initialize()"
            )
    if tokenizer is not None and not protection.bases:
        _capture_own_text(protection, tokenizer)
    if not protection.bases:
        raise RuntimeError(
            "deepspeed.protect(): nothing has been captured yet: run capture() first, or pass the model's tokenizer"
        )
    for matrix in protection.matrices:
        if matrix.bias_at is not None:
            raise ValueError(
                f"deepspeed.protect(): the bias of layer {matrix.name} trains, and its gradient arrives apart from the "
                f"weight's; freeze it before the capture: bias.requires_grad_(False)"
            )
    if protection.rest == "hold":
        covered = {id(p) for matrix in protection.matrices for p in matrix.parameters}
        for p in protection.model.parameters():
            if id(p) not in covered:
                p.requires_grad_(False)
    return [matrix.weight.register_hook(_projection(matrix, protection)) for matrix in protection.matrices]


def _capture_own_text(protection: NullSpace, tokenizer: Any) -> None:
    from gradproj.integrations.own_text import backward_own_text, warn_of_few_tokens

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "deepspeed.protect(): each process writes and captures its own text, which must be summed: call "
            "deepspeed.init_distributed() first, and make NullSpace(group=torch.distributed.group.WORLD)"
        )
    with protection.capture(SCALE):
        backward_own_text(protection.model, tokenizer, sequences=128)
    warn_of_few_tokens(protection)


def _projection(matrix: Matrix, protection: NullSpace):
    def project(gradient: Tensor) -> Tensor:
        vectors = protection.bases[matrix.name].vectors.to(gradient.device)  # the engine may have moved the model
        projected = gradient.clone()  # autograd may still need the one that it gave
        functional.pin_([matrix.region.matrix(projected)], [vectors])
        return projected

    return project
