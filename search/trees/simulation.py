"""One batch of simulations: each goes on from the node that it expands, along the edges below, to a new leaf.

All simulations of all trees advance together, level by level, so that each network call has one level; those that
expand a deeper node join when the others reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.core.loop import Loop
from steer.core.objective import FINISHED
from steer.core.run import Run
from steer.core.start import Start, prior, started
from steer.core.trajectory import StepRecord, Trajectory, required
from steer.errors import ShapeError, SteerError
from steer.key import Key
from steer.particles.proposals import Proposal, predict_and_score, propose
from steer.types import ReverseProcess

from .expansion_plan import ExpansionPlan
from .node_table import EDGE_COLUMNS
from .ragged import Slots
from .tree import Tree


class LastPrediction(NamedTuple):
    """The last simulations that carried their predictions, and their log path weights [B, W] down to their edge."""

    state: Trajectory
    log_path_weight: Tensor | float


class LiveColumns(NamedTuple):
    """Which of the columns [B, W] that are evaluated together are live, None for all of them.

    In every problem they are the first ones.
    alone: the run of each problem of a conditioned network; none where it cannot be asked about one (`only`). Idle
           columns are then computed, and paid.
    """

    mask: NDArray[np.bool_] | None
    alone: Sequence[Run] = ()

    def evaluate(self, function: Evaluated, run: Run, x: Tensor, first: int = 0) -> dict[str, Tensor]:
        """What a function says of states [B, W, *event] of a run, evaluated on live ones alone; 0 elsewhere.

        A conditioned network needs the rows of every problem in place, as many of each. There the columns that are live
        in all problems share a call, and those that some problems have more are a call for each of these.

        first: number of the layer's node in column 0, for messages.
        """
        width = x.shape[1]
        if self.mask is None or not (run.process.problems is None or self.alone):
            return function(_owned(run, torch.arange(x.shape[0] * width), width, first), x)
        if run.process.problems is None:
            live = torch.from_numpy(self.mask.reshape(-1).nonzero()[0])
            calls = [(live, run, x.flatten(0, 1).index_select(0, live.to(x.device))[None])]
        else:
            calls = self._by_problem(run, x)
        wide: dict[str, Tensor] = {}
        for places, of, states in calls:
            for name, part in function(_owned(of, places, width, first), states).items():
                column = wide.setdefault(name, part.new_zeros((x.shape[0] * width, *part.shape[2:])))
                column.index_copy_(0, places.to(x.device), part.flatten(0, 1))
        return {name: column.view(*x.shape[:2], *column.shape[1:]) for name, column in wide.items()}

    def _by_problem(self, run: Run, x: Tensor) -> Iterator[tuple[Tensor, Run, Tensor]]:
        """Places on the merged axis (B * W), with the run and the states of a call for them."""
        assert self.mask is not None
        place, count = torch.arange(self.mask.size).view(self.mask.shape), self.mask.sum(1)
        shared = int(count.min())
        if shared:
            yield place[:, :shared].reshape(-1), run, x[:, :shared]
        for b in (count > shared).nonzero()[0].tolist():
            of_problem = replace(self.alone[b], key=run.key.shifted(problem=b, slot=shared))
            yield place[b, shared : count[b]], of_problem, x[b : b + 1, shared : int(count[b])]


Evaluated = Callable[[Run, Tensor], dict[str, Tensor]]
"""(run, states [B, W, *event]) -> tensors [B, W, ...] by name. The run is that of the problems which the states are of,
and its key stands at their slots."""


@dataclass(eq=False, kw_only=True)
class Simulator:
    """How simulations advance, the same in every batch of a search.

    loop:            reports steps, and notes what an interrupted run is left with.
    tree:            that they add nodes to.
    start:           where chains begin.
    proposal:        what chains move by; the edges are corrected for it.
    predict_rewards: whether the prediction at every node is scored, for policies that ask for it.
    store:           device of the nodes' states, None for the network's.
    keep_states:     whether the states and densities of steps between nodes are kept too.
    last:            the last prediction of the batch under way; None before the first.
    """

    loop: Loop
    tree: Tree
    start: Start
    proposal: Proposal
    predict_rewards: bool = False
    store: torch.device | str | None = None
    keep_states: bool = False
    last: LastPrediction | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        try:
            torch.empty(0, device=self.store)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise SteerError(f"store is a device to keep states on, as 'cpu', got {self.store!r}: {error}") from error

    @cached_property
    def alone(self) -> Sequence[Run]:
        """The run of each problem alone; none where the network is not conditioned, or cannot be asked about one."""
        run, problems = self.loop.run, self.process.problems or 1
        try:
            return [run.only(b) for b in range(problems)] if problems > 1 else []
        except ShapeError:
            return []

    @property
    def process(self) -> ReverseProcess:
        return self.loop.run.process

    def __call__(self, plan: ExpansionPlan) -> None:
        """Runs the simulations of a plan, and adds their nodes to the tree: all of them, or after an error none."""
        tree = self.tree
        key = self.loop.run.key.shifted(slot=tree.simulations)
        running = plan.running()
        widest, fewest = running.max(1).tolist(), running.min(1).tolist()
        joined: list[bool] = [False, *np.any(running[1:] > running[:-1], axis=1)]
        log_path_weight: Tensor | float = 0.0
        with tree.undone_on_error():
            state = self.start_at_root(key, widest[0]) if widest[0] else None
            with torch.no_grad():
                for depth, width in enumerate(widest):
                    here = plan.path[depth, :, :width]
                    if joined[depth]:
                        state, log_path_weight = self.restore_nodes(depth, here), 0.0
                    if state is None:
                        continue
                    mask = None if fewest[depth] == width else plan.depth[:, :width] <= depth
                    live = LiveColumns(mask, self.alone)
                    state = self.move_along_edge(state, live, tree.levels[depth], key, log_path_weight)
                    log_path_weight = log_path_weight + state.log_weight
                    slots, state = self.add_nodes(depth + 1, live, here, state, key)
                    np.copyto(plan.path[depth + 1, :, :width], slots, where=True if mask is None else mask)

    def start_at_root(self, key: Key, width: int) -> Trajectory:
        """Simulations that begin at the root, `width` in every tree."""
        tree, run = self.tree, self.loop.run
        begun = started(self.start, self.process, run.objective, key, tree.problems, width)
        if begun.k > tree.levels[0]:
            raise SteerError(
                f"the start puts particles at level {begun.k}, past the first branching level {tree.levels[0]}; pass "
                "levels that begin there or later"
            )
        begun = replace(begun, keep_states=self.keep_states)
        self.loop.partial = begun
        if self.start is prior:
            return begun
        # What another start has weighted, multiplied in and normalized by is the weight of the edge from the root.
        tree.normalizer_known &= ~begun.log_evidence.isnan().cpu().numpy()
        tree.biased_start |= begun.biased_start
        return begun.reweight(
            begun.log_evidence[:, None].nan_to_num() - begun.path.log_potential_or_zero(begun.log_weight)
        )

    def restore_nodes(self, depth: int, slots: Slots) -> Trajectory:
        """Simulations at nodes [B, W] of a depth, with what is cached there."""
        kept = self.tree.states(depth, torch.from_numpy(slots), self.process.device)
        level, x = self.tree.levels[depth - 1], kept.pop("x")
        return Trajectory.begin(self.process, x, k=level, keep_states=self.keep_states).with_step_cache(**kept)

    def move_along_edge(
        self, state: Trajectory, live: LiveColumns, until: int, key: Key, log_path_weight: Tensor | float
    ) -> Trajectory:
        """Steps to the level at the end of an edge. log_path_weight: of the nodes at its beginning."""
        noise = key.fold("step")
        while state.k < until:
            if state.cache.x0 is None:
                state, _ = self.predict(state, live, key, score=False)
            before = self.loop.predicted(state)
            self.last = LastPrediction(before, log_path_weight)
            model = self.process.transition(state.x, required(state.cache.x0), state.k)
            drawn = propose(self.proposal, state, model)
            state = self.loop.stepped(before, state.step(drawn, noise, model=None if drawn is model else model))
        return state

    def add_nodes(
        self, depth: int, live: LiveColumns, parent: Slots, state: Trajectory, key: Key
    ) -> tuple[Slots, Trajectory]:
        """New nodes at the end of an edge. The prediction of each is made once and cached; leaves are scored.

        Returns their slots [B, W], and the simulations as they go on from there.
        """
        tree, layer = self.tree, self.tree.layers[depth]
        columns: dict[str, Any] = {"log_importance_ratio": state.log_weight.cpu().numpy(), **self._edge(state)}
        if depth == tree.depth:
            columns |= self._leaf_scores(state, live)
        else:
            state, scores = self.predict(state, live, key, score=self.predict_rewards)
            if scores is not None and self.predict_rewards:
                columns["predicted_reward"] = scores.cpu().numpy()
            elif "predicted_reward" in layer:
                columns["predicted_reward"] = math.nan
            columns |= {name: self._stored(tensor) for name, tensor in state.cache.tensors().items()}
        self._check_same_steps(depth, columns)
        slots = tree.add_nodes(depth, live.mask, parent, x=self._stored(state.x), **columns)
        return slots, state.reset_weights()

    def predict(
        self, state: Trajectory, live: LiveColumns, key: Key, *, score: bool
    ) -> tuple[Trajectory, Tensor | None]:
        """The state caching its prediction (and what a proposal needs), and scores [B, W] where they are asked for."""
        k = state.k

        def predicted(run: Run, x: Tensor) -> dict[str, Tensor]:
            here = Trajectory.begin(run.process, x, k=k)
            here, scores = predict_and_score(here, run.objective, run.temperature, self.proposal, score, run.key)
            found = here.cache.tensors()
            found.pop("score", None)
            return found if scores is None else {**found, "score": scores}

        found = live.evaluate(predicted, replace(self.loop.run, key=key), state.x)
        scores = found.pop("score", None)
        return state.with_step_cache(**found), scores

    def _leaf_scores(self, state: Trajectory, live: LiveColumns) -> dict[str, NDArray[Any]]:
        """Rewards and values [B, W] of new leaves."""
        run = self.loop.run
        scores = live.evaluate(_scored, run, state.x, self.tree.leaves.size)["score"].cpu()
        run.meter.finite.settle()  # scores are read here: nothing that is not finite enters the tree
        return {"reward": scores.numpy(), "value": self.tree.rule.leaf_value(scores.numpy(), run.temperature)}

    def score_again(self) -> None:
        """Makes the scores that a tree holds this run's: those of its leaves, and of its nodes' predictions.

        Raises SteerError where nodes hold gradients of another reward, which is what guided proposals would follow.
        """
        tree, reward = self.tree, self.loop.run.objective.reward
        if tree.reward is reward or not tree.leaves.size:
            tree.reward = reward
            return
        if tree.reward is not None and any("gradient" in layer for layer in tree.layers):
            raise SteerError(
                "the nodes of this tree hold gradients of the reward it was grown with, and this is another; grow it "
                "on with that one, or begin a new tree"
            )
        found = []
        for depth, layer in enumerate(tree.layers[1:], start=1):
            name = "reward" if depth == tree.depth else "predicted_reward"
            if name in layer:
                # Scores that this run would not keep up are none: "unbiased" asks for all of them.
                wanted = self.predict_rewards or name == "reward"
                found.append((layer, name, self._scores_of(depth) if wanted else torch.tensor(math.nan)))
        for layer, name, scores in found:
            layer[name][:] = torch.where(layer.filled, scores, layer[name])
        tree.reward = reward

    def _scores_of(self, depth: int) -> Tensor:
        """Scores [B, size] of the leaves, or of the predictions of all nodes of a depth."""
        run, layer, scores = self.loop.run, self.tree.layers[depth], []
        for first in range(0, layer.size, run.chunk):
            slots = torch.arange(first, min(first + run.chunk, layer.size)).expand(self.tree.problems, -1)
            held = self.tree.states(depth, slots, self.process.device)
            clean = held["x"] if "x0" not in held else self.process.complete(held["x"], held["x0"])
            mask = layer.filled[:, first : first + run.chunk].numpy()
            live = LiveColumns(None if mask.all() else mask, self.alone)
            with torch.no_grad():
                scores.append(live.evaluate(_scored, run, clean, first)["score"].cpu())
        run.meter.finite.settle()
        return torch.cat(scores, 1)

    def _edge(self, state: Trajectory) -> dict[str, Tensor]:
        """An edge's steps, [B, W, steps, ...], where they are kept: states left, and densities (NaN without noise)."""
        steps = [event for event in state.past if isinstance(event, StepRecord)]
        if not steps:
            return {}
        absent = torch.full_like(state.log_weight, torch.nan)

        def densities(values: Sequence[Tensor | None]) -> Tensor:
            return torch.stack([absent if value is None else value for value in values], 2).cpu()

        x = self._stored(torch.stack([step.x for step in steps], 2))
        log_prob = densities([step.log_prob for step in steps])
        log_behaviour = densities([step.log_behaviour for step in steps])
        return dict(zip(EDGE_COLUMNS, (x, log_prob, log_behaviour), strict=True))

    def _check_same_steps(self, depth: int, columns: dict[str, Any]) -> None:
        """Raises where a table keeps another number of steps on every edge than simulations now take."""
        layer = self.tree.layers[depth]
        kept, taken = (0 if x is None else x.shape[2] for x in (layer.states.get("edge_x"), columns.get("edge_x")))
        if layer.size and kept != taken:
            raise SteerError(
                f"this tree keeps {kept} steps on every edge to level {self.tree.levels[depth - 1]}, and its "
                f"simulations now take {taken}: their start begins at another level; grow it on with the start it had"
            )

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor if self.store is None else tensor.to(self.store)


def _owned(run: Run, places: Tensor, width: int, first: int) -> Run:
    """The run, whose messages name problem and node of each row, by its place on the merged axis."""

    def named(row: int, column: int) -> tuple[int, int]:
        per_row = len(places) // run.problems if run.process.problems is not None else len(places)
        problem, node = divmod(int(places[row * per_row + column]), width)
        return problem, first + node

    return replace(run, objective=run.objective.of(named))


def _scored(run: Run, x: Tensor) -> dict[str, Tensor]:
    """Rewards of clean states, as `LiveColumns.evaluate` asks for them."""
    return {"score": run.objective(x, FINISHED)}
