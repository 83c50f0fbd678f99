"""Bases in files and state dicts, by the names of their layers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradproj.nullspace.allocation import Curvature
from gradproj.nullspace.basis import Basis, spaced
from gradproj.nullspace.layers import Layer, is_conv1d

FORMAT = "3"


def pack(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> dict[str, dict[str, Any]]:
    """Plain tensors and numbers; targets of all ranks' rows."""
    packed = {}
    for layer in layers:
        basis = bases[layer.name]
        curvature = basis.curvature
        packed[layer.name] = {
            "vectors": basis.vectors,
            "target": None if basis.target is None else whole(layer, basis.target),
            "values": curvature.values,
            "numbers": [curvature.scale, curvature.trace, curvature.outputs, curvature.inputs, basis.tokens],
        }
    return packed


def unpack(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Basis]:
    bases = {}
    for name, entry in packed.items():
        scale, trace, outputs, inputs, tokens = entry["numbers"]
        curvature = Curvature(scale, entry["values"], trace, int(outputs), int(inputs))
        bases[name] = Basis(entry["vectors"], entry["target"], curvature, int(tokens))
    return bases


def save(path, layers: Sequence[Layer], bases: Mapping[str, Basis], share: float) -> None:
    packed = pack(layers, bases)
    # Of eigenpairs that layers with the same inputs share: the layer that keeps most of them.
    owners: dict[tuple, str] = {}
    for name, basis in sorted(bases.items(), key=lambda item: -item[1].rank):
        owners.setdefault(_identity(basis), name)
    kinds_of = {layer.name: layer.kind for layer in layers}
    tensors, facts = {}, {}
    for name, entry in packed.items():
        owner = owners[_identity(bases[name])]
        facts[name] = {
            "numbers": entry["numbers"],
            "rank": bases[name].rank,
            "eigenpairs_of": owner,
            "kind": kinds_of[name],
        }
        if owner == name:
            tensors[f"{name}.values"] = entry["values"]
            tensors[f"{name}.vectors"] = entry["vectors"].T  # as they lie in memory: one after the other
        if entry["target"] is not None:
            tensors[f"{name}.target"] = entry["target"]
    metadata = {"format": FORMAT, "share": str(share), "layers": json.dumps(facts)}
    _safetensors().save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path, metadata)


def _metadata(file, path) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or "layers" not in metadata:
        raise ValueError(
            f"NullSpace.load: {path} has no bases of format {FORMAT}: it was not made by this version's NullSpace.save()"
        )
    return metadata


def kinds(path) -> dict[str, str]:
    """The class of each layer's module, by the layers' names. Errors as of :func:`load`."""
    with _safetensors("safetensors").safe_open(path, framework="pt") as file:
        return {name: fact["kind"] for name, fact in json.loads(_metadata(file, path)["layers"]).items()}


def load(path) -> tuple[dict[str, Basis], float]:
    """The bases, and the share that they were made with.

    Raises:
        ValueError: not such a file.
    """
    with _safetensors("safetensors").safe_open(path, framework="pt") as file:
        metadata = _metadata(file, path)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    packed = {
        name: {
            "numbers": fact["numbers"],
            "vectors": tensors[f"{fact['eigenpairs_of']}.vectors"][: fact["rank"]].T,
            "target": tensors.get(f"{name}.target"),
            "values": tensors[f"{fact['eigenpairs_of']}.values"],
        }
        for name, fact in json.loads(metadata["layers"]).items()
    }
    return unpack(packed), float(metadata["share"])


def matching(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> list[Layer]:
    """The layers of which there are bases, in their order.

    Raises:
        ValueError: there is none, or of another size; it is named.
    """
    by_name = {layer.name: layer for layer in layers}
    for name, basis in bases.items():
        if name not in by_name:
            raise ValueError(f"NullSpace: the model has no layer {name!r} that trains, for which there is a basis")
        outputs, inputs = by_name[name].shape
        if basis.vectors.shape[0] != inputs or basis.curvature.outputs != outputs:
            raise ValueError(
                f"NullSpace: layer {name!r} is {outputs} x {inputs} (its bias counted), but its basis is of a layer "
                f"{basis.curvature.outputs} x {basis.vectors.shape[0]}"
            )
    return [by_name[name] for name in bases]


def _identity(basis: Basis) -> tuple:
    """Equal for layers whose eigenvectors are leading columns of one matrix. Without any, eigenvalues tell layers
    apart."""
    tensors = (basis.vectors, basis.curvature.values)
    return (*(t.untyped_storage().data_ptr() for t in tensors), basis.vectors.shape[0])


def _target_placements(layer: Layer) -> tuple:
    """How the rows of a target [outputs, r] lie over the ranks: as the weight's outputs do, which Conv1D has in its
    columns."""
    placements = layer.weight.placements  # type: ignore[attr-defined]
    if not is_conv1d(layer.owner):
        return placements
    from torch.distributed.tensor import Shard

    found = tuple(Shard(0) if type(p) is Shard and p.dim == 1 else p for p in placements)
    if any(p.is_shard() and type(p) is not Shard for p in found):
        raise NotImplementedError(
            f"NullSpace: the weight of {layer.name}, a Conv1D, is {placements} of a DTensor; shard it over one mesh dimension"
        )
    return found


def whole(layer: Layer, target: Tensor) -> Tensor:
    """The target of all rows, where this rank holds those of its shard of the weight."""
    weight: Any = layer.weight
    if not hasattr(weight, "device_mesh"):
        return target
    from torch.distributed.tensor import DTensor

    shape = torch.Size((layer.shape[0], target.shape[1]))
    return DTensor.from_local(
        target, weight.device_mesh, _target_placements(layer), run_check=False, shape=shape, stride=(shape[1], 1)
    ).full_tensor()


def on_rank(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> dict[str, Basis]:
    """On the devices of the layers' weights, with this rank's rows of the targets. Eigenvectors that layers share stay
    shared."""
    vectors: dict[tuple, Tensor] = {}
    for layer in sorted(layers, key=lambda layer: -bases[layer.name].rank):
        key = layer.weight.device, *_identity(bases[layer.name])
        if key not in vectors:
            vectors[key] = spaced(bases[layer.name].vectors.to(layer.weight.device))
    found = {}
    for layer in layers:
        weight: Any = layer.weight
        basis = bases[layer.name]
        key, target = (weight.device, *_identity(basis)), basis.target
        if target is not None:
            if hasattr(weight, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                placements = _target_placements(layer)
                target = distribute_tensor(target, weight.device_mesh, placements, src_data_rank=None).to_local()
            target = target.to(weight.device)
        found[layer.name] = basis._replace(vectors=vectors[key][:, : basis.rank], target=target)
    return found


def _safetensors(module: str = "safetensors.torch"):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("NullSpace.save and load need safetensors: pip install safetensors") from error
