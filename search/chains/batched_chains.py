"""Chains that move at their own pace, written as generators and evaluated together wherever they are at one level.

A chain yields `EvaluationRequest`s, states it wants valued, and is sent back the prediction and the score. So an
algorithm box with breaks and backtracking reads as it is printed, and its chains still share calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from steer.core.event import Event
from steer.core.objective import check_finite
from steer.core.run import Run
from steer.core.trajectory import Trajectory
from steer.errors import SteerError
from steer.key import Key
from steer.processes.gaussian import sampling_uses_network
from steer.results.result import Result
from steer.types import Stop


class BestSoFar(NamedTuple):
    """What a chain has to show: a clean state (1, 1, *event), its score, and the slot of the noise it began from."""

    clean: Tensor
    score: float
    root: int


class EvaluationRequest(NamedTuple):
    """States x (1, m, *event) at level k to be valued, and what the chain holds so far. At k = K: scored only."""

    x: Tensor
    k: int
    held: BestSoFar | None


Name = tuple[int, int]  # problem and slot
Answer = tuple[Tensor, list[float]]  # predictions (1, m, *event) of the states asked about, and their scores
Chain = Generator[EvaluationRequest, Answer, BestSoFar]
"""Yields what it requests, is sent the answers, and returns what it found."""


def run_in_lockstep(run: Run, particles: int, start: Callable[[Run, Name], Chain], keep: int) -> Result:
    """Runs the chains `start(run, (problem, slot))` to their end, or until they are stopped.

    Problems of an unconditioned process share network calls; those of a conditioned one are asked about one by one.

    Args:
        run: the method's run.
        particles: N chains per problem.
        start: what begins a chain.
        keep: how many of the N chains share the weight.
    """
    runs = [run.only(problem) for problem in range(run.problems)]
    names = [(problem, slot) for problem in range(run.problems) for slot in range(particles)]
    chains = {name: start(runs[name[0]], name) for name in names}
    held: dict[Name, BestSoFar | None] = dict.fromkeys(names)
    population: Trajectory | None = None
    try:
        with torch.no_grad():
            requests = {name: next(chain) for name, chain in chains.items()}
            while requests:
                population = _population(runs, requests)
                answers = _answers(run, runs, particles, requests)
                for name, answer in answers.items():
                    try:
                        requests[name] = chains[name].send(answer)
                        held[name] = requests[name].held
                    except StopIteration as end:
                        held[name] = end.value
                        del requests[name]
                _report(runs, requests, {problem for problem, _ in answers})
    except (Stop, KeyboardInterrupt):
        if any(found is None for found in held.values()):
            raise
        return _result(run, held, keep, interrupted=True)
    except SteerError as error:
        complete = all(found is not None for found in held.values())
        error.keep(_result(run, held, keep, interrupted=True) if complete else population)
        raise
    return _result(run, held, keep, interrupted=False)


def _result(run: Run, held: dict[Name, BestSoFar | None], keep: int, *, interrupted: bool) -> Result:
    """The Result of what chains hold: x (B, N, *event), of which the `keep` best share the weight."""
    found = [[held[name] for name in held if name[0] == problem] for problem in range(run.problems)]
    rows = [[one for one in problem if one is not None] for problem in found]
    x = torch.cat([torch.cat([one.clean for one in problem], 1) for problem in rows], 0)
    reward = torch.tensor([[one.score for one in problem] for problem in rows], dtype=torch.float64)
    root = torch.tensor([[one.root for one in problem] for problem in rows])
    return Result.from_search(run, x, reward.to(x.device), root.to(x.device), keep=keep, interrupted=interrupted)


def begin(run: Run, name: Name, slots: range) -> Tensor:
    """The prior's draws of some equally spaced noise slots, (1, m, *event)."""
    return _drawn(run, name, slots, "prior", lambda key, many: run.process.prior(key, 1, many))


def draw(run: Run, name: Name, slots: range, x: Tensor, x0: Tensor, k: int) -> Tensor:
    """Steps from level k of one state (1, 1, *event), drawn with the noise of some slots: (1, m, *event)."""

    def step(key: Key, many: int) -> Tensor:
        wide, ahead = (tensor.expand(1, many, *tensor.shape[2:]) for tensor in (x, x0))
        return run.process.transition(wide, ahead, k).sample(key.at(k))

    return _drawn(run, name, slots, "step", step)


