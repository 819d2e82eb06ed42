"""From what a chain went through to the tensors of a RolloutBatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..core.objective import check_finite, open_objective
from ..core.population import gather
from ..core.trajectory import ResamplingRecord, Trajectory
from ..cost import Cost, Meter
from ..errors import RewardError, SteerError
from ..key import Key
from ..processes.gaussian import GaussianProcess
from .batch import RolloutBatch
from .kernels import describe

Rewards = Callable[..., Any] | Mapping[str, Callable[..., Any]]


class Walked(NamedTuple):
    """One step as today's rows took it: states (P, N, *event), densities and transition ids (P, N)."""

    k: int
    x: Tensor
    x_next: Tensor
    mean: Tensor | None
    log_prob: Tensor
    log_behaviour: Tensor
    step_id: Tensor | None = None


def named(reward: Rewards) -> dict[str, Callable[..., Any]]:
    """Rewards by name; one alone is called "reward"."""
    rewards = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
    if not rewards:
        raise RewardError("a rollout needs at least one reward, got an empty mapping; pass {name: reward}")
    return rewards


def metered(process: GaussianProcess) -> tuple[GaussianProcess, Meter]:
    """The process counting into a meter of its own."""
    meter = Meter()
    return process.metered(meter), meter


def scores(process: GaussianProcess, x: Tensor, rewards: Mapping[str, Callable[..., Any]]) -> dict[str, Tensor]:
    """Scores (P, N) of finished states by every reward, float64; decoded once."""
    if not rewards:
        return {}
    with torch.no_grad():
        samples = process.decode(x)
        decoded, values = replace(process, decoder=None), {}
        for name, reward in rewards.items():
            _, objective, _ = open_objective(process, reward, groupwise=True)
            values[name] = replace(objective, process=decoded)(samples.view(*x.shape[:2], *samples.shape[1:]))
    for value in values.values():
        check_finite(value, "of the finished samples")
    return values


def walked(state: Trajectory, means: Mapping[int, Tensor]) -> list[Walked]:
    """The stochastic steps along the lines of today's particles, oldest first. means: of each step, as it was taken."""
    shared = any(isinstance(event, ResamplingRecord) for event in state.past)
    steps, after = [], state.x
    for step, index in state.lineages():
        before = gather(step.x, index)
        if step.log_prob is not None and step.log_behaviour is not None:
            mean = means.get(step.k)
            steps.append(
                Walked(
                    step.k,
                    before,
                    after,
                    None if mean is None else gather(mean, index),
                    step.log_prob.gather(1, index),
                    step.log_behaviour.gather(1, index),
                    index if shared else None,
                )
            )
        after = before
    return steps[::-1]


def ancestors(state: Trajectory) -> Tensor | None:
    """Index (P, N, K) of today's particles in the population of every level they left; None for plain chains."""
    if not any(isinstance(event, ResamplingRecord) for event in state.past):
        return None
    return torch.stack([index for _, index in state.lineages()][::-1], 2)


