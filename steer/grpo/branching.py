"""Branching rollouts: rows share prefixes, and a step is judged by all the samples that come from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from ..core.loop import Reached
from ..core.objective import num_problems
from ..core.trajectory import Trajectory, required
from ..errors import SteerError
from ..key import Key, as_key
from ..processes.gaussian import GaussianProcess
from ..types import ReverseProcess
from .assembly import Rewards, ancestors, assemble, recorded_steps, rewards_by_name, score_samples, with_meter
from .batch import RolloutBatch
from .kernels import CorrelatedSiblings, need_policy, ode_of, stored_as


def branch(
    process: ReverseProcess,
    reward: Rewards,
    *,
    groups: int = 1,
    splits: Collection[int] = (0, 3, 6, 9),
    ways: int = 2,
    spread: float | None = None,
    noise: Literal["all", "splits"] = "all",
    key: Key | int = 0,
    seed: int | None = None,
    storage: torch.dtype = torch.float32,
    policy_version: int = 0,
) -> RolloutBatch:
    """Trees of samples, one per group, whose rows share their beginnings: ways^len(splits) rows a group.

    Args:
        process: the policy; its rule is the kernel, as in `collect`.
        reward: one, or {name: reward}; all are scored on the finished samples.
        groups: P, one per problem (a conditioned process fixes it).
        splits: levels at which every branch splits into `ways`, before its step; a group starts from one noise.
        ways: children per split, at least 2.
        spread: own noise of a sibling relative to what it shares with the others, (common + s own) / sqrt(1 + s^2);
            None for independent siblings. Each draw follows the kernel, and its density is the kernel's, at any
            spread.
        noise: which steps are stochastic: "all", or "splits" with the ODE between.
        key: random seed, or a `steer.Key`.
        seed: another name for `key`; give one of the two.
        storage: dtype of stored states.
        policy_version: for your own use: which update of the policy drew this.

    Returns:
        A `RolloutBatch` with `step_id` (steps that rows share) and `ancestors`, for `depth_advantages`. Rows of one
        group are not independent.

    Raises:
        SteerError: splits at levels without noise, or fewer than two ways.
        StateSpaceError: a process without Gaussian transitions.
        RewardError, NonFiniteError: from the reward.

    Cost per group: one network row per branch and level, sum_k (branches at k) in all, and a call of each reward per
    row; the prediction of a branch serves all its children.
    Source: Li et al. 2025 (BranchGRPO); splits and ways as there. Differs: branch noise has unit variance.
    """
    model, key = need_policy(process), as_key(key, seed)
    rewards, splits = rewards_by_name(reward), sorted(set(splits))
    _check(model, splits, ways)
    policy, meter = with_meter(model)
    chain, ode = (stored_as(p, storage) for p in (policy, policy.with_rule(ode_of(policy.rule))))
    state = Trajectory.begin(chain, chain.prior(key.fold("prior"), num_problems(model, groups), 1), keep_states=True)
    means: dict[int, Tensor] = {}
    reached = Reached()
    with reached.keeping_partial(meter), torch.no_grad():
        for k in range(chain.steps):
            reached.note(state)
            state = state.with_step_cache(x0=chain.denoise(state.x, k))
            if k in splits:
                state = state.branch(ways)
            source = chain if noise == "all" or k in splits else ode
            transition = source.transition(state.x, required(state.cache.x0), k)
            if transition.stochastic:
                means[k] = transition.mean
            if k in splits and spread is not None:
                transition = CorrelatedSiblings(base=transition, ways=ways, spread=spread, storage=storage)
            state = state.step(transition, key.fold("step"))
        reached.note(state)
        values = score_samples(policy, state.x, rewards)
    problems, rows = state.x.shape[:2]
    first = torch.arange(problems, device=state.x.device)[:, None] * rows
    mask = torch.zeros(problems, rows, chain.steps, dtype=torch.bool)
    mask[:, :, list(means)] = True
    return assemble(
        model,
        recorded_steps(state, means),
        mask,
        x=state.x,
        rewards=values,
        key=key,
        cost=meter.cost(),
        storage=storage,
        window=f"branch(splits={splits}, ways={ways}, spread={spread}, noise={noise!r})",
        method="branch",
        policy_version=policy_version,
        ancestors=ancestors(state),
        root_id=first + state.root,
        parent_id=first + state.ancestor(1),
    )


def _check(process: GaussianProcess, splits: list[int], ways: int) -> None:
    """Raises SteerError where siblings would be equal, or there are none."""
    usable = [k for k in range(process.steps) if process.stochastic(k)]
    if not splits or not set(splits) <= set(usable) or ways < 2:
        raise SteerError(
            f"branches differ by the noise of the step they split at, so splits must be among the stochastic levels "
            f"{usable} and ways at least 2, got splits {splits} and ways {ways}; change them, or use a stochastic "
            "rule, for instance process.with_rule(steer.flow_sde(0.7))"
        )
