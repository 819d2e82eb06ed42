"""Models: analytic ones with exact answers, embedded pretrained ones, and diffusers pipelines."""

from .chain import chain_law
from .mixture import Exact, ExactStep, GaussianMixture, finite_data, gaussian, gaussian_mixture

__all__ = ["Exact", "ExactStep", "GaussianMixture", "chain_law", "finite_data", "gaussian", "gaussian_mixture"]
