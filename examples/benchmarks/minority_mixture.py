"""Minority methods where everything is known: an 8-dimensional mixture with a mode of 3 %.

    python examples/benchmarks/minority_mixture.py [--samples 4000] [--steps 100] [--key 0] [--json FILE]

First table: for every method and strength, the mass of the rare mode ± binomial standard error, the mean exact
log-density, the share of samples that are less likely than all but one in a thousand of the law's own ("off"), and
network rows per sample. Temperature > 1 and the reward have closed-form answers, in the column "exact".
Second table: the rare mode's mass under Boost-and-Skip as a function of kappa, on linear, cosine and flow schedules
and two gammas, beside the mass that it has in theory: one curve.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import rewards
from steer.minority_sampling import boost_and_skip, minority, minority_guidance, minority_metrics, self_guided
from steer.models import GaussianMixture

RARE, MASS, SIZE = 3, 0.03, 8
SCHEDULES = {"linear": steer.VP(), "cosine": steer.Cosine(), "flow": steer.RectifiedFlow()}
KAPPAS = (0.0, 0.02, 0.05, 0.15, 0.45, 1.0)


def mixture() -> GaussianMixture:
    """Three modes of 38, 34 and 25 % and one of 3 %, in unit of data of about unit variance."""
    means = torch.zeros(4, SIZE, dtype=torch.float64)
    means[0, 0], means[1, 1], means[2, 2] = 2.0, 2.0, 2.0
    means[RARE, :3], means[RARE, 3] = -0.9, -1.8
    return GaussianMixture(means, torch.tensor([0.25, 0.3, 0.35, 0.3]), [0.38, 0.34, 0.25, MASS])


def chain(law: GaussianMixture, steps: int, schedule: steer.Schedule = SCHEDULES["linear"]) -> steer.GaussianProcess:
    """Ancestral sampling at levels equally spaced in log-SNR."""
    times = steer.log_snr_times(schedule, steps)
    return steer.models.gaussian_mixture(law.means, law.covs, law.weights, schedule=schedule, times=times)


class ExactClassifier:
    """log p(common | x_t), log p(rare | x_t) of the mixture: what a noisy classifier would learn at best."""

    def __init__(self, law: GaussianMixture):
        self.law = law

    def __call__(self, x: Tensor, log_snr: float) -> Tensor:
        signal = 1.0 / (1.0 + math.exp(-log_snr))
        joint = self.law.log_joint(x.double(), math.sqrt(signal), math.sqrt(1.0 - signal))
        rest = [k for k in range(len(self.law.weights)) if k != RARE]
        return torch.stack([joint[:, rest].logsumexp(1), joint[:, RARE]], 1)


def methods(law: GaussianMixture, samples: int, steps: int, key: int) -> dict[str, tuple[steer.Result, float | None]]:
    """Runs by name, with the exact mass of the rare mode where there is one."""
    base, run = chain(law, steps), functools.partial(steer.rollout, particles=samples, key=key, keep_states=False)
    zero = rewards.Linear(torch.zeros(SIZE))
    found: dict[str, tuple[steer.Result, float | None]] = {"base": (run(base, zero), MASS)}
    for kappa in KAPPAS[1:]:
        process = minority(base, boost_and_skip(kappa))
        found[f"Boost-and-Skip, kappa {kappa}"] = (run(process, zero), boosted_mass(law, process))
    for scale in (0.25, 0.5, 1.0, 3.5):
        hooks = minority_guidance(ExactClassifier(law), scale=scale)
        found[f"minority guidance, w {scale}"] = (run(minority(base, hooks), zero), 1.0 if scale == 1.0 else None)
    for signal in (0.0016, 0.5):
        for scale in (1.0, 4.0, 20.0):
            process = minority(base, self_guided(scale, signal=signal))
            found[f"self-guided, signal {signal}, w {scale}"] = (run(process, zero), None)
    for exponent in (0.7, 0.4):
        result = steer.fkc(base, exponent=exponent, particles=samples, key=key)
        found[f"temperature {1 / exponent:.2f} (fkc)"] = (result, annealed_mass(law, exponent))
    away = rewards.Linear(torch.tensor([-1.0, -1.0, -1.0, 0, 0, 0, 0, 0]))
    for temperature in (2.0, 1.0):
        result = steer.smc(base, away, particles=samples, temperature=temperature, key=key)
        exact = law.exact(away, temperature=temperature)
        found[f"reward, T {temperature} (smc)"] = (result, float(exact.weights[RARE]))
    return found


def annealed_mass(law: GaussianMixture, exponent: float, draws: int = 400_000) -> float:
    """Mass of the rare mode in p^exponent, by importance sampling from the modes' own powers."""
    generator = torch.Generator().manual_seed(0)
    variances = law.variances[:, 0] / exponent
    which = torch.randint(len(law.weights), (draws,), generator=generator)
    noise = torch.randn(draws, SIZE, generator=generator, dtype=torch.float64)
    x = law.means[which] + noise * variances[which, None].sqrt()
    drawn = GaussianMixture(law.means, variances, torch.ones(len(law.weights)))
    weight = torch.softmax(exponent * law.log_prob(x) - drawn.log_prob(x), 0)
    return float(weight @ law.responsibilities(x)[:, RARE])


