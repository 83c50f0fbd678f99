"""Bases in files and state dicts, by the names of their matrices."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradproj.nullspace.allocation import Curvature
from gradproj.nullspace.basis import Basis, spaced
from gradproj.nullspace.matrices import Matrix, Slot, at_address
from gradproj.rows.sharding import all_reduce

FORMAT = "5"


Found = Mapping[str, tuple[tuple, Basis]]  # by the matrices' names: where it is (Matrix.address), and the whole basis


def pack(matrices: Sequence[Matrix], bases: Mapping[str, Basis]) -> dict[str, dict[str, Any]]:
    """Plain tensors and numbers, with the targets of all ranks' rows. Of the matrices that share eigenpairs, the one
    that keeps most of them has them, and the others name it."""
    owners: dict[tuple, str] = {}
    for matrix in sorted(matrices, key=lambda matrix: -bases[matrix.name].rank):
        owners.setdefault(bases[matrix.name].memory, matrix.name)
    packed = {}
    for matrix in matrices:
        basis = bases[matrix.name]
        scale, values, trace, outputs, inputs = basis.curvature
        entry = {"address": matrix.address(), "scale": scale, "trace": trace, "outputs": outputs, "inputs": inputs}
        entry |= {"rank": basis.rank, "tokens": basis.tokens, "eigenpairs_of": owners[basis.memory]}
        if entry["eigenpairs_of"] == matrix.name:
            entry |= {"vectors": basis.vectors, "values": values}
        if basis.target is not None:
            entry["target"] = _whole(matrix, basis.target)
        packed[matrix.name] = entry
    return packed


def unpack(packed: Mapping[str, Mapping[str, Any]]) -> Found:
    found = {}
    for name, entry in packed.items():
        owner = packed[entry["eigenpairs_of"]]
        curvature = Curvature(entry["scale"], owner["values"], entry["trace"], entry["outputs"], entry["inputs"])
        basis = Basis(owner["vectors"][:, : entry["rank"]], entry.get("target"), curvature, entry["tokens"])
        found[name] = entry["address"], basis
    return found


def save(path, matrices: Sequence[Matrix], bases: Mapping[str, Basis], share: float) -> None:
    tensors, others = {}, {}
    for name, entry in pack(matrices, bases).items():
        others[name] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        for key in entry.keys() - others[name].keys():
            tensors[f"{name}.{key}"] = entry[key].detach().cpu().contiguous()
    metadata = {"format": FORMAT, "share": str(share), "matrices": json.dumps(others)}
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


def load(path) -> tuple[Found, float]:
    """The bases, and the share that they were made with."""
    with _opened(path) as (file, metadata):
        packed = json.loads(metadata["matrices"])
        for key in file.keys():  # noqa: SIM118  not a dict
            name, _, field = key.rpartition(".")
            packed[name][field] = file.get_tensor(key)
    return unpack(packed), float(metadata["share"])


def on_rank(found: Found, slots: Mapping[str, Slot]) -> tuple[list[Matrix], dict[str, Basis]]:
    """The matrices in a model, and the bases on their devices, with this rank's rows of the targets. Eigenvectors that
    matrices share stay shared. A ValueError if the model has no such matrix."""
    matrices = [at_address(name, address, slots) for name, (address, _) in found.items()]
    shared: dict[tuple, Tensor] = {}
    bases = {}
    for matrix in sorted(matrices, key=lambda matrix: -found[matrix.name][1].rank):
        (_, basis), device = found[matrix.name], matrix.weight.device
        key = device, *basis.memory
        if key not in shared:
            shared[key] = spaced(basis.vectors.to(device))
        target = basis.target
        if target is not None:
            rows = matrix.rows()
            target = target[rows.begin : rows.end].to(device)
        bases[matrix.name] = basis._replace(vectors=shared[key][:, : basis.rank], target=target)
    return matrices, bases


def _whole(matrix: Matrix, target: Tensor) -> Tensor:
    """All rows of a target, of which this rank has those of its shard of the weight."""
    weight: Any = matrix.weight
    if not hasattr(weight, "device_mesh"):
        return target
    if any(p.is_shard() and type(p).__name__ != "Shard" for p in weight.placements):
        raise NotImplementedError(
            f"NullSpace: the weight of {matrix.name} is {weight.placements} of a DTensor, of which a rank has "
            "scattered rows: save from a model that is sharded over one mesh dimension"
        )
    rows = matrix.rows()
    whole = target.new_zeros(matrix.shape[0], target.shape[1])
    whole[rows.begin : rows.end] = target
    for d, placement in enumerate(weight.placements):
        if placement.is_shard():
            whole = all_reduce(whole, weight.device_mesh.get_group(d))
    return whole


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("NullSpace.save and load need safetensors: pip install safetensors") from error
    return safetensors
