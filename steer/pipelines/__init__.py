"""Any diffusers pipeline as a reverse process."""

from .from_pipeline import from_pipeline
from .latents import from_latents
from .native_solver import own_solver
from .verification import verify

__all__ = ["from_latents", "from_pipeline", "own_solver", "verify"]
