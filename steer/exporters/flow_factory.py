"""To Flow-Factory: the fields of its samples, one dict a row, and the scheduler's settings that go with them.

Names and shapes read at github.com/X-GenGroup/Flow-Factory at a0b2bc5 (2026-05), in src/flow_factory:
samples/samples.py:68-192 (BaseSample), 294-375 (stacking), models/stable_diffusion/sd3_5.py:265-345 (a rollout),
utils/trajectory_collector.py:146-172 (index maps), trainers/grpo.py:215-276 (the trainer's side),
scheduler/flow_match_euler_discrete.py:243-438 (the formula). No code of theirs is here, and none is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..grpo.batch import Kind, RolloutBatch
from .contract import conditioning_rows, mean_logp, need_images, prompt_groups, trainer_kernel, weighted_advantages

KERNEL_NAMES = {"FlowSDE": "Flow-SDE", "DanceSDE": "Dance-SDE", "CPS": "CPS"}
LOGP_KINDS: dict[str, Kind] = {"Flow-SDE": "gaussian", "Dance-SDE": "gaussian", "CPS": "neg_sq_err"}


def to_flow_factory(
    batch: RolloutBatch,
    *,
    cond: Mapping[str, Tensor] | None = None,
    images: Tensor | None = None,
    advantages: Tensor | None = None,
    num_train_timesteps: int = 1000,
) -> list[dict[str, Any]]:
    """B dicts for `SD3_5Sample.from_dict` or another of Flow-Factory's samples, rows in order; K steps on the grid.

    timesteps:          (K,) float32, all of the grid: 1000 sigma before each step, without the final 0. The trainer
                        divides by 1000 instead of asking the scheduler for sigmas, so any grid will do, with one
                        exception: Flow-SDE's first step, from sigma = 1, takes the scheduler's second sigma.
    all_latents:        (M, *event) in the storage dtype, states before and after stored steps, joined where steps do.
                        Their dtype is the transformer's input dtype there, as in its own rollouts.
    latent_index_map:   (K + 1,) int64, position on the grid to row of all_latents, -1 where none is.
    log_probs:          (S,) float32, averaged over coordinates. Under "CPS" the mean of -(x_next - mean)^2, which is no
                        density (`neg_sq_err`).
    log_prob_index_map: (K + 1,) int64, step to entry of log_probs, -1 where none is.
    prompt:             text, by whose hash the trainer groups rows ("problem 3" where there are no prompts).
    prompt_ids, prompt_embeds, pooled_prompt_embeds, ...: (L, ...), from cond, as they are.
    image:              (C, H, W) in [0, 1], if images (B, C, H, W) are given; rewards are scored of it.
    extra_kwargs:       {"rewards": {name: ()}, sample_id, parent_id, log_weight to the policy: (), "advantage": ()}.
                        The last only if passed: prepare_feedback writes its own, so skip that. It is times the row's
                        weight, for which Flow-Factory has no field.

    Both maps are read off the first sample of a micro-batch, so all rows must have the same window. It trains on
    scheduler.train_timesteps, which the settings fix to the steps stored here. cond: {name: (P, ...)}, over batch.cond.
    """
    kernel = trainer_kernel(batch, "Flow-Factory", KERNEL_NAMES)
    steps = _common_window(batch)
    given = weighted_advantages(batch, advantages, "Flow-Factory")
    if given is not None and not bool((given == given[:, :1]).all()):
        raise ShapeError("Flow-Factory has one advantage a sample, not one a step; pass (B,), or export to verl-omni")
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
    return [
        {
            **shared,
            **_row(rows, b),
            "prompt": prompts[b],
            "extra_kwargs": {"rewards": _row(batch.rewards, b), **_row(extra, b)},
        }
        for b in range(batch.rows)
    ]


def _row(values: Mapping[str, Tensor], b: int) -> dict[str, Tensor]:
    return {name: value[b] for name, value in values.items()}


def flow_factory_settings(batch: RolloutBatch) -> dict[str, Any]:
    """The entries of Flow-Factory's configuration that its formula must have to score this batch as it was drawn."""
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
    """The steps that every row has."""
    if bool((batch.step_idx != batch.step_idx[0]).any()):
        raise ShapeError(
            "Flow-Factory reads the window off the first sample, so all rows need the same one; collect with "
            "steer.grpo.every() or sliding(), or one problem at a time"
        )
    return batch.step_idx[0].tolist()


def _joined_states(batch: RolloutBatch, steps: list[int]) -> tuple[Tensor, list[int]]:
    """States (B, M, *event) before and after each step, each position of the grid once, and the positions."""
    at: dict[int, Tensor] = {}
    for s, k in enumerate(steps):
        if k in at and not torch.equal(at[k], batch.x_t[:, s]):
            raise ShapeError(
                f"Flow-Factory keeps one state a position, and step {k} does not start where {k - 1} ended"
            )
        at[k], at[k + 1] = batch.x_t[:, s], batch.x_next[:, s]
    places = sorted(at)
    return torch.stack([at[k] for k in places], 1), places


def _index_map(places: list[int], count: int) -> Tensor:
    found = torch.full((count + 1,), -1, dtype=torch.int64)
    found[places] = torch.arange(len(places))
    return found
