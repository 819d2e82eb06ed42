"""What flow_grpo, verl-omni and Flow-Factory have in common: which batches they can train on, and how they read a step.

All three recompute a step's log-prob from (x_t, x_next, timestep) by their own formula, on a rectified flow, and
compare it with the stored one. So a batch can be exported only if their formula is the distribution that drew it; this
is checked here, by the kernel's name and its standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteError, ShapeError, StateSpaceError, SteerError
from ..grpo.batch import Kind, RolloutBatch

NOISE_LEVEL_PARAMETER = {"FlowSDE": "a", "DanceSDE": "eta", "CPS": "eta"}
"""Kernels that trainers know, and the parameter of each that they call its noise level."""

RATIO_TOLERANCE = 1e-5
"""How far importance ratios may start from 1. A std off by a factor 1 + e moves mean log-probs by about e (1 + std)."""


class TrainerKernel(NamedTuple):
    """Kernel name and noise level, in the trainer's terms."""

    name: str
    level: float


def trainer_kernel(batch: RolloutBatch, trainer: str, names: Mapping[str, str]) -> TrainerKernel:
    """The kernel in the trainer's terms, checked to be one that its formula scores as the batch was drawn.

    Args:
        batch: The rollouts.
        trainer: The trainer's name, for error messages.
        names: The trainer's name of each kernel that it has.

    Returns:
        The kernel's name and noise level for the trainer.

    Raises:
        NotStochasticError: Where the rows have no density.
        NonFiniteError: For states or densities that are not finite.
        SteerError: Where the rows suit other losses only.
        StateSpaceError: For a kernel or a path that the trainer does not have.
        ShapeError: Where rows have different numbers of steps, or none.
    """
    batch.need_density()
    need_finite({"x_t": batch.x_t, "x_next": batch.x_next, "logp_old": batch.logp_old}, trainer)
    if batch.objective != "policy_gradient":
        raise SteerError(
            f"{trainer} needs rows for policy gradients, and these were collected as {batch.objective!r}: their "
            "weights under the base policy are too unreliable. Use them for SFT, DPO or reward-weighted regression "
            "(x0, rewards, log_w_target), or collect at a higher temperature"
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
            f"{trainer}'s formula for {rule} gives steps another standard deviation than they were drawn with; it "
            f"needs states x_t = (1 - sigma) x_0 + sigma noise, got {batch.kernel['schedule']}; collect on "
            "steer.RectifiedFlow()"
        )
    if bool((error > RATIO_TOLERANCE / (1.0 + batch.std)).any()):
        raise StateSpaceError(
            f"{trainer} keeps sigmas in float32, which changes the steps of {rule} near sigma = 1 enough to show "
            "in importance ratios; collect on a grid of float32 numbers: "
            "process.with_times(torch.tensor(process.times).tolist())"
        )
    return TrainerKernel(names[rule], level)


def _trainer_std(rule: str, level: float, batch: RolloutBatch) -> Tensor:
    """Standard deviation [B, S] of each step on a rectified flow, by the trainers' formulas."""
    sigmas = batch.sigmas.double()
    here, there = sigmas[batch.step_idx], sigmas[batch.step_idx + 1]
    span = (here - there).clamp(min=0.0)
    if rule == "CPS":
        return there * torch.sin(torch.tensor(level, dtype=torch.float64) * torch.pi / 2)
    if rule == "DanceSDE":
        return level * span.sqrt()
    return level * (here / (1.0 - torch.where(here == 1.0, sigmas[1], here))).sqrt() * span.sqrt()


def mean_logp(batch: RolloutBatch, kind: Kind) -> Tensor:
    """Log-probs as all three trainers have them: averaged over coordinates.

    Args:
        batch: The rollouts.
        kind: "gaussian" for a log-density; "neg_sq_err" for the mean of -(x_next - mean)^2, which is no density.

    Returns:
        Log-probs [B, S].

    Raises:
        SteerError: Where a density is needed and the batch was converted by `as_neg_sq_err()`.
    """
    if kind == "gaussian" and batch.logp_kind != "gaussian":
        raise SteerError(
            "the trainer expects log-densities, and these log-probs were made by as_neg_sq_err(); pass the batch as it "
            "was before"
        )
    return (batch if kind == "gaussian" else batch.as_neg_sq_err()).logp("mean")


