"""A callback for Lightning's ``Trainer``, under automatic or manual optimization."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning
from torch import Tensor

from gradproj.optim import Attached, attach
from gradproj.protection import Protection
from gradproj.rows.sharding import of_replicas


class ProtectCallback(lightning.Callback):
    """Captures a :class:`gradproj.NullSpace` when training begins, and attaches it to the module's optimizers.

    It is attached before a checkpoint's optimizer states are loaded, so that a run that resumes takes its bases from
    there and captures nothing.

    Args:
        protection: of the LightningModule, or of a module in it.
        data: batches of the capability, gone through once; moved to the module's device.
        loss: ``(module, batch) -> scalar``.
    Raises:
        TypeError: not a NullSpace. On training: what ``attach`` and ``capture`` raise.

    Example::

        protect = ProtectCallback(gradproj.NullSpace(module.net), capability, lambda module, batch: module.loss(*batch))
        lightning.Trainer(max_epochs=3, callbacks=[protect]).fit(module, data)
    """

    def __init__(self, protection: Protection, data: Iterable[Any], loss: Callable[[Any, Any], Tensor]):
        if not isinstance(protection, Protection) or not protection.captures_once:
            raise TypeError(
                f"ProtectCallback: protection must be a NullSpace, got {type(protection).__name__}; for Directions call protect() in "
                f"on_train_batch_start()"
            )
        self.protection, self.data, self.loss = protection, data, loss
        self._attached: Attached | None = None

    def on_fit_start(self, trainer, pl_module) -> None:
        replicas = of_replicas(pl_module.parameters())
        self._attached = attach(trainer.optimizers, self.protection, sharding=replicas)

    def on_train_start(self, trainer, pl_module) -> None:
        if not len(self.protection):
            with self.protection.capture():
                for batch in self.data:
                    self.loss(pl_module, pl_module.transfer_batch_to_device(batch, pl_module.device, 0)).backward()

    def on_fit_end(self, trainer, pl_module) -> None:
        self._detach()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        """A second ``fit()`` attaches again."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None
