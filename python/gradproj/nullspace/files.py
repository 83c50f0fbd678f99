"""Bases in files and state dicts, by the names of their layers."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradproj.nullspace.allocation import Curvature
from gradproj.nullspace.basis import Basis, spaced
from gradproj.nullspace.layers import Layer, is_conv1d

FORMAT = "4"


def pack(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> dict[str, dict[str, Any]]:
    """Plain tensors and numbers, with the targets of all ranks' rows. Of the layers that share eigenpairs, the one that
    keeps most of them has them, and the others name it."""
    owners: dict[tuple, str] = {}
    for layer in sorted(layers, key=lambda layer: -bases[layer.name].rank):
        owners.setdefault(bases[layer.name].memory, layer.name)
    packed = {}
    for layer in layers:
        basis = bases[layer.name]
        scale, values, trace, outputs, inputs = basis.curvature
        entry = {"kind": layer.kind, "scale": scale, "trace": trace, "outputs": outputs, "inputs": inputs}
        entry |= {"rank": basis.rank, "tokens": basis.tokens, "eigenpairs_of": owners[basis.memory]}
        if entry["eigenpairs_of"] == layer.name:
            entry |= {"vectors": basis.vectors, "values": values}
        if basis.target is not None:
            entry["target"] = _whole(layer, basis.target)
        packed[layer.name] = entry
    return packed


def unpack(packed: Mapping[str, Mapping[str, Any]]) -> dict[str, Basis]:
    bases = {}
    for name, entry in packed.items():
        owner = packed[entry["eigenpairs_of"]]
        curvature = Curvature(entry["scale"], owner["values"], entry["trace"], entry["outputs"], entry["inputs"])
        bases[name] = Basis(owner["vectors"][:, : entry["rank"]], entry.get("target"), curvature, entry["tokens"])
    return bases


def save(path, layers: Sequence[Layer], bases: Mapping[str, Basis], share: float) -> None:
    tensors, others = {}, {}
    for name, entry in pack(layers, bases).items():
        others[name] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        for key in entry.keys() - others[name].keys():
            tensors[f"{name}.{key}"] = entry[key].detach().cpu().contiguous()
    metadata = {"format": FORMAT, "share": str(share), "layers": json.dumps(others)}
    _safetensors().torch.save_file(tensors, path, metadata)


@contextlib.contextmanager
def _opened(path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The file and its metadata. A ValueError if :func:`save` has not made it."""
    with _safetensors().safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"NullSpace.load: {path} has no bases of format {FORMAT}: it was not made by this version's "
                "NullSpace.save()"
            )
        yield file, metadata


def kinds(path) -> dict[str, str]:
    """The class of each layer's module, by the layers' names."""
    with _opened(path) as (_, metadata):
        return {name: entry["kind"] for name, entry in json.loads(metadata["layers"]).items()}


def load(path) -> tuple[dict[str, Basis], float]:
    """The bases, and the share that they were made with."""
    with _opened(path) as (file, metadata):
        packed = json.loads(metadata["layers"])
        for key in file.keys():  # noqa: SIM118  not a dict
            name, _, field = key.rpartition(".")
            packed[name][field] = file.get_tensor(key)
    return unpack(packed), float(metadata["share"])


def matching(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> list[Layer]:
    """The layers of which there are bases. A ValueError if a basis is of no layer, or of one of another size."""
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
    return [layer for layer in layers if layer.name in bases]


def on_rank(layers: Sequence[Layer], bases: Mapping[str, Basis]) -> dict[str, Basis]:
    """On the devices of the layers' weights, with this rank's rows of the targets. Eigenvectors that layers share stay
    shared."""
    shared: dict[tuple, Tensor] = {}
    found = {}
    for layer in sorted(layers, key=lambda layer: -bases[layer.name].rank):
        basis, device = bases[layer.name], layer.weight.device
        key = device, *basis.memory
        if key not in shared:
            shared[key] = spaced(basis.vectors.to(device))
        target = None if basis.target is None else _of_rank(layer, basis.target).to(device)
        found[layer.name] = basis._replace(vectors=shared[key][:, : basis.rank], target=target)
    return found


def _whole(layer: Layer, target: Tensor) -> Tensor:
    """All rows of a target, of which this rank has those of its shard of the weight."""
    weight: Any = layer.weight
    if not hasattr(weight, "device_mesh"):
        return target
    from torch.distributed.tensor import DTensor

    shape = torch.Size((layer.shape[0], target.shape[1]))
    return DTensor.from_local(
        target, weight.device_mesh, _placements(layer), run_check=False, shape=shape, stride=(shape[1], 1)
    ).full_tensor()


def _of_rank(layer: Layer, target: Tensor) -> Tensor:
    """This rank's rows of a target."""
    weight: Any = layer.weight
    if not hasattr(weight, "device_mesh"):
        return target
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(target, weight.device_mesh, _placements(layer), src_data_rank=None).to_local()


def _placements(layer: Layer) -> tuple:
    """Of a target [outputs, r]: those of the weight's outputs, which are Conv1D's columns."""
    placements = layer.weight.placements  # type: ignore[attr-defined]
    if not is_conv1d(layer.owner):
        return placements
    from torch.distributed.tensor import Shard

    found = tuple(Shard(0) if type(p) is Shard and p.dim == 1 else p for p in placements)
    if any(p.is_shard() and type(p) is not Shard for p in found):
        raise NotImplementedError(
            f"NullSpace: the weight of {layer.name}, a Conv1D, is {placements} of a DTensor; shard it over one mesh "
            "dimension"
        )
    return found


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("NullSpace.save and load need safetensors: pip install safetensors") from error
    return safetensors
