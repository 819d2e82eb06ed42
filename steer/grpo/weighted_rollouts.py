"""Rollouts from steered populations, with the weights that turn them back into samples of the policy.

A sampler of p(x) exp(r(x) / T) ends with weights W_i. On its paths the potentials multiply to exp(r(x_i) / T), however
they were spread over the steps and whatever proposal was corrected for, so the weights W_i exp(-r(x_i) / T) target the
policy itself. With the estimate Z_hat of the normalizing constant they are unbiased, not only consistent: for N rows,

    w_i = N W_i Z_hat exp(-r(x_i) / T),        E[mean_i w_i f(path_i)] = E_p[f(path)]        at any N,

because E[Z_hat sum W_i g_i] = E_p[exp(r / T) g] for every g. They are usable while Var_p(r / T) is about one, and do
not cover samples that the reward forbids (-inf), which the population never holds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.leaf_paths import LeafPaths
from ..core.loop import keeping
from ..core.objective import num_problems
from ..core.population import log_potential
from ..errors import NotStochasticError, SteerError
from ..key import Key
from ..processes.gaussian import GaussianProcess
from ..processes.second_order import SecondOrderProcess, model_of, noisy
from ..results.result import Law, Result
from .assembly import RecordedStep, ancestors, assemble, recorded_steps, score_samples, with_meter
from .batch import Objective, RolloutBatch
from .kernels import stored_as, windowed
from .windows import Window, stochastic_steps


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
    law: Law | None,
    objective: Objective,
    policy_version: int,
) -> RolloutBatch:
    """The rows of a method's population, with their weights back to the policy; arguments as `collect`."""
    groups, name = num_problems(process, groups), _name(method)
    mask = _same_for_all(stochastic_steps(window, process, groups, group_size, key), window, name)
    inside = frozenset(t for t, on in zip(process.times, mask[0, 0].tolist(), strict=False) if on)
    chain = stored_as(process.with_rule(windowed(process.rule, inside)), storage)
    steering, others = next(iter(rewards.items())), dict(list(rewards.items())[1:])
    keeps = {"keep_states": True} if "keep_states" in inspect.signature(method).parameters else {}
    result: Result = method(
        chain, steering[1], batch=groups, particles=group_size, temperature=temperature, key=key, **keeps
    )
    with keeping(result):  # paid for, whatever is wrong with it
        declared, law = law is not None, law or result.law
        _check_run(result, chain, law, name)
        if not _rows_are_leaves(result):  # after `take` or `draw`
            result = replace(result, tree=None)
        policy, meter = with_meter(process)
        values = {steering[0]: result.reward} | score_samples(policy, result.x, others)
        steps, lineage, parent = _recorded(chain, result)
        if law == "none":
            if steps and objective == "policy_gradient" and not declared:
                raise _no_weight_corrects(name)
            steps = [step._replace(log_behaviour=torch.full_like(step.log_prob, torch.nan)) for step in steps]
        elif objective == "policy_gradient":
            _check_steps(steps, mask, result, name)
        first = torch.arange(groups, device=result.x.device)[:, None] * result.reward.shape[1]
        log_target, log_base = log_weights(result, law)
        batch = assemble(
            process,
            steps,
            mask[:, :1].expand(-1, result.reward.shape[1], -1).to(result.x.device),
            x=result.x,
            rewards=values,
            key=key,
            cost=result.cost + meter.cost(),
            storage=storage,
            window=window,
            policy_version=policy_version,
            path=_path(result, storage) if path else None,
            ancestors=lineage,
            root_id=first + result.root,
            parent_id=first + parent,
            sample_id=first + _copies(result.x),
            method=name,
            log_w_target=log_target.float(),
            log_w_base=log_base.float(),
            objective="tilted_sft" if law == "none" else objective,
        )
        if law == "none":
            return batch
        batch = merged(batch)
        if objective == "policy_gradient":
            _check_ess(batch, result, temperature)
        return batch


def log_weights(result: Result, law: Law) -> tuple[Tensor, Tensor]:
    """Log-weights [P, N] of a Result's rows, towards its target and back to the policy; of mean one in expectation.

    Args:
        law: what the rows are weighted samples of, as in `Result.law`.
    """
    target = result.log_weight + math.log(result.log_weight.shape[1])
    if law == "none":
        return target, torch.full_like(target, torch.nan)
    if law == "model":
        return target, target
    base = target - log_potential(result.reward, result.temperature)
    evidence = torch.where(result.log_evidence.isnan(), 0.0, result.log_evidence)  # not known after MCMC starts
    return target, (base + evidence[:, None]).masked_fill(target == -torch.inf, -torch.inf)


