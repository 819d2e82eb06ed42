"""Any diffusers pipeline as a reverse process."""

from .opening import from_pipeline
from .verifying import verify

__all__ = ["from_pipeline", "verify"]
