"""A callback for ``transformers.Trainer`` and every trainer that derives from it, such as TRL's."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainerCallback

from gradproj.hooks import inner_optimizer
from gradproj.optim import Attached, attach
from gradproj.protection import Protection
from gradproj.rows.dtensors import is_dtensor
from gradproj.rows.sharding import of_replicas

FILE = "gradproj.pt"  # in a checkpoint's folder: a null space, which the Trainer would not keep


class ProtectCallback(TrainerCallback):
    """Protects a capability while a ``Trainer`` trains: attaches to whatever optimizer the Trainer has made.

    A :class:`gradproj.NullSpace` is captured once, on all of ``data``, when training begins; it is saved with every
    checkpoint and taken from there when training resumes. :class:`gradproj.Directions` get a fresh direction from the
    next batch of ``data`` before every ``every``-th step; they are in the optimizer's state. Batches go to the model's
    device. Under DDP a direction is averaged over the ranks, and what a null space has gathered is summed.

    What the protection did is in the Trainer's log: ``gradproj/removed`` and ``gradproj/cosine_min`` (of the
    directions), or ``gradproj/moved``, how far the last step had moved the protected products. Reporters named in
    ``report_to`` run before a callback: to have these figures there too, move it to the front of
    ``trainer.callback_handler.callbacks``.

    Args:
        protection: a NullSpace of the model that is trained (after adapters were added), or Directions.
        data: batches as the model takes them, with labels: a list, or a ``DataLoader``, which is gone through again and
            again.
        loss: ``(model, batch) -> scalar``; None is ``model(**batch).loss``.
        every: steps between directions, 1 by default. A NullSpace takes none.
    Raises:
        TypeError, ValueError: one of these is not what it should be. On training: what ``attach`` and ``capture``
        raise.

    Example::

        protect = gradproj.hf.Protect(gradproj.NullSpace(model), capability_batches)
        trainer = DPOTrainer(model, args=args, train_dataset=preferences, callbacks=[protect])
    """

    def __init__(
        self,
        protection: Protection,
        data: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        every: int | None = None,
    ):
        if not isinstance(protection, Protection):
            raise TypeError(
                f"ProtectCallback: protection must be a NullSpace or Directions, got {type(protection).__name__}"
            )
        if isinstance(data, Mapping | Tensor | Iterator) or not isinstance(data, Iterable):
            raise TypeError(
                f"ProtectCallback: data must be a list of batches or a DataLoader, which can be gone through again, got "
                f"{type(data).__name__}"
            )
        if protection.captures_once and every is not None:
            raise ValueError(
                f"ProtectCallback: a {type(protection).__name__} is captured once; every= is for Directions"
            )
        if every is not None and every < 1:
            raise ValueError(f"ProtectCallback: every must be >= 1, got {every}")
        self.protection, self.data, self.loss, self.every = protection, data, loss or _own_loss, every or 1
        self._attached: Attached | None = None
        self._batches: Iterator[Any] = iter(())

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
        inner = inner_optimizer("ProtectCallback", optimizer)
        if self._attached is None or getattr(inner, "_gradproj", None) is not self._attached._hooks:
            if self._attached is not None:
                self._attached.detach()
            # The Trainer hands out the model inside of DDP. Directions are averaged here.
            replicas = of_replicas(model.parameters()) if self.protection.captures_once else None
            self._attached = attach(inner, self.protection, sharding=replicas)
        if not self.protection.captures_once:
            begun = -(-state.global_step // self.every)  # directions that an interrupted run has taken
            self._batches = islice(self._endless(), begun, None)
        elif state.global_step:
            self._resume(self.protection, args, state.global_step)
        elif not len(self.protection):
            with self.protection.capture():
                for batch in self.data:
                    self._backward(model, batch)

    def on_step_begin(self, args, state, control, model=None, **_):
        if self._attached is None or self.protection.captures_once or state.global_step % self.every:
            return
        with self._attached.protect():
            self._backward(model, next(self._batches))
            _average_over_replicas(self.protection.parameters())

    def on_save(self, args, state, control, **_):
        if self.protection.captures_once:
            entry = self.protection.state({}, ())  # by every rank: shards are gathered
            if args.should_save:
                torch.save(entry, _file(args, state.global_step))

    def on_log(self, args, state, control, logs=None, **_):
        if logs is None or "loss" not in logs:
            return
        found = {f"gradproj/{name}": value for name, value in self.protection.metrics().items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def _backward(self, model: nn.Module, batch: Any) -> None:
        device = next(model.parameters()).device
        self.loss(model, send_to_device(batch, device)).backward()

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.data:
                empty = False
                yield batch
            if empty:
                raise ValueError("ProtectCallback: data has no batch")

    @staticmethod
    def _resume(protection: Protection, args, step: int) -> None:
        path = _file(args, step)
        if not path.exists():
            raise FileNotFoundError(
                f"ProtectCallback: training resumes at step {step}, but {path} does not exist, so what was protected is not "
                f"known; resume from a checkpoint that this callback has seen being saved, in output_dir"
            )
        protection.load_state(torch.load(path, weights_only=True), ())


def _file(args, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}", FILE)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    found = model(**batch).loss
    if found is None:
        raise ValueError(
            "ProtectCallback: the model returned no loss, because the batch has no labels; add them, or pass loss="
        )
    return found


def _average_over_replicas(parameters: list[Tensor]) -> None:
    """What DDP does after a forward pass of its own; a callback is given the model inside it. DTensors are reduced
    already."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return
    for p in parameters:
        if p.grad is not None and not is_dtensor(p):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
