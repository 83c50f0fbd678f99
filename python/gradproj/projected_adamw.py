"""AdamW with a null space from a file: for those who can name an optimizer's class and arguments, and no more."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.nullspace import NullSpace
from gradproj.nullspace.matrices import without_wrappers
from gradproj.optim import attach


class ProjectedAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` that protects what a file of :meth:`gradproj.NullSpace.save` says, from its first step on.

    For config files and ``transformers.Trainer(optimizer_cls_and_kwargs=...)``, which make an optimizer from a class
    and keyword arguments. Hooks do not survive copying or pickling: make a new one, and load the ``state_dict()``.

    Args:
        params: the model; or its ``named_parameters()``, or parameter groups of such pairs: a basis finds its layer by
            name.
        protection: the file's path.
        every, space, rest: of :class:`gradproj.NullSpace`.
        adamw: everything that ``torch.optim.AdamW`` takes.
    Attributes:
        protection: the :class:`gradproj.NullSpace`; its ``pin()`` pins now, its ``last`` is what the last pin did.
    Raises:
        ValueError: parameters without names; a layer of the file is absent or of another size; it is named.
        NotImplementedError: a layer that a name does not describe (Conv1D, a LoRA adapter): give the model.

    Example::

        opt = gradproj.ProjectedAdamW(model.named_parameters(), protection="python.safetensors", lr=1e-5)
        Trainer(model, args, optimizer_cls_and_kwargs=(gradproj.ProjectedAdamW, {"model": model, "protection": path}))
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        protection: str | os.PathLike,
        *,
        every: int = 1,
        space: str = "weights",
        rest: str = "hold",
        **adamw: Any,
    ):
        model = params if isinstance(params, nn.Module) else None
        if model is not None:
            params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(params, **adamw)  # type: ignore[arg-type]
        named = {
            without_wrappers(name): p
            for group in self.param_groups
            for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
        }
        if len(named) < sum(len(group["params"]) for group in self.param_groups):
            raise ValueError(
                "ProjectedAdamW: a basis finds its layer by name, and there are parameters without; pass the model or "
                "model.named_parameters(); where only parameters can be passed: "
                "gradproj.attach(optimizer, NullSpace.load(path, model))"
            )
        covered = _modules_of(named) if model is None else model
        self.protection = NullSpace.load(protection, covered, every=every, space=space, rest=rest)
        attach(self, self.protection)


def _modules_of(named: Mapping[str, Tensor]) -> nn.Module:
    """Modules with the given parameters under their names: all that a null space needs of a model that is captured."""
    root = nn.Module()
    for name, p in named.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(last, p)  # type: ignore[arg-type]
    return root
