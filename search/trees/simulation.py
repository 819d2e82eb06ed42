"""One batch of simulations: each goes on from the node that it expands, along the edges below, to a new leaf.

All simulations of all trees advance together, level by level, so that each network call has one level; those that
expand a deeper node join when the others reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steer.core.loop import Loop
from steer.core.objective import FINISHED, Owner
from steer.core.start import Start, prior
from steer.core.trajectory import StepRecord, Trajectory, required
from steer.errors import SteerError
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
    """Which of the simulations [B, W] that advance together are under way, both None for all of them.

    rows: those on the merged axis (B * W), where the others need not be evaluated.
    """

    mask: NDArray[np.bool_] | None
    rows: Tensor | None

    @classmethod
    def of(cls, mask: NDArray[np.bool_] | None, process: ReverseProcess, device: torch.device) -> LiveColumns:
        """A conditioned network needs the rows of every problem in place: there idle columns are computed, and paid."""
        if mask is None or process.problems is not None:
            return cls(mask, None)
        return cls(mask, torch.from_numpy(mask.reshape(-1).nonzero()[0]).to(device))

    def owner(self, x: Tensor, first: int) -> Owner:
        """Which problem and node (the layer has `first`) each row that is evaluated of states [B, W, ...] is."""

        def named(row: int, column: int) -> tuple[int, int]:
            place = row * x.shape[1] + column if self.rows is None else int(self.rows[column])
            return place // x.shape[1], first + place % x.shape[1]

        return named

    def evaluate(self, function: Callable[[Tensor], dict[str, Tensor]], x: Tensor) -> dict[str, Tensor]:
        """What a function says of states [B, W, ...], evaluated on live rows alone where it may be; 0 elsewhere."""
        rows = self.rows
        if rows is None:
            return function(x)

        def unpacked(part: Tensor) -> Tensor:
            wide = part.new_zeros((x.shape[0] * x.shape[1], *part.shape[2:]))
            return wide.index_copy_(0, rows, part[0]).view(*x.shape[:2], *part.shape[2:])

        packed = function(x.flatten(0, 1).index_select(0, rows)[None])
        return {name: unpacked(part) for name, part in packed.items()}


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

    @property
    def process(self) -> ReverseProcess:
        return self.loop.run.process

    def __call__(self, plan: ExpansionPlan) -> None:
        """Runs the simulations of a plan, and adds their nodes to the tree: all of them, or after an error none."""
        tree = self.tree
        key = self.loop.run.key.shifted(slot=tree.simulations).wide(plan.depth.shape[1])
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
                    live = LiveColumns.of(mask, self.process, state.x.device)
                    state = self.move_along_edge(state, live, tree.levels[depth], key, log_path_weight)
                    log_path_weight = log_path_weight + state.log_weight
                    slots, state = self.add_nodes(depth + 1, live, here, state, key)
                    np.copyto(plan.path[depth + 1, :, :width], slots, where=True if mask is None else mask)

    def start_at_root(self, key: Key, width: int) -> Trajectory:
        """Simulations that begin at the root, `width` in every tree."""
        tree, run = self.tree, self.loop.run
        begun = self.start(self.process, run.objective, key, tree.problems, width)
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
        process, run, k = self.process, self.loop.run, state.k
        objective = run.objective.of(live.owner(state.x, 0))

        def predicted(x: Tensor) -> dict[str, Tensor]:
            here = Trajectory.begin(process, x, k=k)
            here, scores = predict_and_score(here, objective, run.temperature, self.proposal, score, key)
            found = here.cache.tensors()
            found.pop("score", None)
            return found if scores is None else {**found, "score": scores}

        found = live.evaluate(predicted, state.x)
        scores = found.pop("score", None)
        return state.with_step_cache(**found), scores

    def _leaf_scores(self, state: Trajectory, live: LiveColumns) -> dict[str, NDArray[Any]]:
        """Rewards and values [B, W] of new leaves."""
        run = self.loop.run
        objective = run.objective.of(live.owner(state.x, self.tree.leaves.size))
        scores = live.evaluate(lambda x: {"score": objective(x, FINISHED)}, state.x)["score"].cpu()
        run.meter.finite.settle()  # scores are read here: nothing that is not finite enters the tree
        return {"reward": scores.numpy(), "value": self.tree.rule.leaf_value(scores.numpy(), run.temperature)}

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
