"""From the steps of a run to the tensors of a RolloutBatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..core.objective import FINISHED, open_objective
from ..core.population import gather
from ..core.trajectory import ResamplingRecord, Trajectory
from ..cost import Cost, Meter
from ..errors import RewardError, SteerError
from ..key import Key
from ..processes.gaussian import GaussianProcess
from ..processes.second_order import SecondOrderProcess, model_of, noisy
from .batch import RolloutBatch
from .kernels import describe_kernel

Rewards = Callable[..., Any] | Mapping[str, Callable[..., Any]]
"""One reward, or several by name."""


class RecordedStep(NamedTuple):
    """One stochastic step of all rows, along the rows' own lineages.

    k:             level it left.
    x, x_next:     states before and after, [P, N, *event].
    x_before:      the states before x, where the step remembers what was predicted there; None elsewhere.
    mean:          of the transition, [P, N, *event]; None where it was not kept.
    log_prob:      log-density of x_next under the policy's transition, [P, N] float64, summed over coordinates.
    log_behaviour: the same under the transition that drew x_next, [P, N] float64.
    step_id:       [P, N] int64, equal where rows of a problem share the step; None where every row has its own.
    """

    k: int
    x: Tensor
    x_next: Tensor
    mean: Tensor | None
    log_prob: Tensor
    log_behaviour: Tensor
    step_id: Tensor | None = None
    x_before: Tensor | None = None


def rewards_by_name(reward: Rewards) -> dict[str, Callable[..., Any]]:
    """Rewards by name; a single one is called "reward"."""
    rewards = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
    if not rewards:
        raise RewardError("a rollout needs at least one reward, got an empty mapping; pass {name: reward}")
    return rewards


def with_meter(process: GaussianProcess) -> tuple[GaussianProcess, Meter]:
    """The process counting into a meter of its own, and that meter."""
    meter = Meter()
    return process.metered(meter), meter


def score_samples(process: GaussianProcess, x: Tensor, rewards: Mapping[str, Callable[..., Any]]) -> dict[str, Tensor]:
    """Scores [P, N] float64 of finished states [P, N, *event] by every reward; they are decoded once."""
    if not rewards:
        return {}
    with torch.no_grad():
        samples = process.decode(x)
        decoded, values = replace(model_of(process), decoder=None), {}
        for name, reward in rewards.items():
            _, objective, meter = open_objective(process, reward, groupwise=True)
            wide = samples.view(*x.shape[:2], *samples.shape[1:])
            values[name] = replace(objective, process=decoded)(wide, FINISHED)
            meter.finite.settle()
    return values


def recorded_steps(state: Trajectory, means: Mapping[int, Tensor]) -> list[RecordedStep]:
    """The stochastic steps along the lineages of the final particles, oldest first.

    Args:
        state: a population that kept its states.
        means: by level, the mean of the step's transition, [P, N, *event]; empty where they were not kept.
    """
    shared = any(isinstance(event, ResamplingRecord) for event in state.past)
    remembers = isinstance(state.process, SecondOrderProcess)
    line = [(step, index, noisy(state.process, gather(step.x, index))) for step, index in state.lineages()]
    steps, after = [], state.x
    for (step, index, x), (_, _, before) in zip(line, [*line[1:], line[-1]], strict=True):
        if step.log_prob is not None and step.log_behaviour is not None:
            mean = means.get(step.k)
            steps.append(
                RecordedStep(
                    k=step.k,
                    x=x,
                    x_next=noisy(state.process, after),
                    mean=None if mean is None else gather(mean, index),
                    log_prob=step.log_prob.gather(1, index),
                    log_behaviour=step.log_behaviour.gather(1, index),
                    step_id=index if shared else None,
                    x_before=before if remembers else None,
                )
            )
        after = x
    return steps[::-1]


def ancestors(state: Trajectory) -> Tensor | None:
    """Index [P, N, K] of each final particle's ancestor in the population of every level; None for plain chains."""
    if not any(isinstance(event, ResamplingRecord) for event in state.past):
        return None
    return torch.stack([index for _, index in state.lineages()][::-1], 2)


