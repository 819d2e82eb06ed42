"""A policy left in train(): noticed where its predictions are other than in eval()."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteerError
from ..processes.gaussian import GaussianProcess
from ..processes.second_order import model_of, noisy

TOLERANCE = 1e-4
"""Largest difference, relative to the largest number of a float32 prediction, that is taken for rounding."""


def check_evaluation_mode(process: GaussianProcess, states: Callable[[], Tensor], k: int) -> None:
    """Refuses a policy that predicts something else in train() than in eval().

    Dropout and batch statistics make densities those of another network at each call. Networks in train() that do the
    same in eval() pass, so that gradient checkpointing, which some tie to train(), stays possible.

    Args:
        process: the policy.
        states: gives states to predict at, [P, M, *event]; more than one, for batch statistics.
        k: their level.

    Raises:
        SteerError: where predictions differ.

    Cost: two predictions, uncounted, and only where a network is in train().
    """
    training = [module for network in networks(process.denoiser) for module in network.modules() if module.training]
    if not training:
        return
    process, x = replace(model_of(process), meter=None), noisy(process, states())
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        left = process.denoise(x, k)
        with _evaluating(training):
            right = process.denoise(x, k)
    off = float((left - right).abs().max() / right.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    if not off <= TOLERANCE * max(1.0, torch.finfo(right.dtype).eps / torch.finfo(torch.float32).eps):
        raise SteerError(
            f"the policy's network was left in train(), where it predicts otherwise than in eval() (by {off:.2g} of "
            f"the largest number at level {k}): dropout or batch statistics make each density that of another network; "
            "call .eval() on it before rollouts and updates, its weights get gradients all the same"
        )


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """These modules in eval(), and in train() again afterwards."""
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def networks(held_by: Any) -> list[nn.Module]:
    """The networks that a function can reach: in attributes, closures, bound arguments and containers.

    Args:
        held_by: a denoiser, or anything that holds networks.

    Returns:
        Modules, each once, without those inside another.
    """
    found, seen, waiting = [], set(), [held_by]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, type | types.ModuleType | Tensor | str | bytes):
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found.append(each)
        else:
            waiting += _held_by(each)
    return found


def _held_by(holder: Any) -> list[Any]:
    """What an object that is no network holds."""
    if isinstance(holder, Mapping):
        return list(holder.values())
    if isinstance(holder, list | tuple | set | frozenset):
        return list(holder)
    if isinstance(holder, functools.partial):
        return [holder.func, *holder.args, *holder.keywords.values()]
    held = [getattr(holder, "__self__", None), getattr(holder, "__func__", None)]
    if isinstance(holder, types.FunctionType):
        named = (holder.__globals__.get(name) for name in holder.__code__.co_names)
        held += [each for each in named if isinstance(each, nn.Module)]
        for cell in holder.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
    return [*held, *getattr(holder, "__dict__", {}).values()]
