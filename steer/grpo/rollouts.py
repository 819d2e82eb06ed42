"""Groups of samples with everything a policy update needs: plain rollouts here, steered ones in `weighted_rollouts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch

from ..core.loop import Reached
from ..core.objective import num_problems
from ..core.trajectory import Trajectory
from ..cost import check_counts
from ..key import Key, as_key
from ..processes.gaussian import GaussianProcess
from ..results.result import Law
from ..types import ReverseProcess
from .assembly import Rewards, assemble, recorded_steps, rewards_by_name, score_samples, with_meter
from .batch import Objective, RolloutBatch
from .evaluation_mode import check_evaluation_mode
from .kernels import StochasticInSomeRows, need_policy, ode_of, stored_as
from .weighted_rollouts import check_choice, collect_steered
from .windows import Window, every, stochastic_steps


def collect(
    process: ReverseProcess,
    reward: Rewards,
    *,
    groups: int = 1,
    group_size: int = 16,
    key: Key | int = 0,
    seed: int | None = None,
    window: Window | None = None,
    shared_noise: bool = False,
    storage: torch.dtype = torch.float32,
    means: bool = True,
    path: bool = False,
    method: Callable[..., Any] | None = None,
    temperature: float = 1.0,
    law: Law | None = None,
    objective: Objective = "policy_gradient",
    policy_version: int = 0,
) -> RolloutBatch:
    """Groups of samples of the policy, with the density of every stochastic step.

    Args:
        process: the policy; its rule is the kernel: steer.flow_sde(.7), dance_sde(.3), cps(.7) or ddim(1.0).
        reward: one, or {name: reward}: the first steers, all are scored on the finished samples.
        groups: P, one per problem (a conditioned process fixes it).
        group_size: N rows per group.
        key: random seed, or a `steer.Key`.
        seed: another name for `key`; give one of the two.
        window: which steps are stochastic, `every()` by default; the others follow the ODE. See `grpo.windows`.
        shared_noise: one initial noise for all rows of a group (DanceGRPO, MixGRPO); plain rollouts only.
        storage: dtype of stored states. The chain itself continues from what is stored, so densities are exact.
        means: whether to keep the means of steps, [B, S, *event] (plain rollouts only).
        path: whether to keep all states, [B, K + 1, *event].
        method: a sampler to collect from, for instance steer.smc, functools.partial(steer.psi, share=.3) or
            search.dts, which must use the policy's own transitions. None: plain chains of the policy.
        temperature: > 0, in units of the reward: the method's.
        law: the distribution that the method's weights target: "target", p(x) exp(r(x) / temperature); "model", p(x);
            "none", no known one, as after a greedy selection. None: as the method's `Result.law` says. What you declare
            is not questioned.
        objective: what the rows must be good for. "policy_gradient" refuses rows that no weight corrects, and groups
            whose weights back to the policy have an ESS, of rows or of starting noises, below a quarter of the group.
            "tilted_sft" takes them.
        policy_version: for your own use: which update of the policy drew this.

    Returns:
        A `RolloutBatch` of P N rows. Where no weight corrects the rows, its objective is "tilted_sft" and `log_w_base`
        is NaN. Further facts for a trainer (cond, cfg_scale) go in by dataclasses.replace(batch, ...).

    Raises:
        NotStochasticError: a policy gradient of steps that no weight turns into steps of the policy, because of their
            start, or because the method does not say what it targets; `.partial` has the Result.
        SteerError: the ESS is too low, or the method moves by other transitions; `.partial` has the Result. A network
            whose predictions depend on train() was left in it.
        StateSpaceError: a process without Gaussian transitions.
        RewardError, NonFiniteError: from the reward.

    Cost: that of the method; for plain chains, K network rows and one call of each reward per row. Nothing is evaluated
    twice, but where a network is in train(): it predicts two states of every problem twice more, not counted.
    Source: Liu et al. 2025 (Flow-GRPO); Xue et al. 2025 (DanceGRPO); Li et al. 2025 (MixGRPO).
    """
    check_counts(groups=groups, group_size=group_size)
    check_choice("objective", objective, get_args(Objective))
    check_choice("law", law, (None, *get_args(Law)))
    model, key = need_policy(process), as_key(key, seed)
    rewards, window = rewards_by_name(reward), window or every()
    check_evaluation_mode(model, lambda: model.prior(key.fold("prior"), num_problems(model, groups), 2), 0)
    if method is not None:
        return collect_steered(
            model,
            rewards,
            method,
            groups=groups,
            group_size=group_size,
            key=key,
            window=window,
            storage=storage,
            path=path,
            temperature=temperature,
            law=law,
            objective=objective,
            policy_version=policy_version,
        )
    policy, meter = with_meter(model)
    groups = num_problems(model, groups)
    mask = stochastic_steps(window, model, groups, group_size, key).to(model.device)
    reached = Reached()
    with reached.keeping_partial(meter):
        state, kept = _plain_chains(policy, storage, mask, key, reached, shared_noise=shared_noise, means=means)
        values = score_samples(policy, state.x, rewards)
    row = torch.arange(groups * group_size, device=model.device).view(groups, group_size)
    return assemble(
        model,
        recorded_steps(state, kept),
        mask,
        x=state.x,
        rewards=values,
        key=key,
        cost=meter.cost(),
        storage=storage,
        window=window,
        policy_version=policy_version,
        path=state.states().to(storage) if path else None,
        root_id=row[:, :1].expand_as(row) if shared_noise else row,
    )


def _plain_chains(
    process: GaussianProcess,
    storage: torch.dtype,
    mask: torch.Tensor,
    key: Key,
    reached: Reached,
    *,
    shared_noise: bool,
    means: bool,
) -> tuple[Trajectory, dict[int, torch.Tensor]]:
    """Plain chains, stochastic where mask [P, N, K] is true, and the means of their stochastic steps by level."""
    problems, rows, _ = mask.shape
    ode = stored_as(process.with_rule(ode_of(process.rule)), storage)
    process = stored_as(process, storage)
    x = process.prior(key.fold("prior"), problems, 1 if shared_noise else rows)
    state = Trajectory.begin(process, x.expand(-1, rows, *x.shape[2:]).contiguous(), keep_states=True)
    noise, kept = key.fold("step"), {}
    some, all_rows = mask.any(0).any(0).tolist(), mask.all(0).all(0).tolist()
    with torch.no_grad():
        for k in range(process.steps):
            reached.note(state)
            x0 = process.denoise(state.x, k)
            transition = (process if some[k] else ode).transition(state.x, x0, k)
            if some[k] and means:
                kept[k] = transition.mean
            if some[k] and not all_rows[k]:
                transition = StochasticInSomeRows(
                    noisy=transition, ode=ode.transition(state.x, x0, k), noisy_at=mask[:, :, k]
                )
            state = state.step(transition, noise)
    reached.note(state)
    return state, kept
