"""A progress line, where tqdm is installed and somebody looks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 3.0  # seconds before it is shown


@contextlib.contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Callable[[], Any]]:
    """Gives what to call after each ``unit``."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc=what, unit=f" {unit}", delay=PATIENCE, disable=None) as bar:
        yield bar.update
