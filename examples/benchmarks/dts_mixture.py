"""The two-dimensional tables of Diffusion Tree Sampling, and a rare event.

    python examples/benchmarks/dts_mixture.py [--budgets 10000 100000] [--keys 5] [--widths 1] [--out FILE]

Three targets p(x) exp(r(x)), whose laws are known in closed form:
  ring          eight modes of deviation .3 on a circle of radius 4, r = log[sum w_i N_i / sum N_i], w_i = exp(1.5 i)
                (the reward as inferred from the paper's plots: the target is sum w_i N_i).
  checkerboard  r = -|x|^2 / 2. The prior is a mixture: each of the eight squares of side 2 is a 3 x 3 grid of
                Gaussians of deviation 1 / 3, so that the tilted law is exact.
  rare          the ring, and a reward of width .2 centred 1.5 (five deviations) outside its last mode: the tilted law
                lies where the prior has less than 1e-4 of its mass.
"exact draws" are as many independent samples of the target as the budget pays for chains.
100 steps with the mixture's true reverse kernel, so that no discretisation error hides a sampler's own. Measures:
  TV    exact total variation of the masses of square cells (side 1, .25 for the rare event) against the target's.
  MMD   with the kernel exp(-|x - y|^2 / (2 width^2)), of the weighted sample against the target's closed-form
        embedding, with no sampling of the target; and its square. The paper states neither its kernel nor which of the
        two it plots, so its own build is run here, and with `--widths` at several kernels.
  mass  of the ring's heaviest mode less the true one: its mean is a bias. log Z  likewise, of the evidence.
Means over keys with standard errors. Every method spends the same network rows; gradients come on top for dps,
tds, das and the guided tree.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import rewards, search
from steer.models import Exact, ExactStep, GaussianMixture


def dps(process: steer.ReverseProcess, reward: steer.Reward, **options: Any) -> steer.Result:
    """Chains that follow the reward's gradient and are not corrected for it: diffusion posterior sampling."""
    run = steer.smc(process, reward, proposal=steer.guided(1.0), selection=steer.resample(threshold=0.0), **options)
    even = torch.full_like(run.log_weight, -math.log(run.log_weight.shape[1]))
    return replace(run, log_weight=even, log_evidence=run.log_evidence * math.nan)


METHODS = {
    "importance sampling": steer.importance_sampling,
    "dps": dps,
    "smc": steer.smc,
    "tds": steer.tds,
    "das": steer.das,
    "dts, the paper's build": functools.partial(search.dts, build="boltzmann"),
    "dts, uniform build": functools.partial(search.dts, build="uniform"),
    "dts (default)": search.dts,
    "dts (default), guided": functools.partial(search.dts, proposal=steer.guided(0.5)),
}
LEARNING = "dts, the paper's build"
EXACT = "exact draws"


@dataclass(frozen=True, eq=False)
class Problem:
    """A process, its reward, the exact tilted law, the side of the cells that TV is measured on; apart: modes are."""

    process: steer.GaussianProcess
    reward: steer.Reward
    target: Exact
    cell: float
    apart: bool = False


def chain(mixture: GaussianMixture) -> steer.GaussianProcess:
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=100, transition=ExactStep(mixture), dtype=torch.float64
    )


def ring_means() -> Tensor:
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    return 4.0 * torch.stack([angle.cos(), angle.sin()], 1)


def ring() -> Problem:
    means, log_weight = ring_means(), 1.5 * torch.arange(1, 9, dtype=torch.float64)
    mixture = GaussianMixture(means, torch.full((8,), 0.09))

    def reward(x: Tensor) -> Tensor:
        exponent = -torch.cdist(x.double(), means).square() / (2 * 0.09)
        return torch.logsumexp(exponent + log_weight, 1) - torch.logsumexp(exponent, 1)

    evidence = float(torch.logsumexp(log_weight, 0) - math.log(8))
    return Problem(
        chain(mixture), reward, Exact(torch.softmax(log_weight, 0), means, mixture.covs, evidence), 1.0, True
    )


