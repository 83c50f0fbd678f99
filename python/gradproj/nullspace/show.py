"""A picture of a null space: which matrix got which rank, and what curvature is left in it."""

from typing import Any

from gradproj.nullspace.null_space import NullSpace


def show(protection: NullSpace) -> Any:
    """A bar for each matrix, in the order of the model: above, its rank as a part of its inputs; below, the curvature
    that is left, as a part of the largest, by which ``param_groups`` slows it.

    Returns:
        a matplotlib Figure: ``show(protection).savefig("null_space.png")``.
    Raises:
        RuntimeError: nothing has been captured. ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("show() needs matplotlib: pip install matplotlib") from error
    if not protection.bases:
        raise RuntimeError("show(): nothing has been captured yet: run capture() first")
    names = [matrix.name for matrix in protection.matrices]
    bases = [protection.bases[name] for name in names]
    kinds = [name.split("[")[0].split(".")[-1] for name in names]
    left = [basis.left for basis in bases]
    rows = {"kept: rank / inputs": [b.rank / b.curvature.inputs for b in bases], "curvature left": left}
    if max(left) > 0:
        rows["curvature left"] = [x / max(left) for x in left]
    figure = Figure(figsize=(max(6.0, min(16.0, 0.12 * len(names))), 5.0), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(2, sharex=True), rows.items(), strict=True):
        for number, kind in enumerate(dict.fromkeys(kinds)):
            mine = [m for m, of in enumerate(kinds) if of == kind]
            axes.bar(mine, [values[m] for m in mine], width=1.0, color=f"C{number % 10}", label=kind)
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("matrices, in the order of the model")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False, fontsize="small"
    )
    return figure
