"""The protection of what matrices compute: which of them, their inputs' moments, where the rank goes, and the pins.

Imports :mod:`gradproj.protection`, :mod:`gradproj.capture`, :mod:`gradproj.rows` and :mod:`gradproj.kernels`.
"""

from gradproj.nullspace.null_space import NullSpace
from gradproj.nullspace.show import show

__all__ = ["NullSpace", "show"]
