"""Export to Flow-Factory: the fields of its samples, one dict per row, and the scheduler settings for them.

Names and shapes were read at github.com/X-GenGroup/Flow-Factory at a0b2bc5 (2026-05), in src/flow_factory:
samples/samples.py:68-192 (BaseSample), 294-375 (stacking), models/stable_diffusion/sd3_5.py:265-345 (a rollout),
utils/trajectory_collector.py:146-172 (index maps), trainers/grpo.py:215-276 (the trainer's side),
scheduler/flow_match_euler_discrete.py:243-438 (the formula). None of their code is copied or imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..grpo.batch import Kind, RolloutBatch
from .contract import (
    conditioning_rows,
    mean_logp,
    need_images,
    prompt_groups,
    trainer_kernel,
    trainer_rewards,
    weighted_advantages,
)

KERNEL_NAMES = {"FlowSDE": "Flow-SDE", "DanceSDE": "Dance-SDE", "CPS": "CPS"}
"""Flow-Factory's name of each kernel it has."""

LOGP_KINDS: dict[str, Kind] = {"Flow-SDE": "gaussian", "Dance-SDE": "gaussian", "CPS": "neg_sq_err"}
"""What Flow-Factory calls a log-prob, by its name of the kernel."""


def to_flow_factory(
    batch: RolloutBatch,
    *,
    cond: Mapping[str, Tensor] | None = None,
    images: Tensor | None = None,
    advantages: Tensor | None = None,
    forbidden: float | None = None,
    num_train_timesteps: int = 1000,
) -> list[dict[str, Any]]:
    """Convert rollouts to one dict per row, for `SD3_5Sample.from_dict` or another of Flow-Factory's samples.

    Args:
        batch: The rollouts: B rows of S steps on a grid of K, from P problems.
        cond: Conditioning by name, [P, ...] each, over `batch.cond`.
        images: Decoded images [B, C, H, W] in [0, 1], by which the trainer computes rewards.
        advantages: Advantages [B], needed for weighted rows.
        forbidden: The reward that -inf, which forbids a sample, becomes; None makes that an error.
        num_train_timesteps: The scheduler's number of training timesteps.

    Returns:
        B dicts, rows in order:

        timesteps: [K] float32, all of the grid: 1000 sigma before each step, without the final 0. The trainer divides
            by 1000 instead of asking the scheduler for sigmas, so any grid will do, with one exception: Flow-SDE's
            first step, from sigma = 1, uses the scheduler's second sigma.
        all_latents: [M, *event] in the storage dtype, states before and after stored steps, joined where steps are
            consecutive. Their dtype is the transformer's input dtype there, as in its own rollouts.
        latent_index_map: [K + 1] int64, level of the grid to row of all_latents, -1 where there is none.
        log_probs: [S] float32, averaged over coordinates. Under "CPS" the mean of -(x_next - mean)^2, which is no
            density (`neg_sq_err`).
        log_prob_index_map: [K + 1] int64, step to entry of log_probs, -1 where there is none.
        prompt: Text, by whose hash the trainer groups rows ("problem 3" where there are no prompts).
        prompt_ids, prompt_embeds, pooled_prompt_embeds, ...: [L, ...], from cond, as they are.
        image: [C, H, W] in [0, 1], if images are given.
        extra_kwargs: {"rewards": {name: []}, sample_id, parent_id, log_weight under the base policy: [],
            "advantage": []}. The advantage only if passed, times the row's importance weight, for which Flow-Factory
            has no field; skip its prepare_feedback, which writes its own.

        The trainer reads both maps from the first sample of a micro-batch, so all rows must have the same window. It
        trains on scheduler.train_timesteps, which the settings fix to the steps stored here.

    Raises:
        SteerError: For batches that Flow-Factory cannot train on (see `contract.trainer_kernel`), and for weighted rows
            without advantages.
        ShapeError: Where rows have different windows, and for an advantage per step.
        NonFiniteError: For rewards, densities, states or advantages that are not finite.
        RewardError: For images outside [0, 1].
    """
    kernel = trainer_kernel(batch, "Flow-Factory", KERNEL_NAMES)
    steps = _common_window(batch)
    given = weighted_advantages(batch, advantages, "Flow-Factory")
    if given is not None and not bool((given == given[:, :1]).all()):
        raise ShapeError(
            "Flow-Factory has one advantage a sample, not one a step, got values that differ by step; pass (B,), or "
            "export to verl-omni"
        )
    texts = batch.prompts or tuple(f"problem {p}" for p in range(batch.problems))
    prompts = [texts[p] for p in batch.problem_id.tolist()]
    if given is None:
        prompt_groups(batch, prompts, "Flow-Factory")
    states, places = _joined_states(batch, steps)
    count = len(batch.sigmas) - 1
    shared = {
        "timesteps": batch.sigmas[:count].float() * num_train_timesteps,
        "latent_index_map": _index_map(places, count),
        "log_prob_index_map": _index_map(steps, count),
    }
    rows = {
        "all_latents": states,
        "log_probs": mean_logp(batch, LOGP_KINDS[kernel.name]),
        **conditioning_rows(batch, cond),
    }
    rows |= {} if images is None else {"image": need_images(batch, images)}
    extra = {"sample_id": batch.sample_id, "parent_id": batch.parent_id, "log_weight": batch.log_w_base}
    extra |= {} if given is None else {"advantage": given[:, 0]}
    rewards = trainer_rewards(batch, "Flow-Factory", forbidden)
    return [
        {
            **shared,
            **_row(rows, b),
            "prompt": prompts[b],
            "extra_kwargs": {"rewards": _row(rewards, b), **_row(extra, b)},
        }
        for b in range(batch.rows)
    ]


