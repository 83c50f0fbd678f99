"""The protection of what layers compute: which weights, their inputs' moments, where the rank goes, and the pins.

Imports :mod:`gradproj.protection`, :mod:`gradproj.capture`, :mod:`gradproj.rows` and :mod:`gradproj.kernels`.
"""

from gradproj.nullspace.null_space import NullSpace

__all__ = ["NullSpace"]
