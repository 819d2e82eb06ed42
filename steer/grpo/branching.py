"""Branching rollouts: rows share prefixes, and steps are judged by all that came of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from ..core.objective import num_problems
from ..core.trajectory import Trajectory, required
from ..errors import SteerError
from ..key import Key, as_key
from ..processes.gaussian import GaussianProcess
from ..types import ReverseProcess
from .assembly import Rewards, ancestors, metered, named, record, scores, walked
from .batch import RolloutBatch
from .kernels import Siblings, need_policy, ode_of, stored_as


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
    """Trees of samples, one per group, that share their beginnings: ways^len(splits) rows a group.

    splits: levels at which every branch splits into `ways`, before its step; all splits start from one noise.
    spread: own noise of a sibling relative to what it shares with the others, (common + s own) / sqrt(1 + s^2); None
            for independent siblings. Each draw follows the kernel, and its density is the kernel's, at any spread.
    noise:  steps that are stochastic: "all", or "splits" with the ODE between.

    `depth_advantages` is for these; every step has `step_id`. Rows of one group are not independent.
    Cost per group: one network row per branch and level, sum_k (branches at k) in all; a branch's prediction serves all
    its children.
    Source: Li et al. 2025 (BranchGRPO); splits and ways as there. Differs: branch noise has unit variance.
    """
    model, key, rewards, splits = need_policy(process), as_key(key, seed), named(reward), sorted(set(splits))
    _check(model, splits, ways)
    policy, meter = metered(model)
    chain, still = (stored_as(p, storage) for p in (policy, policy.with_rule(ode_of(policy.rule))))
    state = Trajectory.begin(chain, chain.prior(key.fold("prior"), num_problems(model, groups), 1), keep_states=True)
    means: dict[int, Tensor] = {}
    with torch.no_grad():
        for k in range(chain.steps):
            state = state.with_step_cache(x0=chain.denoise(state.x, k))
            if k in splits:
                state = state.branch(ways)
            source = chain if noise == "all" or k in splits else still
            law = source.transition(state.x, required(state.cache.x0), k)
            if law.stochastic:
                means[k] = law.mean
            if k in splits and spread is not None:
                law = Siblings(law, ways, spread, storage)
            state = state.step(law, key.fold("step"))
    values = scores(policy, state.x, rewards)
    problems, rows = state.x.shape[:2]
    first = torch.arange(problems, device=state.x.device)[:, None] * rows
    mask = torch.zeros(problems, rows, chain.steps, dtype=torch.bool)
    mask[:, :, list(means)] = True
    return record(
        model,
        walked(state, means),
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
    usable = [k for k in range(process.steps) if process.stochastic(k)]
    if not splits or not set(splits) <= set(usable) or ways < 2:
        raise SteerError(
            f"branches differ by the noise of the step they split at, so that splits must be among the stochastic "
            f"levels {usable} and ways at least 2, got splits {splits} and ways {ways}; where no level is stochastic, "
            "use a stochastic rule, for instance process.with_rule(steer.flow_sde(0.7))"
        )
