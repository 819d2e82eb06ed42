"""Diffusion tree sampling: weighted samples from trees of denoising chains that share their beginnings.

**Why the "unbiased" build is.** For a node a let s(a) = prod 1 / |C| over its ancestors (its path weight),
V(a) = E_p[exp(r / T) | a] and M_d = sum s(a) V(a) over the nodes at depth d. M_0 = Z, and at the leaves
M_D = Z_hat = exp(v(root) / T). Let F_d be all states at depths up to d. Where the children a node is given are a
function of F_d, they are, given F_d, independent draws of the model, so E[M_(d+1) | F_d] = M_d: a martingale. Hence
E[Z_hat] = Z for any number of simulations, and, with exp(r / T) f in place of exp(r / T), E[Z_hat f_hat] =
E_p[exp(r / T) f]. Increments are uncorrelated,
    Var Z_hat = sum_d E[ sum_(a at d) s(a)^2 Var(V(child) | a) / |C(a)| ].
Every depth d is given a fixed share of the rows, thus n_d ~ budget simulations, and a node some `defence` s(a) n_d of
them or more: the sum is of the order of sum_d E_p[Var(V(child) | a)] / (defence n_d) ~ 1 / budget, and so f_hat
converges. It is least where |C(a)| ~ s(a) sd(V(child) | a), which the build predicts by s(a) exp(r(x0_hat) / T).
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
from steer.core.loop import Loop
from steer.core.population import log_potential
from steer.core.resampling import systematic
from steer.core.run import Run
from steer.core.start import Start, prior
from steer.errors import SteerError
from steer.key import Key
from steer.particles.proposals import Proposal, bootstrap
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .backup import soft_backup
from .branching import branching_levels, check_tree_start, expansion_costs, new_or_given_tree
from .expansion_plan import ExpansionPlan
from .ragged import Slots, each_problem
from .readout import LeafWeights
from .simulation import Simulator
from .tree import Tree
from .tree_policy import TreePolicy
from .tree_search import Policy, TreeSearch


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
    walkers: int | None = None,
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

    A simulation expands one node of the tree: it goes on from its state to a new leaf, and the states at branching
    levels on the way become nodes. Leaf weights are
        w(leaf) = exp(r / T) prod_ancestors 1 / |C| / Z_hat,        Z_hat = exp(v(root) / T).
    With build="unbiased", E[Z_hat] = Z and E[sum of Z_hat w f] = E_p[exp(r / T) f] at any number of simulations (proof
    at the top of this file), because growth at depth d looks at states down to depth d only. Simulations are dealt to
    depths in turn, by rows spent; at depth d they go to nodes, systematically, by the children that these lack of
        (1 - defence) softmax(log s + r(x0_hat) / T) + defence softmax(log s),      s = prod_ancestors 1 / |C|,
    a defensive mixture: its first part is proportional to the spread that a node adds to Z_hat were its prediction
    right. Wrong predictions cost variance, at the worst about 1 / defence times that of growth by s alone.

    Args:
        process: the model, with a stochastic transition rule.
        reward: scores of clean states [M, *event] (or of what the process decodes), [M]; higher is better.
        batch: B, independent trees; those of a process conditioned on prompts are one per prompt.
        particles: simulations per tree, 16 by default; each adds a leaf, except that a "boltzmann" simulation may end
            at an old one.
        budget: network rows per tree (NFE times batch rows), never exceeded, used to within the cheapest simulation.
        temperature: T, in units of the reward.
        key: of all random draws.
        seed: the same as `key`, by its usual name; give one of them.
        build: where simulations expand. "unbiased" (above), "uniform" (the least visited child), or the paper's
            "boltzmann" (child c with probability proportional to exp(v_c / temperature)), which is biased.
        levels: branching levels, or how many (equally spaced); between them a chain is one edge. Many cost rewards and
            memory, no network rows; few cannot follow a reward that is decided late. The paper has four.
        walkers: W, simulations per batch. They share network calls: a batch is up to K calls of up to W rows, where SMC
            makes K calls in all. The law of "unbiased" does not depend on W: None is 16, and half of the simulations
            there are once that is more, up to 256. The other builds learn only between batches: None is 16.
        widening: (C, alpha) of "uniform" and "boltzmann": a node of N visits expands below C N^alpha children.
        defence: weight of the defensive part of the mixture, which ignores predicted rewards, in (0, 1].
        proposal: `steer.bootstrap`, or `steer.guided(scale)`, `steer.follow(hooks)` or a function of yours, corrected
            by p / q on every edge.
        start: where chains begin; it may set weights, a log-potential and its normalizing constant, and may not spend
            network rows.
        tree: `result.tree` of an earlier run, which is grown further (and changed). Its levels stand; a budget is what
            this run may add. The same key resumes with fresh noise: a simulation's noise is named by its number. With
            another reward, leaves and cached predictions are scored again, a reward each; a tree whose nodes hold
            gradients of another reward (guided proposals) is refused.
        store: device to keep nodes' states on, "cpu" to offload them; by default the network's.
        keep_states: keep the states and densities of the steps between nodes too, for `steer.grpo.collect`.
        on_step: called with an `Event` of the simulations under way after each step. Raising `Stop` returns the tree as
            of the last whole batch; stopped in the first batch, its predictions.

    Returns:
        The leaves x [B, N, *event], reward [B, N], log_weight [B, N] that sum to one, log_evidence = log Z_hat [B], and
        `tree`. Trees with fewer leaves than N repeat one at weight zero.

    Raises:
        BudgetError, CollapsedWeightsError, NonFiniteError, NotDifferentiableError, NotStochasticError, RewardError,
        ShapeError, StateSpaceError; each carries in `.partial` what the run has so far: a Result, or before the first
        leaves a Trajectory.

    Cost: per tree a simulation that expands the root takes K rows (K = process.steps), one that expands a node at level
        k takes K - k - 1, since the prediction of a node is cached; one reward per leaf, and one per inner node for
        "unbiased". Trees of several prompts share their calls; where they differ ("uniform", "boltzmann"), the rows
        that one has more are a call of its own, so that a tree costs what it costs alone. (A denoiser of yours that
        is closed over several prompts and has no method `only` is paid for columns that idle.) Memory: two states a
        node, and with keep_states one for every step.
    Source: Jain et al. 2025 (Diffusion Tree Sampling, 2506.20701), Algorithms 1 and 2.
    Differs: the default build; many simulations a batch, with visits counted on the way down; the readout is the exact
        weights, of which the paper's stochastic descent is one draw. log-mean-exp as in the camera-ready (the first
        version's log-sum-exp is biased).
    """
    if not 0.0 < defence <= 1.0:
        raise SteerError(f"defence is the weight of a part of a mixture, in (0, 1], got {defence}")
    run = Run.open("dts", process, reward, batch=batch, temperature=temperature, key=key, seed=seed, on_step=on_step)
    tree = new_or_given_tree(tree, run.problems, branching_levels(run.process, levels))
    simulator = Simulator(
        loop=Loop(run),
        tree=tree,
        start=check_tree_start(start),
        proposal=proposal,
        predict_rewards=build == "unbiased",
        store=store,
        keep_states=keep_states,
    )
    search = TreeSearch(
        policy=_policy(build, run, tree, widening, defence),
        simulator=simulator,
        backup=soft_backup,
        readout=LeafWeights(),
        backup_each_batch=build == "boltzmann",
        widest=256 if build == "unbiased" else 16,
    )
    return search.grow(walkers, particles, budget)


