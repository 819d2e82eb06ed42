"""Collect many rows and train on few: the best, the worst and a random sample of the middle."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..errors import SteerError
from ..key import Key, as_key
from .batch import RolloutBatch
from .group_advantages import finite_rewards, group_moments


def keep(batch: RolloutBatch, *, best: int, worst: int, middle: int, by: str, key: Key | int = 0) -> RolloutBatch:
    """The best and the worst rows of every group by one reward, and a uniform draw of the others.

    Args:
        batch: N rows per group, from `collect(group_size=N)`; groups must be the problems. The states of rows that are
            not kept are dropped.
        best: rows of highest reward to keep of each group.
        worst: rows of lowest reward to keep.
        middle: m of the others to keep, at least 1 where there are others.
        by: name of the reward to rank by.
        key: names the draw of the middle.

    Returns:
        A batch of best + worst + middle rows per group, which carry the cost of all N. Rows kept for certain weigh as
        before; each of the m others drawn stands for (N - best - worst) / m rows, and its log-weights say so. Sums
        over all N rows, policy gradients among them, are then estimated without bias. Means and standard deviations of
        all rows are in `reward_mean` and `reward_std`, for `advantages`.

    Raises:
        SteerError: the numbers do not fit the group, or none of the middle is kept: no weight corrects for that.
        NotStochasticError: no weight corrects the rows themselves.
        NonFiniteError: a reward of a row with weight is not finite.
    """
    problems, rows = batch.problems, batch.rows // batch.problems
    others, size = rows - best - worst, best + worst + middle
    batch.need_density()
    if min(best, worst) < 0 or others < 0 or not min(1, others) <= middle <= others or batch.groups != problems:
        raise SteerError(
            f"of {rows} rows a group, best and worst must leave others, and middle must be 1 to as many, got best "
            f"{best}, worst {worst}, middle {middle} ({others} others) and {batch.groups} groups of {problems} "
            "problems: without any of the middle the rows kept say nothing of it, and no weight corrects that; keep at "
            "least one of the middle"
        )
    weight = batch.weights().double()
    counting = {name: finite_rewards(batch, name, weight) for name in batch.rewards}
    moments = {name: group_moments(reward, batch.group_id, weight) for name, reward in counting.items()}
    ranked = torch.sort(batch.rewards[by].view(problems, rows), dim=1, descending=True, stable=True).indices
    draw = as_key(key).fold("scout").uniform((problems, max(1, others)), device=batch.x0.device)[:, :others]
    chosen = draw.argsort(1)[:, :middle] + best
    place = torch.arange(rows, device=batch.x0.device).expand(problems, -1)
    index = ranked.gather(1, torch.cat([place[:, :best], chosen, place[:, rows - worst :]], 1))
    log_w = torch.zeros(problems, size, dtype=torch.float32, device=batch.x0.device)
    log_w[:, best : best + middle] = math.log(others / middle) if middle else 0.0
    log_w -= math.log(rows / size)  # weights to mean one over the rows kept, in expectation
    out = batch.select(index)
    return replace(
        out,
        log_w_base=out.log_w_base + log_w.flatten(),
        log_w_target=out.log_w_target + log_w.flatten(),
        reward_mean={name: mean.float() for name, (mean, _) in moments.items()},
        reward_std={name: std.float() for name, (_, std) in moments.items()},
        cost={name: value * (1.0 if name == "seconds" else rows / size) for name, value in batch.cost.items()},
        method=f"{batch.method}, {size} kept of {rows}",
    )
