"""Fine-tune a model without losing what it can do: fused gradient projection on any sharding, never flattened."""

import importlib

from gradproj import reference
from gradproj.directions import Directions
from gradproj.kernels.backends import backends, use_backend
from gradproj.nullspace import NullSpace
from gradproj.optim import ProjectedOptimizer, attach
from gradproj.projected_adamw import ProjectedAdamW
from gradproj.rows.functional import combine_, gram, orthogonal_gradient_projection, pin_, project_
from gradproj.rows.results import Pin, Projection
from gradproj.rows.sharding import Sharding

__all__ = [
    "Directions",
    "NullSpace",
    "Pin",
    "ProjectedAdamW",
    "ProjectedOptimizer",
    "Projection",
    "Sharding",
    "attach",
    "backends",
    "combine_",
    "gram",
    "orthogonal_gradient_projection",
    "pin_",
    "project_",
    "reference",
    "use_backend",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "hf":  # imports transformers
        return importlib.import_module("gradproj.hf")
    raise AttributeError(f"module 'gradproj' has no attribute {name!r}")
