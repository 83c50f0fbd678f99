"""Directions inside an optimizer's ``state_dict()``.

Direction k (oldest first) of parameter i is ``state_dict["state"][i]["protected_k"]``, beside ``exp_avg`` and the like,
so that whatever shards or reshards optimizer state does the same with it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_PREFIX = "protected_"


def insert(state_dict: dict[str, Any], rows: Sequence[Sequence[Tensor | None]]) -> dict[str, Any]:
    """``state_dict`` with the tensors of ``rows``: K lists, oldest first, of one tensor or None per parameter."""
    state = dict(state_dict["state"])
    for k, row in enumerate(rows):
        for i, t in zip(_ids(state_dict), row, strict=True):
            if t is not None:
                state[i] = {**state.get(i, {}), f"{_PREFIX}{k}": t}
    return {**state_dict, "state": state}


def without_directions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` as the inner optimizer knows it."""
    state = {}
    for i, entries in state_dict["state"].items():
        if isinstance(entries, dict) and any(map(_is_direction, entries)):
            entries = {name: value for name, value in entries.items() if not _is_direction(name)}
            if not entries:  # an optimizer may take an empty state for one that it has set up
                continue
        state[i] = entries
    return {**state_dict, "state": state}


def directions(state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> list[dict[Tensor, Tensor]]:
    """What :func:`insert` put in: entry k is direction k, parameter -> tensor on the parameter's device. ValueError if
    the number of parameters or a shape differs."""
    ids = _ids(state_dict)
    if len(ids) != len(parameters):
        raise ValueError(f"load_state_dict: {len(ids)} parameters, but the optimizer has {len(parameters)}")
    found: dict[int, dict[Tensor, Tensor]] = {}
    for i, p in zip(ids, parameters, strict=True):
        entries = state_dict["state"].get(i)
        for name in filter(_is_direction, entries if isinstance(entries, dict) else ()):
            t, k = entries[name], int(name.removeprefix(_PREFIX))
            shape = (*p.shape, 2) if p.is_complex() else p.shape  # of a complex gradient, its real view
            if t.shape != shape:
                raise ValueError(
                    f"load_state_dict: direction {k} of parameter {i} has shape {tuple(t.shape)}, but the parameter "
                    f"has shape {tuple(p.shape)}"
                )
            found.setdefault(k, {})[p] = t.to(p.device)
    return [found.get(k, {}) for k in range(max(found, default=-1) + 1)]


def _ids(state_dict: dict[str, Any]) -> list[Any]:
    return [i for group in state_dict["param_groups"] for i in group["params"]]


def _is_direction(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdigit()