def timesteps(batch: RolloutBatch, scale: float) -> Tensor:
    """Timesteps [B, S], float32, of the states before each step: bit for bit diffusers' `scheduler.timesteps`.

    Args:
        batch: The rollouts.
        scale: The scheduler's num_train_timesteps.
    """
    return batch.sigmas.float()[batch.step_idx] * scale


def joined_states(batch: RolloutBatch, trainer: str) -> Tensor:
    """States of consecutive steps, each once.

    Args:
        batch: The rollouts.
        trainer: The trainer's name, for error messages.

    Returns:
        States [B, S + 1, *event], before the first step and after each.

    Raises:
        ShapeError: Where a step does not start from the state that the one before ended in.
    """
    gaps = bool((batch.step_idx[:, 1:] != batch.step_idx[:, :-1] + 1).any())
    if gaps or not torch.equal(batch.x_next[:, :-1], batch.x_t[:, 1:]):
        raise ShapeError(
            f"{trainer} reads the state after a step as the state before the next, so its window has no gaps; collect "
            "with steer.grpo.every() or another window of consecutive steps"
        )
    return torch.cat([batch.x_t[:, :1], batch.x_next], 1)


def trainer_rewards(batch: RolloutBatch, trainer: str, forbidden: float | None) -> dict[str, Tensor]:
    """All rewards by name, [B] float32, finite.

    Args:
        batch: The rollouts.
        trainer: The trainer's name, for error messages.
        forbidden: The reward that -inf becomes; None makes that an error.

    Raises:
        NonFiniteError: For a reward that is not finite: it would turn every advantage of its group into NaN.
    """
    rewards = {name: value.float() for name, value in batch.rewards.items()}
    if forbidden is not None:
        rewards = {name: value.masked_fill(value == -torch.inf, forbidden) for name, value in rewards.items()}
    return need_finite(
        rewards,
        trainer,
        "it would turn every advantage of its group into NaN; pass forbidden=..., the reward that -inf becomes (the "
        "lowest there is), and look into a reward that gives NaN or +inf",
    )


def need_finite(tensors: Mapping[str, Tensor], trainer: str, cure: str = "look into what made it") -> dict[str, Tensor]:
    """Tensors by name, [B, ...] each, checked to be finite.

    Args:
        tensors: What is to be exported.
        trainer: The trainer's name, for error messages.
        cure: What to do instead, for error messages.

    Raises:
        NonFiniteError: Naming the tensor and the row.
    """
    for name, value in tensors.items():
        bad = (~value.isfinite()).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"{trainer} takes finite numbers only, got {value[tuple(bad[0])].item()} in {name!r} of row "
                f"{int(bad[0, 0])} (in {len(bad[:, 0].unique())} rows of {len(value)}): {cure}"
            )
    return dict(tensors)


def chosen_reward(rewards: Mapping[str, Tensor], reward: str | None) -> Tensor:
    """The reward to train on, [B] float32.

    Args:
        rewards: All of them, by name.
        reward: Its name; None: the only one.

    Raises:
        SteerError: Where there is no such reward, or several and no name.
    """
    name = next(iter(rewards)) if reward is None and len(rewards) == 1 else reward
    if name is None or name not in rewards:
        raise SteerError(f"name the reward to train on, one of {sorted(rewards)}, got {reward!r}")
    return rewards[name]


def importance_weights(batch: RolloutBatch) -> Tensor | None:
    """Importance weights of the base policy over the distribution that drew the rows.

    Args:
        batch: The rollouts.

    Returns:
        Weights [B, S], of mean one in a group: each row's (`batch.weights()`, which account for proposals and
        selections) where these differ from one, else each step's. None where rows were drawn from the base policy.
    """
    weight = batch.weights()
    if not torch.allclose(weight, torch.ones_like(weight), rtol=0.0, atol=1e-6):
        return weight[:, None].expand(batch.mask.shape).contiguous()
    same = torch.allclose(batch.logp("mean"), batch.logp("mean", of="behavior"), rtol=0.0, atol=1e-6)
    return None if same or batch.logp_kind != "gaussian" else batch.step_weights()


