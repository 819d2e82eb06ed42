"""What flow_grpo, verl-omni and Flow-Factory have in common: whom they can train on, and how they read a step.

All three recompute a step's log-prob from (x_t, x_next, timestep) by their own formula, on a rectified flow, and
compare it with the stored one: a batch is theirs only where their formula is the law that drew it. That is checked
here, by name of the kernel and by its standard deviations, before anything leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError, StateSpaceError, SteerError
from ..grpo.batch import Kind, RolloutBatch

NOISE_LEVEL_PARAMETER = {"FlowSDE": "a", "DanceSDE": "eta", "CPS": "eta"}
"""Kernels that trainers know, and the parameter of each that they call its noise level."""


RATIO_TOLERANCE = 1e-5
"""How far ratios may begin from 1. A relative error e of a step's std moves a mean log-prob by e (1 + std), roughly."""


class TrainerKernel(NamedTuple):
    """What a trainer is to be told: its own name of the kernel, and the noise level."""

    name: str
    level: float


def trainer_kernel(batch: RolloutBatch, trainer: str, names: Mapping[str, str]) -> TrainerKernel:
    """The kernel in the trainer's words; refuses a batch that the trainer's formula would not score as it was drawn.

    names: the trainer's name of each kernel it has. Raises NotStochasticError where there is no density, SteerError
    where rows are good for other losses only, StateSpaceError for a kernel or a path that is not the trainer's.
    """
    batch.need_density()
    if batch.objective != "policy_gradient":
        raise SteerError(
            f"{trainer} takes policy gradients, and these rows were collected as {batch.objective!r}: their weights to "
            "the policy are too few to trust. Use them for SFT, DPO or reward-weighted regression (x0, rewards, "
            "log_w_target), or collect at a higher temperature"
        )
    rule = batch.kernel["rule"]
    if rule not in names:
        raise StateSpaceError(
            f"{trainer} can score steps of {', '.join(names)} only, got {rule}; collect with "
            "process.with_rule(steer.flow_sde(0.7)), or train with steer.grpo"
        )
    if not bool(batch.mask.all()) or not batch.mask.shape[1]:
        raise ShapeError(
            f"{trainer} takes the same number of steps, at least one, in every row; these have "
            f"{batch.mask.sum(1).min()} to {batch.mask.sum(1).max()}"
        )
    level = float(batch.kernel["parameters"][NOISE_LEVEL_PARAMETER[rule]])
    error = (_trainer_std(rule, level, batch) / batch.std.double() - 1.0).abs()
    if bool((error > 1e-3).any()):
        raise StateSpaceError(
            f"{trainer}'s formula for {rule} gives steps another standard deviation than they were drawn with; its "
            f"states are x_t = (1 - sigma) x_0 + sigma noise, and this batch is of {batch.kernel['schedule']}"
        )
    if bool((error > RATIO_TOLERANCE / (1.0 + batch.std)).any()):
        raise StateSpaceError(
            f"{trainer} keeps sigmas in float32, which moves the law of {rule} near sigma = 1 enough to show in "
            "ratios; collect on a grid of float32 numbers: process.with_times(torch.tensor(process.times).tolist())"
        )
    return TrainerKernel(names[rule], level)


def _trainer_std(rule: str, level: float, batch: RolloutBatch) -> Tensor:
    """Standard deviation (B, S) of each step on a rectified flow, as trainers have it."""
    sigmas = batch.sigmas.double()
    here, there = sigmas[batch.step_idx], sigmas[batch.step_idx + 1]
    span = (here - there).clamp(min=0.0)
    if rule == "CPS":
        return there * torch.sin(torch.tensor(level, dtype=torch.float64) * torch.pi / 2)
    if rule == "DanceSDE":
        return level * span.sqrt()
    return level * (here / (1.0 - torch.where(here == 1.0, sigmas[1], here))).sqrt() * span.sqrt()


def mean_logp(batch: RolloutBatch, kind: Kind) -> Tensor:
    """Log-probs (B, S) as all three have them: averaged over coordinates, and under "neg_sq_err" no density at all."""
    if kind == "gaussian" and batch.logp_kind != "gaussian":
        raise SteerError(
            "these log-probs were made by as_neg_sq_err(), and the trainer expects a density; pass the batch"
        )
    return (batch if kind == "gaussian" else batch.as_neg_sq_err()).logp("mean")


def timesteps(batch: RolloutBatch, scale: float) -> Tensor:
    """Timesteps (B, S) float32 of the states before each step, bit for bit diffusers' `scheduler.timesteps`."""
    return batch.sigmas.float()[batch.step_idx] * scale


