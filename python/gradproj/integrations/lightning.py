"""A callback for Lightning's ``Trainer``, under automatic or manual optimization."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning
from torch import Tensor

from gradproj.capture import SCALE
from gradproj.optim import Attached, attach
from gradproj.protection import Protection
from gradproj.rows.sharding import of_replicas


class ProtectCallback(lightning.Callback):
    """Captures a :class:`gradproj.NullSpace` when training begins, and attaches it to the module's optimizers.

    It is attached before a checkpoint's optimizer states are loaded, so that a run that resumes takes its bases from
    there and captures nothing.

    Args:
        protection: of the LightningModule, or of a module in it.
        data: batches of the capability, gone through once; moved to the module's device. None: what the model itself
            writes (:func:`gradproj.hf.own_text`), which then is the module that the protection is of.
        loss: ``(module, batch) -> scalar``, of ``data``.
        tokenizer: the model's, for own text.
        own: how many sequences of own text are captured, in addition to ``data``. None: 128 without data, else none.
    Raises:
        TypeError: not a NullSpace; no tokenizer for own text; no loss for data. On training: what ``attach``,
        ``capture`` and ``own_text`` raise.
    Warns:
        RuntimeWarning: fewer tokens of own text were captured than an eighth of the widest layer's inputs.

    Examples::

        protect = ProtectCallback(gradproj.NullSpace(module.net), capability, lambda module, batch: module.loss(*batch))
        protect = ProtectCallback(gradproj.NullSpace(module.language_model), tokenizer=tokenizer)
        lightning.Trainer(max_epochs=3, callbacks=[protect]).fit(module, data)
    """

    def __init__(
        self,
        protection: Protection,
        data: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        tokenizer: Any = None,
        own: int | None = None,
    ):
        if not isinstance(protection, Protection) or not protection.captures_once:
            raise TypeError(
                f"ProtectCallback: protection must be a NullSpace, got {type(protection).__name__}; for Directions "
                f"call protect() in on_train_batch_start()"
            )
        self.own = own if own is not None else 128 if data is None else 0
        if self.own and tokenizer is None:
            raise TypeError("ProtectCallback: own text needs the model's tokenizer: pass tokenizer=, or data, loss")
        if data is not None and loss is None:
            raise TypeError("ProtectCallback: data need a loss: pass loss=lambda module, batch: ..")
        self.protection, self.data, self.loss, self.tokenizer = protection, data, loss, tokenizer
        self._attached: Attached | None = None

    def on_fit_start(self, trainer, pl_module) -> None:
        replicas = of_replicas(pl_module.parameters())
        self._attached = attach(trainer.optimizers, self.protection, sharding=replicas)

    def on_train_start(self, trainer, pl_module) -> None:
        if len(self.protection):
            return
        protection: Any = self.protection
        with protection.capture(SCALE):
            if self.own:
                from gradproj.integrations.own_text import backward_own_text

                backward_own_text(protection.model, self.tokenizer, self.own)
            for batch in () if self.data is None else self.data:
                batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
                (SCALE * self.loss(pl_module, batch)).backward()  # type: ignore[misc]
        if self.own:
            from gradproj.integrations.own_text import warn_of_few_tokens

            warn_of_few_tokens(protection)

    def on_fit_end(self, trainer, pl_module) -> None:
        self._detach()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        """A second ``fit()`` attaches again."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