def _policy(build: str, run: Run, tree: Tree, widening: tuple[float, float], defence: float) -> Policy:
    """The policy of a build, by its name."""
    rows = expansion_costs(run.process, tree.levels)
    if build == "unbiased":
        inner = [layer for layer in tree.layers[1:-1] if layer.size]
        column = "predicted_reward"
        if any(column not in layer or bool(layer[column][layer.filled].isnan().any()) for layer in inner):
            raise SteerError("a tree built by another rule keeps no predicted rewards; grow it by that rule")
        return ProportionalAllocation(rows=rows, temperature=run.temperature, defence=defence)
    if build == "boltzmann":
        return TreePolicy(score=_soft_value, draw=True, widening=widening, revisit=True, rows=rows)
    if build == "uniform":
        return TreePolicy(score=_least_visited, draw=False, widening=widening, revisit=False, rows=rows)
    raise SteerError(f'build is "unbiased", "uniform" or "boltzmann", got {build!r}')


def _soft_value(tree: Tree, depth: int, problem: Slots, parent: Slots, child: Slots) -> NDArray[Any]:
    """The value of each child, as it counts at its parent."""
    layer = tree.layers[depth]
    return tree.child_values(layer, layer.places(problem, child))


def _least_visited(tree: Tree, depth: int, problem: Slots, parent: Slots, child: Slots) -> NDArray[Any]:
    """The fewer visits, the higher."""
    layer = tree.layers[depth]
    return -layer.flat("visits")[layer.places(problem, child)]


