"""To flow_grpo: one entry of its list of samples, and the settings that make its formula ours.

Names and shapes read at github.com/yifan123/flow_grpo: scripts/train_sd3.py:167-187,653-682,797-899 and
flow_grpo/diffusers_patch/sd3_sde_with_logprob.py:12-69 at ac4c86e (2025-07), scripts/train_sd3_fast.py at 74db691,
and for `sde_type` the same step function at 54809b5. No code of theirs is here, and none is imported.
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
    weighted_advantages,
)

KERNEL_NAMES = {"FlowSDE": "sde", "CPS": "cps"}
LOGP_KINDS: dict[str, Kind] = {"sde": "gaussian", "cps": "neg_sq_err"}


def to_flow_grpo(
    batch: RolloutBatch,
    *,
    reward: str | None = None,
    cond: Mapping[str, Tensor] | None = None,
    advantages: Tensor | None = None,
    num_train_timesteps: int = 1000,
) -> dict[str, Any]:
    """One sample dict of flow_grpo's SD3 scripts, as it stands after "Waiting for rewards", rows B first throughout.

    prompt_ids:     (B, L) int64, from cond. Decoded to text, by which the trainer groups rows.
    prompt_embeds, pooled_prompt_embeds: (B, L, D), (B, D'), from cond, as they are. The transformer's conditioning.
    timesteps:      (B, S) float32 in [0, 1000], falling: 1000 sigma *before* each step. The trainer looks its sigmas
                    up in pipeline.scheduler by exact equality, so that scheduler must hold batch.sigmas.
    latents, next_latents: (B, S, *event) float32, before and after each step. Float32 whatever the storage dtype: the
                    values are those that were stored, and the transformer gets them uncast.
    log_probs:      (B, S) float32, averaged over coordinates. Under "sde" a log-density. Under "cps" the mean of
                    -(x_next - mean)^2, which is no density (`neg_sq_err`): its ratios are not probabilities' ratios.
    rewards:        {"avg": (B,), name: (B,)} float32. It trains on "avg" (here: `reward`), centred by prompt, and logs
                    the rest.
    advantages:     (B, S) float32, only if passed: times the rows' weights to the policy, which flow_grpo has no field
                    for. Put them in place of its own (samples["advantages"]).

    Steps j = 0..S-1 of a row are trained on independently, so windows may differ by row and have gaps. train_sd3.py
    asserts S = num_steps; train_sd3_fast.py takes any S = sde_window_size.
    cond: {name: (P, ...)}, over batch.cond. Raises SteerError as `contract.trainer_kernel` says.
    """
    kernel = trainer_kernel(batch, "flow_grpo", KERNEL_NAMES)
    fields = conditioning_rows(batch, cond)
    missing = {"prompt_ids", "prompt_embeds", "pooled_prompt_embeds"} - set(fields)
    if missing:
        raise SteerError(f"flow_grpo needs {', '.join(sorted(missing))} of every problem; pass cond={{name: (P, ...)}}")
    given = weighted_advantages(batch, advantages, "flow_grpo")
    if given is None:
        prompt_groups(batch, [tuple(ids) for ids in fields["prompt_ids"].tolist()], "flow_grpo")
    rewards = {name: value.float() for name, value in batch.rewards.items()}
    return {
        "prompt_ids": fields["prompt_ids"].long(),
        "prompt_embeds": fields["prompt_embeds"],
        "pooled_prompt_embeds": fields["pooled_prompt_embeds"],
        "timesteps": timesteps(batch, num_train_timesteps),
        "latents": batch.x_t.to(torch.float32),
        "next_latents": batch.x_next.to(torch.float32),
        "log_probs": mean_logp(batch, LOGP_KINDS[kernel.name]),
        "rewards": {**rewards, "avg": chosen_reward(batch, reward)},
        **({} if given is None else {"advantages": given}),
    }


def flow_grpo_settings(batch: RolloutBatch) -> dict[str, Any]:
    """The entries of flow_grpo's config that its formula must have to score this batch as it was drawn."""
    kernel = trainer_kernel(batch, "flow_grpo", KERNEL_NAMES)
    return {
        "sample.num_steps": len(batch.sigmas) - 1,
        "sample.noise_level": kernel.level,
        "sample.sde_type": kernel.name,
        "sample.sde_window_size": batch.mask.shape[1],
        "sample.guidance_scale": batch.cfg_scale,
    }
