"""Bases in files and state dicts, by the names of their layers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradproj.allocation import Curvature
from gradproj.basis import Basis
from gradproj.layers import Layer

FORMAT = "1"


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
    tensors, numbers = {}, {}
    for name, entry in pack(layers, bases).items():
        numbers[name] = entry["numbers"]
        for kind in ("vectors", "target", "values"):
            if entry[kind] is not None:
                t = entry[kind].T if kind == "vectors" else entry[kind]  # as they lie in memory: one after the other
                tensors[f"{name}.{kind}"] = t.detach().cpu().contiguous()
    import gradproj

    metadata = {"format": FORMAT, "gradproj": gradproj.__version__, "share": str(share), "layers": json.dumps(numbers)}
    _safetensors().save_file(tensors, path, metadata)


def load(path) -> tuple[dict[str, Basis], float]:
    """The bases, and the share that they were made with.

    Raises:
        ValueError: not such a file.
    """
    with _safetensors("safetensors").safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT or "layers" not in metadata:
            raise ValueError(
                f"NullSpace.load: {path} has no bases of format {FORMAT}: it was not made by NullSpace.save()"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    packed = {
        name: {
            "numbers": numbers,
            "vectors": tensors[f"{name}.vectors"].T,
            "target": tensors.get(f"{name}.target"),
            "values": tensors[f"{name}.values"],
        }
        for name, numbers in json.loads(metadata["layers"]).items()
    }
    return unpack(packed), float(metadata["share"])


def whole(layer: Layer, target: Tensor) -> Tensor:
    """The target of all rows, where this rank holds those of its shard of the weight."""
    weight: Any = layer.weight
    if not hasattr(weight, "device_mesh"):
        return target
    from torch.distributed.tensor import DTensor

    shape = torch.Size((layer.shape[0], target.shape[1]))
    return DTensor.from_local(
        target, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(shape[1], 1)
    ).full_tensor()


def on_rank(layer: Layer, basis: Basis) -> Basis:
    """On the device of the layer's weight, with this rank's rows of the target."""
    weight: Any = layer.weight
    target = basis.target
    if target is not None and hasattr(weight, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        target = distribute_tensor(target, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
    return basis._replace(
        vectors=basis.vectors.to(weight.device), target=None if target is None else target.to(weight.device)
    )


def _safetensors(module: str = "safetensors.torch"):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("NullSpace.save and load need safetensors: pip install safetensors") from error
