"""Export to flow_grpo: one entry of its list of samples, and the settings under which its formula is steer's.

Names and shapes were read at github.com/yifan123/flow_grpo: scripts/train_sd3.py:167-187,653-682,797-899 and
flow_grpo/diffusers_patch/sd3_sde_with_logprob.py:12-69 at ac4c86e (2025-07), scripts/train_sd3_fast.py at 74db691,
and for `sde_type` the same step function at 54809b5. None of their code is copied or imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SteerError
from ..grpo.batch import Kind, RolloutBatch
from .contract import (
    chosen_reward,
    conditioning_rows,
    mean_logp,
    prompt_groups,
    timesteps,
    trainer_kernel,
    trainer_rewards,
    weighted_advantages,
)

KERNEL_NAMES = {"FlowSDE": "sde", "CPS": "cps"}
"""flow_grpo's name of each kernel it has."""

LOGP_KINDS: dict[str, Kind] = {"sde": "gaussian", "cps": "neg_sq_err"}
"""What flow_grpo calls a log-prob, by its name of the kernel."""


def to_flow_grpo(
    batch: RolloutBatch,
    *,
    reward: str | None = None,
    cond: Mapping[str, Tensor] | None = None,
    advantages: Tensor | None = None,
    forbidden: float | None = None,
    num_train_timesteps: int = 1000,
) -> dict[str, Any]:
    """Convert rollouts to one sample dict of flow_grpo's SD3 scripts, as it is after "Waiting for rewards".

    Args:
        batch: The rollouts: B rows of S steps, from P problems.
        reward: Name of the reward to train on; None: the only one.
        cond: Conditioning by name, [P, ...] each, over `batch.cond`. Must have prompt_ids, prompt_embeds and
            pooled_prompt_embeds.
        advantages: Advantages [B] or [B, S], needed for weighted rows.
        forbidden: The reward that -inf, which forbids a sample, becomes; None makes that an error.
        num_train_timesteps: The scheduler's number of training timesteps.

    Returns:
        A dict of tensors with rows first:

        prompt_ids: [B, L] int64, from cond. Decoded to text, by which the trainer groups rows.
        prompt_embeds, pooled_prompt_embeds: [B, L, D], [B, D'], from cond as they are: the transformer's conditioning.
        timesteps: [B, S] float32 in [0, 1000], falling: 1000 sigma *before* each step. The trainer looks its sigmas up
            in pipeline.scheduler by exact equality, so that scheduler must hold batch.sigmas.
        latents, next_latents: [B, S, *event] float32, before and after each step. Float32 whatever the storage dtype:
            the values are those that were stored, and the transformer gets them uncast.
        log_probs: [B, S] float32, averaged over coordinates. Under "sde" a log-density; under "cps" the mean of
            -(x_next - mean)^2, which is no density (`neg_sq_err`), so its ratios are not ratios of probabilities.
        rewards: {"avg": [B], name: [B]} float32. The trainer uses "avg" (here: `reward`), centred by prompt, and logs
            the rest.
        advantages: [B, S] float32, only if passed: times the rows' importance weights, for which flow_grpo has no
            field. Put them in place of its own (samples["advantages"]).

        Steps j = 0..S-1 of a row are trained on independently, so windows may differ by row and have gaps.
        train_sd3.py asserts S = num_steps; train_sd3_fast.py takes any S = sde_window_size.

    Raises:
        SteerError: For batches that flow_grpo cannot train on (see `contract.trainer_kernel`), missing conditioning,
            and weighted rows without advantages.
        NonFiniteError: For rewards, densities, states or advantages that are not finite.
    """
    kernel = trainer_kernel(batch, "flow_grpo", KERNEL_NAMES)
    fields = conditioning_rows(batch, cond)
    missing = {"prompt_ids", "prompt_embeds", "pooled_prompt_embeds"} - set(fields)
    if missing:
        raise SteerError(
            f"flow_grpo needs {', '.join(sorted(missing))} of every problem, "
            f"got {', '.join(sorted(fields)) or 'none'}; "
            "pass cond={name: (P, ...)}"
        )
    given = weighted_advantages(batch, advantages, "flow_grpo")
    if given is None:
        prompt_groups(batch, [tuple(ids) for ids in fields["prompt_ids"].tolist()], "flow_grpo")
    rewards = trainer_rewards(batch, "flow_grpo", forbidden)
    return {
        "prompt_ids": fields["prompt_ids"].long(),
        "prompt_embeds": fields["prompt_embeds"],
        "pooled_prompt_embeds": fields["pooled_prompt_embeds"],
        "timesteps": timesteps(batch, num_train_timesteps),
        "latents": batch.x_t.to(torch.float32),
        "next_latents": batch.x_next.to(torch.float32),
        "log_probs": mean_logp(batch, LOGP_KINDS[kernel.name]),
        "rewards": {**rewards, "avg": chosen_reward(rewards, reward)},
        **({} if given is None else {"advantages": given}),
    }


def flow_grpo_settings(batch: RolloutBatch) -> dict[str, Any]:
    """Entries of flow_grpo's config under which its formula scores this batch as it was drawn.

    Args:
        batch: The rollouts.

    Returns:
        Values by dotted name.

    Raises:
        SteerError: As `to_flow_grpo`, for batches that it cannot train on.
    """
    kernel = trainer_kernel(batch, "flow_grpo", KERNEL_NAMES)
    return {
        "sample.num_steps": len(batch.sigmas) - 1,
        "sample.noise_level": kernel.level,
        "sample.sde_type": kernel.name,
        "sample.sde_window_size": batch.mask.shape[1],
        "sample.guidance_scale": batch.cfg_scale,
    }