def record(
    process: GaussianProcess,
    steps: Sequence[Walked],
    mask: Tensor,
    *,
    x: Tensor,
    rewards: Mapping[str, Tensor],
    key: Key,
    cost: Cost,
    storage: torch.dtype,
    window: Any = None,
    **extra: Any,
) -> RolloutBatch:
    """A batch of the steps that mask (P, N, K) asks for. Weights and lineage are those of plain rows unless given."""
    problems, rows = x.shape[:2]
    steps = [step for step in steps if bool(mask[:, :, step.k].any())]
    if not steps:
        return _empty(process, x=x, rewards=rewards, key=key, cost=cost, storage=storage, window=window, **extra)
    levels = torch.tensor([step.k for step in steps])
    kept = mask[:, :, levels].to(x.device)
    count = int(kept.sum(2).max())
    order = torch.sort(~kept, dim=2, stable=True).indices[:, :, :count]
    held = kept.gather(2, order)
    whole = bool(kept.all())

    def column(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        stacked = torch.stack([value.to(dtype) for value in values], 2)
        if not whole:
            place = order.view(*order.shape, *(1 for _ in stacked.shape[3:])).expand(-1, -1, -1, *stacked.shape[3:])
            stacked = stacked.gather(2, place)
            stacked = torch.where(held.view(*held.shape, *(1 for _ in stacked.shape[3:])), stacked, 0)
        return stacked.flatten(0, 1)

    def per_level(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        row = torch.tensor(values, dtype=dtype, device=x.device)
        return torch.where(held, row[order], torch.zeros_like(row[:1])).flatten(0, 1)

    grid, ks = process.levels, levels.tolist()
    if whole and ks == list(range(ks[0], ks[0] + len(ks))):  # a chain: every state once, and two views of them
        states = column([*(step.x for step in steps), steps[-1].x_next], storage)
        before, after = states[:, :-1], states[:, 1:]
    else:
        before, after = (column(part, storage) for part in ([s.x for s in steps], [s.x_next for s in steps]))
    means, ids = [step.mean for step in steps], _step_ids(steps, problems, rows)
    return RolloutBatch(
        x_t=before,
        x_next=after,
        t=per_level([grid[k].t for k in ks], torch.float32),
        t_next=per_level([grid[k + 1].t for k in ks], torch.float32),
        step_idx=per_level(ks, torch.int64),
        mask=held.flatten(0, 1),
        mean_old=None if any(mean is None for mean in means) else column(cast(Any, means), torch.float32),
        std=per_level([process.rule.std(grid[k], grid[k + 1]) for k in ks], torch.float32),
        logp_old=column([step.log_prob for step in steps], torch.float32),
        logp_behavior=column([step.log_behaviour for step in steps], torch.float32),
        step_id=None if ids is None else column(ids, torch.int64).masked_fill(~held.flatten(0, 1), -1),
        **_run(process, x, rewards, key, cost, storage, window, extra),
    )


def _step_ids(steps: Sequence[Walked], problems: int, rows: int) -> list[Tensor] | None:
    """Ids (P, N) of each step's transitions, unlike those of other problems and levels; None where rows share none."""
    ids = []
    for step in steps:
        if step.step_id is None:
            return None
        offset = torch.arange(problems, device=step.step_id.device)[:, None] * rows
        ids.append(step.step_id + offset + step.k * problems * rows)
    return ids


def _empty(process: GaussianProcess, *, x: Tensor, storage: torch.dtype, **run: Any) -> RolloutBatch:
    """A batch of finished samples alone, where a collector keeps no steps."""
    rows = x.shape[0] * x.shape[1]
    none = torch.zeros(rows, 0, device=x.device)
    state = torch.zeros(rows, 0, *x.shape[2:], dtype=storage, device=x.device)
    extra = {name: run.pop(name) for name in set(run) - {"rewards", "key", "cost", "window"}}
    return RolloutBatch(
        x_t=state,
        x_next=state,
        t=none,
        t_next=none,
        step_idx=none.long(),
        mask=none.bool(),
        mean_old=None,
        std=none,
        logp_old=none,
        logp_behavior=none,
        **_run(process, x, **run, storage=storage, extra=extra),
    )


def _run(
    process: GaussianProcess,
    x: Tensor,
    rewards: Mapping[str, Tensor],
    key: Key,
    cost: Cost,
    storage: torch.dtype,
    window: Any,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """Every field that is not of a step."""
    problems, rows = x.shape[:2]
    row = torch.arange(problems * rows, device=x.device)
    zero = torch.zeros(problems * rows, device=x.device)
    spent = {"nfe": cost.nfe, "rewards": cost.rewards, "grads": cost.grads, "decodes": cost.decodes}
    problem = row // rows
    fields: dict[str, Any] = {
        "x0": x.flatten(0, 1),
        "rewards": {name: value.flatten().float() for name, value in rewards.items()},
        "log_w_target": zero,
        "log_w_base": zero,
        "group_id": problem,
        "problem_id": problem,
        "sample_id": row,
        "root_id": row,
        "parent_id": row,
        "sigmas": torch.tensor([level.sigma for level in process.levels], device=x.device),
        "times": torch.tensor(process.times, dtype=torch.float64, device=x.device),
        "kernel": describe(process, window=window, storage=storage),
        "seed": torch.full_like(row, ((key.seed + 2**63) % 2**64) - 2**63),
        "key": key,
        "cost": {name: value / len(row) for name, value in spent.items()} | {"seconds": cost.seconds.get("total", 0.0)},
        "prompts": None if process.prompts is None else tuple(process.prompts),
        "logp_numel": max(1, x[0, 0].numel()),
    }
    unknown = {name for name in extra if name not in RolloutBatch.__dataclass_fields__}
    if unknown:
        raise SteerError(f"a RolloutBatch has no field {', '.join(sorted(unknown))}")
    return fields | {name: _rows(value) for name, value in extra.items()}


def _rows(value: Any) -> Any:
    """(P, N, ...) tensors as rows (B, ...)."""
    return value.flatten(0, 1) if isinstance(value, Tensor) else value
