"""Growing trees within a budget, batch by batch: plan, simulate, count, back up. What `dts` and `dts_star` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steer.core.checkpoints import Checkpoints
from steer.core.run import Run
from steer.cost import affordable, check_counts
from steer.errors import BudgetError, CollapsedWeightsError, SteerError, keep_partial
from steer.key import Key
from steer.processes.gaussian import sampling_uses_network
from steer.results.result import Result

from .backup import Backup
from .branching import rows_per_edge
from .expansion_plan import ExpansionPlan
from .ragged import Slots
from .readout import Readout, read_predictions, read_tree
from .simulation import Simulator
from .snapshot import restore
from .tree import Tree

Policy = Callable[[Tree, int, Slots, Key], ExpansionPlan]
"""(tree, simulations, network rows left to each tree [B], key) -> ExpansionPlan. May plan fewer than asked for."""

_UNLIMITED = 2**62


@dataclass(eq=False, kw_only=True)
class TreeSearch:
    """One run that grows trees.

    policy:       where simulations expand the tree.
    simulator:    how they advance from there to new leaves.
    backup:       how values rise from the leaves to the root.
    readout:      what the leaves weigh in the end.
    backup_each_batch: whether the policy selects by values, which then are kept up to date.
    widest:       simulations per batch, where no number is given, once there are twice as many in the tree; 16 before.
    """

    policy: Policy
    simulator: Simulator
    backup: Backup
    readout: Readout
    backup_each_batch: bool
    widest: int = 16

    @property
    def run(self) -> Run:
        return self.simulator.loop.run

    @property
    def tree(self) -> Tree:
        return self.simulator.tree

    def grow(self, walkers: int | None, particles: int | None, budget: int | None) -> Result:
        """Batches until the particles are made, the budget is spent, or `on_step` asks to stop."""
        tree, loop = self.tree, self.simulator.loop
        check_counts(walkers=walkers)
        self.check_budget(particles, budget)
        self.check_same_states()
        self.simulator.score_again()
        tree.rule = self.backup
        if self.backup_each_batch and tree.leaves.size:  # grown at another temperature, or by another rule
            tree.backup(self.run.temperature)
        with loop.keeping_partial(), self.keeping_leaves():
            kept = Checkpoints(self.run, None, *self.options(), walkers, particles, budget)
            with loop.steps():
                for plan in self.plans(walkers, particles, budget, kept):
                    self.simulate_batch(plan)
            return self.result(interrupted=loop.interrupted)

    def options(self) -> tuple[Any, ...]:
        """What a batch depends on beside the run and the tree that is given."""
        simulator = self.simulator
        how = (simulator.start, simulator.proposal, simulator.predict_rewards, simulator.store, simulator.keep_states)
        search = (self.policy, self.backup, self.readout, self.backup_each_batch, self.widest)
        given = self.tree.parts() if self.tree.leaves.size else self.tree.levels
        return *how, *search, given

    def plans(
        self, walkers: int | None, particles: int | None, budget: int | None, kept: Checkpoints
    ) -> Iterator[ExpansionPlan]:
        """A plan for every batch, made of the tree as the batches before have left it."""
        most = particles or (16 if budget is None else None)
        made, left = 0, np.full(self.tree.problems, _UNLIMITED if budget is None else budget)
        if kept.carried:
            tensors, facts = kept.carried["tree"]
            restore(self.tree, tensors, facts, self.run.process.device)
            made, left = kept.carried["made"], kept.carried["left"].numpy()
        while most is None or made < most:
            width = walkers or min(self.widest, max(16, self.tree.simulations // 2))
            width = width if most is None else min(width, most - made)
            plan, spent = self.trim_to_budget(self.policy(self.tree, width, left, self.run.key), left)
            if not plan.real.any():
                return
            yield plan
            made, left = made + width, left - spent
            kept.reached(None, tree=self.tree.parts(), made=made, left=torch.from_numpy(left))

    def trim_to_budget(self, plan: ExpansionPlan, left: Slots) -> tuple[ExpansionPlan, Slots]:
        """The plan without its last simulations, where the idle columns of a network that cannot be asked about one
        problem, or of steps that call it, would overdraw the budget; and the network rows that each tree spends on it,
        [B]."""
        process, rows = self.run.process, rows_per_edge(self.run.process, self.tree.levels)
        apart = process.problems is None or bool(self.simulator.alone)
        idle_columns_cost = not apart or sampling_uses_network(process)
        while True:
            running = plan.running()
            paid = running.max(1, keepdims=True) if idle_columns_cost else running
            spent = np.broadcast_to(np.dot(rows, paid), left.shape)
            if (spent <= left).all():
                return plan, spent
            plan = plan.without_last()

    def simulate_batch(self, plan: ExpansionPlan) -> None:
        """Runs the simulations of a plan, counts their visits, and backs up what they found."""
        self.simulator(plan)
        self.tree.count_visits(plan)
        if self.backup_each_batch:
            self.tree.backup_paths(plan)

    def result(self, *, interrupted: bool) -> Result:
        """The leaves so far; where there are none, the predictions of the first batch."""
        if self.tree.leaves.size:
            return read_tree(self.run, self.tree, self.readout, interrupted=interrupted)
        last = self.simulator.last
        assert last is not None  # `Loop.steps` lets nothing end a run before its first prediction
        return read_predictions(self.run, self.tree, self.readout, last)

    @contextmanager
    def keeping_leaves(self) -> Iterator[None]:
        """Whatever is raised leaves the tree as of the last whole batch in its `.partial`, once it has leaves."""
        try:
            yield
        except BaseException as error:
            if self.tree.leaves.size:
                try:
                    keep_partial(error, self.result(interrupted=True))
                except CollapsedWeightsError as collapsed:
                    keep_partial(error, collapsed.partial)
            raise

    def check_budget(self, particles: int | None, budget: int | None) -> None:
        """Raises BudgetError where a budget does not pay for what is asked, or not for one simulation."""
        rows = rows_per_edge(self.run.process, self.tree.levels)
        check_counts(particles=particles)
        if not self.tree.leaves.size or budget is None:
            affordable(sum(rows), particles=particles, budget=budget)
        elif budget < rows[-1]:
            raise BudgetError(
                f"a budget of {budget} network rows per problem pays for no simulation: growing this tree from its "
                f"last branching level takes {rows[-1]}; raise the budget to {rows[-1]}"
            )

    def check_same_states(self) -> None:
        """Raises where a given tree keeps the states between its nodes and this run would not, or the reverse."""
        leaves = self.tree.leaves
        if leaves.size and ("edge_x" in leaves) != self.simulator.keep_states:
            raise SteerError(
                "a tree keeps the states of all its steps or of none; grow it with the keep_states it was begun with"
            )