def renoise(run: Run, name: Name, slot: int, x: Tensor, k_from: int, k_to: int) -> Tensor:
    """One state (1, 1, *event) back at a noisier level, with the noise of a slot."""
    key = _key_at(run.key.fold("renoise", k_from), name[0], range(slot, slot + 1))
    return run.process.noise(x, k_from, k_to, key)


def _drawn(run: Run, name: Name, slots: range, what: str, make: Callable[[Key, int], Tensor]) -> Tensor:
    """What is made with the noise of some slots: all that lie between are drawn too, unless drawing has a price."""
    key = run.key.fold(what)
    if slots.step > 1 and sampling_uses_network(run.process):
        return torch.cat([make(_key_at(key, name[0], slots[i : i + 1]), 1) for i in range(len(slots))], 1)
    return make(_key_at(key, name[0], slots), slots[-1] - slots[0] + 1)[:, :: slots.step]


def _key_at(key: Key, problem: int, slots: range) -> Key:
    return key.shifted(problem=problem, slot=slots.start)


def _answers(run: Run, runs: list[Run], particles: int, requests: dict[Name, EvaluationRequest]) -> dict[Name, Answer]:
    """Predictions and scores of what was asked at the noisiest level: who is ahead waits, and is met there again."""
    k = min(ask.k for ask in requests.values())
    names = [name for name, ask in requests.items() if ask.k == k]
    if run.process.problems in (None, 1):
        return _evaluate(run, runs[0], particles, requests, names, k)
    groups = [[name for name in names if name[0] == problem] for problem in range(run.problems)]
    found = [_evaluate(run, runs[group[0][0]], particles, requests, group, k) for group in groups if group]
    return {name: answer for answers in found for name, answer in answers.items()}


def _evaluate(
    run: Run, own: Run, particles: int, requests: dict[Name, EvaluationRequest], names: list[Name], k: int
) -> dict[Name, Answer]:
    """Answers to some chains at level k, by one run's network and reward."""
    process = own.process
    sizes = [requests[name].x.shape[1] for name in names]
    x = torch.cat([requests[name].x for name in names], 1)  # in one row: no conditioning tells them apart
    x0 = own.predict(x, k) if k < process.steps else x
    clean = process.complete(x, x0) if k < process.steps else x
    scores = torch.cat([own.objective(part) for part in clean.split(run.chunk, 1)], 1)[0].cpu().split(sizes)
    worst = torch.zeros(run.problems, particles, dtype=torch.float64)
    for (problem, slot), each in zip(names, scores, strict=True):
        worst[problem, slot] = each.max()  # NaN and +inf come through
    check_finite(worst, f"at level {k} of {process.steps}")
    answers = zip(names, x0.split(sizes, 1), scores, strict=True)
    return {name: (predictions, each.tolist()) for name, predictions, each in answers}


def _population(runs: list[Run], requests: dict[Name, EvaluationRequest]) -> Trajectory:
    """The states about to be valued at the noisiest level; of one problem where each has a process of its own."""
    k = min(request.k for request in requests.values())
    first = next(problem for (problem, _), request in requests.items() if request.k == k)
    alone = runs[0].process is not runs[-1].process
    x = [r.x for (problem, _), r in requests.items() if r.k == k and (problem == first or not alone)]
    return Trajectory.begin(runs[first].process, torch.cat(x, 1), k=k)


def _report(runs: list[Run], requests: dict[Name, EvaluationRequest], moved: set[int]) -> None:
    """Tells `on_step`, for every problem whose chains have moved, what they will have valued next, at its noisiest
    level; as x0 and scores, what each chain would return now."""
    for problem in sorted(moved):
        run, own = runs[problem], [request for name, request in requests.items() if name[0] == problem]
        if run.on_step is None or not own:
            continue
        k = min(request.k for request in own)
        held = [(request.x, request.held) for request in own if request.k == k and request.held is not None]
        if not held:
            continue
        x = torch.cat([states for states, _ in held], 1)
        x0 = torch.cat([best.clean.expand_as(states) for states, best in held], 1)
        scores = torch.tensor([[best.score for states, best in held for _ in range(states.shape[1])]])
        state = Trajectory.begin(run.process, x, k=k)
        event = Event(
            run=run.name,
            state=state,
            x0=x0,
            scores=scores.to(x.device, torch.float64),
            problems=range(problem, problem + 1),
            chunk=0,
            meter=run.meter,
        )
        run.on_step(event)