def weighted_advantages(batch: RolloutBatch, given: Tensor | None, trainer: str) -> Tensor | None:
    """Advantages times `importance_weights`, for a trainer without a field for weights.

    A clipped loss is proportional to the advantage, so a weighted advantage is a weighted loss, up to the trainer's own
    clipping of advantages.

    Args:
        batch: The rollouts.
        given: Advantages [B] or [B, S]; None: the trainer computes its own.
        trainer: The trainer's name, for error messages.

    Returns:
        Weighted advantages [B, S] float32, or None.

    Raises:
        SteerError: For weighted rows without advantages.
        ShapeError: For advantages of another shape.
    """
    weight = importance_weights(batch)
    if given is None:
        if weight is not None:
            raise SteerError(
                f"these rows are weighted (ESS {batch.ess().min():.3g} at least, of {batch.method}), and {trainer} has "
                "no field for weights, so it would train on a biased group; pass advantages= from "
                "steer.grpo.advantages(batch), which are multiplied by the weights here, or export to verl-omni"
            )
        return None
    spread = per_step(batch, given)
    return spread if weight is None else spread * weight


def per_step(batch: RolloutBatch, given: Tensor) -> Tensor:
    """Advantages [B] or [B, S] as [B, S] float32; ShapeError for other shapes, NonFiniteError for other numbers."""
    if given.shape not in ((batch.rows,), batch.mask.shape):
        raise ShapeError(
            f"advantages are (B,) or (B, S) = {tuple(batch.mask.shape)}, got {tuple(given.shape)}; give one number a "
            "row, or one a step"
        )
    need_finite({"advantages": given}, "a trainer")
    whole = given if given.ndim == 2 else given[:, None].expand(batch.mask.shape)
    return whole.float().contiguous()


def need_images(batch: RolloutBatch, images: Tensor, *, frames: bool = False) -> Tensor:
    """Check that there is one image per row.

    Args:
        batch: The rollouts.
        images: Images [B, C, H, W].
        frames: Whether [B, T, C, H, W] will do as well.

    Returns:
        The images.

    Raises:
        ShapeError: For other shapes.
        RewardError: For values that are NaN or outside [0, 1].
    """
    from .. import rewards

    if images.ndim not in ((4, 5) if frames else (4,)) or len(images) != batch.rows:
        raise ShapeError(
            f"images are (B, C, H, W) with B = {batch.rows}, got {tuple(images.shape)}; decode batch.x0, one "
            "image a row"
        )
    rewards.image_checks.check_range(images, "the trainer", nan_passes=False)
    return images


def conditioning_rows(batch: RolloutBatch, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Conditioning of every row, from that of every problem.

    Args:
        batch: The rollouts.
        given: Conditioning by name, [P, ...] each; takes precedence over `batch.cond`.

    Returns:
        Conditioning by name, [B, ...] each.

    Raises:
        ShapeError: For conditioning of another number of problems.
    """
    both = {**batch.cond, **(given or {})}
    for name, value in both.items():
        if len(value) != batch.problems:
            raise ShapeError(
                f"cond[{name!r}] has one entry per problem, {batch.problems}, got {len(value)}; do not repeat "
                "entries by row"
            )
    return {name: value[batch.problem_id.to(value.device)] for name, value in both.items()}


def prompt_groups(batch: RolloutBatch, labels: Sequence[object], trainer: str) -> None:
    """Check that trainers, which group rows by prompt, find the batch's own groups.

    Args:
        batch: The rollouts.
        labels: What the trainer groups rows by, one label per row.
        trainer: The trainer's name, for error messages.

    Raises:
        SteerError: Unless rows have the same label exactly where they are of one group.
    """
    pairs = set(zip(labels, batch.group_id.tolist(), strict=True))
    if not len(pairs) == len({label for label, _ in pairs}) == len({group for _, group in pairs}):
        raise SteerError(
            f"{trainer} compares rows of equal prompts, and these groups are not prompts ({len(pairs)} pairs of prompt "
            f"and group, {batch.groups} groups); collect distinct prompts, or pass advantages="
        )