def checkerboard() -> Problem:
    corners = [(i, j) for i in range(-4, 4, 2) for j in range(-4, 4, 2) if (i + j) // 2 % 2 == 0]
    offsets = [1 / 3, 1.0, 5 / 3]
    means = torch.tensor([[i + a, j + b] for i, j in corners for a in offsets for b in offsets], dtype=torch.float64)
    mixture = GaussianMixture(means, torch.full((len(means),), 1 / 9))
    reward = rewards.Quadratic(torch.zeros(2, dtype=torch.float64), 1.0)
    return Problem(chain(mixture), reward, mixture.exact(reward), 1.0)


def rare() -> Problem:
    means = ring_means()
    mixture = GaussianMixture(means, torch.full((8,), 0.09))
    reward = rewards.Quadratic(means[7] * 5.5 / 4.0, 25.0)
    return Problem(chain(mixture), reward, mixture.exact(reward), 0.25)


PROBLEMS = {"ring": ring, "checkerboard": checkerboard, "rare": rare}


def cell_variation(target: Exact, x: Tensor, weight: Tensor, side: float) -> float:
    """Total variation between a weighted sample and the target on square cells over [-8, 8]^2, the rest as one."""
    edges = torch.arange(-8.0, 8.0 + side / 2, side, dtype=torch.float64)
    scale = target.covs.diagonal(dim1=1, dim2=2).sqrt()
    below = torch.special.ndtr((edges - target.means[..., None]) / scale[..., None])  # (modes, 2, edges)
    inside = below.diff(dim=2)
    exact = torch.einsum("k,ki,kj->ij", target.weights, inside[:, 0], inside[:, 1])
    count = len(edges) - 1
    index = ((x + 8.0) / side).floor().long()
    kept = ((index >= 0) & (index < count)).all(1)
    flat = torch.where(kept, index[:, 0] * count + index[:, 1], count * count)
    found = torch.zeros(count * count + 1, dtype=torch.float64).index_add_(0, flat, weight)
    exact = torch.cat([exact.flatten(), 1.0 - exact.sum()[None]])
    return 0.5 * (found - exact).abs().sum().item()


def discrepancy(target: Exact, x: Tensor, weight: Tensor, width: float) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel of that width, the target's side in closed form."""
    kept = weight > 0
    x, weight = x[kept] / width, weight[kept]
    means, variance = target.means / width, target.covs[:, 0, 0] / width**2  # isotropic modes

    def smoothed(points: Tensor, extra: Tensor) -> Tensor:
        spread = 1.0 + variance + extra
        return torch.exp(-0.5 * torch.cdist(points, means).square() / spread) / spread

    both = torch.stack([smoothed(mean[None], extra)[0] for mean, extra in zip(means, variance, strict=True)])
    squared = target.weights @ both @ target.weights
    squared = squared - 2.0 * weight @ (smoothed(x, torch.zeros(())) @ target.weights)
    small = x.float()
    for rows, share in zip(small.split(2048), weight.split(2048), strict=True):
        kernel = torch.exp(-0.5 * torch.cdist(rows, small, compute_mode="donot_use_mm_for_euclid_dist").square())
        squared = squared + share @ (kernel.double() @ weight)
    return max(0.0, squared.item())


def discrepancies(target: Exact, x: Tensor, weight: Tensor, widths: list[float]) -> dict[str, float]:
    """MMD and its square, at every width."""
    squared = {width: discrepancy(target, x, weight, width) for width in widths}
    return {f"MMD {w:g}": math.sqrt(value) for w, value in squared.items()} | {
        f"MMD² {w:g}": value for w, value in squared.items()
    }


def draws(problem: Problem, count: int, key: int) -> Tensor:
    """Independent draws of the target (count, 2): what no method of as many samples can beat but by luck."""
    name, target = steer.Key(key).fold("exact"), problem.target
    mode = torch.searchsorted(target.weights.cumsum(0), name.uniform((1, count))[0]).clamp(max=len(target.weights) - 1)
    noise = name.fold("noise").normal((1, count, 2))[0]
    return target.means[mode] + target.covs[mode, 0, :1].sqrt() * noise


def ideal(problem: Problem, budget: int, key: int, widths: list[float]) -> dict[str, float]:
    """The measures of as many exact draws as the budget makes chains."""
    count = budget // problem.process.steps
    x, weight = draws(problem, count, key), torch.full((count,), 1.0 / count, dtype=torch.float64)
    return {
        "TV": cell_variation(problem.target, x, weight, problem.cell),
        **discrepancies(problem.target, x, weight, widths),
        "mass": math.nan,
        "log Z": math.nan,
        "ess": count,
        "nfe": 0,
        "seconds": 0.0,
    }


def measure(problem: Problem, label: str, budget: int, key: int, widths: list[float]) -> dict[str, float]:
    """What one run of a method gives, at a budget."""
    if label == EXACT:
        return ideal(problem, budget, key, widths)
    options = {}
    if label == LEARNING:
        options["walkers"] = max(16, budget // 4000)  # it learns between sweeps: forty of them and more
    elif label.startswith("dts"):
        options["walkers"] = max(16, budget // 500)  # these learn nothing from rewards, so wide sweeps cost nothing
    began = time.perf_counter()
    run = METHODS[label](problem.process, problem.reward, budget=budget, key=key, **options)
    x, weight, target = run.x[0].double(), run.log_weight[0].exp(), problem.target
    nearest = torch.cdist(x, target.means).argmin(1)
    heavy = int(target.weights.argmax())
    return {
        "TV": cell_variation(target, x, weight, problem.cell),
        **discrepancies(target, x, weight, widths),
        "mass": float(weight[nearest == heavy].sum() - target.weights[heavy]) if problem.apart else math.nan,
        "log Z": float(run.log_evidence[0]) - target.log_evidence,
        "ess": float(run.ess[0]),
        "nfe": run.cost.nfe,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10_000, 100_000], help="network rows; 1e6 in full")
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=[EXACT, *METHODS], default=[EXACT, *METHODS])
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0], help="of the kernels of MMD")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shown = ["TV", *(f"{m} {w:g}" for m in ("MMD", "MMD²") for w in options.widths), "mass", "log Z"]
    table = []
    for name in options.problems:
        problem = PROBLEMS[name]()
        for budget in options.budgets:
            print(f"\n{name}, {budget:,} network rows, {options.keys} keys\n")
            print(f"| method | {' | '.join(shown)} | ess | s |\n|---{'|---' * (len(shown) + 2)}|")
            for label in options.methods:
                runs = [measure(problem, label, budget, key, options.widths) for key in range(options.keys)]
                columns = {c: torch.tensor([run[c] for run in runs], dtype=torch.float64) for c in runs[0]}
                mean = {c: (v.mean().item(), v.std().item() / math.sqrt(len(v))) for c, v in columns.items()}
                cells = [
                    "-" if math.isnan(mean[c][0]) else f"{mean[c][0]:.{p}f} ± {mean[c][1]:.{p}f}"
                    for c, p in ((c, 5 if "²" in c else 4) for c in shown)
                ]
                print(
                    f"| {label} | {' | '.join(cells)} | {mean['ess'][0]:.0f} | {mean['seconds'][0]:.1f} |", flush=True
                )
                table.append({"problem": name, "budget": budget, "method": label, "mean": mean})
    if options.out:
        options.out.write_text(json.dumps({"torch": torch.__version__, "keys": options.keys, "table": table}, indent=2))


if __name__ == "__main__":
    main()
