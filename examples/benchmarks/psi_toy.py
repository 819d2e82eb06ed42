"""The toy of Ψ-Sampler (Yoon et al. 2025, App. E) at equal NFE: where particles should begin.

    python examples/benchmarks/psi_toy.py [--keys 10] [--runs 1000] [--out psi_toy.json]

Data: six modes on a circle of radius 6, covariance .3 I. Reward: three bumps exp(-|x - p|^2 / 2) at radius 6.5, beyond
every other mode. Budget: 100 network rows, 5 steps. The start of MCMC and Top-K needs a prediction that depends on x at
t = 1, which the exact posterior mean of a flow does not: its gradient is zero there. They get the exact flow map, read
from a table of the probability-flow ODE: a distilled model of one row, and the ledger counts it as one.

Two kinds of steps: "exact" draws from the true reverse kernels, so that five steps cost nothing in accuracy, and "vp"
is ancestral sampling on the variance-preserving path, as in the paper, whose own error at five steps every method
shares. Each run ends in one draw from its weighted population. Printed: energy distance between the draws of all runs
of a key and the exact law (unbiased: 0 is perfect, and it may come out below), and the reward; mean and standard error
over keys.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import steer
from steer import Key
from steer.models import ExactStep, GaussianMixture, gaussian_mixture

BUDGET, STEPS = 100, 5
ANGLES = torch.arange(6, dtype=torch.float64) * math.pi / 3
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
DATA = GaussianMixture(6.0 * CIRCLE, torch.full((6,), 0.3))
BUMPS = 6.5 * CIRCLE[::2]


def reward(x: Tensor) -> Tensor:
    return (-0.5 * (x.double()[:, None] - BUMPS).square().sum(2)).exp().sum(1)


def flow_map(process: steer.GaussianProcess, reach: float = 6.0, cells: int = 400, steps: int = 200) -> Callable:
    """x at the first level to the x_0 of its probability-flow ODE, by bilinear interpolation in a table."""
    axis = torch.linspace(-reach, reach, cells, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(1, -1, 2)
    fine = process.with_times(steer.uniform_times(process.schedule, steps, start=process.times[0]))
    fine, x = fine.with_rule(steer.ode()), grid
    for k in range(fine.steps):
        x = fine.transition(x, fine.denoise(x, k), k).mean
    table = x.view(cells, cells, 2)

    def predict(x: Tensor) -> Tensor:
        place = ((x + reach) * ((cells - 1) / (2.0 * reach))).clamp(0.0, cells - 1.000001)
        corner = place.detach().floor().long()
        part = place - corner
        value = torch.zeros_like(x)
        for i in (0, 1):
            for j in (0, 1):
                share = (part[..., 0] if i else 1.0 - part[..., 0]) * (part[..., 1] if j else 1.0 - part[..., 1])
                value = value + share[..., None] * table[corner[..., 0] + i, corner[..., 1] + j]
        return value

    return predict


def exact_draws(temperature: float, count: int, key: Key) -> Tensor:
    """Draws (count, 2) of the tilted law: half a million draws of the data, resampled."""
    size = 500_000
    mode = (key.fold("mode").uniform((1, size)) * 6).long()[0]
    x = DATA.means[mode] + math.sqrt(0.3) * key.fold("x").normal((1, size, 2))[0]
    return x[steer.systematic(reward(x)[None] / temperature, key.fold("resample"), count)[0]]


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, each unbiased."""

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2.0 * torch.cdist(x, y).mean() - within(x) - within(y))


def methods(predict: Callable) -> dict[str, Callable]:
    """Name -> function of (process, batch, temperature, key) to a Result of at most BUDGET rows per problem."""

    def smc(**options):
        def run(process, batch, temperature, key):
            return steer.smc(
                process, reward, batch=batch, budget=BUDGET, temperature=temperature, key=key,
                proposal=steer.guided(), **options,
            )  # fmt: skip

        return run

    def psi(start):
        def run(process, batch, temperature, key):
            return steer.psi(process, reward, batch=batch, budget=BUDGET, temperature=temperature, key=key, start=start)

        return run

    table = {"SMC from the prior": smc(), "Top-10 of 50": smc(start=steer.top_k_of_n(50, x0_predictor=predict))}
    for chains in (1, 5):
        for name, start in (("ULA", steer.ula), ("MALA", steer.mala), ("pCNL", steer.pcnl)):
            table[f"{name}, {chains} chain{'s' * (chains > 1)}"] = psi(start(chains=chains, x0_predictor=predict))
    return table


def measured(
    run: Callable, process: steer.GaussianProcess, temperature: float, truth: Tensor, keys: int, runs: int
) -> dict:
    """What one method does over keys."""
    distances, rewards = [], []
    for i in range(keys):
        result = run(process, runs, temperature, Key(i))
        distances.append(energy_distance(result.draw(1, i).x[:, 0], truth))
        rewards.append(float(result.mean_reward.mean()))
    seen = result.trajectory.diagnostics
    diagnosed = {name: float(seen[name].nanmedian()) for name in ("acceptance", "split_rhat") if name in seen}
    return {"energy": spread(distances), "reward": spread(rewards), "rows": result.cost.nfe // runs, **diagnosed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    flow = gaussian_mixture(
        DATA.means, torch.full((6,), 0.3), schedule=steer.RectifiedFlow(),
        times=steer.uniform_times(steer.RectifiedFlow(), STEPS, start=1.0), dtype=torch.float64,
    )  # fmt: skip
    kinds = {"exact": flow.with_rule(ExactStep(DATA)), "vp": steer.convert(flow, steer.VP())}
    starts, rows = methods(flow_map(flow)), []
    print(f"steps    T  {'start':<20} {'energy distance':>17}  {'reward':>14}  rows  acceptance  R-hat")
    for kind, process in kinds.items():
        for temperature in (0.3, 0.1):
            truth = exact_draws(temperature, 8000, Key(0).fold("truth", str(temperature)))
            for name, run in starts.items():
                row = {"steps": kind, "T": temperature, "start": name}
                row |= measured(run, process, temperature, truth, arguments.keys, arguments.runs)
                rows.append(row)
                print(
                    f"{kind:<5} {temperature:>4}  {name:<20} {row['energy'][0]:>8.4f} ± {row['energy'][1]:.4f}  "
                    f"{row['reward'][0]:>6.3f} ± {row['reward'][1]:.3f}  {row['rows']:>4}  "
                    f"{row.get('acceptance', math.nan):>10.2f}  {row.get('split_rhat', math.nan):>5.2f}",
                    flush=True,
                )
            print(f"{kind:<5} {temperature:>4}  {'the exact law':<20} {0.0:>8.4f}{'':11}{reward(truth).mean():>6.3f}")
    if arguments.out:
        run = {"keys": arguments.keys, "runs": arguments.runs, "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**run, "python": platform.python_version(), "rows": rows}, indent=2))


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    column = torch.tensor(values, dtype=torch.float64)
    return float(column.mean()), float(column.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


if __name__ == "__main__":
    main()
