"""Rollouts from steered populations, with the weights that turn them back into samples of the policy.

A sampler of p(x) exp(r(x) / T) ends with weights W_i. On its paths the potentials multiply to exp(r(x_i) / T), however
they were spread over the steps and whatever proposal was corrected for, so the weights W_i exp(-r(x_i) / T) target the
policy itself. With the evidence estimate Z_hat they are more than consistent: for N rows,

    w_i = N W_i Z_hat exp(-r(x_i) / T),        E[mean_i w_i f(path_i)] = E_p[f(path)]        at any N,

because E[Z_hat sum W_i g_i] = E_p[exp(r / T) g] for every g. They are usable while Var_p(r / T) is about one, and say
nothing of samples that the reward forbids (-inf), which the population never holds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SteerError
from ..key import Key
from ..objective import conditioned, log_potential
from ..process import GaussianProcess
from ..result import Result
from ..trajectory import gather
from .batch import RolloutBatch
from .kernels import Windowed, stored_as
from .record import Walked, ancestors, metered, record, scores, walked
from .windows import Window, placed


def collect_steered(
    process: GaussianProcess,
    rewards: dict[str, Callable[..., Any]],
    method: Callable[..., Any],
    *,
    groups: int,
    group_size: int,
    key: Key,
    window: Window,
    storage: torch.dtype,
    path: bool,
    temperature: float,
    law: Literal["target", "base", "none"] | None,
    objective: Literal["policy_gradient", "tilted_sft"],
    policy_version: int,
) -> RolloutBatch:
    """The rows of a sampler's population; arguments as `collect`.

    A method's steps are stored where its Result keeps states (`keep_states`), or where its tree has a node at both
    ends (search.dts with levels=range(K - 1)); elsewhere rows have samples, weights and rewards alone.
    """
    groups, name = conditioned(process, groups), _name(method)
    mask = placed(window, process, groups, group_size, key)
    if not bool((mask == mask[:1, :1]).all()):
        raise SteerError(
            f"particles of {name} meet at every step, so that all need the same window, got {window}, which differs "
            "between rows; use grpo.every(), grpo.sliding(update), or method=None"
        )
    inside = frozenset(t for t, on in zip(process.times, mask[0, 0].tolist(), strict=False) if on)
    chain = stored_as(process.with_rule(Windowed(process.rule, inside)), storage)
    steering, others = next(iter(rewards.items())), dict(list(rewards.items())[1:])
    keeps = {"keep_states": True} if "keep_states" in inspect.signature(method).parameters else {}
    result: Result = method(
        chain, steering[1], batch=groups, particles=group_size, temperature=temperature, key=key, **keeps
    )
    if result.interrupted:
        raise SteerError(f"{name} was interrupted: its rows are predictions, not samples; collect again").keep(result)
    policy, meter = metered(process)
    values = {steering[0]: result.reward} | scores(policy, result.x, others)
    law = law or law_of(result)
    row = torch.arange(result.reward.numel(), device=result.x.device).view(result.reward.shape)
    first = row[:, :1]
    state = result.trajectory
    if state is not None and keeps:
        steps, lineage = walked(state, {}), ancestors(state)
        parent = first + state.ancestor(1) if state.resamplings().any() else row
    else:
        steps, lineage, parent = tree_steps(chain, result), None, row
    if law == "none":
        steps = [step._replace(log_behaviour=torch.full_like(step.log_prob, torch.nan)) for step in steps]
    wide = mask[:1, :1].expand(groups, row.shape[1], -1).to(row.device)
    log_target, log_base = log_weights(result, law)
    batch = record(
        process, steps, wide, x=result.x, rewards=values, key=key, cost=result.cost + meter.cost(), storage=storage,
        window=window, policy_version=policy_version, path=_path(result, storage) if path else None, ancestors=lineage,
        root_id=first + result.root, parent_id=parent, log_w_target=log_target.float(), log_w_base=log_base.float(),
        sample_id=first + _copies(result.x), method=name,
        objective="tilted_sft" if law == "none" else objective,
    )  # fmt: skip
    if law == "none":
        return batch
    batch = merged(batch)
    if objective == "policy_gradient":
        _check_ess(batch, result, temperature)
    return batch


def law_of(result: Result) -> Literal["target", "base", "none"]:
    """What a Result's weights target: its tilted law (SMC's family, DTS), the model (a rollout), or none (searches).

    Read off its evidence and memory. What is biased is taken at its word: DTS's "boltzmann" build, for one.
    """
    if result.trajectory is not None and "spent" in result.trajectory.memory:
        return "target"
    if bool(result.log_evidence.isnan().any()):
        return "none"
    return "base" if result.tree is None else "target"


def log_weights(result: Result, law: Literal["target", "base", "none"]) -> tuple[Tensor, Tensor]:
    """Log-weights (P, N) of a Result's rows for the law it targets and for the policy, with mean one in expectation."""
    target = result.log_weight + math.log(result.log_weight.shape[1])
    if law == "none":
        return target, torch.full_like(target, torch.nan)
    if law == "base":
        return target, target
    base = target - log_potential(result.reward, result.temperature)
    evidence = torch.where(result.log_evidence.isnan(), 0.0, result.log_evidence)  # unknown after MCMC starts
    return target, (base + evidence[:, None]).masked_fill(target == -torch.inf, -torch.inf)


