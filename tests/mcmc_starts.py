"""Starts run by themselves, on a prior that is tilted exactly."""

import torch

import steer
from steer.core.objective import open_objective
from steer.key import Key


def flat_process(size, dtype=torch.float64):
    """A process whose prior is N(0, I) and whose prediction is the state: the tilted prior is N(0, I) exp(r / T)."""
    times = steer.uniform_times(steer.RectifiedFlow(), 4, start=1.0)
    return steer.from_denoiser(lambda x, t: x, steer.RectifiedFlow(), times, event=(size,), dtype=dtype)


def run_start(start, process, reward, *, batch, particles, key=0, temperature=1.0):
    """A start's trajectory and the ledger."""
    process, objective, meter = open_objective(process, reward)
    return start.prepare(process, temperature)[0](process, objective, Key(key), batch, particles), meter.cost()