def merged(batch: RolloutBatch) -> RolloutBatch:
    """The batch with copies of a sample merged into one row, for a batch that was `select`ed from another.

    Args:
        batch: rows, of which those of equal `sample_id` are copies.

    Returns:
        A batch of as many rows: the first of equal ones has their summed weight; the others have weight 0 (log-weights
        of -inf), and padding in place of steps.
    """
    row = torch.arange(batch.rows, device=batch.sample_id.device)
    sample = torch.unique(batch.sample_id, return_inverse=True)[1]
    owner = torch.full_like(row, batch.rows).scatter_reduce(0, sample, row, "amin")[sample]
    kept = owner == row
    if bool(kept.all()):
        return batch

    def pooled(log_weight: Tensor) -> Tensor:
        top = torch.full_like(log_weight, -torch.inf).scatter_reduce(0, owner, log_weight, "amax")
        shift = torch.where(top.isfinite(), top, 0.0)
        total = torch.zeros_like(log_weight).index_add(0, owner, (log_weight - shift[owner]).exp())
        return torch.where(kept, total.log() + shift, -torch.inf)

    def padded(steps: Tensor, blank: int = 0) -> Tensor:
        return torch.where(kept.view(-1, *(1 for _ in steps.shape[1:])), steps, blank)

    names = ("x_t", "x_next", "t", "t_next", "step_idx", "std", "logp_old", "logp_behavior")
    return replace(
        batch,
        log_w_target=pooled(batch.log_w_target),
        log_w_base=pooled(batch.log_w_base),
        mask=batch.mask & kept[:, None],
        mean_old=None if batch.mean_old is None else padded(batch.mean_old),
        step_id=None if batch.step_id is None else padded(batch.step_id, -1),
        x_before=None if batch.x_before is None else padded(batch.x_before),
        step_rewards={name: padded(value) for name, value in batch.step_rewards.items()},
        **{name: padded(getattr(batch, name)) for name in names},
    )


def tree_steps(process: GaussianProcess, paths: LeafPaths) -> list[RecordedStep]:
    """The stochastic steps along the lines of a tree's leaves, oldest first, where the tree kept them."""
    remembers, found = isinstance(process, SecondOrderProcess), []
    for i, step in enumerate(paths.steps):
        x, before = (noisy(process, paths.steps[j].x) for j in (i, max(0, i - 1)))
        if process.stochastic(step.k):
            moved = noisy(process, step.x_next)
            of_edge = step.log_prob, step.log_behaviour, step.node
            found.append(RecordedStep(step.k, x, moved, None, *of_edge, before if remembers else None))
    return found


def _recorded(process: GaussianProcess, result: Result) -> tuple[list[RecordedStep], Tensor | None, Tensor]:
    """Stored steps of a result's rows, their ancestors [P, N, K] at every level, and their parents [P, N]."""
    state, row = result.trajectory, torch.arange(result.reward.shape[1], device=result.x.device)
    row = row.expand(result.reward.shape)
    if state is not None and not (state.keep_states and _policy_ran(process, result)):
        return [], None, row
    if result.tree is not None:
        paths: LeafPaths = result.tree.leaf_paths(result.x.device)
        return tree_steps(process, paths), None, paths.ancestors[-2]
    if state is None:
        return [], None, row
    return recorded_steps(state, {}), ancestors(state), state.ancestor(1) if state.resamplings().any() else row


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises SteerError where an argument is none of its choices."""
    if value not in choices:
        raise SteerError(f"{name} is one of {', '.join(map(repr, choices))}, got {value!r}; pass one of these")


def _same_for_all(mask: Tensor, window: Window, name: str) -> Tensor:
    """Where steps are stochastic, [P, N, K], if that is the same for all rows."""
    if not bool((mask == mask[:1, :1]).all()):
        raise SteerError(
            f"particles of {name} are resampled between steps, so all need the same window, got {window}, which "
            "differs between rows; use grpo.every(), grpo.sliding(update), or method=None"
        )
    return mask


def _check_run(result: Result, chain: GaussianProcess, law: str, name: str) -> None:
    """Raises where a run did not end, or did not use the policy's own transitions."""
    if result.interrupted:
        raise SteerError(f"{name} was interrupted: its rows are predictions, not samples; collect again")
    if law != "none" and not _policy_ran(chain, result):
        raise SteerError(
            f"{name} moves particles by transitions of its own (another process, rule or start than the policy's), so "
            "its steps are not draws of the policy; collect with steer.smc or another sampler over the policy's "
            'transitions, or pass law="none" for its samples alone'
        )