def joined_states(batch: RolloutBatch, trainer: str) -> Tensor:
    """States (B, S + 1, *event) of a window that runs through; ShapeError where steps do not join."""
    gaps = bool((batch.step_idx[:, 1:] != batch.step_idx[:, :-1] + 1).any())
    if gaps or not torch.equal(batch.x_next[:, :-1], batch.x_t[:, 1:]):
        raise ShapeError(
            f"{trainer} reads the state after a step as the state before the next, so its window has no gaps; collect "
            "with steer.grpo.every() or another window of consecutive steps"
        )
    return torch.cat([batch.x_t[:, :1], batch.x_next], 1)


def chosen_reward(batch: RolloutBatch, reward: str | None) -> Tensor:
    """The reward (B,) to train on, float32: the one by that name, or the only one."""
    name = next(iter(batch.rewards)) if reward is None and len(batch.rewards) == 1 else reward
    if name is None or name not in batch.rewards:
        raise SteerError(f"name the reward to train on, one of {sorted(batch.rewards)}, got {reward!r}")
    return batch.rewards[name].float()


def importance_weights(batch: RolloutBatch) -> Tensor | None:
    """Weights (B, S) to the base policy, mean one in a group; None where rows were drawn from it.

    A row's own (`weights()`, which account for proposals and selections alike) where it has any, else a step's.
    """
    weight = batch.weights()
    if not torch.allclose(weight, torch.ones_like(weight), rtol=0.0, atol=1e-6):
        return weight[:, None].expand(batch.mask.shape).contiguous()
    same = torch.allclose(batch.logp("mean"), batch.logp("mean", of="behavior"), rtol=0.0, atol=1e-6)
    return None if same or batch.logp_kind != "gaussian" else batch.step_weights()


def weighted_advantages(batch: RolloutBatch, given: Tensor | None, trainer: str) -> Tensor | None:
    """Advantages (B, S) float32 times `importance`, for a trainer without a field for weights; None: it computes them.

    A clipped loss is proportional to the advantage, so weighting one weights the other, up to the trainer's own
    clipping of advantages. Raises SteerError for weighted rows without advantages.
    """
    weight = importance_weights(batch)
    if given is None:
        if weight is not None:
            raise SteerError(
                f"these rows are weighted (ESS {batch.ess().min():.3g} at least, of {batch.method}), and {trainer} has "
                "no field for weights: it would train on a biased group. Pass advantages=steer.grpo's, which then "
                "carry the weights, or export to verl-omni"
            )
        return None
    spread = per_step(batch, given)
    return spread if weight is None else spread * weight


def per_step(batch: RolloutBatch, given: Tensor) -> Tensor:
    """Advantages (B,) or (B, S) as (B, S) float32."""
    if given.shape not in ((batch.rows,), batch.mask.shape):
        raise ShapeError(f"advantages are (B,) or (B, S) = {tuple(batch.mask.shape)}, got {tuple(given.shape)}")
    whole = given if given.ndim == 2 else given[:, None].expand(batch.mask.shape)
    return whole.float().contiguous()


def need_images(batch: RolloutBatch, images: Tensor, *, frames: bool = False) -> Tensor:
    """The images (B, C, H, W), or with frames also (B, T, C, H, W); ShapeError where they are not one a row."""
    if images.ndim not in ((4, 5) if frames else (4,)) or len(images) != batch.rows:
        raise ShapeError(f"images are (B, C, H, W) with B = {batch.rows}, got {tuple(images.shape)}")
    return images


def conditioning_rows(batch: RolloutBatch, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Conditioning by name for every row, (B, ...), from that of every problem, (P, ...)."""
    both = {**batch.cond, **(given or {})}
    for name, value in both.items():
        if len(value) != batch.problems:
            raise ShapeError(f"cond[{name!r}] is one entry per problem, {batch.problems}, got {len(value)}")
    return {name: value[batch.problem_id.to(value.device)] for name, value in both.items()}


def prompt_groups(batch: RolloutBatch, labels: Sequence[object], trainer: str) -> None:
    """Raises SteerError unless rows of a group, and only they, have the same label: trainers group by prompt."""
    pairs = set(zip(labels, batch.group_id.tolist(), strict=True))
    if not len(pairs) == len({label for label, _ in pairs}) == len({group for _, group in pairs}):
        raise SteerError(
            f"{trainer} compares rows of equal prompts, and here groups are not prompts ({len(pairs)} pairs of prompt "
            f"and group, {batch.groups} groups); collect distinct prompts, or pass advantages="
        )
