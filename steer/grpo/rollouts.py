"""Groups of samples with everything a policy update needs: plain rollouts here, steered ones in `weighted_rollouts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from ..core.objective import num_problems
from ..core.trajectory import Trajectory
from ..cost import check_counts
from ..key import Key, as_key
from ..processes.gaussian import GaussianProcess
from ..results.result import Law
from ..types import ReverseProcess
from .assembly import Rewards, metered, named, record, scores, walked
from .batch import RolloutBatch
from .kernels import Mixed, need_policy, ode_of, stored_as
from .weighted_rollouts import collect_steered
from .windows import Window, every, placed


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
    objective: Literal["policy_gradient", "tilted_sft"] = "policy_gradient",
    policy_version: int = 0,
) -> RolloutBatch:
    """Groups of samples of the policy with the density of every stochastic step, as `RolloutBatch` documents.

    process:      the policy; its rule is the kernel: steer.flow_sde(.7), dance_sde(.3), cps(.7) or ddim(1.0).
    reward:       one, or {name: reward}: the first steers, all are scored.
    groups:       number of groups, one per problem (a conditioned process fixes it).
    window:       which steps are stochastic, `every()` by default; the others follow the ODE. See `windows`.
    shared_noise: one initial noise for all rows of a group (DanceGRPO, MixGRPO); plain rollouts only.
    storage:      dtype of stored states. The chain itself moves on what is stored, so densities are exact.
    means, path:  whether to keep the means of steps (plain only), and all states.
    method:       a sampler to collect from, for instance steer.smc, functools.partial(steer.psi, share=.3) or
                  search.dts; run at `temperature`. None: the policy as it is. It must move by the policy's own rule.
    law:          what the method's weights target: "target", p(x) exp(r / temperature), "model", or "none" for greedy
                  selections. By default as `Result.law` says.
    objective:    what rows must be good for: "policy_gradient" refuses groups whose weights to the base policy have an
                  ESS, of rows or of starting noises, below a quarter of the group; "tilted_sft" takes them.

    Further facts for a trainer (cond, cfg_scale) go in by dataclasses.replace(batch, ...).
    Cost: that of the method; plain, K network rows and one call of each reward per row. Nothing is evaluated twice.
    Raises SteerError (ESS too low; `.partial` has the Result), StateSpaceError, NonFiniteError, RewardError.
    """
    check_counts(groups=groups, group_size=group_size)
    model, key, rewards, window = need_policy(process), as_key(key, seed), named(reward), window or every()
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
    policy, meter = metered(model)
    groups = num_problems(model, groups)
    mask = placed(window, model, groups, group_size, key).to(model.device)
    state, kept = _roll(policy, storage, mask, key, shared_noise=shared_noise, means=means)
    values = scores(policy, state.x, rewards)
    row = torch.arange(groups * group_size, device=model.device).view(groups, group_size)
    return record(
        model,
        walked(state, kept),
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


def _roll(
    process: GaussianProcess, storage: torch.dtype, mask: torch.Tensor, key: Key, *, shared_noise: bool, means: bool
) -> tuple[Trajectory, dict[int, torch.Tensor]]:
    """Plain chains, stochastic where mask (P, N, K) is true, and the means of their stochastic steps."""
    problems, rows, _ = mask.shape
    still = stored_as(process.with_rule(ode_of(process.rule)), storage)
    process = stored_as(process, storage)
    x = process.prior(key.fold("prior"), problems, 1 if shared_noise else rows)
    state = Trajectory.begin(process, x.expand(-1, rows, *x.shape[2:]).contiguous(), keep_states=True)
    noise, kept = key.fold("step"), {}
    some, all_rows = mask.any(0).any(0).tolist(), mask.all(0).all(0).tolist()
    with torch.no_grad():
        for k in range(process.steps):
            x0 = process.denoise(state.x, k)
            law = (process if some[k] else still).transition(state.x, x0, k)
            if some[k] and means:
                kept[k] = law.mean
            if some[k] and not all_rows[k]:
                law = Mixed(law, still.transition(state.x, x0, k), mask[:, :, k])
            state = state.step(law, noise)
    return state, kept