def merged(batch: RolloutBatch) -> RolloutBatch:
    """The batch with copies of a sample merged: the first row has their summed weight, the others none and no steps."""
    owner = batch.sample_id
    if bool((owner == torch.arange(batch.rows, device=owner.device)).all()):
        return batch
    kept = owner == torch.arange(batch.rows, device=owner.device)

    def pooled(log_weight: Tensor) -> Tensor:
        top = torch.full_like(log_weight, -torch.inf).scatter_reduce(0, owner, log_weight, "amax")
        shift = torch.where(top.isfinite(), top, 0.0)
        total = torch.zeros_like(log_weight).index_add(0, owner, (log_weight - shift[owner]).exp())
        return torch.where(kept, total.log() + shift, -torch.inf)

    return replace(
        batch, log_w_target=pooled(batch.log_w_target), log_w_base=pooled(batch.log_w_base),
        mask=batch.mask & kept[:, None],
    )  # fmt: skip


def tree_steps(process: GaussianProcess, result: Result) -> list[Walked]:
    """Steps of a tree's leaves where nodes stand at both ends of a step: transitions are rebuilt, nothing is drawn."""
    tree = result.tree
    if tree is None:
        return []
    slots = torch.where(tree.leaves.filled, torch.arange(tree.leaves.size), 0)
    steps, device = [], result.x.device
    for depth in range(tree.depth, 1, -1):
        layer, above = tree.layers[depth], tree.layers[depth - 1]
        parent = layer["parent"].gather(1, slots)
        k = tree.levels[depth - 2]
        if tree.levels[depth - 1] == k + 1 and process.stochastic(k):
            here = {name: gather(above[name].to(device), parent.to(device)) for name in ("x", "x0")}
            after = gather(layer["x"].to(device), slots.to(device))
            law = process.transition(here["x"], here["x0"], k)
            log_prob = law.log_prob(after)
            drawn_by = log_prob - layer["correction"].gather(1, slots).to(device)
            steps.append(Walked(k, here["x"], after, law.mean, log_prob, drawn_by, slots.to(device)))
        slots = parent
    return steps[::-1]


def _check_ess(batch: RolloutBatch, result: Result, temperature: float) -> None:
    size, rows = torch.minimum(batch.ess(), batch.effective_roots()), batch.rows // batch.groups
    low = (~(size >= rows / 4)).nonzero()
    if len(low):
        worst = int(size.argmin())
        raise SteerError(
            f"weights back to the policy must keep an ESS of a quarter of the group, {rows / 4:g} of {rows} rows and "
            f"of starting noises, got {batch.ess()[worst]:.3g} and {batch.effective_roots()[worst]:.3g} in group "
            f"{worst} ({len(low)} of {batch.groups} groups are below): the steering is too "
            f"strong to correct; raise the temperature ({temperature:g} now; the ESS falls like exp(-Var(r / T))), or "
            'pass objective="tilted_sft" for losses that learn the tilted law itself'
        ).keep(result)


def _copies(x: Tensor) -> Tensor:
    """Slot (P, N) of the first particle of the problem with the same sample."""
    slots = []
    for samples in x.flatten(2) if x.ndim > 2 else x[..., None]:
        _, group = torch.unique(samples, dim=0, return_inverse=True)
        first = torch.full_like(group, len(group)).scatter_reduce(
            0, group, torch.arange(len(group), device=group.device), "amin"
        )
        slots.append(first[group])
    return torch.stack(slots)


def _path(result: Result, storage: torch.dtype) -> Tensor | None:
    return None if result.trajectory is None else result.trajectory.states().to(storage)


def _name(method: Callable[..., Any]) -> str:
    inner = getattr(method, "func", method)
    return getattr(inner, "__name__", type(inner).__name__)
