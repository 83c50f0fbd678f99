"""Protected directions inside an optimizer's ``state_dict()``.

Direction k (oldest first) of parameter i is ``state_dict["state"][i]["protected_k"]``, beside ``exp_avg`` and the like, so that
whatever maps, shards or reshards optimizer state does the same with it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_PREFIX = "protected_"


def insert(state_dict: dict[str, Any], rows: Sequence[Sequence[Tensor | None]]) -> dict[str, Any]:
    """``state_dict`` with ``rows``: K lists, oldest first, with one tensor or None per parameter. Shares the tensors."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    state = dict(state_dict["state"])
    for i, column in zip(ids, zip(*rows, strict=True), strict=True):
        entries = {f"{_PREFIX}{k}": t for k, t in enumerate(column) if t is not None}
        if entries:
            state[i] = {**state.get(i, {}), **entries}
    return {**state_dict, "state": state}


def extract(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, dict[int, Tensor]]]:
    """``state_dict`` as the wrapped optimizer knows it, and per parameter id the tensors by number of their direction."""
    state, found = {}, {}
    for i, entries in state_dict["state"].items():
        mine = [name for name in entries if str(name).startswith(_PREFIX)] if isinstance(entries, dict) else []
        found[i] = {int(name.removeprefix(_PREFIX)): entries[name] for name in mine}
        rest = {name: value for name, value in entries.items() if name not in mine} if mine else entries
        if rest or not mine:  # an optimizer that finds an empty state may take it for one that it has set up
            state[i] = rest
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    return {**state_dict, "state": state}, {i: found[i] for i in ids if found.get(i)}
