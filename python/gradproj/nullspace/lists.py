"""The lists that one ``pin_`` takes for the matrices of a null space."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradproj.nullspace.basis import Basis
from gradproj.nullspace.matrices import Matrix, Slot
from gradproj.rows import functional
from gradproj.rows.results import Pin
from gradproj.rows.sharding import Sharding, local_tensors


class PinLists:
    """Weights, bases, targets and biases, made once: they hold for as long as the parameters stay where they are."""

    def __init__(self, matrices: Sequence[Matrix], bases: Mapping[str, Basis]):
        self.covered = {id(p) for matrix in matrices for p in matrix.parameters}  # identities
        slots = {slot.name: slot for matrix in matrices for slot in matrix.slots}
        self._seen: list[tuple[dict, str, Tensor, Tensor, int, bool]] = []
        for slot in slots.values():
            p, local = slot.get(), local_tensors([slot.get()])[0]
            self._seen.append((slot.module._parameters, slot.key, p, local, local.data_ptr(), p.requires_grad))
        self._matrices = movable(matrices, bases)
        self._names = tuple(matrix.name for matrix in self._matrices)
        self._weights = [matrix.rows().part for matrix in self._matrices]
        self._vectors = [bases[name].vectors for name in self._names]
        self._bases = functional.split_bases(self._weights, self._vectors)
        self._targets = [bases[name].target for name in self._names]
        self._biases = [matrix.bias_rows() for matrix in self._matrices]

    def current(self) -> bool:
        """Whether no parameter was replaced, moved, frozen or freed since."""
        for parameters, name, p, local, address, trained in self._seen:
            if parameters.get(name) is not p or p.requires_grad != trained or local.data_ptr() != address:
                return False
        return True

    def pin(self) -> Pin:
        return Pin(self._names, functional.pin_(self._weights, self._bases, self._targets, self._biases))

    @torch.no_grad()
    def project_gradients(self) -> Pin:
        """G <- G - (G U) U^T on the gradients of the matrices that have one."""
        moving = [k for k, matrix in enumerate(self._matrices) if matrix.weight.grad is not None]
        gradients = [self._matrices[k].rows(gradient=True).part for k in moving]
        biases = [self._matrices[k].bias_rows(gradient=True) for k in moving]
        spans = []
        for k, gradient, bias in zip(moving, gradients, biases, strict=True):
            u = self._bases[k] if gradient.dtype == self._weights[k].dtype else self._vectors[k]
            # A bias without a gradient does not move: it is no input.
            spans.append(u[..., :-1, :] if self._matrices[k].bias_at is not None and bias is None else u)
        return Pin(tuple(self._names[k] for k in moving), functional.pin_(gradients, spans, None, biases))


def refuse_optimizers(slots: Sequence[Slot], optimizers: Sequence[Optimizer], sharding: Sharding | None) -> None:
    """Refuse optimizers that step none of the parameters, and shards whose rows nothing tells."""
    stepped = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not any(id(slot.get()) in stepped for slot in slots):
        raise ValueError(
            "this NullSpace is of another model than the optimizer's: none of its layers' weights is among the "
            "optimizer's parameters; make both from the same model, the optimizer after adapters were added"
        )
    if sharding is not None and sharding.placement == "shard":
        raise NotImplementedError(
            'a NullSpace pins whole rows of weights, which Sharding(placement="shard") does not tell: shard with '
            "fully_shard (FSDP2), whose DTensors do; for pipeline stages make NullSpace(stage, group=) of each stage's "
            "own ranks"
        )


def movable(matrices: Sequence[Matrix], bases: Mapping[str, Basis]) -> list[Matrix]:
    """The matrices that have a basis and train. Refused if one trains other parameters than when it was captured."""
    found = []
    for matrix in matrices:
        trained = {p.requires_grad for p in (matrix.weight, matrix.bias) if p is not None}
        if matrix.weight.shape != matrix.whole or len(trained) == 2:
            raise RuntimeError(
                f"NullSpace: layer {matrix.name} does not train what it trained when it was captured: its weight or "
                "bias was frozen or freed since, or has another size; capture again"
            )
        if trained == {True} and bases[matrix.name].rank:
            found.append(matrix)
    return found