def _policy_ran(chain: GaussianProcess, result: Result) -> bool:
    """Whether a run used the policy as it was given: its network, rule, grid and prior."""
    if isinstance(result.process, SecondOrderProcess) != isinstance(chain, SecondOrderProcess):
        return False
    if isinstance(result.process, SecondOrderProcess) and result.process.rule != chain.rule:
        return False
    ran, chain = model_of(result.process), model_of(chain)
    return (
        isinstance(ran, GaussianProcess)
        and ran.denoiser is chain.denoiser
        and ran.initial is chain.initial
        and (ran.rule, ran.times, ran.schedule) == (chain.rule, chain.times, chain.schedule)
    )


def _rows_are_leaves(result: Result) -> bool:
    """Whether a result's rows are the leaves of its tree, in their order; True where there is no tree."""
    if result.tree is None:
        return True
    tree, x = result.tree, result.x
    leaves = tree.states(tree.depth, tree.leaf_slots(), x.device)["x"]
    return leaves.shape == x.shape and bool((leaves.to(x.dtype) == x).all())


def _no_weight_corrects(name: str) -> SteerError:
    """The error of a policy gradient that would take the rows for the policy's."""
    return NotStochasticError(
        f"a policy gradient needs samples of the policy, or weights that turn them into such, and {name} gives neither "
        '(its Result.law is "none"): it begins from a start that no weight corrects, selects greedily, or is a '
        "function of yours that does not say what it samples. Use a weighted sampler, for instance "
        "functools.partial(steer.smc, start=steer.pcnl(...)); if you know what it samples, declare it by "
        'law="target" or law="model"; for its samples alone pass law="none" or objective="tilted_sft"'
    )


def _check_steps(steps: list[RecordedStep], mask: Tensor, result: Result, name: str) -> None:
    """Raises where a policy gradient would not find the steps to train on."""
    asked = mask[0, 0].nonzero().flatten().tolist()
    if {step.k for step in steps} >= set(asked):
        return
    raise SteerError(
        f"{name} stored not all of the stochastic steps {asked} of its rows, so they cannot be trained on: collect "
        "with a sampler that can keep states (steer.smc, psi, tds, das, fk_steering, search.dts) and return its Result "
        'as it is, or pass objective="tilted_sft"'
    )


def _check_ess(batch: RolloutBatch, result: Result, temperature: float) -> None:
    """Raises where some group has too little weight left, counted by rows or by starting noises."""
    size, rows = torch.minimum(batch.ess(), batch.effective_roots()), batch.rows // batch.groups
    low = (~(size >= rows / 4)).nonzero()
    if len(low):
        worst = int(size.argmin())
        raise SteerError(
            f"weights back to the policy must keep an ESS of a quarter of the group, {rows / 4:g} of {rows} rows and "
            f"of starting noises, got {batch.ess()[worst]:.3g} and {batch.effective_roots()[worst]:.3g} in group "
            f"{worst} ({len(low)} of {batch.groups} groups are below): the steering is too "
            f"strong to correct; raise the temperature ({temperature:g} now; the ESS falls like exp(-Var(r / T))), or "
            'pass objective="tilted_sft" for losses that learn the tilted distribution itself'
        )


def _copies(x: Tensor) -> Tensor:
    """Index [P, N] of the first particle of the problem with the same sample."""
    slots = []
    for samples in x.flatten(2) if x.ndim > 2 else x[..., None]:
        _, group = torch.unique(samples, dim=0, return_inverse=True)
        first = torch.full_like(group, len(group)).scatter_reduce(
            0, group, torch.arange(len(group), device=group.device), "amin"
        )
        slots.append(first[group])
    return torch.stack(slots)


def _path(result: Result, storage: torch.dtype) -> Tensor | None:
    """All states of the rows, [P, N, K + 1, *event], where the run kept them."""
    return None if result.trajectory is None else result.trajectory.states().to(storage)


def _name(method: Callable[..., Any]) -> str:
    """Name of a method, also inside a partial."""
    inner = getattr(method, "func", method)
    return getattr(inner, "__name__", type(inner).__name__)
