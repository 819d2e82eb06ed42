"""Feynman-Kac correctors on the 40-mode mixture, annealed to a third of its temperature.

    python examples/benchmarks/fkc_mixture40.py [--particles 10000] [--steps 500] [--seeds 3] [--out table.json]

The setting of Skreta et al. 2025 (2503.02819): the plane's 40-mode mixture (means uniform in +-40, standard deviation
softplus(2), drawn as its authors draw it), data divided by 50, a variance-exploding path with geometric sigma from 10
to .01, exact score, target p^3. Methods: both of the paper's samplers (target score, v = 1; tempered noise, v = 1 / 3)
without and with weights, and two transports that leave the weights little to do. Distances are to exact draws, in data
units, mean and standard error over seeds: Wasserstein-1 and -2 (1000 draws by systematic resampling, optimal
assignment), RBF-MMD (bandwidth 5), total variation of histograms (200^2 bins), Wasserstein-2 of energies, log Z error.
The first row is another set of exact draws: what no sampler can beat. A row that is differentiated through counts 2
more in `price`, forward passes per problem; methods without divergences get particles in proportion.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import steer

SCALE, BETA, EDGE = 50.0, 3.0, 60.0


def model(steps: int) -> steer.GaussianProcess:
    """The mixture on its path, in units of SCALE."""
    generator = torch.Generator().manual_seed(0)
    means = (torch.rand((40, 2), generator=generator) - 0.5) * 2.0 * 40.0 / SCALE
    variance = (math.log1p(math.exp(2.0)) / SCALE) ** 2
    schedule = steer.VE(sigma_max=10.0)
    return steer.models.gaussian_mixture(
        means, torch.full((40,), variance), schedule=schedule, times=steer.log_snr_times(schedule, steps, end=0.001)
    )


class Truth:
    """p^BETA by quadrature on a grid, in units of SCALE."""

    def __init__(self, mixture: steer.models.GaussianMixture, cells: int = 2400):
        self.mixture, self.cell = mixture, 2.0 * EDGE / SCALE / cells
        axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * self.cell - EDGE / SCALE
        self.points = torch.cartesian_prod(axis, axis)
        log_mass = BETA * mixture.log_prob(self.points)
        self.log_z = float(log_mass.logsumexp(0)) + 2.0 * math.log(self.cell)
        self.cumulative = torch.softmax(log_mass, 0).cumsum(0)

    def draws(self, count: int, key: steer.Key) -> Tensor:
        """Exact draws (count, 2), up to the size of a cell."""
        uniform = key.fold("cell").uniform((count, 1))[:, 0]
        index = torch.searchsorted(self.cumulative, uniform).clamp(max=len(self.points) - 1)
        return self.points[index] + (key.fold("within").uniform((count, 1, 2))[:, 0] - 0.5) * self.cell

    def energy(self, x: Tensor) -> Tensor:
        return -BETA * self.mixture.log_prob(x)


def distances(x: Tensor, y: Tensor, truth: Truth) -> dict[str, float]:
    """Between equally weighted samples x (M, 2) and exact ones y, in data units."""
    from scipy.optimize import linear_sum_assignment

    few = 1000
    near, far = x[:: max(1, len(x) // few)][:few] * SCALE, y[: min(few, len(x))] * SCALE
    gap = torch.cdist(near, far)
    w1, w2 = (float((gap**p).numpy()[linear_sum_assignment((gap**p).numpy())].mean()) ** (1 / p) for p in (1, 2))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-0.5 * (torch.cdist(a, b) / 5.0).square()).exp()

    mmd = kernel(near, near).mean() + kernel(far, far).mean() - 2.0 * kernel(near, far).mean()
    bins = [torch.histc(_bin(s), bins=200 * 200, min=0, max=200 * 200) / len(s) for s in (x, y)]
    quantile = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    energies = [torch.quantile(truth.energy(s), quantile) for s in (x, y)]
    return {
        "W1": w1,
        "W2": w2,
        "MMD": math.sqrt(max(0.0, float(mmd))),
        "TV": 0.5 * float((bins[0] - bins[1]).abs().sum()),
        "energy W2": float((energies[0] - energies[1]).square().mean().sqrt()),
    }


def _bin(x: Tensor) -> Tensor:
    place = ((x * SCALE + EDGE) / (2.0 * EDGE) * 200).long().clamp(0, 199)
    return (place[:, 0] * 200 + place[:, 1]).float()


def methods(process: steer.GaussianProcess) -> dict[str, tuple[bool, float, Callable[..., steer.Result]]]:
    """Name -> (whether weights are used, price of a row, run)."""
    unweighted, spread = steer.resample(threshold=0.0), 2.0 / SCALE
    exact = steer.FeynmanKac(probes=None)

    def score(noise: float, **fixed):
        return lambda **o: steer.fkc(
            process, exponent=BETA, transport=steer.score_transport, noise=noise, sigma_data=spread, **fixed, **o
        )

    return {
        "target score": (False, 1.0, score(1.0, selection=unweighted)),
        "target score + FKC": (True, 1.0, score(1.0)),
        "tempered noise": (False, 1.0, score(1.0 / BETA, selection=unweighted)),
        "tempered noise + FKC": (True, 1.0, score(1.0 / BETA)),
        "flow + FKC": (
            True, 5.0, lambda **o: steer.fkc(process, exponent=BETA, weight=exact, sigma_data=spread, **o),
        ),
        "VCG-SMC": (
            True, 3.0, lambda **o: steer.driftlite(process, exponent=BETA, probes=1, sigma_data=spread, **o),
        ),
    }  # fmt: skip


def main() -> None:
    import warnings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=10_000, help="where a row costs 1; fewer where it costs more")
    parser.add_argument("--steps", type=int, default=500, help="the paper has 1000")
    parser.add_argument("--seeds", type=int, default=3, help="the paper has 5")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="with exponents that sum to")  # tempered noise is in the table
    process = model(arguments.steps)
    truth = Truth(process.reference)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        key = steer.Key(seed)
        exact = truth.draws(arguments.particles, key.fold("exact"))
        others = truth.draws(arguments.particles, key.fold("others"))
        table.setdefault("exact draws", []).append(distances(others, exact, truth) | {"log Z error": math.nan})
        for name, (weighted, price, run) in methods(process).items():
            began = time.perf_counter()
            particles = int(arguments.particles / price)
            result = run(particles=particles, key=key)
            x = (result.draw(particles, key) if weighted else result).x[0].double()
            row = distances(x, exact, truth) | {
                "log Z error": float(result.log_evidence[0]) - truth.log_z if weighted else math.nan,
                "ESS": float(result.ess[0]) / particles if weighted else math.nan,
                "price": (result.cost.nfe + 2.0 * result.cost.grads) / 1e6,
                "seconds": time.perf_counter() - began,
            }
            table.setdefault(name, []).append(row)
    columns = list(table["VCG-SMC"][0])
    print("method".ljust(22) + "".join(c.rjust(17) for c in columns))
    for name, rows in table.items():
        cells = ""
        for column in columns:
            values = torch.tensor([row.get(column, math.nan) for row in rows])
            cell = f"{values.mean():.3g} ± {values.std() / math.sqrt(len(rows)):.2g}"
            cells += ("-" if bool(values.isnan().all()) else cell).rjust(17)
        print(name.ljust(22) + cells)
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
