"""The tasks of `auto.py`: a process, a reward at a price, and where there is one a judge that no method sees."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import rewards

sys.path += [str(Path(__file__).resolve().parents[1] / "train"), str(Path(__file__).resolve().parent)]
CHAINS = (3, 8, 20, 48)  # what the four budgets pay for, in plain chains that are scored once


@dataclass(frozen=True)
class Task:
    """A process and a reward.

    price:   of a score, in network rows. With it a budget covers rows, backward passes (two rows each) and scores.
    judge:   of the best sample, never used to steer.
    chains:  that the budgets pay for.
    samples: unsteered samples that stand for the exact distribution.
    ess:     share of them that their ESS is at the temperature of the population. At any but a fifth, nothing but
             populations is measured.
    """

    process: Callable[[], Any]
    reward: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor], Tensor] | None = None
    price: int = 0
    chains: tuple[int, ...] = CHAINS
    samples: int = 1024
    ess: float = 0.2

    def at(self, price: int) -> Task:
        """The same, slower."""
        return replace(self, price=price)


def wrinkles(samples: Tensor) -> Tensor:
    """Noise of unit variance that is a function of the sample, and rough: no two samples share it."""
    flat = samples.flatten(1).double()
    direction = torch.linspace(0.5, 1.5, flat.shape[1], dtype=torch.float64)
    return (2.0**0.5) * torch.sin(1e3 * flat @ direction)


@cache
def mixture(dimension: int, rule: Any = None, steps: int = 10) -> Any:
    """Four Gaussians in that many dimensions."""
    draw = torch.Generator().manual_seed(dimension)
    means = 1.5 * torch.randn(4, dimension, generator=draw, dtype=torch.float64)
    process = steer.models.gaussian_mixture(means, [0.3] * 4, steps=steps)
    return process if rule is None else process.with_rule(rule)


def along(dimension: int) -> rewards.Linear:
    """A coordinate in a direction that favours none of the modes by much."""
    draw = torch.Generator().manual_seed(100 + dimension)
    return rewards.Linear(torch.randn(dimension, generator=draw, dtype=torch.float64) / dimension**0.5)


def far(samples: Tensor) -> Tensor:
    """Steep: near a point that one sample in some hundreds comes near to."""
    return -20.0 * (samples.flatten(1) - 2.5).norm(dim=1)


def rare(samples: Tensor) -> Tensor:
    """1 for an image of a 3 with much ink (one sample in a hundred), else 0."""
    return ((rewards.DigitLogProb(3)(samples) > -0.7) & (rewards.Ink()(samples) > 0.33)).double()


def noisy(reward: Any, size: float) -> Callable[[Tensor], Tensor]:
    """A reward with noise of that standard deviation, and without a gradient; its judge has no noise."""
    return lambda samples: (reward(samples) + size * wrinkles(samples)).detach()


@cache
def flow(name: str, steps: int, rule: Any) -> Any:
    """The embedded flow, or its few-step twin."""
    from digits_flow_twin import TEACHER, TWIN, process

    return process({"flow": TEACHER, "twin": TWIN}[name], steps, rule)


@cache
def digits(rule: Any = None, steps: int = 8) -> Any:
    """The embedded diffusion model of digits, unlabelled."""
    return steer.load("digits", steps=steps, transition=rule)


@cache
def letters() -> Any:
    """The embedded masked model of words."""
    return steer.load("letters")


def text(spec: str) -> Callable[[Tensor], Tensor]:
    """A reward of words by its name; reads the tokens when it is called."""
    return lambda tokens: rewards.from_specs([spec], letters().text)(tokens)


def emoji() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """CLIP of the pipeline `emoji`, and another CLIP to judge by."""
    from emoji import judge

    return rewards.clip_emoji(), judge()


ODE, SDE = steer.ode(), steer.ddim(eta=1.0)
SMALL = -1  # sign of a size
THREE, JUDGE = rewards.DigitLogProb(3), rewards.DigitLogProb(3, net="digits-judge")
JPEG, PNG = rewards.JPEGSize(sign=SMALL), rewards.PNGSize(sign=SMALL)
QUADRATIC = rewards.Quadratic(torch.full((16,), 1.0, dtype=torch.float64), torch.ones(16, dtype=torch.float64))


def tasks() -> dict[str, Task]:
    """Name -> task."""
    mixed = Task(partial(mixture, 16), along(16), samples=32768)
    three = Task(digits, THREE, JUDGE)
    few = Task(partial(flow, "twin", 5, SDE), THREE, JUDGE)
    count_e = Task(letters, text("letters:e"))
    found = {
        "mixture 2-d": Task(partial(mixture, 2), along(2), samples=32768),
        "mixture 16-d": mixed,
        "mixture 64-d": Task(partial(mixture, 64), along(64), samples=32768),
        "mixture 2-d, far": Task(partial(mixture, 2), far, samples=32768),
        "mixture 16-d, quadratic": Task(partial(mixture, 16), QUADRATIC, samples=32768),
        "mixture 16-d, noisy": replace(mixed, reward=noisy(along(16), 0.5), judge=along(16)),
        "mixture 16-d, ODE": replace(mixed, process=partial(mixture, 16, ODE)),
        "mixture 16-d, 40 steps": replace(mixed, process=partial(mixture, 16, None, 40), chains=(3, 10, 28)),
        "digits 3": three,
        "digits jpeg": Task(digits, JPEG, PNG),
        "digits ink": Task(digits, rewards.Ink()),
        "digits symmetry": Task(digits, rewards.Symmetry()),
        "digits rare": Task(digits, rare),
        "digits 3, noisy": Task(digits, noisy(THREE, 1.0), JUDGE),
        "digits 3, ODE": replace(three, process=partial(digits, ODE)),
        "flow 3": Task(partial(flow, "flow", 8, SDE), THREE, JUDGE),
        "flow jpeg": Task(partial(flow, "flow", 8, SDE), JPEG, PNG),
        "few steps, 3": few,
        "few steps, jpeg": Task(partial(flow, "twin", 5, SDE), JPEG, PNG),
        "few steps, ink": Task(partial(flow, "twin", 4, SDE), rewards.Ink()),
        "few steps, 3, ODE": Task(partial(flow, "twin", 2, ODE), THREE, JUDGE),
        "letters e": count_e,
        "letters ing": Task(letters, text("matches:.*ing")),
    }
    slow = {"mixture 16-d": mixed, "digits 3": three, "digits jpeg": found["digits jpeg"], "few steps, 3": few}
    found |= {f"{name}, price {p}": task.at(p) for name, task in slow.items() for p in (1, 10, 100)}
    found["letters e, price 10"] = count_e.at(10)
    found |= {
        f"{name}, cold": replace(found[name], ess=0.02) for name in ("mixture 2-d", "mixture 16-d", "mixture 64-d")
    }
    found |= {f"{name}, warm": replace(found[name], ess=0.5) for name in ("mixture 2-d", "mixture 16-d")}
    found["letters e, cold"] = replace(count_e, ess=0.02, samples=8192)
    return found
