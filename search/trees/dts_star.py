"""Diffusion tree search: the tree of DTS grown for its best leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steer.core.event import OnStep
from steer.core.loop import Loop
from steer.core.run import Run
from steer.core.start import Start, prior
from steer.cost import check_counts
from steer.key import Key
from steer.particles.proposals import bootstrap
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .backup import Backup, max_backup
from .branching import branching_levels, check_tree_start, expansion_costs, new_or_given_tree
from .ragged import Slots
from .readout import BestLeaves
from .simulation import Simulator
from .tree import Tree
from .tree_policy import TreePolicy
from .tree_search import TreeSearch


def dts_star(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    levels: int | Sequence[int] = 4,
    walkers: int = 4,
    widening: tuple[float, float] = (1.0, 0.35),
    explore: float = 0.5,
    keep: int = 1,
    backup: Backup = max_backup,
    start: Start = prior,
    tree: Tree | None = None,
    store: torch.device | str | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """The leaves of a tree grown towards high reward, the weight on the best.

    Anytime: stopped early, it returns the best so far.

    Args:
        particles: simulations per tree, 16 by default; every one makes a new leaf.
        temperature: is noted in the result; values are best rewards (T -> 0), which it does not change.
        levels: branching levels, or how many (equally spaced).
        walkers: W, simulations per batch. Those that meet at a node take its best child, its second best, and so on. A
            batch is up to K calls of up to W rows: more walkers, fewer calls, and less learned between them.
        widening: (C, alpha): a node of N visits is expanded while it has fewer than C N^alpha children.
        explore: weight of the bonus sqrt(log N(parent) / N(child)) that keeps rarely visited children in play, in units
            of the standard deviation of the leaf rewards so far.
        keep: how many of the leaves share the weight.
        backup: rule of `search/trees/backup.py`, or of yours, by which the value of a node (to which the bonus is
            added) follows from the rewards below it; by default the best of them.
        Others: as `search.dts`.

    Returns:
        Every leaf x [B, N, *event], reward [B, N], log_weight [B, N] that is equal at the `keep` best leaves and -inf
        elsewhere, and `tree`; log_evidence is NaN, and weighted means estimate no distribution (`law` is "none").

    Raises:
        As `search.dts`.

    Cost: per tree as `search.dts`, without rewards of inner nodes.
    Source: Jain et al. 2025 (2506.20701), DTS*.
    Differs: the paper's widening (2, .8) expands only the root for the first 36 simulations and mostly the root for
        thousands, which is best-of-N; this one expands the root about N^.35 times, and is left with cheaper simulations
        from states that led somewhere. The bonus is in units of the rewards' spread (the paper leaves its scale open).
        Simulations never end at an old leaf.
    """
    check_counts(keep=keep)
    run = Run.open(
        "dts_star", process, reward, batch=batch, temperature=temperature, key=key, seed=seed, on_step=on_step
    )
    tree = new_or_given_tree(tree, run.problems, branching_levels(run.process, levels))
    simulator = Simulator(loop=Loop(run), tree=tree, start=check_tree_start(start), proposal=bootstrap, store=store)
    rows = expansion_costs(run.process, tree.levels)
    search = TreeSearch(
        policy=TreePolicy(score=UCTScore(explore), draw=False, widening=widening, revisit=False, rows=rows),
        simulator=simulator,
        backup=backup,
        readout=BestLeaves(keep),
        backup_each_batch=True,
    )
    return search.grow(walkers, particles, budget)


@dataclass(frozen=True)
class UCTScore:
    """UCT: the value of a child (the best reward below it) plus a bonus for being visited rarely.

    explore: weight of the bonus, in units of the standard deviation of the leaf rewards so far.
    """

    explore: float

    def __call__(self, tree: Tree, depth: int, problem: Slots, parent: Slots, child: Slots) -> NDArray[Any]:
        above, layer = tree.layers[depth - 1], tree.layers[depth]
        node = layer.places(problem, child)
        often = np.log(above.flat("visits")[above.places(problem, parent)])
        bonus = np.sqrt(often / layer.flat("visits")[node])
        return tree.child_values(layer, node) + self.explore * _reward_std(tree)[problem] * bonus


def _reward_std(tree: Tree) -> NDArray[Any]:
    """Standard deviation of the finite leaf rewards of each tree, [B]."""
    reward = tree.leaves["reward"].numpy()
    finite = tree.leaves.filled.numpy() & np.isfinite(reward)
    count = finite.sum(1).clip(min=1)
    mean = np.where(finite, reward, 0.0).sum(1) / count
    return np.sqrt(np.square(np.where(finite, reward - mean[:, None], 0.0)).sum(1) / count)
