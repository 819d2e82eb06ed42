"""Diffusion tree sampling: weighted samples from trees of denoising chains that share their beginnings.

**Why the "unbiased" build is.** For a node a let s(a) = prod 1 / |C| over its ancestors, V(a) = E_p[exp(r / T) | a] and
M_d = sum s(a) V(a) over the nodes at depth d. M_0 = Z, and at the leaves M_D = Z_hat = exp(v(root) / T). Let F_d be all
states at depths up to d. Where the children a node is given are a function of F_d, they are, given F_d, independent
draws of the model, so E[M_(d+1) | F_d] = M_d: a martingale. Hence E[Z_hat] = Z for any number of walks, and, with
exp(r / T) f in place of exp(r / T), E[Z_hat f_hat] = E_p[exp(r / T) f]. Increments are uncorrelated,
    Var Z_hat = sum_d E[ sum_(a at d) s(a)^2 Var(V(child) | a) / |C(a)| ].
Every depth d is given a fixed share of the rows, thus n_d ~ budget walks, and a node some `defence` s(a) n_d of them or
more: the sum is of the order of sum_d E_p[Var(V(child) | a)] / (defence n_d) ~ 1 / budget, and so f_hat converges.
It is least where |C(a)| ~ s(a) sd(V(child) | a), which the build predicts by s(a) exp(r(x0_hat) / T).
Boltzmann building breaks the supposition: it returns to children whose leaves were lucky, whose values then regress,
and leaves those with unlucky first leaves as they are, so that values stay low.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.core.event import OnStep
from steer.core.population import log_potential
from steer.core.resampling import systematic
from steer.core.run import Run
from steer.core.start import Start, prior
from steer.errors import SteerError
from steer.key import Key
from steer.particles.proposals import Proposal, bootstrap
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .branching import branching_levels, plantable, planted, segment_rows
from .ragged import Slots, each_problem
from .tree import Tree
from .tree_policy import Descent
from .tree_search import Choose, Growth, Plan


def dts(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    build: str = "unbiased",
    levels: int | Sequence[int] = 9,
    walkers: int = 16,
    widening: tuple[float, float] = (2.0, 0.8),
    defence: float = 0.5,
    proposal: Proposal = bootstrap,
    start: Start = prior,
    tree: Tree | None = None,
    store: torch.device | str | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature): the leaves of a tree, with its exact leaf weights.

    particles: walks per tree, 16 by default; each adds a leaf, but where a "boltzmann" walk ends at an old one.
    budget:    or network rows per tree, never exceeded, and used to within the cheapest walk.
    build:     where walks expand. "unbiased" (below), "uniform" (the least visited child), or the paper's "boltzmann"
               (child c with probability proportional to exp(v_c / temperature)), which is biased.
    levels:    branching levels, or how many (equally spaced); between them a chain is one edge. Many cost rewards and
               memory, no network rows; few cannot follow a reward that is decided late. The paper has four.
    walkers:   walks per sweep, W. They share network calls. "unbiased" does not depend on rewards found, so W may be
               as large as memory allows; the others learn only between sweeps.
    widening:  (C, alpha) of "uniform" and "boltzmann": a node of N visits expands below C N^alpha children.
    defence:   share of "unbiased" growth that ignores predicted rewards, in (0, 1].
    proposal:  `steer.bootstrap`, or `steer.guided(scale)` or `steer.follow(hooks)`, corrected by p / q on every edge.
    start:     where chains begin; it may set weights, what it has spent and its normaliser, not spend network rows.
    tree:      `result.tree` of an earlier run, grown on from where it stands (and changed). Its levels stand; a budget
               is what this run may add. The same key goes on with fresh noise: a walk's noise is named by its number.
    store:     device to keep nodes' states on, "cpu" to offload them; default, the network's.
    keep_states: keep the states and densities of the steps between nodes too, for `steer.grpo.collect`.
    on_step:   called with the Trajectory of the walks under way after each step. Raising `Stop` returns the tree as of
               the last whole sweep; stopped in the first, its predictions.

    Returns the leaves x (B, N, *event), reward (B, N), log_weight (B, N) that sum to one,
        w(leaf) = exp(r / T) prod_ancestors 1 / |C| / Z_hat,        Z_hat = exp(v(root) / T),
    log_evidence = log Z_hat (B,), and `tree`. Trees with fewer leaves than N repeat one at weight zero.

    "unbiased": E[Z_hat] = Z and E[sum of Z_hat w f] = E_p[exp(r / T) f] at any number of walks (proof above), because
    growth at depth d looks at states down to depth d only. Walks are dealt to depths in turn, by rows spent; at depth d
    they go to nodes, systematically, by what these lack of their fair share of the children there,
        (1 - defence) softmax(log s + r(x0_hat) / T) + defence softmax(log s),      s = prod_ancestors 1 / |C|,
    proportional to the spread a node adds to Z_hat were its prediction right. Wrong predictions cost variance, about
    1 / defence times that of growth by s alone at the worst.

    Cost per tree: a walk expanding the root takes K rows (K = process.steps), one expanding a node at level k takes
    K - k - 1, since a node keeps its prediction; one reward per leaf, and one per inner node for "unbiased". A model
    conditioned on several problems also computes (and counts) columns that idle because trees differ: never for
    "unbiased". Memory: two states a node, and with keep_states one for every step.
    Raises BudgetError, CollapsedWeightsError, NonFiniteError, NotDifferentiableError, NotStochasticError, RewardError,
    ShapeError, StateSpaceError; each carries what was paid for in `.partial`.
    Source: Jain et al. 2025 (Diffusion Tree Sampling, 2506.20701), Algorithms 1 and 2. Differs: the default build;
    many walks a sweep, with visits counted on the way down; readout is the exact weights, of which the paper's
    stochastic descent is one draw. log-mean-exp as in the camera-ready (the first version's log-sum-exp is biased).
    """
    if not 0.0 < defence <= 1.0:
        raise SteerError(f"defence is a share of growth in (0, 1], got {defence}")
    run = Run.open("dts", process, reward, batch=batch, temperature=temperature, key=key, seed=seed, on_step=on_step)
    tree = planted(tree, run.problems, branching_levels(run.process, levels))
    growth = Growth(
        run,
        tree,
        plantable(start),
        proposal,
        looks=build == "unbiased",
        live=build == "boltzmann",
        store=store,
        keep_states=keep_states,
    )
    return growth.grow(_builder(build, growth, widening, defence), walkers, particles, budget)


