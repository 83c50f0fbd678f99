"""Directions inside an optimizer's ``state_dict()``.

Direction k (oldest first) of parameter i is ``state_dict["state"][i]["protected_k"]``, beside ``exp_avg`` and the like, so that
whatever maps, shards or reshards optimizer state does the same with it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_PREFIX = "protected_"


def insert(state_dict: dict[str, Any], rows: Sequence[Sequence[Tensor | None]]) -> dict[str, Any]:
    """``state_dict`` with ``rows``: K lists, oldest first, with one tensor or None per parameter. Shares the tensors."""
    ids = _ids(state_dict)
    state = dict(state_dict["state"])
    for i, column in zip(ids, zip(*rows, strict=True), strict=False):
        entries = {f"{_PREFIX}{k}": t for k, t in enumerate(column) if t is not None}
        if entries:
            state[i] = {**state.get(i, {}), **entries}
    return {**state_dict, "state": state}


def without_directions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` as the inner optimizer knows it."""
    state = {}
    for i, entries in state_dict["state"].items():
        rest = _others(entries)
        if rest or rest is entries:  # an optimizer that finds an empty state may take it for one that it has set up
            state[i] = rest
    return {**state_dict, "state": state}


def directions(state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> list[dict[Tensor, Tensor]]:
    """What :func:`insert` put in, oldest first: parameter -> tensor on the parameter's device.

    Raises:
        ValueError: not one entry per parameter, or a shape that is not its parameter's.
    """
    ids = _ids(state_dict)
    if len(ids) != len(parameters):
        raise ValueError(f"load_state_dict: {len(ids)} parameters, but the optimizer has {len(parameters)}")
    found: dict[int, dict[Tensor, Tensor]] = {}
    for i, p in zip(ids, parameters, strict=True):
        for name, t in state_dict["state"].get(i, {}).items():
            if not _is_direction(name):
                continue
            k = int(name.removeprefix(_PREFIX))
            shapes = (p.shape, (*p.shape, 2)) if p.is_complex() else (p.shape,)  # of a complex gradient, maybe its real view
            if t.shape not in shapes:
                raise ValueError(
                    f"load_state_dict: direction {k} of parameter {i} has shape {tuple(t.shape)}, but the parameter has "
                    f"shape {tuple(p.shape)}"
                )
            found.setdefault(k, {})[p] = t.to(p.device)
    return [found[k] for k in sorted(found)]


def take_from(state: dict[Tensor, Any], parameters: Sequence[Tensor]) -> list[dict[Tensor, Tensor]]:
    """Remove directions from a live optimizer's ``state``, where a checkpoint was loaded before they had an owner."""
    ids = list(range(len(parameters)))
    entries = {i: state[p] for i, p in zip(ids, parameters, strict=True) if isinstance(state.get(p), dict)}
    found = directions({"state": entries, "param_groups": [{"params": ids}]}, parameters)
    for p in {p for row in found for p in row}:
        state[p] = _others(state[p])
        if not state[p]:
            del state[p]
    return found


def _ids(state_dict: dict[str, Any]) -> list[Any]:
    return [i for group in state_dict["param_groups"] for i in group["params"]]


def _is_direction(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(_PREFIX)


def _others(entries: Any) -> Any:
    if not isinstance(entries, dict) or not any(map(_is_direction, entries)):
        return entries
    return {name: value for name, value in entries.items() if not _is_direction(name)}
