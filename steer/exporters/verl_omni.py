"""Export to verl-omni: what its rollout workers return, with importance weights, and the settings for it.

Names and shapes were read at github.com/verl-project/verl-omni at a1139ba (2026-08), in verl_omni:
agent_loop/diffusion_agent_loop.py:335-403 (the DataProto), trainer/diffusion/rollout_correction.py:64-162 (weights),
pipelines/sd3_flow_grpo/vllm_omni_rollout_adapter.py:254-334 (windows), diffusers_training_adapter.py:148-181 beside it
and workers/engine/fsdp/diffusers_impl.py:784-935 (the trainer's side), pipelines/schedulers/flow_match_sde.py:148-321
(the formula). None of their code is copied or imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..grpo.batch import Kind, RolloutBatch
from .contract import (
    chosen_reward,
    conditioning_rows,
    importance_weights,
    joined_states,
    mean_logp,
    need_images,
    per_step,
    timesteps,
    trainer_kernel,
    trainer_rewards,
)

KERNEL_NAMES = {"FlowSDE": "sde", "DanceSDE": "dance_sde", "CPS": "cps"}
"""verl-omni's name of each kernel it has."""

LOGP_KINDS: dict[str, Kind] = {"sde": "gaussian", "dance_sde": "gaussian", "cps": "neg_sq_err"}
"""What verl-omni calls a log-prob, by its name of the kernel."""


def to_verl_omni(
    batch: RolloutBatch,
    *,
    reward: str | None = None,
    cond: Mapping[str, Tensor] | None = None,
    images: Tensor | None = None,
    uid: Sequence[str] | None = None,
    advantages: Tensor | None = None,
    forbidden: float | None = None,
    num_train_timesteps: int = 1000,
) -> dict[str, dict[str, Any]]:
    """Convert rollouts to the three parts of the DataProto that verl-omni's `generate_sequences` returns.

        DataProto(TensorDict(d["batch"], batch_size=B), d["non_tensor_batch"], d["meta_info"])

    Args:
        batch: The rollouts: B rows of W = S steps, from P problems.
        reward: Name of the reward to train on; None: the only one.
        cond: Conditioning by name, [P, ...] each, over `batch.cond`.
        images: Decoded images [B, C, H, W] or frames [B, T, C, H, W] in [0, 1].
        uid: B strings, equal for rows of a group; by default the group's number. Pass the trainer's own where it
            assigned them.
        advantages: Advantages [B] or [B, W], to use in place of the trainer's own.
        forbidden: The reward that -inf, which forbids a sample, becomes; None makes that an error.
        num_train_timesteps: The scheduler's number of training timesteps.

    Returns:
        {"batch": ..., "non_tensor_batch": ..., "meta_info": ...}. In "batch":

        all_latents: [B, W + 1, *event] float32: the window's states. Step j is scored from [:, j] to [:, j + 1], so a
            window has no gaps; its start may differ by row.
        all_timesteps: [B, W] float32 in [0, 1000], falling: 1000 sigma before each step, looked up in the scheduler by
            exact equality.
        rollout_log_probs: [B, W] float32 of the *base policy*, averaged over coordinates; under "cps" the mean of
            -(x_next - mean)^2, no density (`neg_sq_err`). In bypass mode the trainer uses them as old_log_probs, so
            importance ratios start at 1. Steered rows were drawn from another distribution; that is in
        rollout_is_weights: [B, W] float32, only if rows are weighted: base policy over what drew them, by row or by
            step (`contract.importance_weights`). Multiplies each element of the loss, detached. The trainer's own,
            exp of a difference of *means*, is a D-th root of it: leave rollout_is off, as the settings do.
        rm_scores: [B, 1] float32, the reward to train on; expanded to [B, W] and centred by uid.
        responses: [B, C, H, W] or [B, T, C, H, W] uint8, if images are given.
        prompts: [B, L] int64, from cond["prompt_ids"].
        prompt_embeds, prompt_embeds_mask, ...: The rest of cond, as it is.
        old_log_probs, advantages: [B, W], only if advantages are passed: the batch then goes to `update_actor` as it
            is, past the trainer's own. Else the trainer computes them from the above.

        In "non_tensor_batch", arrays of B objects: uid, sample_id, parent_id, and all rewards by name. The trainer
        centres weighted rows by an unweighted mean, which costs variance but no bias; those of `steer.grpo.advantages`
        are weighted.

    Raises:
        SteerError: For batches that verl-omni cannot train on (see `contract.trainer_kernel`).
        ShapeError: For windows with gaps, and for images, advantages or uid of another number of rows.
        NonFiniteError: For rewards, densities, states or advantages that are not finite.
        RewardError: For images outside [0, 1].
    """
    kernel, rewards = trainer_kernel(batch, "verl-omni", KERNEL_NAMES), trainer_rewards(batch, "verl-omni", forbidden)
    fields, log_probs = conditioning_rows(batch, cond), mean_logp(batch, LOGP_KINDS[kernel.name])
    tensors: dict[str, Tensor] = {
        "all_latents": joined_states(batch, "verl-omni").to(torch.float32),
        "all_timesteps": timesteps(batch, num_train_timesteps),
        "rollout_log_probs": log_probs,
        "rm_scores": chosen_reward(rewards, reward)[:, None],
    }
    if "prompt_ids" in fields:
        tensors["prompts"] = fields.pop("prompt_ids").long()
    if images is not None:
        pixels = need_images(batch, images, frames=True).detach().float()
        tensors["responses"] = pixels.clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    if (weight := importance_weights(batch)) is not None:
        tensors["rollout_is_weights"] = weight
    if advantages is not None:
        tensors |= {"old_log_probs": log_probs.clone(), "advantages": per_step(batch, advantages)}
    return {
        "batch": {**fields, **tensors},
        "non_tensor_batch": _objects(batch, rewards, uid),
        "meta_info": {"reward_extra_keys": sorted(batch.rewards), "global_steps": batch.policy_version},
    }


