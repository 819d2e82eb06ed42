"""How the leaves of a search tree came about, in the terms that whoever trains on them reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PathStep(NamedTuple):
    """One step on the lines of a tree's leaves.

    k:             level that it leaves.
    x, x_next:     states before and after it, [B, N, *event].
    log_prob:      log-density of x_next under the model's own transition, [B, N]; NaN for a step without noise.
    log_behaviour: under the proposal that drew it, [B, N].
    node:          slot of the node that its edge leads to, [B, N].
    """

    k: int
    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    log_behaviour: Tensor
    node: Tensor


class LeafPaths(NamedTuple):
    """How the leaves of a tree came about.

    ancestors: slots of the nodes on the line of each leaf, [B, N] for every depth, the root first, the leaf last.
    steps:     the steps on it, oldest first; none where the tree was grown without keep_states.
    """

    ancestors: tuple[Tensor, ...]
    steps: tuple[PathStep, ...]
