"""One perturbed step between two deterministic stretches: what a single draw is worth, at several step sizes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..core.objective import num_problems
from ..errors import SteerError
from ..key import Key, as_key
from ..processes.gaussian import GaussianProcess
from ..types import ReverseProcess
from .assembly import Rewards, Walked, metered, named, record, scores
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
    """Rows that part at one stochastic step, from a shared ODE path, and are finished by the ODE at each stride.

    level:   where the step is; trainers go through 0..7 of 16, a batch each.
    strides: levels taken at once by each completion. Rewards are named "<name>/<stride>", so that `advantages`
             normalises each stride by itself and sums them, as the method asks.

    Rows of a group have one x_t and one stored step (S = 1). x0 is the first stride's sample.
    Cost per group: level + 1 network rows for the shared part, and N ceil((K - level - 1) / stride) for each stride.
    Source: Zhou et al. 2025 (Granular-GRPO, G2RPO), strides 1 and 2, 16 steps, 12 rows.
    """
    model, key, rewards = need_policy(process), as_key(key, seed), named(reward)
    strides = sorted(set(strides))
    if not 0 <= level < model.steps or not model.stochastic(level) or not strides or strides[0] < 1:
        raise SteerError(
            f"granular rollouts perturb one stochastic step of {model.steps} and finish at strides >= 1, got level "
            f"{level} and strides {strides}; {model.rule} adds noise at "
            f"{[k for k in range(model.steps) if model.stochastic(k)]}"
        )
    policy, meter = metered(model)
    still = stored_as(policy.with_rule(ode_of(model.rule)), storage)
    chain = stored_as(policy, storage)
    with torch.no_grad():
        anchor = chain.prior(key.fold("prior"), num_problems(model, groups), 1)
        anchor = finish(still, anchor, 0, 1, until=level)
        x, x0 = (s.expand(-1, group_size, *s.shape[2:]) for s in (anchor, chain.denoise(anchor, level)))
        law = chain.transition(x, x0, level)
        moved = law.sample(key.fold("step").at(level))
        ends = {stride: finish(still, moved, level + 1, stride) for stride in strides}
        values = {
            f"{name}/{stride}": value
            for stride, x in ends.items()
            for name, value in scores(policy, x, rewards).items()
        }
    log_prob = law.log_prob(moved)
    step = Walked(level, x, moved, law.mean, log_prob, log_prob)
    mask = torch.zeros(*moved.shape[:2], model.steps, dtype=torch.bool)
    mask[:, :, level] = True
    first = torch.arange(len(moved), device=moved.device)[:, None] * group_size
    return record(
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


def finish(process: GaussianProcess, x: Tensor, k: int, stride: int, *, until: int | None = None) -> Tensor:
    """States carried from level k on by the process's rule, `stride` levels at once."""
    last = process.steps if until is None else until
    while k < last:
        there = min(k + stride, last)
        x0 = process.denoise(x, k)
        x, k = process.rule(x, x0, process.levels[k], process.levels[there]).mean, there
    return x
