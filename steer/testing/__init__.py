"""Checks for parts of your own: samplers, transition rules, resamplers, rewards.

Each raises `CheckFailed`, which names what was expected and what came, or returns the largest |z| of its statistics.
The targets are known in closed form, so the statistical checks need no reference implementation. docs/extending.md
shows them at work.
"""

from .resamplers import check_resampler
from .rewards import check_reward
from .rules import check_rule
from .samplers import check_sampler
from .statistics import LIMIT, CheckFailed, worst, z, z_scores

__all__ = [
    "LIMIT",
    "CheckFailed",
    "check_resampler",
    "check_reward",
    "check_rule",
    "check_sampler",
    "worst",
    "z",
    "z_scores",
]
