"""Chains that move at their own pace, written as generators and evaluated together wherever they are at one level.

A chain yields `EvaluationRequest`s, the states it wants valued, and is sent their predictions and scores. An algorithm
with breaks and backtracking can so be written as it is printed, and its chains still share network calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from steer.core.event import Event
from steer.core.loop import keeping
from steer.core.objective import at_level
from steer.core.run import Run
from steer.core.trajectory import Trajectory
from steer.key import Key
from steer.processes.gaussian import sampling_uses_network
from steer.results.result import Result
from steer.types import Stop


class BestSoFar(NamedTuple):
    """What a chain would return now.

    clean: a clean state, [1, 1, *event].
    score: its reward.
    root:  slot of the noise that it began from.
    """

    clean: Tensor
    score: float
    root: int


class EvaluationRequest(NamedTuple):
    """States that a chain wants valued.

    x:    states, [1, m, *event].
    k:    their level; at k = K they are scored, and there is nothing to predict.
    held: what the chain would return now, None before its first score.
    """

    x: Tensor
    k: int
    held: BestSoFar | None


class ChainId(NamedTuple):
    """Which chain: its problem, and its index among the N chains of that problem."""

    problem: int
    slot: int


Answer = tuple[Tensor, list[float]]
"""Predictions [1, m, ...] of the states of a request, and their scores."""
Chain = Generator[EvaluationRequest, Answer, BestSoFar]
"""Yields what it requests, is sent the answers, and returns what it found."""


def run_in_lockstep(run: Run, particles: int, start: Callable[[Run, ChainId], Chain], keep: int) -> Result:
    """Runs chains to their end, or until they are stopped.

    Problems of an unconditioned process share network calls; those of a conditioned one are evaluated one by one.

    Args:
        run: the method's run.
        particles: N chains per problem.
        start: makes a chain from the run of its problem and its id.
        keep: how many of the N chains share the weight.

    Returns:
        Result with what the chains found, x [B, N, *event].

    Raises:
        Whatever reward, network or `on_step` raise; `.partial` is a Result with what the chains would return, or before
        their first scores a Trajectory of their starting states.
    """
    runs = [run.only(problem) for problem in range(run.problems)]
    ids = [ChainId(problem, slot) for problem in range(run.problems) for slot in range(particles)]
    chains = {chain_id: start(runs[chain_id.problem], chain_id) for chain_id in ids}
    held: dict[ChainId, BestSoFar | None] = dict.fromkeys(ids)
    starting: Trajectory | None = None

    def so_far() -> Result | Trajectory | None:
        complete = all(found is not None for found in held.values())
        return _result(run, held, keep, interrupted=True) if complete else starting

    try:
        with keeping(so_far), torch.no_grad():
            requests = {chain_id: next(chain) for chain_id, chain in chains.items()}
            starting = _starting_states(run, requests)
            while requests:
                answers = _answers(run, runs, requests)
                for chain_id, answer in answers.items():
                    try:
                        requests[chain_id] = chains[chain_id].send(answer)
                        held[chain_id] = requests[chain_id].held
                    except StopIteration as end:
                        held[chain_id] = end.value
                        del requests[chain_id]
                _report(runs, requests, {chain_id.problem for chain_id in answers})
    except (Stop, KeyboardInterrupt):
        if any(found is None for found in held.values()):
            raise
        return _result(run, held, keep, interrupted=True)
    return _result(run, held, keep, interrupted=False)


def _result(run: Run, held: dict[ChainId, BestSoFar | None], keep: int, *, interrupted: bool) -> Result:
    """The Result of what chains hold: x [B, N, *event], of which the `keep` best share the weight."""
    found = [[held[each] for each in held if each.problem == problem] for problem in range(run.problems)]
    rows = [[one for one in problem if one is not None] for problem in found]
    x = torch.cat([torch.cat([one.clean for one in problem], 1) for problem in rows], 0)
    reward = torch.tensor([[one.score for one in problem] for problem in rows], dtype=torch.float64)
    root = torch.tensor([[one.root for one in problem] for problem in rows])
    return Result.from_search(run, x, reward.to(x.device), root.to(x.device), keep=keep, interrupted=interrupted)


def begin(run: Run, chain_id: ChainId, slots: range) -> Tensor:
    """Draws of the prior at some equally spaced noise slots, [1, m, *event]."""
    return _drawn(run, chain_id, slots, "prior", lambda key, many: run.process.prior(key, 1, many))


def draw(run: Run, chain_id: ChainId, slots: range, x: Tensor, x0: Tensor, k: int) -> Tensor:
    """Steps from level k of one state [1, 1, *event], each with the noise of its slot: [1, m, *event]."""

    def step(key: Key, many: int) -> Tensor:
        wide, ahead = (tensor.expand(1, many, *tensor.shape[2:]) for tensor in (x, x0))
        return run.process.transition(wide, ahead, k).sample(key.at(k))

    return _drawn(run, chain_id, slots, "step", step)


def renoise(run: Run, chain_id: ChainId, slot: int, x: Tensor, k_from: int, k_to: int) -> Tensor:
    """One state [1, 1, *event] back at a noisier level, with the noise of a slot."""
    key = run.key.fold("renoise", k_from).shifted(problem=chain_id.problem, slot=slot)
    return run.process.noise(x, k_from, k_to, key)


def _drawn(run: Run, chain_id: ChainId, slots: range, what: str, make: Callable[[Key, int], Tensor]) -> Tensor:
    """What is made with the noise of some slots. Those in between are drawn too, unless drawing needs the network."""
    key = run.key.fold(what)
    if slots.step > 1 and sampling_uses_network(run.process):
        return torch.cat([make(key.shifted(problem=chain_id.problem, slot=slot), 1) for slot in slots], 1)
    every = make(key.shifted(problem=chain_id.problem, slot=slots.start), slots[-1] - slots[0] + 1)
    return every[:, :: slots.step]


def _answers(run: Run, runs: list[Run], requests: dict[ChainId, EvaluationRequest]) -> dict[ChainId, Answer]:
    """Predictions and scores of the requests at the noisiest level; the chains ahead of it wait."""
    k = min(request.k for request in requests.values())
    ids = [chain_id for chain_id, request in requests.items() if request.k == k]
    if run.process.problems in (None, 1):
        return _evaluate(run, runs[0], requests, ids, k)
    groups = [[chain_id for chain_id in ids if chain_id.problem == problem] for problem in range(run.problems)]
    found = [_evaluate(run, runs[group[0].problem], requests, group, k) for group in groups if group]
    return {chain_id: answer for answers in found for chain_id, answer in answers.items()}


def _evaluate(
    run: Run, own: Run, requests: dict[ChainId, EvaluationRequest], ids: list[ChainId], k: int
) -> dict[ChainId, Answer]:
    """Answers to some chains at level k, by the network and reward of one problem's run."""
    process = own.process
    sizes = [requests[chain_id].x.shape[1] for chain_id in ids]
    x = torch.cat([requests[chain_id].x for chain_id in ids], 1)  # in one row: no conditioning tells them apart
    x0 = own.predict(x, k) if k < process.steps else x
    clean = process.complete(x, x0) if k < process.steps else x
    owners = [chain_id for chain_id, size in zip(ids, sizes, strict=True) for _ in range(size)]
    found, first = [], 0
    for part in clean.split(run.chunk, 1):
        objective = own.objective.of(lambda _, column, first=first: owners[first + column])
        found.append(objective(part, at_level(process, k)))
        first += part.shape[1]
    scores = torch.cat(found, 1)[0].cpu().split(sizes)
    run.meter.finite.settle()  # scores are read here: no chain is sent one that is not finite
    answers = zip(ids, x0.split(sizes, 1), scores, strict=True)
    return {chain_id: (predictions, each.tolist()) for chain_id, predictions, each in answers}


