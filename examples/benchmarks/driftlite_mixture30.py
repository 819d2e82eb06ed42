"""DriftLite on a 30-dimensional mixture, annealed and tilted, beside guidance alone and guided SMC.

    python examples/benchmarks/driftlite_mixture30.py [--particles 1000] [--steps 200] [--seeds 5] [--out table.json]

The model is sum_j w_j N(6 u_j, s_j^2 I) with random unit vectors u_j, weights .4, .3, .2, .1 and standard deviations 1,
1.02, .98, 1.01, on a grid even in log-SNR. Two targets: p^gamma (modes are far apart, so p^gamma is a mixture of
N(6 u_j, s_j^2 I / gamma) with masses proportional to w_j^gamma s_j^(D (1 - gamma)), up to overlaps below e^-10), and p
tilted by -|x - c|^2 / 2 (exact). All methods get the same number of denoiser rows per problem; a row that is
differentiated through counts 2 more, as a backward pass costs about two forward ones. Mean and standard error over
seeds of: total variation of mode masses; sliced Wasserstein-1 distance to exact draws; error of log Z; least ESS / N on
the way; resamplings; and the potential variance: of what a step adds to the log-weight, over particles as they are
weighted then, per unit of log-SNR, summed over steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import steer
from steer.models import GaussianMixture
from steer.weighted_sde.engine import WeightedSDE

SIZE = 30
WEIGHTS, SDS = (0.4, 0.3, 0.2, 0.1), (1.0, 1.02, 0.98, 1.01)


class Well:
    """r(x) = -|x - c|^2 / 2 with c between the first two modes."""

    def __init__(self, center: Tensor):
        self.center = center

    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * (x.double() - self.center).square().sum(1)

    def quadratic_form(self, size: int) -> steer.QuadraticForm:
        constant = -0.5 * float(self.center.square().sum())
        return steer.QuadraticForm(torch.eye(size, dtype=torch.float64), self.center, constant)


def mixture() -> GaussianMixture:
    """The model; modes are drawn once and for all."""
    directions = steer.Key(30).fold("modes").normal((1, 4, SIZE))[0]
    return GaussianMixture(6.0 * directions / directions.norm(dim=1, keepdim=True), torch.tensor(SDS) ** 2, WEIGHTS)


def annealed(model: GaussianMixture, gamma: float) -> tuple[GaussianMixture, float]:
    """p^gamma of a mixture of isotropic modes that do not overlap, and its log-normaliser."""
    variances = model.variances[:, 0]
    log_mass = gamma * model.weights.log() + 0.5 * SIZE * (
        (1.0 - gamma) * (2.0 * math.pi * variances).log() - math.log(gamma)
    )
    target = GaussianMixture(model.means, variances / gamma, torch.softmax(log_mass, 0))
    return target, float(log_mass.logsumexp(0))


def draws(target: GaussianMixture, count: int, key: steer.Key) -> Tensor:
    """Exact draws (count, D)."""
    mode = torch.searchsorted(target.weights.cumsum(0), key.fold("mode").uniform((count, 1))[:, 0])
    roots = torch.linalg.cholesky(target.covs)
    return target.means[mode] + torch.einsum("nij,nj->ni", roots[mode], key.fold("x").normal((count, 1, SIZE))[:, 0])


def sliced(x: Tensor, log_weight: Tensor, y: Tensor, key: steer.Key, slices: int = 64) -> float:
    """Mean over random directions of the Wasserstein-1 distance between weighted x and equally weighted y."""
    direction = key.normal((1, SIZE, slices))[0]
    direction = direction / direction.norm(dim=0)
    left, order = (x @ direction).sort(0)
    mass = log_weight.exp()[order].cumsum(0)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    index = torch.searchsorted(mass.T.contiguous(), grid.expand(slices, -1).contiguous()).clamp(max=len(x) - 1)
    return float((left.T.gather(1, index) - torch.quantile(y @ direction, grid, dim=0).T).abs().mean())


@contextlib.contextmanager
def recorded(found: list[float]) -> Iterator[None]:
    """Weighted variance over particles of what each step adds to the log-weight, per unit of log-SNR, into found."""
    own = WeightedSDE.weighted

    def weighted(self: WeightedSDE, state: steer.Trajectory, gain: Tensor) -> steer.Trajectory:
        here, there = self.target.levels[state.k], self.target.levels[state.k + 1]
        if there.sigma > 0.0:
            weight = torch.softmax(state.log_weight, 1)
            spread = (weight * gain.square()).sum(1) - (weight * gain).sum(1).square()
            found.append(float(spread.mean()) / (2.0 * math.log(there.alpha * here.sigma / (there.sigma * here.alpha))))
        return own(self, state, gain)

    WeightedSDE.weighted = weighted
    try:
        yield
    finally:
        WeightedSDE.weighted = own


def methods(process, reward, exponent: float) -> dict[str, Callable[..., steer.Result]]:
    """What is compared: (key, particles, ...) -> Result."""
    fk = steer.FeynmanKac(probes=1)
    target = {"process": process, "reward": reward, "exponent": exponent, "look_ahead": steer.at_state()}
    score = {**target, "transport": steer.score_transport, "weight": fk}
    table = {
        "guidance alone": lambda **o: steer.fkc(**score, **{**o, "selection": steer.resample(threshold=0.0)}),
        "guided SMC": lambda **o: steer.fkc(**score, **o),
        "flow transport": lambda **o: steer.fkc(**target, transport=steer.flow_transport, weight=fk, **o),
        "VCG": lambda **o: steer.driftlite(**target, **{**o, "selection": steer.resample(threshold=0.0)}),
        "VCG-SMC": lambda **o: steer.driftlite(**target, **o),
        "ECG-SMC": lambda **o: steer.driftlite(**target, control="ecg", **o),
    }
    if reward is not None:
        table["kernel ratio"] = lambda **o: steer.fkc(**target, **o)
    return table


def price(cost: steer.Cost) -> float:
    """Rows in units of a forward pass."""
    return cost.nfe + 2.0 * cost.grads


def over(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def compare(process, reward, exponent: float, target: GaussianMixture, log_z: float, arguments) -> dict[str, dict]:
    table = {}
    runs = methods(process, reward, exponent)
    spent = {name: price(run(key=0, particles=8).cost) / 8 for name, run in runs.items()}
    purse = arguments.particles * spent["VCG-SMC"]
    for name, run in runs.items():
        particles = int(purse / spent[name])
        rows: list[dict[str, float]] = []
        for seed in range(arguments.seeds):
            added: list[float] = []
            with recorded(added):
                result = run(key=seed, particles=particles, batch=1)
            x, w = result.x[0].double(), result.log_weight[0]
            if name == "guidance alone":
                w = torch.full_like(w, -math.log(len(w)))
            masses = w.exp() @ target.responsibilities(x)
            truth = draws(target, 20_000, steer.Key(1000 + seed))
            sizes = [float(entry.ess.min()) / particles for entry in result.seen]
            rows.append({
                "mode TV": 0.5 * float((masses - target.weights).abs().sum()),
                "SW1": sliced(x, w, truth, steer.Key(7)),
                "log Z error": float(result.log_evidence[0]) - log_z,
                "ESS min": min(sizes),
                "resamplings": float(result.trajectory.resamplings()[0]),  # type: ignore[union-attr]
                "potential variance": sum(added),
            })  # fmt: skip
        table[name] = {"particles": particles} | {
            column: over(torch.tensor([row[column] for row in rows], dtype=torch.float64)) for column in rows[0]
        }
    return table


def show(title: str, table: dict[str, dict]) -> None:
    print(title)
    columns = [c for c in next(iter(table.values())) if c != "particles"]
    print("  " + "method".ljust(16) + "N".rjust(6) + "".join(c.rjust(20) for c in columns))
    for name, row in table.items():
        cells = "".join(f"{row[c][0]:.3g} ± {row[c][1]:.2g}".rjust(20) for c in columns)
        print("  " + name.ljust(16) + str(row["particles"]).rjust(6) + cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=1000, help="of VCG-SMC; the others get what costs the same")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gamma", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = mixture()
    schedule = steer.VP()
    process = steer.models.gaussian_mixture(
        model.means, model.variances[:, 0], model.weights, schedule=schedule, dtype=torch.float64,
        times=steer.log_snr_times(schedule, arguments.steps),
    )  # fmt: skip
    target, log_z = annealed(model, arguments.gamma)
    tables = {f"annealed, gamma = {arguments.gamma}": compare(process, None, arguments.gamma, target, log_z, arguments)}
    well = Well(0.5 * (model.means[0] + model.means[1]))
    exact = model.exact(well)
    tilted = GaussianMixture(exact.means, exact.covs, exact.weights)
    tables["tilted by -|x - c|^2 / 2"] = compare(process, well, 1.0, tilted, exact.log_evidence, arguments)
    for title, table in tables.items():
        show(title, table)
    if arguments.out:
        arguments.out.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
