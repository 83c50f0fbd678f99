"""Which matrices a null space covers: what a model multiplies inputs by, a parameter or a slice of one."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradproj.nullspace.regions import Region, Rows, on_rank, whole

Wanted = Callable[[str, nn.Module], bool]
# What wrappers put into the names of modules.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)(?=\.|$)")


class Slot(NamedTuple):
    """Where a parameter lives. The parameter is asked for anew each time: fully_shard() and others replace it."""

    name: str  # of the parameter, without what wrappers add
    module: nn.Module
    key: str

    def get(self) -> nn.Parameter:
        p = self.module._parameters.get(self.key)
        if p is None:
            raise RuntimeError(
                f"NullSpace: {self.name} is no parameter of the model any more (pruned? weight_norm, or another "
                "parametrization?): undo that, or do it before NullSpace is made"
            )
        return p


class At(NamedTuple):
    """A part of a parameter; of an adapter that starts at zero lora_A, with the slot of lora_B's weight, the only
    ``consumer`` of its output."""

    slot: Slot
    region: Region
    consumer: Slot | None = None


class Matrix:
    """A matrix W [outputs, inputs] that trains, and its bias as one more input, which is always 1.

    Attributes:
        name: of the module whose ``weight`` it is, or of the parameter, with the slice: ``experts.gate_up_proj[3]``.
        slot, region, whole: the parameter, its part, and its shape.
        bias_at: where the bias is; None if none trains.
        consumer: of an adapter, see :class:`At`: products with protected inputs are to be zero, not what they are, and
            then it may train freely.
    """

    def __init__(self, at: At, bias: At | None = None):
        self.slot, self.region, self.consumer = at
        self.bias_at, self.whole = bias, self.slot.get().shape
        label = self.region.label(self.whole)
        of_module = self.slot.key == "weight" and not label
        self.name = self.slot.name[: -len(".weight")] if of_module else f"{self.slot.name}{label}"

    @property
    def key(self) -> tuple:
        """The same on every rank."""
        return self.slot.name, self.region

    def address(self) -> tuple:
        """Names and numbers that :func:`at_address` makes it of again."""
        bias = self.bias_at and (self.bias_at.slot.name, *self.bias_at.region)
        return self.slot.name, tuple(self.whole), tuple(self.region), bias, self.consumer and self.consumer.name

    def rows(self, gradient: bool = False) -> Rows:
        """This rank's rows of the weight, or of its gradient; errors as of :func:`on_rank`."""
        weight = self.weight.grad if gradient else self.weight.detach()
        assert weight is not None
        return on_rank(self.region, weight, self.name)

    def bias_rows(self, gradient: bool = False) -> Tensor | None:
        """This rank's rows of the bias, or of its gradient; None if there is none."""
        bias = None if self.bias is None else self.bias.grad if gradient else self.bias.detach()
        return None if self.bias_at is None or bias is None else on_rank(self.bias_at.region, bias, self.name).part

    def without_consumer(self) -> "Matrix":
        return Matrix(At(self.slot, self.region), self.bias_at)

    @property
    def to_zero(self) -> bool:
        return self.consumer is not None

    @property
    def weight(self) -> nn.Parameter:
        """The whole parameter."""
        return self.slot.get()

    @property
    def bias(self) -> nn.Parameter | None:
        return None if self.bias_at is None else self.bias_at.slot.get()

    @property
    def parameters(self) -> list[Tensor]:
        """What may train without harm to what is protected: not lora_B's bias, which is added to every output."""
        return [slot.get() for slot in self.slots]

    @property
    def slots(self) -> list[Slot]:
        found = (self.slot, self.bias_at and self.bias_at.slot, self.consumer)
        return [slot for slot in found if slot is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; the bias counts as an input."""
        outputs, inputs = self.region.shape
        return outputs, inputs + (self.bias_at is not None)

    @property
    def is_looked_up(self) -> bool:
        """Whether it is what an adapter of an embedding has for one token, which is kept whole."""
        return is_looked_up(self.slot)

    @property
    def is_one_of_many(self) -> bool:
        """Whether it is a slice of a parameter of eight or more, as experts are."""
        return self.whole.numel() >= 8 * math.prod(self.region.shape)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def __repr__(self) -> str:
        return f"Matrix({self.name!r}, {self.shape[0]} x {self.shape[1]})"


def is_looked_up(slot: Slot) -> bool:
    """Of lora_A beside an embedding."""
    return ".lora_embedding_A." in slot.name


def at_address(name: str, address: Sequence[Any], slots: Mapping[str, Slot]) -> Matrix:
    """The matrix of :meth:`Matrix.address` in another model.

    Args:
        name: for errors.
    Raises:
        ValueError: the model has no such parameters that train, or of another size.
    """
    weight, whole, region, bias, consumer = address
    for needed in (weight, bias and bias[0], consumer):
        if needed and needed not in slots:
            raise ValueError(
                f"NullSpace: the model has no parameter {needed!r} that trains, for which there is the basis {name!r}"
            )
    shape = tuple(slots[weight].get().shape)
    if shape != tuple(whole):
        raise ValueError(
            f"NullSpace: parameter {weight!r} has shape {shape}, but the basis {name!r} is of one with {tuple(whole)}"
        )
    at_bias = At(slots[bias[0]], _region(bias[1:])) if bias else None
    return Matrix(At(slots[weight], _region(region), slots[consumer] if consumer else None), at_bias)


def _region(fields: Sequence[Any]) -> Region:
    """Of tuples, or of lists, which JSON has."""
    ranges, outputs, inputs = fields
    return Region(tuple((begin, end) for begin, end in ranges), tuple(outputs), tuple(inputs))


def find_slots(model: nn.Module, wanted: Wanted | None = None) -> list[Slot]:
    """The parameters that train and may be multiplied by, or added as a bias: all but those of embeddings, and what is
    tied to one.

    Args:
        wanted: name and module -> whether to take the parameters that it has itself; None takes all.
    Raises:
        ValueError: there is no matrix among them. NotImplementedError: FSDP1; DeepSpeed.
    """
    _refuse_flat_weights(model)
    seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    slots = []
    for full_name, module in model.named_modules():
        name = without_wrappers(full_name)
        if wanted is not None and not wanted(name, module):
            continue
        for key, p in module._parameters.items():
            if p is not None and p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                slots.append(Slot(f"{name}.{key}" if name else key, module, key))
    if not any(slot.get().dim() > 1 for slot in slots):
        raise ValueError(
            f"NullSpace: {type(model).__name__} has no matrix to protect: no parameter of two or more dimensions, "
            "other than an embedding's, that requires a gradient and whose module modules= takes"
        )
    return slots


def unreached(matrices: Sequence[Matrix], slots: Sequence[Slot], reached: Collection[str]) -> list[Matrix]:
    """The parameters, with the biases beside them, that were multiplied by nowhere and that no gradient has reached:
    what was captured does not depend on them, so that they may learn freely.

    Args:
        reached: names of the parameters that a gradient has reached.
    """
    used = {slot.name for matrix in matrices for slot in matrix.slots} | set(reached)
    free = {slot.name: slot for slot in slots if slot.name not in used}
    found = []
    for slot in free.values():
        if slot.get().dim() > 1:
            bias = free.get(f"{slot.name.removesuffix(slot.key)}bias")
            at_bias = None
            if bias is not None and slot.key == "weight" and bias.get().shape == slot.get().shape[:1]:
                at_bias = At(bias, whole(bias.get().shape))
            found.append(Matrix(At(slot, whole(slot.get().shape)), at_bias))
    return found


def refuse_overlaps(matrices: Sequence[Matrix]) -> None:
    """Refuse matrices that share elements of a parameter: both cannot be pinned exactly."""
    regions: dict[str, set[Region]] = {}
    for matrix in matrices:
        for at in (matrix, matrix.bias_at):
            if at is not None:
                regions.setdefault(at.slot.name, set()).add(at.region)
    for name, mine in regions.items():
        if any(a.overlaps(b) for a, b in combinations(mine, 2)):
            raise NotImplementedError(
                f"NullSpace: {name} is multiplied by as several matrices that share elements (as it lies and "
                "transposed, or whole and in slices), which cannot be pinned together: leave it out with modules="
            )


def running_statistics(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules, with their names, whose statistics a forward pass in training mode moves."""
    found = [
        (without_wrappers(name), m)
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
    ]
    return [(name, m) for name, m in found if m.track_running_stats and m.running_mean is not None]


def without_wrappers(name: str) -> str:
    return _WRAPPERS.sub("", name).lstrip(".")


def _refuse_flat_weights(model: nn.Module) -> None:
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise NotImplementedError(
            "NullSpace: FSDP1 hands out flat pieces of weights, of which no product can be pinned; shard with "
            "fully_shard (FSDP2)"
        )
    if any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters()):
        raise NotImplementedError(
            "NullSpace: DeepSpeed partitions weights and steps copies of them; capture before deepspeed.initialize(), "
            "and use gradproj.integrations.deepspeed.protect(), or shard with fully_shard (FSDP2)"
        )
