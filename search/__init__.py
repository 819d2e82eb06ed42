"""Searches for samples of high reward, on steer's processes.

population/: lock-step chains of which the best go on. chains/: chains that move at their own pace. noise/: search over
the noise that a sampler is given. trees/: trees of chains that share their beginnings.
"""

from . import selection, values
from .chains.depth_first import depth_first
from .chains.rbf import rbf
from .noise.epsilon_greedy import epsilon_greedy
from .noise.noise_search import noise_search
from .noise.paths import paths
from .noise.random_search import random_search
from .noise.zero_order import zero_order
from .population.beam import beam
from .population.best_of_n import best_of_n
from .population.svdd import svdd
from .trees.dts import dts
from .trees.dts_star import dts_star
from .trees.tree import Tree

__all__ = [
    "Tree",
    "beam",
    "best_of_n",
    "depth_first",
    "dts",
    "dts_star",
    "epsilon_greedy",
    "noise_search",
    "paths",
    "random_search",
    "rbf",
    "selection",
    "svdd",
    "values",
    "zero_order",
]
