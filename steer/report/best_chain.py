"""How a run's best sample came about: its predictions from noise to data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.objective import open_objective
from ..core.population import gather
from ..core.trajectory import ResamplingRecord, StepRecord
from .run_result import RunResult
from .tree_layout import best_slots, clean_states, drawable


@dataclass(frozen=True, eq=False)
class Waypoint:
    """One prediction on the way to a sample.

    Args:
        level: Step at which it was made; the number of steps for the sample itself.
        clean: The predicted clean state, [*event].
        value: Its reward; of a tree that has forgotten its reward, as one that was pickled, the value of its node; None
            where neither is known.
    """

    level: int
    clean: Tensor
    value: float | None


def best_chain(result: RunResult, problem: int = 0, most: int = 11) -> list[Waypoint]:
    """The predictions that led to the sample of highest reward.

    Args:
        result: A run with a tree, or with a trajectory that kept its states.
        problem: Of which of its problems.
        most: How many to return at most, evenly spaced.

    Returns:
        From noise to data, the sample itself last; empty where the run kept no tree and no states.

    Cost: of a trajectory, `most` - 1 network rows per problem, not counted in the run's cost: it keeps states, so
    the predictions are made again. Of a tree that scored no predictions, `most` rewards per problem.
    """
    if result.tree is not None:
        return _in_tree(result, problem, most) if drawable(result.tree) else []
    past = () if result.trajectory is None else result.trajectory.past
    return _in_trajectory(result, problem, most) if any(isinstance(event, StepRecord) for event in past) else []


def _in_tree(result: RunResult, problem: int, most: int) -> list[Waypoint]:
    """The nodes on the path to the best leaf."""
    tree = result.tree
    depths = _spread([*range(1, len(tree.levels) + 1)], most)
    with torch.no_grad():
        ways = torch.stack([_clean_path(result, depths, b) for b in range(len(result.reward))])
        scores = _scores(result, ways)
    path, stops = best_slots(tree, problem), []
    for i, depth in enumerate(depths):
        known = tree.nodes_at(depth, problem)
        names = [name for name in ("reward", "predicted_reward") if name in known]
        kept = known[names[0] if names else "value"][path[depth]]
        value = kept if names or scores is None else scores[problem, i]
        stops.append(Waypoint(tree.levels[depth - 1], ways[problem, i], float(value)))
    return stops


def _clean_path(result: RunResult, depths: Sequence[int], problem: int) -> Tensor:
    """Predictions of the nodes at these depths on the path to a problem's best leaf, [n, *event]."""
    path = best_slots(result.tree, problem)
    return torch.stack([clean_states(result, d, torch.tensor([path[d]]), problem)[0, 0] for d in depths])


def _scores(result: RunResult, clean: Tensor) -> Tensor | None:
    """The tree's reward of clean states [B, n, *event], [B, n]; None where the tree has it, or cannot tell."""
    if not scored(result) or "predicted_reward" in result.tree.nodes_at(1):
        return None
    _, objective, _ = open_objective(result.process, result.tree.reward)
    return objective(clean)


def scored(result: RunResult) -> bool:
    """Whether the values along `best_chain` are rewards of predictions, and not values of nodes."""
    if result.tree is None or "predicted_reward" in result.tree.nodes_at(1):
        return True
    return getattr(result.tree, "reward", None) is not None  # a copy made by pickle has none


def _in_trajectory(result: RunResult, problem: int, most: int) -> list[Waypoint]:
    """Predictions along the lineage of the best particle."""
    state, process = result.trajectory, result.process
    assert state is not None
    best = result.reward.argmax(1, keepdim=True).to(state.x.device)
    index = torch.arange(state.x.shape[1], device=state.x.device).expand(state.x.shape[:2])
    states, places = {}, {}
    for event in reversed(state.past):
        if isinstance(event, ResamplingRecord):
            index = event.parent.gather(1, index)
        else:
            states[event.k] = gather(event.x, index.gather(1, best))
        places[event.k] = index.gather(1, best)  # in the population that was scored there, before any rearrangement
    scores = {
        seen.k: float(seen.score[problem, places[seen.k][problem, 0]])
        for seen in result.seen
        if seen.k in places and int(places[seen.k].max()) < seen.score.shape[1]
    }
    stops = []
    with torch.no_grad():
        for k in _spread(sorted(states), most - 1):
            clean = process.complete(states[k], process.denoise(states[k], k, result.key))
            stops.append(Waypoint(k, clean[problem, 0], scores.get(k)))
    end = gather(result.x, best.to(result.x.device))[problem, 0]
    return [*stops, Waypoint(state.k, end, float(result.reward[problem].max()))]


def _spread(levels: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, evenly spaced, first and last included."""
    if len(levels) <= most:
        return list(levels)
    return [levels[math.floor(i * (len(levels) - 1) / (most - 1) + 0.5)] for i in range(most)]
