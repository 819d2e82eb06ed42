"""One stochastic step on an ODE path: the reward that a single draw leads to, at several step sizes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..core.loop import Reached
from ..core.objective import num_problems
from ..core.trajectory import Trajectory
from ..errors import StateSpaceError, SteerError
from ..key import Key, as_key
from ..processes.gaussian import GaussianProcess
from ..processes.second_order import SecondOrderProcess
from ..types import ReverseProcess
from .assembly import RecordedStep, Rewards, assemble, rewards_by_name, score_samples, with_meter
from .batch import RolloutBatch
from .kernels import need_policy, ode_of, stored_as


def granular(
    process: ReverseProcess,
    reward: Rewards,
    *,
    level: int,
    groups: int = 1,
    group_size: int = 12,
    strides: Collection[int] = (1, 2),
    key: Key | int = 0,
    seed: int | None = None,
    storage: torch.dtype = torch.float32,
    policy_version: int = 0,
) -> RolloutBatch:
    """Rows that differ in one stochastic step, from a shared ODE path, and are finished by the ODE at each stride.

    Args:
        process: the policy; its rule is the kernel, as in `collect`.
        reward: one, or {name: reward}; all are scored on the samples of every stride.
        level: which step is stochastic; trainers go through 0..7 of 16, a batch each.
        groups: P, one per problem (a conditioned process fixes it).
        group_size: N rows per group.
        strides: levels that a completion takes at once, one completion per stride.
        key: random seed, or a `steer.Key`.
        seed: another name for `key`; give one of the two.
        storage: dtype of stored states.
        policy_version: for your own use: which update of the policy drew this.

    Returns:
        A `RolloutBatch` whose rows of a group share x_t and have one stored step (S = 1). Rewards are named
        "<name>/<stride>", so that `advantages` normalises each stride by itself and sums them, as the paper does. x0 is
        the sample of the smallest stride.

    Raises:
        SteerError: a level without noise, or no strides.
        StateSpaceError: a process without Gaussian transitions.
        RewardError, NonFiniteError: from the reward.

    Cost per group: level + 1 network rows for the shared part, and N ceil((K - level - 1) / stride) for each stride.
    Source: Zhou et al. 2025 (Granular-GRPO, G2RPO), strides 1 and 2, 16 steps, 12 rows.
    """
    model, key, rewards = need_policy(process), as_key(key, seed), rewards_by_name(reward)
    if isinstance(model, SecondOrderProcess):
        raise StateSpaceError(
            "granular rollouts finish in strides of several levels, and the steps of a SecondOrderProcess go on from "
            "the prediction one level before; use a rule of first order, for instance "
            "process.with_rule(steer.ddim(eta=1.0)), or grpo.collect"
        )
    strides = sorted(set(strides))
    if not 0 <= level < model.steps or not model.stochastic(level) or not strides or strides[0] < 1:
        raise SteerError(
            f"granular rollouts perturb one stochastic step of {model.steps} and finish at strides >= 1, got level "
            f"{level} and strides {strides}; {model.rule} adds noise at "
            f"{[k for k in range(model.steps) if model.stochastic(k)]}: pass one of these levels"
        )
    policy, meter = with_meter(model)
    chain, ode = stored_as(policy, storage), stored_as(policy.with_rule(ode_of(model.rule)), storage)
    reached = Reached()
    with reached.keeping_partial(meter), torch.no_grad():
        anchor = chain.prior(key.fold("prior"), num_problems(model, groups), 1)
        reached.note(Trajectory.begin(chain, anchor))
        anchor = follow_ode(ode, anchor, 0, stride=1, until=level)
        x, x0 = (s.expand(-1, group_size, *s.shape[2:]) for s in (anchor, chain.denoise(anchor, level)))
        transition = chain.transition(x, x0, level)
        moved = transition.sample(key.fold("step").at(level))
        reached.note(Trajectory.begin(chain, moved, k=level + 1))
        ends = {stride: follow_ode(ode, moved, level + 1, stride=stride) for stride in strides}
        values = {
            f"{name}/{stride}": value
            for stride, x in ends.items()
            for name, value in score_samples(policy, x, rewards).items()
        }
    log_prob = transition.log_prob(moved)
    step = RecordedStep(k=level, x=x, x_next=moved, mean=transition.mean, log_prob=log_prob, log_behaviour=log_prob)
    mask = torch.zeros(*moved.shape[:2], model.steps, dtype=torch.bool)
    mask[:, :, level] = True
    first = torch.arange(len(moved), device=moved.device)[:, None] * group_size
    return assemble(
        model,
        [step],
        mask,
        x=ends[strides[0]],
        rewards=values,
        key=key,
        cost=meter.cost(),
        storage=storage,
        window=f"granular(level={level}, strides={strides})",
        method="granular",
        policy_version=policy_version,
        root_id=first.expand(-1, group_size),
        parent_id=first.expand(-1, group_size),
    )


def follow_ode(process: GaussianProcess, x: Tensor, k: int, *, stride: int, until: int | None = None) -> Tensor:
    """States [P, N, *event] at level `until` (the data if None), from level k by the ODE, `stride` levels at once.

    Args:
        process: with the ODE's rule.
    """
    last = process.steps if until is None else until
    while k < last:
        there = min(k + stride, last)
        x0 = process.denoise(x, k)
        x, k = process.rule(x, x0, process.levels[k], process.levels[there]).mean, there
    return x