def boosted_mass(law: GaussianMixture, process: Any, draws: int = 200_000) -> float:
    """Mass of the rare mode after a boosted start and the exact reverse process: E p(rare | x_start)."""
    level, (_, std) = process.levels[0], process.initial
    x = std * torch.randn(draws, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return float(torch.softmax(law.log_joint(x, level.alpha, level.sigma), 1)[:, RARE].mean())


def row(result: steer.Result, law: GaussianMixture, samples: int, real: Tensor, floor: float) -> dict[str, float]:
    """One method's line. Weighted populations are drawn from by weight; their errors count effective samples."""
    drawn = result.draw(samples).x[0]
    metrics = minority_metrics(drawn, real, law=law)
    assert metrics.occupancy is not None
    assert metrics.log_density is not None
    mass, size = metrics.occupancy[RARE], float(result.ess)
    return {
        "mass": mass, "error": math.sqrt(mass * (1.0 - mass) / size), "log_density": metrics.log_density,
        "off": float((law.log_prob(drawn) < floor).double().mean()), "precision": metrics.precision,
        "distance": metrics.distance, "outlier": metrics.outlier, "ess": size,
        "rows": (result.cost.nfe + 2 * result.cost.grads) / samples,
    }  # fmt: skip


def curve(law: GaussianMixture, samples: int, steps: int, key: int) -> list[dict[str, Any]]:
    """The rare mode's mass by kappa, schedule and gamma."""
    lines = []
    for kappa in KAPPAS:
        for name, schedule in SCHEDULES.items():
            for gamma in (4.0, 8.0):
                process = minority(chain(law, steps, schedule), boost_and_skip(kappa, gamma=gamma))
                result = steer.rollout(process, lambda x: x[:, 0], particles=samples, key=key, keep_states=False)
                rare = (law.responsibilities(result.x[0]).argmax(1) == RARE).double().mean().item()
                lines.append(
                    {"kappa": kappa, "schedule": name, "gamma": gamma, "mass": rare, "plan": process.levels[0].alpha,
                     "error": math.sqrt(rare * (1 - rare) / samples), "theory": boosted_mass(law, process)}
                )  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--key", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    law, real = mixture(), steer.Key(1000)
    real = chain(law, arguments.steps).with_rule(steer.models.ExactStep(law))
    real = steer.rollout(real, lambda x: x[:, 0], particles=arguments.samples, key=1000, keep_states=False).x[0]
    floor = float(law.log_prob(real).quantile(0.001))
    rows = {}
    print(
        "| method | rare mode | exact | log-density | off | precision | AvgkNN | LOF | ESS | rows |\n"
        + "|---" * 10
        + "|"
    )
    for name, (result, exact) in methods(law, arguments.samples, arguments.steps, arguments.key).items():
        rows[name] = r = row(result, law, arguments.samples, real, floor)
        print(
            f"| {name} | {r['mass']:.3f} ± {r['error']:.3f} | {'–' if exact is None else f'{exact:.3f}'} "
            f"| {r['log_density']:.2f} | {r['off']:.3f} | {r['precision']:.3f} | {r['distance']:.2f} "
            f"| {r['outlier']:.2f} | {r['ess']:.0f} | {r['rows']:.0f} |", flush=True,
        )  # fmt: skip
    lines = curve(law, arguments.samples, arguments.steps, arguments.key)
    columns = [(name, gamma) for name in SCHEDULES for gamma in (4.0, 8.0)]
    print("\n| kappa | " + " | ".join(f"{n}, gamma {g:.0f}" for n, g in columns) + " | theory |")
    print("|---" * (len(columns) + 2) + "|")
    for kappa in KAPPAS:
        cells = {(line["schedule"], line["gamma"]): line for line in lines if line["kappa"] == kappa}
        each = " | ".join(f"{cells[c]['mass']:.3f} ± {cells[c]['error']:.3f}" for c in columns)
        theory = [cells[c]["theory"] for c in columns]
        print(f"| {kappa} | {each} | {min(theory):.3f} to {max(theory):.3f} |")
    if arguments.json:
        facts = {
            "arguments": vars(arguments) | {"json": None},
            "torch": torch.__version__,
            "rows": rows,
            "curve": lines,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
