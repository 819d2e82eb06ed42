"""Backup rules: how values rise from the leaves of a tree to its root.

A rule is one class of three methods. Bookkeeping of trees is numpy on the host, so a rule sees numpy arrays, float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from steer.core.population import log_potential

from .ragged import Slots

Values = NDArray[Any]
"""Float64 values of nodes, flat."""


class Siblings(NamedTuple):
    """Children [M] of some nodes [P], for reductions over those of each.

    parent: [M], index in [0, P) of each child's parent.
    size:   [P], how many of each parent, at least 1.
    """

    parent: Slots
    size: NDArray[Any]

    def max(self, value: Values) -> Values:
        """Maximum over the children of each parent: [M] -> [P]."""
        top = np.full(len(self.size), -np.inf)
        np.maximum.at(top, self.parent, value)
        return top

    def sum(self, value: Values) -> Values:
        """Sum over the children of each parent, in their order: [M] -> [P]."""
        return np.bincount(self.parent, value, len(self.size))

    def of_parent(self, value: Values) -> Values:
        """Values of parents at each of their children: [P] -> [M]."""
        return value[self.parent]


class Backup(Protocol):
    """What the value of a node is, from the rewards of the leaves below it."""

    def leaf_value(self, reward: Values, temperature: float) -> Values:
        """Values of leaves, [M], from their rewards."""
        ...

    def child_value(self, value: Values, log_importance_ratio: Values) -> Values:
        """What children count for at their parents, [M]. log_importance_ratio: log p / q of the edges to them."""
        ...

    def pool(self, value: Values, siblings: Siblings) -> Values:
        """Values of parents, [P], from what their children count for, [M]. Of a single child it is that child's."""
        ...


@dataclass(frozen=True)
class SoftBackup:
    """log E[exp(r / T)] below a node: log-mean-exp over its children, corrected by importance ratios.

    Source: Jain et al. 2025 (2506.20701), the camera-ready version; the first version's log-sum-exp is biased.
    """

    def leaf_value(self, reward: Values, temperature: float) -> Values:
        return log_potential(torch.from_numpy(reward), temperature).numpy()

    def child_value(self, value: Values, log_importance_ratio: Values) -> Values:
        return value + log_importance_ratio

    def pool(self, value: Values, siblings: Siblings) -> Values:
        top = siblings.max(value)
        shift = np.where(top == -np.inf, 0.0, top)
        total = siblings.sum(np.exp(value - siblings.of_parent(shift)))
        with np.errstate(divide="ignore"):  # log 0 = -inf, where all below is forbidden
            return np.log(total) + shift - np.log(siblings.size)


@dataclass(frozen=True)
class MaxBackup:
    """The best reward below a node, in units of the reward: temperature and importance ratios are left out."""

    def leaf_value(self, reward: Values, temperature: float) -> Values:
        return reward

    def child_value(self, value: Values, log_importance_ratio: Values) -> Values:
        return value

    def pool(self, value: Values, siblings: Siblings) -> Values:
        return siblings.max(value)


soft_backup, max_backup = SoftBackup(), MaxBackup()
