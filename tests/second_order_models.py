"""Small models under the second-order rule, for the tests of it."""

import torch
from exact import PATHS, Linear, times

import steer

REWARD = Linear([0.9, -0.6])


def gaussian(path="vp", rule=None, steps=8, **options):
    grid = steer.uniform_times(PATHS[path], steps, start=0.8) if path == "flow" else times(path, steps)
    return steer.models.gaussian(
        [0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=PATHS[path], times=grid,
        transition=rule or steer.second_order(), dtype=torch.float64, **options,
    )  # fmt: skip


def mixture(rule=None, steps=6):
    return steer.models.gaussian_mixture(
        [[0.0, 0.0], [3.0, 1.0]], [0.1, 0.2], steps=steps, transition=rule or steer.second_order()
    )


def score(x):
    return -(x - 1.0).square().sum(1)
