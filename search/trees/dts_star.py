"""Diffusion tree search: the tree of DTS grown for its best leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steer.core.event import OnStep
from steer.core.run import Run
from steer.core.start import Start, prior
from steer.cost import check_counts
from steer.key import Key
from steer.particles.proposals import bootstrap
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .branching import branching_levels, plantable, planted, segment_rows
from .ragged import Slots
from .tree import Tree
from .tree_policy import Descent
from .tree_search import Growth


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
    start: Start = prior,
    tree: Tree | None = None,
    store: torch.device | str | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """The leaves of a tree grown towards high reward, the weight on the best.

    widening:  (C, alpha): a node of N visits is expanded while it has fewer than C N^alpha children.
    explore:   weight of the bonus sqrt(log N(parent) / N(child)) that keeps rarely visited children in play, in units
               of the standard deviation of the leaf rewards so far.
    keep:      how many of the leaves share the weight.
    walkers:   walks per sweep. Those that meet at a node take its best child, its second best, and so on.
    Other arguments as `search.dts`. temperature is noted in the result and changes nothing: values are maxima (T -> 0).

    Returns every leaf x (B, N, *event), reward (B, N), log_weight equal at the `keep` best leaves and -inf elsewhere,
    `tree`; log_evidence is NaN. Anytime: stopped early, it returns the best so far.
    Cost per tree: as `search.dts`, without rewards of inner nodes. Every walk makes a new leaf.
    Source: Jain et al. 2025 (2506.20701), DTS*. Differs: the paper's widening (2, .8) expands only the root for the
    first 36 walks and mostly the root for thousands, which is best-of-N; this one expands the root about N^.35 times,
    and is left with cheaper walks from states that led somewhere. The bonus is in units of the rewards' spread (the
    paper leaves its scale open). Walks never end at an old leaf.
    """
    check_counts(keep=keep)
    run = Run.open(
        "dts_star", process, reward, batch=batch, temperature=temperature, key=key, seed=seed, on_step=on_step
    )
    tree = planted(tree, run.problems, branching_levels(run.process, levels))
    growth = Growth(
        run,
        tree,
        plantable(start),
        bootstrap,
        keep=keep,
        live=True,
        store=store,
    )
    rows = segment_rows(run.process, tree.levels)
    cost = tuple(sum(rows[depth:]) for depth in range(len(rows)))
    choose = Descent(Optimism(explore), False, widening, revisit=False, rows=cost)
    return growth.grow(choose, walkers, particles, budget)


@dataclass(frozen=True)
class Optimism:
    """UCT: best reward below a child plus a bonus for being visited rarely."""

    explore: float

    def __call__(self, tree: Tree, depth: int, problem: Slots, parent: Slots, child: Slots) -> NDArray[Any]:
        above, layer = tree.layers[depth - 1], tree.layers[depth]
        node = layer.places(problem, child)
        often = np.log(above.flat("visits")[above.places(problem, parent)])
        bonus = np.sqrt(often / layer.flat("visits")[node])
        return layer.flat("value")[node] + self.explore * _spread(tree)[problem] * bonus


def _spread(tree: Tree) -> NDArray[Any]:
    """Standard deviation of the finite leaf rewards of each tree, (B,)."""
    reward = tree.leaves["reward"].numpy()
    finite = tree.leaves.filled.numpy() & np.isfinite(reward)
    count = finite.sum(1).clip(min=1)
    mean = np.where(finite, reward, 0.0).sum(1) / count
    return np.sqrt(np.square(np.where(finite, reward - mean[:, None], 0.0)).sum(1) / count)