@dataclass(frozen=True, kw_only=True)
class ProportionalAllocation:
    """The "unbiased" build: depths in turn by rows spent, nodes by what they lack of their share of the children.

    rows:        network rows of expanding a node of each depth.
    temperature: that divides predicted rewards.
    defence:     weight of the defensive part of the mixture, which ignores them.
    """

    rows: tuple[int, ...]
    temperature: float
    defence: float

    def __call__(self, tree: Tree, simulations: int, left: Slots, key: Key) -> ExpansionPlan:
        depths, problem = self._depths(tree, simulations, int(left.min())), each_problem(tree.problems)
        expanded = np.full((tree.problems, len(depths)), depths, dtype=np.int64)
        path = np.zeros((tree.depth + 1, *expanded.shape), dtype=np.int64)
        deepest = max(depths, default=-1)
        for depth, log_path_weight in zip(range(deepest + 1), tree.log_path_weights(), strict=False):
            first, count = sum(d < depth for d in depths), depths.count(depth)
            if depth and count:
                draw = key.fold("grow").at(tree.batches * tree.depth + depth)
                slots = systematic(self._log_missing(tree, depth, log_path_weight, count), draw, count).numpy()
                for d in range(depth, 0, -1):  # and the nodes above them
                    path[d, :, first : first + count] = slots
                    slots = tree.layers[d].facts["parent"][problem, slots]
        return ExpansionPlan(expanded, path)

    def _depths(self, tree: Tree, simulations: int, left: int) -> list[int]:
        """Depths to expand at, rising: each simulation goes where the fewest rows were spent, if they are left."""
        spent = [int(made[0]) * rows for made, rows in zip(tree.expansions, self.rows, strict=True)]
        chosen: list[int] = []
        for _ in range(simulations):
            open_to = range(tree.depth if tree.leaves.size else 1)
            possible = [depth for depth in open_to if self.rows[depth] <= left]
            if not possible:
                break
            chosen.append(min(possible, key=lambda depth: spent[depth]))
            spent[chosen[-1]] += self.rows[chosen[-1]]
            left -= self.rows[chosen[-1]]
        return sorted(chosen)

    def _log_missing(self, tree: Tree, depth: int, log_path_weight: Tensor, more: int) -> Tensor:
        """Log of the children that nodes of a depth lack of their share once there are `more` at it, [B, size]."""
        layer = tree.layers[depth]
        unreachable = (log_path_weight == -torch.inf).all(1, keepdim=True)  # the start forbids all so far: all alike
        plain = torch.where(unreachable & layer.filled, 0.0, log_path_weight)
        tilted = plain + log_potential(layer["predicted_reward"], self.temperature)
        all_forbidden = (tilted == -torch.inf).all(1, keepdim=True)
        share = torch.softmax(torch.where(all_forbidden, plain, tilted), 1)
        share = (1.0 - self.defence) * share + self.defence * torch.softmax(plain, 1)
        children = layer["children"] * layer.filled
        return (share * (children.sum(1, keepdim=True) + more) - children).clamp(min=0.0).log()
