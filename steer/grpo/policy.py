"""A policy's log-densities of stored steps, which an update recomputes with gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ShapeError, SteerError
from ..processes.gaussian import GaussianProcess
from ..processes.second_order import SecondOrderProcess
from ..types import GaussianTransition
from .batch import Reduction, RolloutBatch, scale
from .evaluation_mode import check_evaluation_mode
from .kernels import describe_kernel


class StepRows(NamedTuple):
    """All stored steps of one level, packed for one network call: M rows of each of P problems.

    k:     the level.
    row:   [P, M] int64, row of the batch.
    slot:  [P, M] int64, which of the row's stored steps.
    valid: [P, M] bool, False where a problem had fewer than M: those entries are steps of other levels, not to count.
    """

    k: int
    row: Tensor
    slot: Tensor
    valid: Tensor

    def of(self, values: Tensor) -> Tensor:
        """These entries of per-step values [B, S, ...], as [P, M, ...], or of per-row values [B], as [P, M]."""
        return values[self.row] if values.ndim == 1 else values[self.row, self.slot]


class PolicyStep(NamedTuple):
    """The policy's transition of stored steps.

    log_prob: [P, M] float64, of the states that were drawn, reduced as asked.
    mean:     [P, M, *event], of the transition.
    std:      of the transition, sqrt(dt) included.
    """

    log_prob: Tensor
    mean: Tensor
    std: float


def by_level(batch: RolloutBatch, *, distinct: bool = False) -> list[StepRows]:
    """The trainable steps of a batch, level by level: each level is one network call of the update.

    Args:
        batch: rows with stored steps.
        distinct: take a step that several rows share (a common prefix) once. For branching rollouts with
            `depth_advantages`, which are the same in all of them: the loss of a level is unchanged, and it costs one
            network row per branch instead of one per row.

    Returns:
        One `StepRows` per level, from noise to data.
    """
    problems, out = batch.problems, []
    for k in torch.unique(batch.step_idx[batch.mask]).tolist():
        at_k = batch.mask & (batch.step_idx == k)
        if distinct and batch.step_id is not None:
            row, slot = at_k.nonzero(as_tuple=True)
            edge = torch.unique(batch.step_id[row, slot], return_inverse=True)[1]
            first = torch.full_like(edge, batch.rows).scatter_reduce(0, edge, row, "amin")
            at_k = at_k.index_put((row, slot), first[edge] == row)
        hit, slot = at_k.any(1).view(problems, -1), at_k.int().argmax(1)
        most = int(hit.sum(1).max())
        within = torch.sort(~hit, dim=1, stable=True).indices[:, :most]
        row = within + torch.arange(problems, device=within.device)[:, None] * hit.shape[1]
        out.append(StepRows(k, row, slot[row], hit.gather(1, within)))
    return out


def log_prob(
    process: GaussianProcess, batch: RolloutBatch, step: StepRows, *, reduction: Reduction = "sum"
) -> PolicyStep:
    """The policy's transition of stored steps, and its log-density of what was drawn; gradients reach the network.

    Args:
        process: the policy being trained: the collecting process around the current network, same grid, same rule.
        batch: rows with stored steps.
        step: the steps to score, of one level, from `by_level`.
        reduction: over coordinates: "sum", a log-density, or their "mean".

    Returns:
        `PolicyStep`. Its quantity is the batch's: a log-density, or -|x_next - mean|^2 after `as_neg_sq_err`.

    Raises:
        SteerError: another rule, schedule, grid or autocast than the batch was drawn by, or another reduction; a
            network whose predictions depend on train() and that was left in it.
        ShapeError: a policy of another number of prompts.

    Cost: P M network rows; 2 P M where steps remember (`steer.second_order`): the prediction before is made again, so
        that gradients are those of the whole density. 4 P more where a network is in train().
    """
    check_same_kernel(process, batch)
    x, x_next = (step.of(states).to(process.dtype) for states in (batch.x_t, batch.x_next))
    check_evaluation_mode(process, lambda: x[:, :2], step.k)
    transition = _transition(process, batch, step, x)
    if batch.logp_kind == "gaussian":
        value = transition.log_prob(x_next)
    else:
        value = -(x_next - transition.mean).double().flatten(2).square().sum(2)
    return PolicyStep(value / scale(reduction, batch.logp_numel), transition.mean, transition.std)


def _transition(process: GaussianProcess, batch: RolloutBatch, step: StepRows, x: Tensor) -> GaussianTransition:
    """The policy's transition from states x [P, M, *event] of stored steps, and the ones before where it remembers."""
    if isinstance(process, SecondOrderProcess):
        assert batch.x_before is not None  # of the same kernel
        x = process.recalled(x, step.of(batch.x_before).to(process.dtype), step.k)
    return process.transition(x, process.denoise(x, step.k), step.k)


def log_probs(process: GaussianProcess, batch: RolloutBatch, *, reduction: Reduction = "sum") -> Tensor:
    """The policy's log-densities of every stored step; before the first update they equal `logp_old`.

    Args:
        process: as in `log_prob`.
        batch: rows with stored steps.
        reduction: over coordinates: "sum" or "mean".

    Returns:
        [B, S] float64, 0 at padding.

    Raises:
        SteerError, ShapeError: as `log_prob`.
    """
    out = torch.zeros(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
    for step in by_level(batch):
        value = log_prob(process, batch, step, reduction=reduction).log_prob
        out = out.index_put((step.row[step.valid], step.slot[step.valid]), value[step.valid])
    return out


def check_same_kernel(process: GaussianProcess, batch: RolloutBatch) -> None:
    """Raises SteerError where a process has another rule, schedule, grid or autocast than the batch was drawn by."""
    here = describe_kernel(process)
    if here["autocast"] != batch.kernel["autocast"]:
        raise SteerError(
            f"densities are of the network that drew the rows, which ran with autocast {batch.kernel['autocast']}, and "
            f"here it is {here['autocast']}; collect and update under the same torch.autocast, or both without"
        )
    if here["hash"] != batch.kernel["hash"]:
        raise SteerError(
            f"densities are of the kernel that drew them, {batch.kernel['rule']}{batch.kernel['parameters']} on "
            f"{len(batch.times) - 1} steps, got {here['rule']}{here['parameters']} on {process.steps} steps of "
            f"{here['schedule']}; evaluate with the rule, schedule and times of the collecting process"
        )
    if process.problems not in (None, batch.problems):
        raise ShapeError(
            f"a policy conditioned on {process.problems} problem(s) cannot score rows of {batch.problems}; condition "
            "it as the collecting process was, problem for problem"
        )
