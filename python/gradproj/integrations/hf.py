"""A callback for ``transformers.Trainer`` and every trainer that derives from it, such as TRL's."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from gradproj.capture import SCALE
from gradproj.hooks import inner_optimizer
from gradproj.integrations.own_text import own_batches, own_text, warn_of_few_tokens
from gradproj.integrations.retention import Retention
from gradproj.optim import Attached, attach
from gradproj.protection import Protection
from gradproj.rows.dtensors import is_dtensor
from gradproj.rows.sharding import of_replicas

FILE = "gradproj.pt"  # in a checkpoint's folder: what the Trainer would not keep
HELD_OUT = 16  # sequences of own text


class ProtectCallback(TrainerCallback):
    """Protects what a model can do while a ``Trainer`` trains it: attaches to whatever optimizer the Trainer has made.

    A :class:`gradproj.NullSpace` is captured once, when training begins: on the batches of ``data``, or, without data,
    on what the model itself writes (:func:`gradproj.hf.own_text`, from the trainer's ``seed``). It is saved with every
    checkpoint and taken from there when training resumes. :class:`gradproj.Directions` get a fresh direction before
    every ``every``-th step, from the next batch of ``data`` or from eight sequences that the model then writes; they
    are in the optimizer's state. Batches go to the model's device. Under DDP a direction is averaged over the ranks,
    and what a null space has gathered is summed.

    In the Trainer's log are ``gradproj/removed`` and ``gradproj/cosine_min`` (of the directions), or
    ``gradproj/moved``, how far the last step had moved the protected products. Before training, at every evaluation and
    at the end there is ``gradproj/retention``, the loss of a few held-out sequences in nats a token, and
    ``gradproj/retention_change``, what it has gained since training began. They are sequences of the model's own text,
    or, if only ``data`` are captured, the first batch, which is left out of the capture unless it is the only one.
    Reporters named in ``report_to`` run before a callback: to have these figures there too, move it to the front of
    ``trainer.callback_handler.callbacks``.

    Args:
        protection: a NullSpace of the model that is trained (after adapters were added), or Directions. Where the
            trainer makes the model, what makes a NullSpace of it: ``gradproj.NullSpace`` itself, or a function. It is
            called again for every model that the trainer makes (``model_init``).
        data: batches as the model takes them, with labels: a list, or a ``DataLoader``, which is gone through again and
            again. None: the model's own text, for which the trainer needs a tokenizer as its ``processing_class``.
        loss: ``(model, batch) -> scalar``, of ``data``; None is ``model(**batch).loss``.
        every: steps between directions, 1 by default. A NullSpace takes none.
        own: how many sequences of own text a NullSpace captures, in addition to ``data``. None: 128 without data, else
            none.
        retention: whether to measure it.
    Raises:
        TypeError, ValueError: one of these is not what it should be. On training: what ``attach``, ``capture`` and
        ``own_text`` raise; no tokenizer.
    Warns:
        RuntimeWarning: the model is stepped, but no trainer has begun training with this callback, so that nothing is
        protected; fewer tokens were captured than an eighth of the widest layer's inputs.

    Example::

        protect = gradproj.hf.Protect(gradproj.NullSpace(model))
        trainer = DPOTrainer(
            model, args=args, train_dataset=preferences, processing_class=tokenizer, callbacks=[protect]
        )
    """

    def __init__(
        self,
        protection: Protection | Callable[[nn.Module], Protection],
        data: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        every: int | None = None,
        *,
        own: int | None = None,
        retention: bool = True,
    ):
        if not (isinstance(protection, Protection) or callable(protection)):
            raise TypeError(
                f"ProtectCallback: protection must be a NullSpace or Directions, got {type(protection).__name__}"
            )
        if data is not None and (isinstance(data, Mapping | Tensor | Iterator) or not isinstance(data, Iterable)):
            raise TypeError(
                f"ProtectCallback: data must be a list of batches or a DataLoader, which can be gone through again, "
                f"got {type(data).__name__}"
            )
        once = not isinstance(protection, Protection) or protection.captures_once
        if once and every is not None:
            raise ValueError("ProtectCallback: a NullSpace is captured once; every= is for Directions")
        if every is not None and every < 1:
            raise ValueError(f"ProtectCallback: every must be >= 1, got {every}")
        if own is not None and not once:
            raise ValueError("ProtectCallback: own= is for a NullSpace; Directions take data, or own text without data")
        if own is not None and own < (data is None):
            raise ValueError(f"ProtectCallback: own must be >= {int(data is None)}, got {own}")
        if loss is not None and data is None:
            raise ValueError("ProtectCallback: loss= is of data; the loss of own text is the model's own")
        self.protection: Any = protection
        self._make = None if isinstance(protection, Protection) else protection
        self._made_of = lambda: None  # the model, weakly
        self.data, self.loss, self.every = data, loss or _model_loss, every or 1
        if own is None:
            own = 0 if data is not None else 128 if once else 8
        self.own, self.retention = own, retention
        self._attached: Attached | None = None
        self._batches: Iterator[Any] = iter(())
        self._retention: Retention | None = None
        self._unasked = _warn_of_steps(self)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, processing_class=None, **_):
        inner = inner_optimizer("ProtectCallback", optimizer)
        if self._make is not None and self._made_of() is not model:  # one for each trial of a search
            self.protection, self._made_of, self._retention = self._make(model), weakref.ref(model), None
        if self._attached is None or getattr(inner, "_gradproj", None) is not self._attached._hooks:
            if self._attached is not None:
                self._attached.detach()
            # The Trainer hands out the model inside of DDP. Directions are averaged here.
            replicas = of_replicas(model.parameters()) if self.protection.captures_once else None
            self._attached = attach(inner, self.protection, sharding=replicas)
        self._unasked.remove()
        if state.global_step:
            self._resume(args, state.global_step)
        else:
            self._begin(args, state, model, processing_class)
        if not self.protection.captures_once:
            begun = -(-state.global_step // self.every)  # directions that an interrupted run has taken
            self._batches = self._endless(args, model, processing_class, begun)

    def _begin(self, args, state, model: nn.Module, tokenizer: Any) -> None:
        """Captures a null space that has captured nothing yet, and measures what is held out."""
        captures = self.protection.captures_once and not len(self.protection)
        measures = self.retention and self._retention is None
        held_out: list[Any] = []
        text: list[Any] = []
        data = () if self.data is None else self.data
        if self.own and (captures or measures):
            count = HELD_OUT * measures + self.own * captures
            rows = self._write(args, model, tokenizer, count)
            held_out, text = own_batches(rows[: HELD_OUT * measures]), own_batches(rows[HELD_OUT * measures :])
        elif measures:
            first, data = _hold_out(data)
            held_out = [first]
        if captures:
            with self.protection.capture(SCALE):
                for batch in text:
                    (SCALE * _model_loss(model, batch)).backward()
                for batch in data:
                    self._backward(model, batch, SCALE)
            warn_of_few_tokens(self.protection)
        if measures:
            self._retention = Retention(held_out, _model_loss if self.own else self.loss)
            state.log_history.append({**self._retention.measure(model), "step": 0})

    def _write(self, args, model: nn.Module, tokenizer: Any, sequences: int, number: int = 0) -> Tensor:
        """Own text, another one for each ``number``."""
        if tokenizer is None:
            raise ValueError(
                "ProtectCallback: the model's own text, which is captured without data and by which retention is "
                "measured, needs a tokenizer: pass processing_class=tokenizer to the trainer, or data to this callback"
            )
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        seed = args.seed + number * ranks  # to which own_text() adds the rank
        return own_text(model, tokenizer, sequences, seed=seed, progress=number == 0 and not args.disable_tqdm)

    def on_step_begin(self, args, state, control, model=None, **_):
        if self._attached is None or self.protection.captures_once or state.global_step % self.every:
            return
        batch = next(self._batches)
        with self._attached.protect():
            self._backward(model, batch)
            _average_over_replicas(self.protection.parameters())

    def on_save(self, args, state, control, **_):
        kept = {"retention": self._retention.state()} if self._retention else {}
        if self.protection.captures_once:
            kept = self.protection.state(kept, ())  # by every rank: shards are gathered
        if kept and args.should_save:
            torch.save(kept, _file(args, state.global_step))

    def on_log(self, args, state, control, model=None, logs=None, **_):
        if logs is None:
            return
        found = {}
        if "loss" in logs:
            found = {f"gradproj/{name}": value for name, value in self.protection.metrics().items()}
        evaluated = "train_loss" in logs or any(name.startswith("eval_") for name in logs)
        if evaluated and self._retention is not None:
            found |= self._retention.measure(model)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def _backward(self, model: nn.Module, batch: Any, scale: float = 1.0) -> None:
        device = next(model.parameters()).device
        (scale * self.loss(model, send_to_device(batch, device))).backward()

    def _endless(self, args, model: nn.Module, tokenizer: Any, begun: int) -> Iterator[Any]:
        """Batches of directions, from number ``begun`` on."""
        if self.data is None:
            for number in count(begun + 1):
                yield from own_batches(self._write(args, model, tokenizer, self.own, number))
        yield from islice(self._passes(), begun, None)

    def _passes(self) -> Iterator[Any]:
        while True:
            first, others = _hold_out(self.data)
            yield from others if self.retention else chain([first], others)

    def _resume(self, args, step: int) -> None:
        if not (self.protection.captures_once or self.retention):
            return
        path = _file(args, step)
        if not path.exists():
            raise FileNotFoundError(
                f"ProtectCallback: training resumes at step {step}, but {path} does not exist, so what was protected "
                f"is not known; resume from a checkpoint that this callback has seen being saved, in output_dir"
            )
        kept = torch.load(path, weights_only=True)
        if self.protection.captures_once:
            self.protection.load_state(kept, ())
        if self.retention:
            if "retention" not in kept:
                raise ValueError(f"ProtectCallback: {path} was saved with retention=False; resume with that")
            kept = kept["retention"]
            held_out = kept["held_out"] or [_hold_out(self.data)[0]]
            self._retention = Retention(held_out, _model_loss if self.own else self.loss, kept["before"])


def _hold_out(data: Iterable[Any] | None) -> tuple[Any, Iterator[Any]]:
    """The first batch, and the others; it again, if there are no others."""
    batches = iter(() if data is None else data)
    for first in batches:
        return first, chain(list(islice(batches, 1)) or [first], batches)
    raise ValueError("ProtectCallback: data has no batch")


def _warn_of_steps(callback: ProtectCallback) -> RemovableHandle:
    """Warns at the first unprotected step of the model, unless the handle has been removed before.

    A trainer that drops its callbacks may have freed this one, so what is watched is the model, where it is known.
    """
    watched = weakref.ref(getattr(callback.protection, "model", callback))
    told = False

    def stepped(optimizer: Optimizer, *_) -> None:
        nonlocal told
        alive: Any = watched()
        if told or alive is None or hasattr(optimizer, "_gradproj"):
            return
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if isinstance(alive, nn.Module) and not any(id(p) in parameters for p in alive.parameters()):
            return
        told = True
        warnings.warn(
            f"gradproj.hf.Protect: {type(optimizer).__name__} has stepped, but no trainer has begun training with this "
            f"callback: nothing is protected. Some trainers drop their callbacks (PPO of ms-swift); capture and call "
            f"gradproj.attach(optimizer, protection) instead",
            RuntimeWarning,
            stacklevel=2,
        )

    return register_optimizer_step_post_hook(stepped)


def _file(args, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}", FILE)


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
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