def _objects(batch: RolloutBatch, rewards: Mapping[str, Tensor], uid: Sequence[str] | None) -> dict[str, Any]:
    """numpy arrays of B objects by name: uid, sample_id, parent_id and rewards."""
    import numpy as np

    groups = [str(group) for group in (batch.group_id.tolist() if uid is None else uid)]
    if len(groups) != batch.rows:
        raise ShapeError(
            f"uid is one string per row, {batch.rows}, got {len(groups)}; rows of a group have the same uid"
        )
    objects = {"uid": groups, "sample_id": batch.sample_id.tolist(), "parent_id": batch.parent_id.tolist()}
    objects |= {name: value.tolist() for name, value in rewards.items()}
    return {name: np.array(value, dtype=object) for name, value in objects.items()}


def verl_omni_settings(batch: RolloutBatch) -> dict[str, Any]:
    """Entries of verl-omni's config under which its formula scores this batch as it was drawn.

    Args:
        batch: The rollouts.

    Returns:
        Values by dotted name.

    Raises:
        SteerError: As `to_verl_omni`, for batches that it cannot train on.
    """
    kernel = trainer_kernel(batch, "verl-omni", KERNEL_NAMES)
    rollout, correction = "actor_rollout_ref.rollout", "algorithm.rollout_correction"
    return {
        f"{rollout}.pipeline.num_inference_steps": len(batch.sigmas) - 1,
        f"{rollout}.pipeline.guidance_scale": batch.cfg_scale,
        f"{rollout}.algo.noise_level": kernel.level,
        f"{rollout}.algo.sde_type": kernel.name,
        f"{rollout}.algo.sde_window_size": batch.mask.shape[1],
        f"{rollout}.calculate_log_probs": True,
        f"{correction}.bypass_mode": True,
        f"{correction}.rollout_is": None,
    }
