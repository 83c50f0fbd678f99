"""Gradient projection at the speed of memory, on any sharding, without ever building a flat gradient."""

from gradproj import float8, reference, tax
from gradproj.backends import backends, use_backend
from gradproj.diagnostics import log_to
from gradproj.functional import Projection, combine_, gram, orthogonal_gradient_projection, project_
from gradproj.optim import ProjectedOptimizer, attach
from gradproj.projector import Projector

__all__ = [
    "ProjectedOptimizer",
    "Projection",
    "Projector",
    "attach",
    "backends",
    "combine_",
    "float8",
    "gram",
    "log_to",
    "orthogonal_gradient_projection",
    "project_",
    "reference",
    "tax",
    "use_backend",
]
__version__ = "0.1.0"
