"""A reward whose scores tell their sample, and a client of a server with its token."""

from __future__ import annotations

import torch

from steer.rewards.remote.client import Remote
from steer.types import RewardSpec


class Tagged:
    """The first pixel in 255ths, plus 1000 times the length of the prompt."""

    spec = RewardSpec(unit="nat", bounds=(0.0, float("inf")), gradient="exact", prompts=True, version="v1")
    __name__ = "Tagged"

    def __call__(self, samples, *, prompts=None):
        scores = samples[:, 0, 0, 0] * 255
        return scores if prompts is None else scores + 1000 * torch.tensor([float(len(text)) for text in prompts])


def connect(server, **options) -> Remote:
    return Remote(server.url, **{"token": server.token, **options})


def numbered(rows: int, first: int = 0) -> torch.Tensor:
    images = torch.zeros(rows, 3, 4, 5)
    images[:, 0, 0, 0] = ((torch.arange(rows) + first) % 256) / 255
    return images
