"""Growing trees: sweeps of walks that roll out together, within a budget; what `dts` and `dts_star` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.core import population
from steer.core.loop import completed
from steer.core.objective import Objective, check_finite
from steer.core.population import log_potential
from steer.core.run import Run
from steer.core.start import Start, prior
from steer.core.trajectory import LevelRecord, StepRecord, Trajectory, required
from steer.cost import affordable, check_counts
from steer.errors import BudgetError, CollapsedWeightsError, SteerError
from steer.key import Key
from steer.particles.proposals import Proposal, predict_and_score, propose
from steer.processes.gaussian import sampling_uses_network
from steer.results.result import Result
from steer.types import ReverseProcess, Stop

from .branching import segment_rows
from .ragged import Slots, each_problem
from .tree import Tree

Plan = tuple[Slots, Slots]
"""Where the walks of a sweep go: entry (B, W), the depth of the node each expands (`depth` for a walk that ends at an
old leaf, `depth + 1` for no walk), rising along W; and the slots walked through at each depth, (depth + 1, B, W)."""

Choose = Callable[[Tree, int, Slots, Key], Plan]
"""(tree, walks, rows left to each tree (B,), key) -> Plan."""


@dataclass(eq=False)
class Growth:
    """One run that grows trees: what walks are made of, and the ledger.

    looks:  score the prediction at every node, for builds that ask for it.
    keep:   for searches, where values are best rewards: how many of the leaves share the weight. None: soft values.
    live:   keep values current after every sweep, for builds that select by them.
    store:  device of the nodes' states, None for the network's.
    keep_states: keep the states and densities of steps between nodes too.
    """

    run: Run
    tree: Tree
    start: Start
    proposal: Proposal
    looks: bool = False
    keep: int | None = None
    live: bool = False
    store: torch.device | str | None = None
    keep_states: bool = False
    paid: Trajectory | None = field(default=None, init=False)
    so_far: Tensor | float = field(default=0.0, init=False)
    network_key: Key = field(default=Key(0), init=False)

    def __post_init__(self) -> None:
        try:
            torch.empty(0, device=self.store)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise SteerError(f"store is a device to keep states on, as 'cpu', got {self.store!r}: {error}") from error

    @property
    def process(self) -> ReverseProcess:
        return self.run.process

    @property
    def objective(self) -> Objective:
        return self.run.objective

    @property
    def key(self) -> Key:
        return self.run.key

    @property
    def temperature(self) -> float:
        return self.run.temperature

    @property
    def greedy(self) -> bool:
        """Whether values are best rewards."""
        return self.keep is not None

    def grow(self, choose: Choose, walkers: int, particles: int | None, budget: int | None) -> Result:
        """Sweeps until the particles are made, the budget is spent, or `on_step` asks to stop."""
        tree, rows = self.tree, segment_rows(self.process, self.tree.levels)
        check_counts(walkers=walkers)
        self._check_affordable(sum(rows), rows[-1], particles, budget)
        if tree.leaves.size and ("edge" in tree.leaves) != self.keep_states:
            raise SteerError(
                "a tree keeps the states of all its steps or of none; grow it with the keep_states it was begun with"
            )
        made, most = 0, particles or (16 if budget is None else None)
        if self.live and tree.leaves.size:  # of another temperature, or another kind of value
            self._back_up()
        left = np.full(tree.problems, 2**62 if budget is None else budget)
        interrupted = False
        try:
            while most is None or made < most:
                width = walkers if most is None else min(walkers, most - made)
                entry, path, running, spent = self._fitted(choose(tree, width, left, self.key), rows, left)
                if not (entry <= tree.depth).any():
                    break
                self._sweep(entry, path, running)
                made, left = made + width, left - spent
        except (Stop, KeyboardInterrupt):
            if self.paid is None:
                raise
            interrupted = True
        except SteerError as error:
            if tree.leaves.size:
                try:
                    error.keep(self._result(interrupted=True))
                except CollapsedWeightsError as collapsed:
                    error.keep(collapsed.partial)
            error.keep(self.paid)
            raise
        return self._result(interrupted=interrupted)

    def _sweep(self, entry: Slots, path: Slots, running: Slots) -> None:
        """Every walk goes on from the node it chose; each network call has one level, and walks join on the way.

        running: walks under way on the edges below each depth, (D, B).
        """
        tree, key = self.tree, self.key.shifted(slot=self.tree.iterations).wide(entry.shape[1])
        self.network_key = key
        widest, fewest = running.max(1).tolist(), running.min(1).tolist()
        joined: list[bool] = [False, *np.any(running[1:] > running[:-1], axis=1)]
        before = tree.counts()
        try:
            state = self._begun(key, widest[0]) if widest[0] else None
            with torch.no_grad():
                for depth, width in enumerate(widest):
                    above, live = path[depth, :, :width], None if fewest[depth] == width else entry[:, :width] <= depth
                    if joined[depth]:
                        state = self._entered(depth, above)
                    if state is None:
                        continue
                    rows = self._rows(live, state.x.device)
                    state = self._along_edge(state, rows, tree.levels[depth], key.fold("step"))
                    slots, state = self._attach(depth + 1, live, rows, above, state)
                    np.copyto(path[depth + 1, :, :width], slots, where=True if live is None else live)
        except BaseException:
            if self.paid is not None and not tree.leaves.size:  # a first sweep: nodes stand in the order of its walks
                made = zip(tree.levels, tree.layers[1:], strict=True)
                self.so_far = sum(layer["correction"] for k, layer in made if layer.size and k <= self.paid.k)
            tree.rollback(before)  # the tree holds whole walks only, so that it can be grown again
            raise
        tree.commit(entry, path)
        if self.live:
            tree.backup_paths(entry, path, greedy=self.greedy)

    def _begun(self, key: Key, width: int) -> Trajectory:
        """Walks that begin at the root, `width` in every tree."""
        begun = self.start(self.process, self.objective, key, self.tree.problems, width)
        if begun.k > self.tree.levels[0]:
            raise SteerError(
                f"the start puts particles at level {begun.k}, past the first branching level "
                f"{self.tree.levels[0]}; pass levels that begin there or later"
            )
        begun = replace(begun, keep_states=self.keep_states)
        if self.start is prior:
            return begun
        # What another start has weighted, spent and normalised by is the weight of the edge from the root.
        self.tree.normalised &= ~begun.log_evidence.isnan().cpu().numpy()
        self.tree.biased_start |= begun.biased_start
        return begun.reweight(
            begun.log_evidence[:, None].nan_to_num() - begun.path.log_potential_or_zero(begun.log_weight)
        )

    def _entered(self, depth: int, slots: Slots) -> Trajectory:
        """Walks at nodes (B, W) of a depth, with what is remembered there."""
        kept = self.tree.states(depth, torch.from_numpy(slots), getattr(self.process, "device", None))
        level, x = self.tree.levels[depth - 1], kept.pop("x")
        return Trajectory.begin(self.process, x, k=level, keep_states=self.keep_states).with_step_cache(**kept)

    def _along_edge(self, state: Trajectory, rows: Tensor | None, until: int, noise: Key) -> Trajectory:
        while state.k < until:
            if state.cache.x0 is None:
                state, _ = self._predict(state, rows, score=False)
            self.paid = before = state
            model = self.process.transition(state.x, required(state.cache.x0), state.k)
            drawn = propose(self.proposal, state, model)
            state = state.step(drawn, noise, model=None if drawn is model else model)
            self.run.report(before, state)
        return state

    def _attach(
        self, depth: int, live: NDArray[np.bool_] | None, rows: Tensor | None, parent: Slots, state: Trajectory
    ) -> tuple[Slots, Trajectory]:
        """New nodes at the end of an edge: predicted there once, and for ever; scored, where they are leaves.

        Returns their slots, and the walks as they go on from there.
        """
        tree, layer = self.tree, self.tree.layers[depth]
        columns: dict[str, Any] = {"correction": state.log_weight.cpu().numpy(), **self._edge(state)}
        if depth == tree.depth:
            scores = self._on_rows(lambda x: {"score": self.objective(x)}, state.x, rows)["score"].cpu()
            check_finite(scores, "of the finished samples", first=tree.leaves.size)
            value = scores if self.greedy else log_potential(scores, self.temperature)
            columns |= {"reward": scores.numpy(), "value": value.numpy()}
        else:
            state, scores = self._predict(state, rows, score=self.looks)
            if "look" in layer and not self.looks:
                columns["look"] = math.nan
            if self.looks and scores is not None:
                check_finite(scores, f"of the predictions at level {state.k}", first=layer.size)
                columns["look"] = scores.cpu().numpy()
            columns |= {name: self._stored(tensor) for name, tensor in state.cache.tensors().items()}
        kept, taken = (0 if edge is None else edge.shape[2] for edge in (layer.states.get("edge"), columns.get("edge")))
        if layer.size and kept != taken:
            raise SteerError(
                f"this tree keeps {kept} steps on every edge to level {state.k}, and its walks now take {taken}: their "
                "start begins at another level; grow it on with the start it had"
            )
        return tree.attach(depth, live, parent, x=self._stored(state.x), **columns), state.reset_weights()

    def _edge(self, state: Trajectory) -> dict[str, Tensor]:
        """An edge's steps, (B, W, steps, ...), where they are kept: states left, and densities (NaN without noise)."""
        steps = [event for event in state.past if isinstance(event, StepRecord)]
        if not steps:
            return {}
        absent = torch.full_like(state.log_weight, torch.nan)

        def densities(values: Sequence[Tensor | None]) -> Tensor:
            return torch.stack([absent if value is None else value for value in values], 2).cpu()

        return {
            "edge": self._stored(torch.stack([step.x for step in steps], 2)),
            "edge_log_prob": densities([step.log_prob for step in steps]),
            "edge_log_behaviour": densities([step.log_behaviour for step in steps]),
        }

    def _predict(self, state: Trajectory, rows: Tensor | None, *, score: bool) -> tuple[Trajectory, Tensor | None]:
        """The state with its prediction (and what a proposal needs), and scores where they are asked for."""
        process, k = self.process, state.k

        def predicted(x: Tensor) -> dict[str, Tensor]:
            here = Trajectory.begin(process, x, k=k)
            here, scores = predict_and_score(
                here, self.objective, self.temperature, self.proposal, score, self.network_key
            )
            found = here.cache.tensors()
            found.pop("score", None)
            return found if scores is None else {**found, "score": scores}

        found = self._on_rows(predicted, state.x, rows)
        scores = found.pop("score", None)
        return state.with_step_cache(**found), scores

    def _rows(self, live: NDArray[np.bool_] | None, device: torch.device) -> Tensor | None:
        """Rows of the merged axis (B * W) that are live; None for all.

        A conditioned network needs every problem's rows in place: there idle columns are computed, and paid for.
        """
        if self.process.problems is not None or live is None:
            return None
        return torch.from_numpy(live.reshape(-1).nonzero()[0]).to(device)

    @staticmethod
    def _on_rows(function: Callable[[Tensor], dict[str, Tensor]], x: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """What a function says of states (B, W, ...), on some rows alone, 0 elsewhere: idle columns cost nothing."""
        if rows is None:
            return function(x)

        def unpacked(part: Tensor) -> Tensor:
            wide = part.new_zeros((x.shape[0] * x.shape[1], *part.shape[2:]))
            return wide.index_copy_(0, rows, part[0]).view(*x.shape[:2], *part.shape[2:])

        packed = function(x.flatten(0, 1).index_select(0, rows)[None])
        return {name: unpacked(part) for name, part in packed.items()}

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor if self.store is None else tensor.to(self.store)

    def _fitted(self, plan: Plan, rows: Sequence[int], left: Slots) -> tuple[Slots, Slots, Slots, Slots]:
        """The plan without its last walks, where a conditioned network's idle columns would overdraw the budget; how
        many are under way on each edge, (D, B), and the network rows that each tree spends, (B,)."""
        entry, path = plan
        while True:
            running = (entry <= np.arange(len(rows))[:, None, None]).sum(2)
            idle = self.process.problems is not None or sampling_uses_network(
                self.process
            )  # whether idle columns cost rows
            paid = running.max(1, keepdims=True) if idle else running
            spent = np.broadcast_to(np.dot(rows, paid), left.shape)
            if (spent <= left).all():
                return entry, path, running, spent
            entry, path = entry[:, :-1], path[:, :, :-1]

    def _check_affordable(self, whole: int, cheapest: int, particles: int | None, budget: int | None) -> None:
        check_counts(particles=particles)
        if not self.tree.leaves.size or budget is None:
            affordable(whole, particles=particles, budget=budget)
        elif budget < cheapest:
            raise BudgetError(
                f"a budget of {budget} network rows per problem pays for no walk: growing this tree from its last "
                f"branching level takes {cheapest}; raise the budget to {cheapest}"
            )

    def _result(self, *, interrupted: bool) -> Result:
        tree, leaves = self.tree, self.tree.leaves
        if not leaves.size:
            return self._predictions()
        filled, reward = leaves.filled, leaves["reward"]
        # Trees of fewer leaves repeat their first one, at weight zero.
        slots = torch.where(filled, torch.arange(leaves.size), 0)
        root_value = self._back_up()
        reward, ancestor = reward.gather(1, slots), slots
        for layer in tree.layers[:1:-1]:
            ancestor = layer["parent"].gather(1, ancestor)
        x = tree.states(tree.depth, slots, getattr(self.process, "device", None))["x"]
        if self.keep is not None:
            log_weight = population.weights_of_top_k(reward.masked_fill(~filled, -torch.inf), self.keep)
            evidence = torch.full_like(root_value, math.nan)
        else:
            log_weight = tree.log_share(tree.depth) + leaves["value"]
            evidence = torch.where(torch.from_numpy(tree.normalised), root_value, math.nan)
        return self._weighted(x, reward, log_weight, evidence, ancestor, interrupted)

    def _back_up(self) -> Tensor:
        """Values of all nodes, from the leaves' rewards: those of the roots, (B,)."""
        reward = self.tree.leaves["reward"]
        self.tree.set_leaf_values(reward if self.greedy else log_potential(reward, self.temperature))
        return self.tree.backup(greedy=self.greedy)

    def _predictions(self) -> Result:
        """What a run has that was stopped in its first sweep: the last predictions of its walks, as leaves."""
        assert self.paid is not None
        with torch.no_grad():
            x = completed(self.paid).x
            scores = self.objective(x)
        check_finite(scores, "of the predictions")
        root = torch.arange(scores.shape[1]).expand(scores.shape)
        if self.keep is not None:
            return self._weighted(
                x,
                scores,
                population.weights_of_top_k(scores, self.keep),
                torch.full_like(scores[:, 0], math.nan),
                root,
                True,
            )
        log_weight = log_potential(scores, self.temperature) + self.paid.log_weight + self.so_far
        evidence = torch.where(torch.from_numpy(self.tree.normalised), population.log_mean_exp(log_weight), math.nan)
        return self._weighted(x, scores, log_weight, evidence, root, True)

    def _weighted(
        self, x: Tensor, reward: Tensor, log_weight: Tensor, evidence: Tensor, root: Tensor, interrupted: bool
    ) -> Result:
        """The Result of samples with log-weights of any scale; an error with it inside, where a problem has none."""
        dead = (log_weight == -torch.inf).all(1)
        log_weight = torch.where(dead[:, None], log_weight, population.normalise(log_weight))
        reward, log_weight, evidence, root = (part.to(x.device) for part in (reward, log_weight, evidence, root))
        result = Result(
            process=self.process,
            x=x,
            reward=reward,
            log_weight=log_weight,
            log_evidence=evidence,
            root=root,
            key=self.key,
            cost=self.run.meter.cost(),
            temperature=self.temperature,
            seen=(LevelRecord(self.process.steps, population.ess(log_weight), reward),),
            interrupted=interrupted,
            tree=self.tree,
            law="none" if self.greedy or self.tree.biased_start else "target",
        )
        if bool(dead.any()):
            raise CollapsedWeightsError(
                f"every leaf of problem {int(dead.nonzero()[0])} has weight zero: the reward forbids (-inf) all of "
                "them; grow the tree further (error.partial.tree), or give a reward that is finite on what the model "
                "makes"
            ).keep(result)
        return result


def resorted(entry: Slots, path: Slots) -> Plan:
    """A plan with its walks in order of the depth they enter at, so that those under way are the first columns."""
    order, problem = entry.argsort(axis=1, kind="stable"), each_problem(len(entry))
    return entry[problem, order], path[:, problem, order]