def assemble(
    process: GaussianProcess,
    steps: Sequence[RecordedStep],
    mask: Tensor,
    *,
    x: Tensor,
    rewards: Mapping[str, Tensor],
    key: Key,
    cost: Cost,
    storage: torch.dtype,
    window: Any = None,
    **fields: Any,
) -> RolloutBatch:
    """A batch of finished samples and of those of their steps that were asked for.

    Args:
        process: the policy.
        steps: stochastic steps of all rows, oldest first.
        mask: [P, N, K] bool, which steps to store of which row.
        x: finished samples, [P, N, *event].
        rewards: scores [P, N] by name.
        key: of the run. cost: of the run. storage: dtype of stored states. window: what `mask` came from.
        fields: other fields of `RolloutBatch`; tensors are [P, N, ...]. Weights and lineage are those of plain rows
            unless given.
    """
    problems, rows = x.shape[:2]
    steps = [step for step in steps if bool(mask[:, :, step.k].any())]
    run = {"x": x, "rewards": rewards, "key": key, "cost": cost, "storage": storage, "window": window}
    if not steps:
        return _samples_only(process, **run, fields=fields)
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
    earlier = [step.x_before for step in steps]
    return RolloutBatch(
        x_t=before,
        x_next=after,
        x_before=None if any(x is None for x in earlier) else column(cast(Any, earlier), storage),
        t=per_level([grid[k].t for k in ks], torch.float32),
        t_next=per_level([grid[k + 1].t for k in ks], torch.float32),
        step_idx=per_level(ks, torch.int64),
        mask=held.flatten(0, 1),
        mean_old=None if any(mean is None for mean in means) else column(cast(Any, means), torch.float32),
        std=per_level([process.rule.std(grid[k], grid[k + 1]) for k in ks], torch.float32),
        logp_old=column([step.log_prob for step in steps], torch.float32),
        logp_behavior=column([step.log_behaviour for step in steps], torch.float32),
        step_id=None if ids is None else column(ids, torch.int64).masked_fill(~held.flatten(0, 1), -1),
        **_fields_of_the_run(process, **run, fields=fields),
    )


def _step_ids(steps: Sequence[RecordedStep], problems: int, rows: int) -> list[Tensor] | None:
    """Ids [P, N] of each step's transitions, unlike those of other problems and levels; None where rows share none."""
    ids = []
    for step in steps:
        if step.step_id is None:
            return None
        offset = torch.arange(problems, device=step.step_id.device)[:, None] * rows
        ids.append(step.step_id + offset + step.k * problems * rows)
    return ids


def _samples_only(process: GaussianProcess, *, x: Tensor, storage: torch.dtype, **run: Any) -> RolloutBatch:
    """A batch of finished samples, where a collector keeps no steps."""
    rows = x.shape[0] * x.shape[1]
    none = torch.zeros(rows, 0, dtype=torch.float32, device=x.device)
    state = torch.zeros(rows, 0, *x.shape[2:], dtype=storage, device=x.device)
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
        **_fields_of_the_run(process, x=x, storage=storage, **run),
    )


def _fields_of_the_run(
    process: GaussianProcess,
    *,
    x: Tensor,
    rewards: Mapping[str, Tensor],
    key: Key,
    cost: Cost,
    storage: torch.dtype,
    window: Any,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """Every field that does not belong to a step; `fields` replaces the defaults."""
    problems, rows = x.shape[:2]
    row = torch.arange(problems * rows, device=x.device)
    zero = torch.zeros(problems * rows, dtype=torch.float32, device=x.device)
    counts = {"nfe": cost.nfe, "rewards": cost.rewards, "grads": cost.grads, "decodes": cost.decodes}
    problem = row // rows
    defaults: dict[str, Any] = {
        "x0": x.flatten(0, 1),
        "rewards": {name: value.flatten().float() for name, value in rewards.items()},
        "log_w_target": zero,
        "log_w_base": zero,
        "group_id": problem,
        "problem_id": problem,
        "sample_id": row,
        "root_id": row,
        "parent_id": row,
        "sigmas": torch.tensor([level.sigma for level in process.levels], dtype=torch.float32, device=x.device),
        "times": torch.tensor(process.times, dtype=torch.float64, device=x.device),
        "kernel": describe_kernel(process, window=window, storage=storage),
        "seed": torch.full_like(row, ((key.seed + 2**63) % 2**64) - 2**63),
        "key": key,
        "cost": {name: value / len(row) for name, value in counts.items()}
        | {"seconds": cost.seconds.get("total", 0.0)},
        "prompts": None if process.prompts is None else tuple(process.prompts),
        "logp_numel": max(1, x[0, 0].numel()),
    }
    unknown = {name for name in fields if name not in RolloutBatch.__dataclass_fields__}
    if unknown:
        raise SteerError(f"a RolloutBatch has no field {', '.join(sorted(unknown))}")
    return defaults | {name: _as_rows(value) for name, value in fields.items()}


def _as_rows(value: Any) -> Any:
    """Tensors [P, N, ...] as rows [B, ...]; anything else as it is."""
    return value.flatten(0, 1) if isinstance(value, Tensor) else value
