"""Models: analytic ones with exact answers, embedded pretrained ones, and diffusers pipelines."""

from .mixture import Exact, ExactStep, GaussianMixture, gaussian, gaussian_mixture

__all__ = ["Exact", "ExactStep", "GaussianMixture", "gaussian", "gaussian_mixture"]