def _starting_states(run: Run, requests: dict[ChainId, EvaluationRequest]) -> Trajectory:
    """The first of the starting states that every chain is about to have valued, as a population [B, N, *event]."""
    rows = [[request.x[:, :1] for each, request in requests.items() if each.problem == b] for b in range(run.problems)]
    return Trajectory.begin(run.process, torch.cat([torch.cat(row, 1) for row in rows], 0))


def _report(runs: list[Run], requests: dict[ChainId, EvaluationRequest], moved: set[int]) -> None:
    """Calls `on_step` for every problem in `moved` that has chains under way.

    The event's state is what those chains will have valued next, at the noisiest level of them; its x0 and scores are
    what each of the chains would return now.
    """
    for problem in sorted(moved):
        run, own = runs[problem], [request for each, request in requests.items() if each.problem == problem]
        if run.on_step is None or not own:
            continue
        k = min(request.k for request in own)
        held = [(request.x, request.held) for request in own if request.k == k and request.held is not None]
        x = torch.cat([states for states, _ in held], 1)
        x0 = torch.cat([best.clean.expand(1, states.shape[1], *best.clean.shape[2:]) for states, best in held], 1)
        each = [best.score for states, best in held for _ in range(states.shape[1])]
        event = Event(
            run=run.name,
            live_state=Trajectory.begin(run.process, x, k=k),
            live_x0=x0,
            live_scores=torch.tensor([each], dtype=torch.float64, device=x.device),
            problems=range(problem, problem + 1),
            chunk=0,
            meter=run.meter,
            completed=True,
        )
        run.on_step(event)
