"""The protection of K gradients: what a step leaves alone are directions in the space of all parameters.

Imports :mod:`gradproj.protection`, :mod:`gradproj.capture`, :mod:`gradproj.rows` and :mod:`gradproj.kernels`.
"""

from gradproj.directions.directions import Directions

__all__ = ["Directions"]
