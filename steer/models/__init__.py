"""Models with exact answers, for tests and examples: Gaussian mixtures and Markov languages."""

from .chain import chain_law
from .markov import MarkovLanguage, Table, markov_language, masked_chain_law
from .mixture import Exact, ExactStep, GaussianMixture, finite_data, gaussian, gaussian_mixture

__all__ = [
    "Exact",
    "ExactStep",
    "GaussianMixture",
    "MarkovLanguage",
    "Table",
    "chain_law",
    "finite_data",
    "gaussian",
    "gaussian_mixture",
    "markov_language",
    "masked_chain_law",
]
