"""Trackers of experiments as `on_step=`: TensorBoard, Weights & Biases, trackio, and whatever else logs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch

from ..core.diagnostics import surviving_seeds
from ..core.event import Event


def tensorboard(writer: Any, *, total: int | None = None) -> Callable[[Event], None]:
    """Logs every step to TensorBoard: `on_step=steer.trackers.tensorboard(SummaryWriter("runs/tb"))`.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar(name, value, step)`.
        total: as in `measures`.

    Returns:
        A function of an Event, for `on_step=`. Its steps are the events it saw, from 1: levels of the chain where the
        method goes through it once.
    """

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return _logged(log, total)


def wandb(run: Any, *, total: int | None = None) -> Callable[[Event], None]:
    """Logs every step to Weights & Biases: `on_step=steer.trackers.wandb(wandb.init(project="foxes"))`.

    Args:
        run: what `wandb.init` returns, or what has its `log(values, step=step)`, as trackers of accelerate do.
        total: as in `measures`.

    Returns:
        A function of an Event, as `tensorboard` returns.
    """
    return _logged(lambda values, step: run.log(dict(values), step=step), total)


def trackio(run: Any, *, total: int | None = None) -> Callable[[Event], None]:
    """Logs every step to trackio: `on_step=steer.trackers.trackio(trackio.init(project="foxes"))`.

    Args:
        run: what `trackio.init` returns.
        total: as in `measures`.

    Returns:
        A function of an Event, as `tensorboard` returns.
    """
    return wandb(run, total=total)


def measures(event: Event, total: int | None = None) -> dict[str, float]:
    """The numbers of a step that trackers log, means over problems.

    Args:
        event: the step.
        total: network rows that the run will spend over all its problems, for the time that is left; None where that is
            not known.

    Returns:
        By name: steer/reward_mean and steer/reward_best, of the predictions that are not forbidden and of the best, and
        steer/forbidden, the share of the others, where predictions were scored; steer/ess, steer/surviving_seeds
        (distinct starting noises among particles of positive weight), steer/level, steer/nfe (network rows so far),
        steer/seconds and, with a total, steer/seconds_left.

    Cost: scores and weights are read from the device.
    """
    state, scores, found = event.live_state, event.live_scores, dict[str, float]()
    if scores is not None:
        allowed = scores > -torch.inf
        found["steer/reward_mean"] = scores[allowed].mean().item()
        found["steer/reward_best"] = scores.amax(1).mean().item()
        found["steer/forbidden"] = 1.0 - allowed.double().mean().item()
    found["steer/ess"] = event.ess.mean().item()
    found["steer/surviving_seeds"] = surviving_seeds(state.root, state.log_weight).mean().item()
    found |= {"steer/level": event.level, "steer/nfe": event.cost.nfe, "steer/seconds": event.cost.seconds["total"]}
    if total is not None:
        found["steer/seconds_left"] = event.cost.seconds_left(total)
    return found


def _logged(log: Callable[[Mapping[str, float], int], None], total: int | None) -> Callable[[Event], None]:
    """A function of an Event that logs its measures under the number of the event."""
    steps = count(1)
    return lambda event: log(measures(event, total), next(steps))
