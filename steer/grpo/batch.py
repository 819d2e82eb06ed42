"""What a trainer receives: the rows of a rollout, with every density that its update needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import NotStochasticError, SteerError
from ..key import Key

Reduction = Literal["sum", "mean"]
Kind = Literal["gaussian", "neg_sq_err"]
Objective = Literal["policy_gradient", "tilted_sft"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch:
    """Rows b = p N + n of P problems (prompts) with N rows each, problem after problem; B = P N, S stored steps a row.

    Only stochastic steps are stored, in the order they were taken. Rows that have fewer than S of them are padded at
    the end: mask is False there, and every other per-step field holds zeros (step_idx too; step_id holds -1).

    States and densities of steps:
    x_t, x_next:   [B, S, *event], storage dtype. The state before and after each stored step, as it was stored: the
                   chain continued from exactly this value, so densities are those of the tensors here.
    x_before:      [B, S, *event], storage dtype. The state before x_t, where steps remember what was predicted there
                   (`steer.second_order`); None elsewhere.
    t, t_next:     [B, S] float32, times of the path before and after; on a rectified flow these are the sigmas.
    step_idx:      [B, S] int64, level k that a step left: sigmas[k] -> sigmas[k + 1].
    mask:          [B, S] bool, True where there is a step to train on.
    mean_old:      [B, S, *event] float32, mean of the policy's transition from x_t; None where it was not kept.
    std:           [B, S] float32, standard deviation of the policy's transition, sqrt(dt) included.
    logp_old:      [B, S] float32, in nats: log-density of x_next under the policy, summed over coordinates.
    logp_behavior: [B, S] float32, in nats: the same under the transition that drew x_next (guided proposals differ
                   from the policy); NaN where a selection made the rows and there is no density to correct by.
    logp_numel:    coordinates D that log-densities are summed over: `logp("mean")` divides by it.
    logp_kind:     "gaussian" for a log-density; "neg_sq_err" for -|x_next - mean|^2 (no scale, no constants), the
                   quantity that some trainers call a log-prob of CPS. Made by `as_neg_sq_err()` only.

    Samples and where they come from:
    x0:            [B, *event], the finished sample, process dtype (not yet decoded).
    rewards:       name -> [B] float32, in units of the reward.
    step_rewards:  name -> [B, S] float32, rewards given to single steps; mostly empty.
    log_w_target:  [B] float32, log-weight of a row towards the distribution its method targeted.
    log_w_base:    [B] float32, log-weight of a row back to the policy. Scaled to mean(exp(log_w_base) f) =
                   E_policy[f] within a group in expectation where the method estimates the normalizing constant, and
                   up to a constant per group where it does not. Zeros when on-policy; -inf for a row without weight (a
                   duplicate merged into another row); NaN where no weight corrects the rows.
    group_id:      [B] int64, rows that are compared with each other: advantages are within it.
    problem_id:    [B] int64, b // N.
    sample_id:     [B] int64, equal where rows are copies of one sample.
    root_id:       [B] int64, equal where rows began from the same initial noise.
    parent_id:     [B] int64, of the branch or particle that the row left at the last branching or resampling.
    step_id:       [B, S] int64, equal where rows share a transition (a common prefix); -1 at padding. None: all differ.
    ancestors:     [B, K] int64, row (of the population then) that was this row's ancestor at level k; None for plain
                   chains.
    reward_mean, reward_std: name -> [groups] float32, statistics of all rows that were scored, where the rows here
                   are a selection of them (`grpo.keep`).

    The run:
    sigmas:        [K + 1] float32, noise scale at every level of the grid, noise first.
    times:         [K + 1] float64, times of the path at every level, noise first.
    path:          [B, K + 1, *event], storage dtype, all states of each row, where `path=True` asked for them.
    kernel:        what drew the steps: {"rule", "parameters", "window", "schedule", "times", "autocast", "hash",
                   "storage"}.
    cond:          name -> [P, ...], conditioning of each problem, for your own use; index by problem_id for rows.
    prompts:       P texts, or None.
    cfg_scale:     guidance scale, for your own use.
    seed:          [B] int64, seed of the run that a row came from.
    key:           the same with its stream; a row's noise is named by (key, problem, row of the problem).
    policy_version: for your own use: which update of the policy drew this.
    cost:          per row: "nfe" (network rows), "rewards", "grads", "decodes"; and "seconds" of the whole run.
    method:        name of the collector.
    objective:     what the rows are good for: "policy_gradient"; or, where there is no density or too little weight,
                   "tilted_sft" (supervised, preference and reward-weighted losses).
    """

    x_t: Tensor
    x_next: Tensor
    t: Tensor
    t_next: Tensor
    step_idx: Tensor
    mask: Tensor
    mean_old: Tensor | None
    std: Tensor
    logp_old: Tensor
    logp_behavior: Tensor
    logp_numel: int
    x0: Tensor
    rewards: Mapping[str, Tensor]
    log_w_target: Tensor
    log_w_base: Tensor
    group_id: Tensor
    problem_id: Tensor
    sample_id: Tensor
    root_id: Tensor
    parent_id: Tensor
    sigmas: Tensor
    times: Tensor
    kernel: Mapping[str, Any]
    seed: Tensor
    key: Key
    cost: Mapping[str, float]
    logp_kind: Kind = "gaussian"
    step_rewards: Mapping[str, Tensor] = field(default_factory=dict)
    step_id: Tensor | None = None
    x_before: Tensor | None = None
    ancestors: Tensor | None = None
    reward_mean: Mapping[str, Tensor] = field(default_factory=dict)
    reward_std: Mapping[str, Tensor] = field(default_factory=dict)
    path: Tensor | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None
    cfg_scale: float = 1.0
    policy_version: int = 0
    method: str = "rollout"
    objective: Objective = "policy_gradient"

    def __repr__(self) -> str:
        return (
            f"RolloutBatch({self.problems} problems x {self.rows // self.problems} rows, {self.mask.shape[1]} stored "
            f"steps of {len(self.times) - 1}, {self.method}, {self.kernel['rule']}, {self.objective})"
        )

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.x0.shape[0]

    @property
    def problems(self) -> int:
        """P, the number of problems (prompts)."""
        return int(self.problem_id[-1]) + 1

    @property
    def groups(self) -> int:
        """The number of groups that advantages are computed in."""
        return int(self.group_id.max()) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held; memory that several of them share counts once."""
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        for mapping in (self.rewards, self.step_rewards, self.reward_mean, self.reward_std, self.cond):
            values += mapping.values()
        memory = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in values if isinstance(v, Tensor)}
        return sum(storage.nbytes() for storage in memory.values())

    def logp(self, reduction: Reduction = "sum", *, of: Literal["old", "behavior"] = "old") -> Tensor:
        """Stored log-densities of steps, [B, S] float32, in nats.

        Args:
            reduction: "sum" over coordinates, a log-density; or their "mean", as flow_grpo, DanceGRPO and verl-omni.
            of: "old", under the policy that collected; "behavior", under the transition that drew the step.

        Returns:
            [B, S]; 0 at padding.

        Raises:
            SteerError: another reduction.
        """
        value = self.logp_old if of == "old" else self.logp_behavior
        return value / scale(reduction, self.logp_numel)

    def as_neg_sq_err(self) -> RolloutBatch:
        """This batch with -|x_next - mean|^2 in place of log-densities, which `logp_kind` then says.

        UniRL and the released CPS code train on its mean over coordinates, `logp("mean")`. It is not a density.

        Returns:
            The batch; itself where it was converted before.
        """
        if self.logp_kind == "neg_sq_err":
            return self
        log_std = self.std.double().clamp(min=torch.finfo(torch.float32).tiny).log()
        constant = -self.logp_numel * (log_std + 0.5 * math.log(2.0 * math.pi))

        def bare(logp: Tensor) -> Tensor:
            squared = 2.0 * self.std.double().square() * (logp.double() - constant)
            return torch.where(self.mask, squared, 0.0).float()

        return replace(
            self, logp_old=bare(self.logp_old), logp_behavior=bare(self.logp_behavior), logp_kind="neg_sq_err"
        )

    def weights(self) -> Tensor:
        """Weights of rows back to the policy, [B] float32, of mean one in each group.

        Returns:
            [B]; ones when on-policy, 0 for rows without weight.

        Raises:
            NotStochasticError: no weight corrects these rows.
        """
        self.need_density()
        weight = torch.zeros(self.groups, dtype=torch.float64, device=self.log_w_base.device)
        top = torch.full_like(weight, -math.inf).scatter_reduce(0, self.group_id, self.log_w_base.double(), "amax")
        raw = (self.log_w_base.double() - top[self.group_id]).exp()
        total = weight.index_add(0, self.group_id, raw)
        count = torch.bincount(self.group_id, minlength=self.groups)
        return (raw * (count / total)[self.group_id]).float()

    def step_weights(self, limit: float = 2.0) -> Tensor:
        """Importance ratios of single steps, policy / behaviour, [B, S] float32: verl-omni's rollout_is_weights.

        They correct a guided proposal given the state it started from, but not what resampling selected: those of a
        bootstrap SMC are all 1, and its rows are tilted all the same. `weights()` corrects both; use one of the two,
        never both.

        Args:
            limit: the largest ratio; larger ones are set to it.

        Returns:
            [B, S]; ones at padding.

        Raises:
            NotStochasticError: no weight corrects these rows.
            SteerError: the batch was converted by `as_neg_sq_err`.
        """
        self.need_density()
        if self.logp_kind != "gaussian":
            raise SteerError('step weights need log-densities, got logp_kind "neg_sq_err"; take them before converting')
        ratio = (self.logp_old.double() - self.logp_behavior.double()).exp().clamp(max=limit)
        return torch.where(self.mask, ratio, 1.0).float()

    def ess(self) -> Tensor:
        """Effective sample size of the weights back to the policy, [groups] float64; copies of a sample count once.

        See `effective_roots`, which can be much lower.
        """
        return self._effective(self.sample_id)

    def effective_roots(self) -> Tensor:
        """Effective number of surviving seeds: the ESS of weights summed over rows that began from the same noise.

        Returns:
            [groups] float64, at most `ess()`.

        The ESS alone does not notice when a group descends from few particles: after the last resampling their rows
        have nearly equal weights, and the ESS rises again to the size of the group.
        """
        return self._effective(self.root_id)

    def _effective(self, family: Tensor) -> Tensor:
        weight, member = self.weights().double(), torch.unique(family, return_inverse=True)[1]
        share = torch.zeros(self.rows, dtype=torch.float64, device=weight.device).index_add(0, member, weight)
        owner = torch.zeros_like(member).index_copy(0, member, self.group_id)
        zero = torch.zeros(self.groups, dtype=torch.float64, device=weight.device)
        return zero.index_add(0, owner, share).square() / zero.index_add(0, owner, share.square())

    def select(self, index: Tensor) -> RolloutBatch:
        """The batch of some of its rows, with all their fields; weights are kept as they are.

        Args:
            index: [P, M] int64, rows of each problem by their number within the problem, 0 to N - 1.

        Returns:
            A batch of P M rows.
        """
        per = self.rows // self.problems
        flat = (index + torch.arange(self.problems, device=index.device)[:, None] * per).flatten()
        changes: dict[str, Any] = {}
        for name in {f.name for f in fields(self)} - {"sigmas", "times"}:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                changes[name] = value[flat]
        for name in ("rewards", "step_rewards"):
            mapping: Mapping[str, Tensor] = getattr(self, name)
            changes[name] = {key: tensor[flat] for key, tensor in mapping.items()}
        return replace(self, **changes)

    def need_density(self) -> None:
        """Raises NotStochasticError where no weight corrects the rows: a policy gradient of them would be biased."""
        if bool((self.logp_behavior.isnan() & self.mask).any()) or bool(self.log_w_base.isnan().any()):
            raise NotStochasticError(
                f"a policy gradient needs rows of the policy, or weights that turn them into such, and there are none "
                f"for rows of {self.method}: it selects greedily, begins from a start that no weight corrects, or does "
                "not say what it targets (Result.law); use these rows for SFT, DPO or reward-weighted regression, or "
                "collect with a weighted sampler, for instance steer.smc"
            )


def scale(reduction: Reduction, numel: int) -> int:
    """What a sum over coordinates is divided by: 1 for "sum", the number of coordinates for "mean"."""
    if reduction not in ("sum", "mean"):
        raise SteerError(f'reduction is "sum" or "mean", got {reduction!r}')
    return numel if reduction == "mean" else 1
