"""Fine-tune a model without losing what it can do: fused gradient projection, on any sharding, without a flat gradient."""

from gradproj import reference, tax
from gradproj.backends import backends, use_backend
from gradproj.diagnostics import log_to
from gradproj.directions import Directions
from gradproj.functional import Projection, combine_, gram, orthogonal_gradient_projection, project_
from gradproj.optim import ProjectedOptimizer, attach
from gradproj.sharding import Sharding

__all__ = [
    "Directions",
    "ProjectedOptimizer",
    "Projection",
    "Sharding",
    "attach",
    "backends",
    "combine_",
    "gram",
    "log_to",
    "orthogonal_gradient_projection",
    "project_",
    "reference",
    "tax",
    "use_backend",
]
__version__ = "0.1.0"
