"""Any diffusers pipeline as a reverse process."""

from .latents import from_latents
from .opening import from_pipeline
from .solver import own_solver
from .verifying import verify

__all__ = ["from_latents", "from_pipeline", "own_solver", "verify"]
