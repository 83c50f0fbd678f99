"""Hears every product of an input with a parameter that trains, in the forward passes of a capture."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gradproj.capture import evaluating
from gradproj.nullspace.matrices import At, Slot
from gradproj.nullspace.products import CASTS, HEARD, OPENED, Heard, Part, look_up, read
from gradproj.nullspace.regions import Region, locate

DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
}  # fmt: skip
_DROPS_PATHS = re.compile(r"DropPath|StochasticDepth|DropBlock")  # classes of timm, transformers, torchvision


class Listener(Protocol):
    def before(self, x: Tensor, weights: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Tensor, Any]:
        """What the call shall take in place of its input ``x``, and what :meth:`after` is to be given.

        Args:
            weights: what ``x`` is multiplied by and what is added. The call takes them detached: a capture needs no
                gradients of them, a third of a pass's work, and what arrives at them comes from another use.
        """

    def after(self, call: Any, y: Tensor) -> None:
        """With what the call returned."""


class Hearing(TorchFunctionMode):
    """While it is on, calls of torch's functions that multiply by a parameter of ``slots`` are told to listeners.

    A use of a parameter is recognised by its memory: an operand is a view of it, or a copy in another dtype. PEFT's
    adapters of parameters add B A to them, for all experts at once: a product with that sum is one with A. Those of
    embeddings look columns of A up.

    Nothing is dropped out meanwhile: what is to stay is what the model does when it is used.

    Args:
        adapters: names of lora_A -> slots of lora_B, of such adapters; None if A is a matrix as others are.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        listeners: Sequence[Listener],
        adapters: Mapping[str, Slot | None] = MappingProxyType({}),
    ):
        super().__init__()
        self._slots, self._listeners, self._adapters = slots, listeners, adapters
        self._sums = WeakTensorKeyDictionary()  # W + B A -> A, the dimension of the sum that is its input, and B's slot
        self._known: dict[int, tuple[Tensor, Slot | None]] = {}  # by identity, and alive, so that no other gets it
        self._casts = WeakTensorKeyDictionary()  # copy -> what it has the values of
        self._rescan()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = _without_dropout(*args, **kwargs)
        if func not in HEARD:  # most calls, attributes of tensors among them
            return func(*args, **kwargs)
        if func in OPENED:  # a backward pass may be made where gradients are off
            with self:
                return OPENED[func](*args, **kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in CASTS and isinstance(args[0], Tensor) and args[0].requires_grad:
            result = func(*args, **kwargs)
            if result is not args[0] and not result._is_view() and self._find(args[0], range(args[0].dim())):
                self._casts[result] = args[0]
            return result
        if func is torch.baddbmm and self._adapters and len(args) == 3 and (adapter := self._adapter(*args[1:])):
            result = func(*args, **kwargs)
            self._sums[result] = adapter
            return result
        if func is F.embedding:
            heard = look_up(self._find_looked_up, *args, **kwargs) if self._adapters else None
        else:
            heard = read(func, self._find, args, kwargs)
        return self._listen(func, args, kwargs, heard) if heard else func(*args, **kwargs)

    def _listen(self, func, args, kwargs, heard: Heard) -> Any:
        calls = []
        x, weights, parts = heard
        if torch._C._functorch.maybe_current_level() is not None:
            raise NotImplementedError(
                f"NullSpace: parameter {parts[0].at.slot.name} is multiplied by inside vmap, or another transform of "
                "torch.func, where its inputs are not seen: run the model on a batch without it during the capture"
            )
        for listener in self._listeners:
            x, call = listener.before(x, weights, parts)
            calls.append(call)
        instead = {id(heard.input): x, **{id(w): w.detach() for w in weights}}
        y = func(*_put(args, instead), **dict(zip(kwargs, _put(kwargs.values(), instead), strict=True)))
        if y.requires_grad:
            for listener, call in zip(self._listeners, calls, strict=True):
                listener.after(call, y)
        return y

    def _adapter(self, left: Tensor, right: Tensor) -> tuple[Tensor, int, Slot] | None:
        """If one of the operands is lora_A of all experts: it, the dimension of its inputs, and lora_B's slot."""
        for operand, inputs in ((left, 1), (right, 2)):
            if operand.requires_grad:
                at = self._find(operand, [2 - inputs], [inputs - 1], operand.detach()[0])
                up = self._adapters.get(at.slot.name) if at is not None else None
                if up is not None:
                    return operand, inputs, up
        return None

    def _find_looked_up(self, operand, outputs, inputs=(), part=None) -> At | None:
        at = self._find(operand, outputs, inputs, part)
        if at is None or at.slot.name not in self._adapters:
            return None
        return at._replace(consumer=self._adapters[at.slot.name])

    def _rescan(self) -> None:
        for slot in self._slots:
            p = slot.get()
            self._known[id(p)] = p, slot

    def _slot(self, base: Tensor) -> Slot | None:
        if id(base) not in self._known:
            if not isinstance(base, nn.Parameter):
                return None
            self._rescan()  # FSDP2 puts another tensor there for the call
            self._known.setdefault(id(base), (base, None))
        return self._known[id(base)][1]

    def _find(
        self, operand: Tensor, outputs: Sequence[int], inputs: Sequence[int] = (), part: Tensor | None = None
    ) -> At | None:
        base = operand if operand._base is None else operand._base
        slot = self._slot(base)
        if slot is None and base not in self._casts and base not in self._sums:
            return None
        region = locate(base, operand if part is None else part, outputs, inputs)
        if region is None:
            return None
        if slot is not None:
            return At(slot, region)
        if base in self._casts:
            origin = self._casts[base]
            at = self._find(origin, range(origin.dim()))
            return at and At(at.slot, _within(at.region, region))
        down, dim, up = self._sums[base]
        if region.inputs != (dim,) or region.shape[1] < base.shape[dim]:
            return None
        expert = region.ranges[0][0]
        at = self._find(down, [2 - dim], [dim - 1], down.detach()[expert])
        return at and at._replace(consumer=up)


def _within(outer: Region, inner: Region) -> Region:
    """The part ``inner`` of a tensor whose dimensions are those that ``outer`` lists as outputs."""
    ranges = list(outer.ranges)
    for (begin, end), d in zip(inner.ranges, outer.outputs, strict=True):
        first = outer.ranges[d][0]
        ranges[d] = first + begin, first + end
    outputs, inputs = (tuple(outer.outputs[d] for d in dims) for dims in (inner.outputs, inner.inputs))
    return Region(tuple(ranges), outputs, inputs)


def _without_dropout(query, key, value, attn_mask=None, dropout_p=0.0, *others, **named) -> tuple[tuple, dict]:
    """The arguments of an attention."""
    return (query, key, value, attn_mask, 0.0, *others), named


def _put(values: Iterable[Any], instead: Mapping[int, Tensor]) -> tuple:
    return tuple(_put(v, instead) if isinstance(v, list | tuple) else instead.get(id(v), v) for v in values)


@contextlib.contextmanager
def experts(model: nn.Module, way: str) -> Iterator[None]:
    """transformers' experts multiply in this way meanwhile: ``"eager"``, one after the other, by slices;
    ``"grouped_mm"``, all at once. They may gather weights first, which then are views of none."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    configs = {key: c for key, c in configs.items() if getattr(c, "_experts_implementation", None)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = way
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def without_noise(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """No module drops a path of the model meanwhile, nor adds noise to embeddings (NEFTune, a hook of theirs)."""
    return evaluating(
        *(m for m in model.modules() if isinstance(m, nn.Embedding) or _DROPS_PATHS.search(type(m).__name__))
    )