def _builder(build: str, growth: Growth, widening: tuple[float, float], defence: float) -> Choose:
    rows = segment_rows(growth.process, growth.tree.levels)
    cost = tuple(sum(rows[depth:]) for depth in range(len(rows)))
    if build == "unbiased":
        inner = [layer for layer in growth.tree.layers[1:-1] if layer.size]
        if any("look" not in layer or bool(layer["look"][layer.filled].isnan().any()) for layer in inner):
            raise SteerError("a tree built by another rule keeps no predicted rewards; grow it by that rule")
        return Apportionment(cost, growth.temperature, defence)
    if build == "boltzmann":
        return Descent(_soft_value, True, widening, revisit=True, rows=cost)
    if build == "uniform":
        return Descent(_least_visited, False, widening, revisit=False, rows=cost)
    raise SteerError(f'build is "unbiased", "uniform" or "boltzmann", got {build!r}')


def _soft_value(tree: Tree, depth: int, problem: Slots, parent: Slots, child: Slots) -> NDArray[Any]:
    layer = tree.layers[depth]
    node = layer.places(problem, child)
    return layer.flat("value")[node] + layer.flat("correction")[node]


def _least_visited(tree: Tree, depth: int, problem: Slots, parent: Slots, child: Slots) -> NDArray[Any]:
    layer = tree.layers[depth]
    return -layer.flat("visits")[layer.places(problem, child)]


@dataclass(frozen=True)
class Apportionment:
    """The "unbiased" build: depths in turn by rows spent, nodes by what they lack of their share.

    rows: network rows of expanding a node of each depth.
    """

    rows: tuple[int, ...]
    temperature: float
    defence: float

    def __call__(self, tree: Tree, walks: int, left: Slots, key: Key) -> Plan:
        depths, problem = self._depths(tree, walks, int(left.min())), each_problem(tree.problems)
        entry = np.full((tree.problems, len(depths)), depths, dtype=np.int64)
        path = np.zeros((tree.depth + 1, *entry.shape), dtype=np.int64)
        for depth, share in zip(range(1 + max(depths, default=-1)), tree.log_shares(), strict=False):
            first, count = sum(d < depth for d in depths), depths.count(depth)
            if depth and count:
                draw = key.fold("grow").at(tree.sweeps * tree.depth + depth)
                slots = systematic(self._lacking(tree, depth, share, count), draw, count).numpy()
                for d in range(depth, 0, -1):  # and the way there
                    path[d, :, first : first + count] = slots
                    slots = tree.layers[d].facts["parent"][problem, slots]
        return entry, path

    def _depths(self, tree: Tree, walks: int, left: int) -> list[int]:
        """Depths to expand at, rising: each walk goes where the fewest rows were spent, if they are left to spend."""
        spent = [int(made[0]) * rows for made, rows in zip(tree.expansions, self.rows, strict=True)]
        chosen: list[int] = []
        for _ in range(walks):
            open_to = range(tree.depth if tree.leaves.size else 1)
            possible = [depth for depth in open_to if self.rows[depth] <= left]
            if not possible:
                break
            chosen.append(min(possible, key=lambda depth: spent[depth]))
            spent[chosen[-1]] += self.rows[chosen[-1]]
            left -= self.rows[chosen[-1]]
        return sorted(chosen)

    def _lacking(self, tree: Tree, depth: int, share: Tensor, more: int) -> Tensor:
        """Log of the children that nodes of a depth, of log-shares (B, size), lack of their fair part once there are
        `more` at it, (B, size)."""
        layer = tree.layers[depth]
        lost = (share == -torch.inf).all(1, keepdim=True)  # the start forbids all that was found so far: all alike
        share = torch.where(lost & layer.filled, 0.0, share)
        tilted = share + log_potential(layer["look"], self.temperature)
        hopeless = (tilted == -torch.inf).all(1, keepdim=True)
        fair = torch.softmax(torch.where(hopeless, share, tilted), 1)
        fair = (1.0 - self.defence) * fair + self.defence * torch.softmax(share, 1)
        children = layer["children"] * layer.filled
        return (fair * (children.sum(1, keepdim=True) + more) - children).clamp(min=0.0).log()
