"""Chains that move at their own pace, written as generators and evaluated together wherever they are at one level.

A walker yields `Ask`s, states it wants valued, and is sent back the prediction and the score. So an algorithm box
with breaks and backtracking reads as it is printed, and its chains still share calls.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

from steer.core.objective import check_finite
from steer.core.trajectory import Trajectory
from steer.errors import SteerError
from steer.key import Key
from steer.processes.gaussian import priced
from steer.results.result import Result
from steer.types import OnStep, Stop

from ..run import Run


class Held(NamedTuple):
    """What a walker has to show: a clean state (1, 1, *event), its score, and the slot of the noise it began from."""

    clean: Tensor
    score: float
    root: int


class Ask(NamedTuple):
    """States x (1, m, *event) at level k to be valued, and what the walker holds so far. At k = K: scored only."""

    x: Tensor
    k: int
    held: Held | None


Name = tuple[int, int]  # problem and slot
Answer = tuple[Tensor, list[float]]  # predictions (1, m, *event) of the states asked about, and their scores
Walker = Generator[Ask, Answer, Held]
"""Yields what it asks, is sent the answers, and returns what it found."""


def walk(
    run: Run, particles: int, start: Callable[[Run, Name], Walker], on_step: OnStep | None
) -> tuple[list[list[Held]], bool]:
    """Runs the walkers `start(run, (problem, slot))` to their end: what each holds, and whether they were stopped.

    Problems of an unconditioned process share network calls; those of a conditioned one are asked about one by one.
    """
    runs = [run.only(problem) for problem in range(run.batch)]
    names = [(problem, slot) for problem in range(run.batch) for slot in range(particles)]
    walkers = {name: start(runs[name[0]], name) for name in names}
    held: dict[Name, Held | None] = dict.fromkeys(names)
    try:
        with torch.no_grad():
            asks = {name: next(walker) for name, walker in walkers.items()}
            while asks:
                answers = _answers(run, runs, particles, asks)
                for name, answer in answers.items():
                    try:
                        asks[name] = walkers[name].send(answer)
                        held[name] = asks[name].held
                    except StopIteration as end:
                        held[name] = end.value
                        del asks[name]
                if on_step is not None and asks:
                    on_step(_population(runs, asks))
    except (Stop, KeyboardInterrupt):
        if any(found is None for found in held.values()):
            raise
        return _by_problem(held, run.batch), True
    except SteerError as error:
        error.keep(_by_problem(held, run.batch))
        raise
    return _by_problem(held, run.batch), False


def collect(run: Run, held: list[list[Held]], interrupted: bool, keep: int) -> Result:
    """The Result of what walkers hold: x (B, N, *event), of which the `keep` best share the weight."""
    x = torch.cat([torch.cat([found.clean for found in problem], 1) for problem in held], 0)
    reward = torch.tensor([[found.score for found in problem] for problem in held], dtype=torch.float64)
    root = torch.tensor([[found.root for found in problem] for problem in held])
    return run.result(x, reward.to(x.device), root.to(x.device), keep=keep, interrupted=interrupted)


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
    key = _named(run.key.fold("renoise", k_from), name[0], range(slot, slot + 1))
    return run.process.noise(x, k_from, k_to, key)


def _drawn(run: Run, name: Name, slots: range, what: str, make: Callable[[Key, int], Tensor]) -> Tensor:
    """What is made with the noise of some slots: all that lie between are drawn too, unless drawing has a price."""
    key = run.key.fold(what)
    if slots.step > 1 and priced(run.process):
        return torch.cat([make(_named(key, name[0], slots[i : i + 1]), 1) for i in range(len(slots))], 1)
    return make(_named(key, name[0], slots), slots[-1] - slots[0] + 1)[:, :: slots.step]


def _named(key: Key, problem: int, slots: range) -> Key:
    return key.shifted(problem=problem, slot=slots.start)


def _answers(run: Run, runs: list[Run], particles: int, asks: dict[Name, Ask]) -> dict[Name, Answer]:
    """Predictions and scores of what was asked at the noisiest level: who is ahead waits, and is met there again."""
    k = min(ask.k for ask in asks.values())
    names = [name for name, ask in asks.items() if ask.k == k]
    if run.process.problems in (None, 1):
        return _evaluated(run, runs[0], particles, asks, names, k)
    groups = [[name for name in names if name[0] == problem] for problem in range(run.batch)]
    found = [_evaluated(run, runs[group[0][0]], particles, asks, group, k) for group in groups if group]
    return {name: answer for answers in found for name, answer in answers.items()}


def _evaluated(
    run: Run, own: Run, particles: int, asks: dict[Name, Ask], names: list[Name], k: int
) -> dict[Name, Answer]:
    """Answers to some walkers at level k, by one run's network and reward."""
    process = own.process
    sizes = [asks[name].x.shape[1] for name in names]
    x = torch.cat([asks[name].x for name in names], 1)  # in one row: no conditioning tells them apart
    x0 = own.predict(x, k) if k < process.steps else x
    clean = process.complete(x, x0) if k < process.steps else x
    scores = torch.cat([own.objective(part) for part in clean.split(run.chunk, 1)], 1)[0].cpu().split(sizes)
    worst = torch.zeros(run.batch, particles, dtype=torch.float64)
    for (problem, slot), each in zip(names, scores, strict=True):
        worst[problem, slot] = each.max()  # NaN and +inf come through
    check_finite(worst, f"at level {k} of {process.steps}")
    answers = zip(names, x0.split(sizes, 1), scores, strict=True)
    return {name: (predictions, each.tolist()) for name, predictions, each in answers}


def _population(runs: list[Run], asks: dict[Name, Ask]) -> Trajectory:
    """What `on_step` gets: the states about to be valued at the noisiest level, as one row; of one problem if problems
    differ."""
    k = min(ask.k for ask in asks.values())
    first = next(problem for (problem, _), ask in asks.items() if ask.k == k)
    alone = runs[0].process is not runs[-1].process
    x = torch.cat([ask.x for (problem, _), ask in asks.items() if ask.k == k and (problem == first or not alone)], 1)
    return Trajectory.begin(runs[first].process, x, k=k)


def _by_problem(held: dict[Name, Held | None], batch: int) -> list[list[Held]]:
    return [[found for (problem, _), found in held.items() if problem == b and found is not None] for b in range(batch)]
