"""What a trainer receives: the rows of a rollout, with every density its update needs, as one value."""

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


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch:
    """Rows b = p * N + n of P problems (prompts) with N rows each, problem-major; S stored steps a row; B = P N.

    Only stochastic steps are stored. Rows that have fewer than S of them are padded at the end: mask is False there,
    and every other per-step field holds zeros (step_idx too). Row b's steps are in the order they were taken.

    States and laws:
    x_t, x_next:   (B, S, *event), storage dtype. The state before and after each stored step, as it was stored: the
                   chain went on from exactly this value, so densities are those of the tensors here.
    t, t_next:     (B, S) float32, times of the path before and after; on a rectified flow these are the sigmas.
    step_idx:      (B, S) int64, level k a step left: sigmas[k] -> sigmas[k + 1].
    mask:          (B, S) bool, True where there is a step to train on.
    mean_old:      (B, S, *event) float32, mean of the base policy's step from x_t; None where it was not kept.
    std:           (B, S) float32, standard deviation of the base policy's step, sqrt(dt) included.
    logp_old:      (B, S) float32, log-density of x_next under the base policy, summed over coordinates.
    logp_behavior: (B, S) float32, the same under the law that drew x_next (guided proposals differ from the base);
                   NaN where a selection made it and there is no density.
    logp_numel:    coordinates D summed over: `logp("mean")` divides by it.
    logp_kind:     "gaussian" for a log-density; "neg_sq_err" for -|x_next - mean|^2 (no scale, no constants), the
                   quantity some trainers call a log-prob of CPS. Made by `as_neg_sq_err()` only.

    Samples and their place:
    x0:            (B, *event), the finished sample, process dtype (not yet decoded).
    rewards:       name -> (B,) float32.
    step_rewards:  name -> (B, S) float32, scores given to single steps; empty mostly.
    log_w_target:  (B,) float32, log-weight of a row for the law its collector targeted; log_w_base: for the base
                   policy. Scaled to mean(exp(log_w_base) f) = E_base[f] within a group in expectation, where the
                   collector knows the evidence, and up to a constant per group where it does not. Zeros when
                   on-policy; -inf for a row that counts for nothing (a duplicate merged into another row).
    group_id:      (B,) int64, rows compared with each other: advantages are within it. problem_id: (B,) int64, b // N.
    sample_id:     (B,) int64, equal where rows are copies of one sample. root_id: (B,), of the initial noise.
    parent_id:     (B,), of the branch or particle that the row left at the last branching or resampling.
    step_id:       (B, S) int64, equal where rows share a transition (a common prefix); -1 at padding. None: all differ.
    ancestors:     (B, K) int64, row (of the population then) that was this row's ancestor at level k; None if plain.
    reward_mean, reward_std: name -> (groups,), statistics of all that was scored, where rows are a selection of it.

    The run:
    sigmas, times: (K + 1,) float32 and float64, noise scale and time at every level of the grid, noise first.
    path:          (B, K + 1, *event), storage dtype, all states of each row, where `path=True` asked for them.
    kernel:        what drew the steps: {"rule", "parameters", "window", "schedule", "times", "hash", "storage"}.
    cond:          name -> (P, ...) conditioning of each problem, handed through; index by problem_id for rows.
    prompts:       P texts, or None. cfg_scale: guidance scale, handed through.
    seed:          (B,) int64, seed of the run a row came from. key: the same with its stream; a row's noise is named by
                   (key, problem, slot).
    policy_version: handed through: which update of the policy drew this.
    cost:          per row: "nfe", "rewards", "grads", "decodes"; and "seconds" of the whole run.
    method:        name of the collector. objective: what the rows are good for: "policy_gradient", or where there is no
                   density or too little weight "tilted_sft" (supervised, preference and reward-weighted losses).
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
    ancestors: Tensor | None = None
    reward_mean: Mapping[str, Tensor] = field(default_factory=dict)
    reward_std: Mapping[str, Tensor] = field(default_factory=dict)
    path: Tensor | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None
    cfg_scale: float = 1.0
    policy_version: int = 0
    method: str = "rollout"
    objective: Literal["policy_gradient", "tilted_sft"] = "policy_gradient"

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
        """Bytes of all tensors held; memory that several of them view counts once."""
        values: list[Any] = [getattr(self, f.name) for f in fields(self)]
        for mapping in (self.rewards, self.step_rewards, self.reward_mean, self.reward_std, self.cond):
            values += mapping.values()
        memory = {v.untyped_storage().data_ptr(): v.untyped_storage() for v in values if isinstance(v, Tensor)}
        return sum(storage.nbytes() for storage in memory.values())

    def logp(self, reduction: Reduction = "sum", *, of: Literal["old", "behavior"] = "old") -> Tensor:
        """Stored log-densities (B, S), summed over coordinates or averaged (flow_grpo, DanceGRPO, verl-omni)."""
        value = self.logp_old if of == "old" else self.logp_behavior
        return value / scale(reduction, self.logp_numel)

    def as_neg_sq_err(self) -> RolloutBatch:
        """This batch with -|x_next - mean|^2 in place of log-densities, labelled so: no density.

        UniRL and the released CPS code train on its mean over coordinates, `logp("mean")`.
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
        """Trajectory weights (B,) to the base policy, of mean one in each group; ones when on-policy."""
        self.need_density()
        weight = torch.zeros(self.groups, dtype=torch.float64, device=self.log_w_base.device)
        top = torch.full_like(weight, -math.inf).scatter_reduce(0, self.group_id, self.log_w_base.double(), "amax")
        raw = (self.log_w_base.double() - top[self.group_id]).exp()
        total = weight.index_add(0, self.group_id, raw)
        count = torch.bincount(self.group_id, minlength=self.groups)
        return (raw * (count / total)[self.group_id]).float()

    def step_weights(self, limit: float = 2.0) -> Tensor:
        """Per-step weights (B, S) base / behaviour, at most `limit`: verl-omni's rollout_is_weights. Ones at padding.

        They correct a guided proposal given the state it started from, and nothing that resampling selected: a
        bootstrap SMC's are all 1, and its rows are tilted all the same. `weights()` corrects both; never use the two.
        """
        self.need_density()
        if self.logp_kind != "gaussian":
            raise SteerError('step weights need log-densities, got logp_kind "neg_sq_err"; take them before converting')
        ratio = (self.logp_old.double() - self.logp_behavior.double()).exp().clamp(max=limit)
        return torch.where(self.mask, ratio, 1.0).float()

    def ess(self) -> Tensor:
        """Effective sample size of the base-policy weights of each group, (groups,). See `effective_roots`."""
        return self._effective(self.sample_id)

    def effective_roots(self) -> Tensor:
        """The same of the weights summed over rows that began from one noise, (groups,): at most `ess`.

        The ESS alone is blind once a group descends from few particles: their rows then weigh alike, because what set
        them apart from the policy was settled at the resampling, and the ESS rises again to the size of the group.
        """
        return self._effective(self.root_id)

    def _effective(self, family: Tensor) -> Tensor:
        weight, member = self.weights().double(), torch.unique(family, return_inverse=True)[1]
        share = torch.zeros(self.rows, dtype=torch.float64, device=weight.device).index_add(0, member, weight)
        owner = torch.zeros_like(member).index_copy(0, member, self.group_id)
        zero = torch.zeros(self.groups, dtype=torch.float64, device=weight.device)
        return zero.index_add(0, owner, share).square() / zero.index_add(0, owner, share.square())

    def select(self, index: Tensor) -> RolloutBatch:
        """The rows index (P, M), given within their problem: M rows a problem, all fields along, weights kept."""
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
        """Raises NotStochasticError where a greedy selection made the rows: they follow no law one could correct."""
        if bool((self.logp_behavior.isnan() & self.mask).any()) or bool(self.log_w_base.isnan().any()):
            raise NotStochasticError(
                f"a policy gradient needs the density that drew its samples, and {self.method} selects greedily: there "
                "is none; use these rows for SFT, DPO or reward-weighted regression, or collect with steer.smc"
            )


def scale(reduction: Reduction, numel: int) -> int:
    """What a sum over coordinates is divided by under that name of a reduction."""
    if reduction not in ("sum", "mean"):
        raise SteerError(f'reduction is "sum" or "mean", got {reduction!r}')
    return numel if reduction == "mean" else 1