def _row(values: Mapping[str, Tensor], b: int) -> dict[str, Tensor]:
    """Row b of every tensor."""
    return {name: value[b] for name, value in values.items()}


def flow_factory_settings(batch: RolloutBatch) -> dict[str, Any]:
    """Entries of Flow-Factory's configuration under which its formula scores this batch as it was drawn.

    Args:
        batch: The rollouts.

    Returns:
        Values by dotted name.

    Raises:
        SteerError: As `to_flow_factory`, for batches that it cannot train on.
    """
    kernel = trainer_kernel(batch, "Flow-Factory", KERNEL_NAMES)
    steps = _common_window(batch)
    return {
        "scheduler.dynamics_type": kernel.name,
        "scheduler.noise_level": kernel.level,
        "scheduler.sde_steps": steps,
        "scheduler.num_sde_steps": len(steps),
        "train.num_inference_steps": len(batch.sigmas) - 1,
        "train.guidance_scale": batch.cfg_scale,
    }


def _common_window(batch: RolloutBatch) -> list[int]:
    """The steps of the grid that rows have, the same for all; ShapeError where they differ."""
    if bool((batch.step_idx != batch.step_idx[0]).any()):
        raise ShapeError(
            "Flow-Factory reads the window from the first sample, so all rows need the same one, got several; collect "
            "with steer.grpo.every() or sliding(), or one problem at a time"
        )
    return batch.step_idx[0].tolist()


def _joined_states(batch: RolloutBatch, steps: list[int]) -> tuple[Tensor, list[int]]:
    """States [B, M, *event] before and after each step, each level of the grid once, and these levels."""
    at: dict[int, Tensor] = {}
    for s, k in enumerate(steps):
        if k in at and not torch.equal(at[k], batch.x_t[:, s]):
            raise ShapeError(
                f"Flow-Factory keeps one state a level, and step {k} does not start from the state that step {k - 1} "
                "ended in; collect one window of consecutive steps by steer.grpo.every()"
            )
        at[k], at[k + 1] = batch.x_t[:, s], batch.x_next[:, s]
    places = sorted(at)
    return torch.stack([at[k] for k in places], 1), places


def _index_map(places: list[int], count: int) -> Tensor:
    """Level 0 to `count` of the grid to its index in `places`, [count + 1] int64; -1 for levels that are not there."""
    found = torch.full((count + 1,), -1, dtype=torch.int64)
    found[places] = torch.arange(len(places))
    return found
