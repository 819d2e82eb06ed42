"""What a tree policy hands to a batch of simulations: where each of them leaves the nodes that are there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ragged import Slots, each_problem


class ExpansionPlan(NamedTuple):
    """Where the simulations of a batch go, W in each of B trees.

    depth: [B, W], depth of the node that each expands, rising along W. D = `tree.depth` for one that ends at an old
           leaf and adds nothing, D + 1 for none.
    path:  [D + 1, B, W], slots of the nodes passed at each depth, down to the one that is expanded. The simulations
           write the slots of their new nodes below it.
    """

    depth: Slots
    path: Slots

    @property
    def edges(self) -> int:
        """D, edges from the root to a leaf."""
        return len(self.path) - 1

    @property
    def real(self) -> NDArray[np.bool_]:
        """Which columns hold a simulation, [B, W]."""
        return self.depth <= self.edges

    @property
    def deepest(self) -> int:
        """The deepest old node that a simulation came to: below, all nodes on paths are new."""
        return int(self.depth.max(where=self.real, initial=0))

    def running(self) -> Slots:
        """Simulations under way on the edge below each depth, [D, B]. They are the first columns."""
        return (self.depth <= np.arange(self.edges)[:, None, None]).sum(2)

    def without_last(self) -> ExpansionPlan:
        """Without the last simulation of every tree."""
        return ExpansionPlan(self.depth[:, :-1], self.path[:, :, :-1])

    def in_order(self) -> ExpansionPlan:
        """With simulations in order of the depth they expand at, so that those under way are the first columns."""
        order, problem = self.depth.argsort(axis=1, kind="stable"), each_problem(len(self.depth))
        return ExpansionPlan(self.depth[problem, order], self.path[:, problem, order])
