"""How many network evaluations a sample needs: ancestral steps against second-order ones, at several noises.

    python examples/benchmarks/steps.py [--keys 3] [--samples 1] [--figure FILE] [--json FILE]

Gaussian data: the law of the chain is known, so errors are exact. Mixtures: statistics are unbiased, in blocks, and the
noise of the mean is taken off the squared error; the error of a saving is a jackknife over blocks. The saving of tau =
.5 at 10 or 20 evaluations is how many ancestral steps have the same error, over 10 or 20. Networks have no exact
answer: they are compared with their own chain of 200 ancestral steps, and, on the same starting noise, with a fine ODE.

normalizing constant: of rewards b'x of one standard deviation, in nats (mixtures: Z / Z* - 1, root mean square of 24).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import rewards
from steer.models import chain_law
from steer.testing.targets import plane_mixture

RULES: dict[str, Any] = {"ancestral": steer.ddim(1.0)}
RULES |= {f"tau {tau:g}": steer.second_order(tau) for tau in (0.0, 0.3, 0.5, 1.0)}
PATHS = {"VP": steer.VP(), "VE": steer.VE(), "flow": steer.RectifiedFlow()}
BLOCKS, MODES, TESTS = 8, 4, 24
MANY = (10, 15, 20, 30, 50, 100, 200)  # ancestral steps
FEW = (10, 20)


def on_grid(path: str, steps: int) -> dict[str, Any]:
    """Options of an analytic model on a path."""
    schedule = PATHS[path]
    if path == "VE":
        return {"schedule": schedule, "times": steer.sigma_times(schedule, steps, sigma_min=0.02)}
    return {"schedule": schedule, "steps": steps}


# -- errors of one chain


def of_gaussian(size: int, path: str, rule: Any, steps: int) -> dict[str, float]:
    """Errors of the chain's exact law: variances from .01 to 2, mean .5."""
    variance = torch.logspace(-2, math.log10(2.0), size, dtype=torch.float64)
    mean = torch.full((size,), 0.5, dtype=torch.float64)
    options = {**on_grid(path, steps), "transition": rule, "dtype": torch.float64}
    law = chain_law(steer.models.gaussian(mean, variance.diag(), **options))
    off, found = law.means[0] - mean, law.covs[0].diagonal()
    b = 1.0 / (size * variance).sqrt()  # b'x has one standard deviation
    return {
        "mean": float(off.norm() / variance.sum().sqrt()),
        "covariance": float((found - variance).norm() / variance.norm()),
        "Frechet": float((off.square() + (found.sqrt() - variance.sqrt()).square()).sum().sqrt()),
        "normalizing constant": abs(float(b @ off + 0.5 * (b.square() * (found - variance)).sum())),
    }


def mixture_of(size: int) -> steer.models.GaussianMixture:
    """Four modes of random means and covariances."""
    key = steer.Key(7)
    means = 1.5 * key.fold("means").normal((1, MODES, size))[0]
    factors = 0.25 * key.fold("factors").normal((1, MODES, size, size))[0]
    covs = 0.3 * torch.eye(size, dtype=torch.float64) + factors @ factors.mT / 4
    return steer.models.GaussianMixture(means, covs, [0.4, 0.3, 0.2, 0.1])


class Statistics:
    """What a mixture's samples are judged by: vectors of which the mixture's own mean is known."""

    def __init__(self, mixture: steer.models.GaussianMixture):
        self.mixture, size = mixture, mixture.means.shape[1]
        w, m, c = mixture.weights, mixture.means, mixture.covs
        mean = w @ m
        second = (w[:, None, None] * (c + m[:, :, None] * m[:, None, :])).sum(0)
        cov = second - mean[:, None] * mean
        b = steer.Key(3).normal((1, TESTS, size))[0].double()
        self.tilts = b / ((b @ cov) * b).sum(1, keepdim=True).sqrt()
        spread = 0.5 * torch.einsum("td,kde,te->tk", self.tilts, c, self.tilts)
        self.log_constants = torch.logsumexp(w.log() + self.tilts @ m.T + spread, 1)
        self.centre, self.scale = mean, float(cov.diagonal().sum().sqrt())
        self.truth = {
            "mean": torch.zeros(size, dtype=torch.float64),
            "covariance": (cov / cov.norm()).flatten(),
            "masses": w,
            "normalizing constant": torch.zeros(TESTS, dtype=torch.float64),
        }
        self.norm, self.power = float(cov.norm()), {"normalizing constant": 1.0 / TESTS}

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Estimates from samples [n, D]."""
        x = x.double()
        off = x - self.centre
        return {
            "mean": off.mean(0) / self.scale,
            "covariance": (off.T @ off / len(x) / self.norm).flatten(),
            "masses": self.mixture.responsibilities(x).mean(0),
            "normalizing constant": (x @ self.tilts.T - self.log_constants).exp().mean(0) - 1.0,
        }

    def errors(self, blocks: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Root of the squared error of the blocks' mean, without what their own noise adds to it.

        No smaller than the standard error of that: what cannot be seen is not claimed.
        """
        found = {}
        for name, truth in self.truth.items():
            values = torch.stack([block[name] for block in blocks])
            noise = values.var(0) / len(values)
            square, least = ((values.mean(0) - truth).square() - noise).sum(), (2.0 * noise.square().sum()).sqrt()
            found[name] = math.sqrt(max(float(least), float(square)) * self.power.get(name, 1.0))
        return found


def of_mixture(statistics: Statistics, path: str, rule: Any, steps: int, samples: int) -> list[dict[str, Tensor]]:
    """The statistics of blocks of samples."""
    m = statistics.mixture
    process = steer.models.gaussian_mixture(m.means, m.covs, m.weights, **on_grid(path, steps), transition=rule)
    x = steer.rollout(process, _nothing, batch=BLOCKS, particles=samples // BLOCKS, keep_states=False).x
    return [statistics(block) for block in x]


def _nothing(x: Tensor) -> Tensor:
    return torch.zeros(len(x), device=x.device)


# -- savings


def steps_needed(curve: dict[int, float], error: float) -> float:
    """Ancestral steps with that error: between two of the curve, straight in both logarithms; infinite past its end."""
    points = sorted(curve.items())
    for (few, high), (many, low) in itertools.pairwise(points):
        if high > error >= low:
            share = math.log(high / error) / math.log(high / low)
            return math.exp(math.log(few) + share * math.log(many / few))
    return math.inf if error < points[-1][1] else float(points[0][0])


def saving(curve: dict[int, float], error: float, steps: int) -> float:
    return steps_needed(curve, error) / steps


def jackknife(function: Callable[[list[int]], float]) -> tuple[float, float]:
    """A function of the blocks taken, and its standard error."""
    whole, every = function(list(range(BLOCKS))), range(BLOCKS)
    without = torch.tensor([function([i for i in every if i != left]) for left in every])
    return whole, float(((BLOCKS - 1) * without.var(unbiased=False)).sqrt()) if math.isfinite(whole) else math.nan


def saving_of_blocks(statistics: Statistics, made: dict[str, Any], steps: int, taken: list[int]) -> float:
    """The saving of tau = .5 at some evaluations, in the covariance's error, of some blocks."""

    def error(name: str, k: int) -> float:
        return statistics.errors([made[name][k][i] for i in taken])["covariance"]

    return saving({k: error("ancestral", k) for k in made["ancestral"]}, error("tau 0.5", steps), steps)


def analytic(samples: float) -> tuple[list[dict[str, Any]], dict[str, dict[str, dict[int, float]]]]:
    """A row for each target and path, and the curves of the figure: target -> rule -> steps -> covariance error."""
    rows, curves = [], {}
    for size in (2, 16, 64):
        for path in PATHS:
            table = {
                name: {k: of_gaussian(size, path, rule, k) for k in (MANY if name == "ancestral" else MANY[:5])}
                for name, rule in RULES.items()
            }
            column = "Frechet"
            curves[f"Gaussian, {size}-d, {path}"] = {n: {k: e[column] for k, e in t.items()} for n, t in table.items()}
            ancestral = {k: error[column] for k, error in table["ancestral"].items()}
            factors = {k: (saving(ancestral, table["tau 0.5"][k][column], k), 0.0) for k in FEW}
            rows.append({"target": f"Gaussian, {size}-d", "path": path, "at": column, "saving": factors, **_at(table)})
    for size, count in ((2, 24000), (16, 8000), (64, 2400)):
        statistics = Statistics(mixture_of(size))
        for path in PATHS:
            made = {
                name: {
                    k: of_mixture(statistics, path, rule, k, int(samples * count))
                    for k in (MANY[:-1] if name == "ancestral" else FEW)
                }
                for name, rule in RULES.items()
            }
            table = {n: {k: statistics.errors(blocks) for k, blocks in t.items()} for n, t in made.items()}
            curves[f"mixture, {size}-d, {path}"] = {
                n: {k: e["covariance"] for k, e in t.items()} for n, t in table.items()
            }

            factors = {k: jackknife(functools.partial(saving_of_blocks, statistics, made, k)) for k in FEW}
            rows.append({
                "target": f"mixture, {size}-d", "path": path, "at": "covariance", "saving": factors,
                **_at(table),
            })  # fmt: skip
    return rows, curves


def _at(table: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """The errors of every rule at 10 and 20 evaluations."""
    return {"errors": {name: {k: errors[k] for k in FEW} for name, errors in table.items()}}


# -- a reward of which more steps are worse


def tail_reward(x: Tensor) -> Tensor:
    return 3.0 * (2.0 * x[:, 0]).sin() - 2.0 * (x[:, 1] - 0.5).square()


def counterexample(samples: int) -> dict[str, float]:
    """log Z of r = 3 sin 2 x_0 - 2 (x_1 - .5)^2 on a mixture of two modes, by rule and steps, and by quadrature."""
    m = plane_mixture()
    line = torch.linspace(-8.0, 8.0, 1601, dtype=torch.float64)
    plane = torch.cartesian_prod(line, line)
    parts = torch.distributions.MultivariateNormal(m.means, m.covs)
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(m.weights), parts).log_prob(plane)
    found = {"the data": float(torch.logsumexp(density + tail_reward(plane), 0) + 2.0 * (line[1] - line[0]).log())}
    for name, steps in (("ancestral", 20), ("ancestral", 50), ("tau 0.5", 10), ("tau 0.5", 20), ("tau 0.5", 50)):
        process = steer.models.gaussian_mixture(m.means, m.covs, m.weights, steps=steps, transition=RULES[name])
        x = steer.rollout(process, _nothing, particles=samples, keep_states=False).x[0]
        found[f"{name}, {steps} steps"] = float(torch.logsumexp(tail_reward(x).double(), 0)) - math.log(len(x))
    return found


# -- networks


def made(name: str, rule: Any, steps: int, count: int, key: int = 0) -> tuple[Tensor, Any]:
    """Samples [n, *event] of an embedded model, and the process."""
    options = {"prompt": "heart"} if name == "emoji" else {}
    process = steer.load(name, steps=steps, transition=rule, **options)
    return steer.rollout(process, _nothing, particles=count, key=key, keep_states=False).x[0], process


def network(name: str, samples: int) -> list[dict[str, Any]]:
    """Digits under every rule: pixel variance and class masses beside those of 200 ancestral steps."""

    def seen(rule: Any, steps: int, key: int = 0) -> tuple[Tensor, Tensor]:
        x, process = made(name, rule, steps, samples, key)
        images = process.decode(x[None])
        masses = torch.stack([rewards.DigitLogProb(digit)(images).exp().mean() for digit in range(10)])
        return x.var(0).sum(), masses

    variance, masses = seen(RULES["ancestral"], 200, key=1)
    rows = []
    for rule, steps in [("ancestral", 50), *itertools.product(RULES, FEW)]:
        spread, found = seen(RULES[rule], steps)
        off = float((found - masses).abs().sum()) / 2
        rows.append({"model": name, "rule": rule, "steps": steps, "variance": float(spread / variance), "masses": off})
    return rows


def along_the_ode(samples: dict[str, int]) -> list[dict[str, Any]]:
    """Root mean square distance to an ODE of 60 second-order steps from the same noise, in standard deviations."""
    rows = []
    for name, count in samples.items():
        fine, _ = made(name, RULES["tau 0"], 60, count)
        for rule, of in (("first-order ODE", steer.ode()), ("tau 0", RULES["tau 0"])):
            off = {k: float((made(name, of, k, count)[0] - fine).square().mean().sqrt() / fine.std()) for k in FEW}
            rows.append({"model": name, "rule": rule, **{f"{k} steps": value for k, value in off.items()}})
    return rows


def evidence(keys: int, rows: int = 2400) -> list[dict[str, Any]]:
    """SMC on digits at equal network rows: spread of log Z over keys, judge, reward and surviving seeds."""
    weights = {"r(x0_hat)": steer.difference(), "tempered": steer.difference(tempering=steer.snr_share)}
    found = []
    for rule, steps in (("ancestral", 50), ("ancestral", 20), ("tau 0.5", 20)):
        process = steer.load("digits", steps=steps, transition=RULES[rule])
        for name, weight in weights.items():
            runs = []
            for digit in (3, 8):
                for key in range(keys):
                    run = functools.partial(steer.smc, process, rewards.DigitLogProb(digit), weight=weight)
                    result = run(budget=rows, key=key)
                    judged = result.mean(lambda x, d=digit, p=process: rewards.judge(d)(p.decode(x[None])))
                    seeds = float(len(torch.unique(result.root)))
                    runs.append((float(result.log_evidence), float(judged), float(result.mean_reward), seeds))
            values = torch.tensor(runs).view(2, keys, 4)
            found.append({
                "rule": rule, "steps": steps, "value": name,
                "std log Z": float(values[:, :, 0].var(1).mean().sqrt()), "log Z": float(values[:, :, 0].mean()),
                "judge": float(values[:, :, 1].mean()),
                "judge se": float(values[:, :, 1].var(1).mean().sqrt() / math.sqrt(2 * keys)),
                "reward": float(values[:, :, 2].mean()), "seeds": float(values[:, :, 3].mean()),
            })  # fmt: skip
    return found


def plane_evidence(runs: int = 400) -> list[dict[str, Any]]:
    """The same on the plane mixture and the counter-example's reward: 64 particles, exact data to compare with."""
    m = plane_mixture()
    found = []
    for rule, steps in (("ancestral", 20), ("tau 0.5", 20)):
        process = steer.models.gaussian_mixture(m.means, m.covs, m.weights, steps=steps, transition=RULES[rule])
        for name, tempering in (("r(x0_hat)", None), ("tempered", steer.snr_share)):
            result = steer.smc(
                process, tail_reward, batch=runs, particles=64, weight=steer.difference(tempering=tempering)
            )
            found.append({
                "rule": rule, "steps": steps, "value": name, "std log Z": float(result.log_evidence.std()),
                "log mean Z": float(torch.logsumexp(result.log_evidence, 0)) - math.log(runs),
                "ess": float(result.ess.mean()) / 64,
            })  # fmt: skip
    return found


# -- what is printed


def number(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.4f}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Errors at 20 evaluations, ancestral and of tau = .5, and the saving."""
    names = ("mean", "covariance", "Frechet", "masses", "normalizing constant")
    lines = [f"| target | path | {' | '.join(names)} | saving at 10 | at 20 |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        pair = [row["errors"][name][20] for name in ("ancestral", "tau 0.5")]
        cells = [" → ".join(number(e[n]) for e in pair) if n in pair[0] else "–" for n in names]
        for steps, (factor, error) in row["saving"].items():
            most = (MANY[-1] if row["target"].startswith("Gaussian") else MANY[-2]) / steps
            said = "" if not error or math.isnan(error) else f" ± {error:.1f}"
            cells.append(f"> {most:g}" if math.isinf(factor) else f"{factor:.1f}{said}")
        lines.append(f"| {row['target']} | {row['path']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_tau(rows: Sequence[dict[str, Any]]) -> str:
    """Error of every rule at 10 and 20 evaluations, averaged over the paths of a target."""
    lines = [f"| target, evaluations | {' | '.join(RULES)} |", "|---" * (len(RULES) + 1) + "|"]
    for target in dict.fromkeys(row["target"] for row in rows):
        for steps in FEW:
            of = [row for row in rows if row["target"] == target]
            cells = [number(sum(row["errors"][name][steps][row["at"]] for row in of) / len(of)) for name in RULES]
            lines.append(f"| {target}, {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def listed(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row.get(name, "–") for name in names]
        lines.append(
            "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


def figure(curves: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """All targets in one picture: error against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels, axes = pyplot.subplots(6, 3, figsize=(11, 17), constrained_layout=True)
    for axis, (title, rules) in zip(axes.flat, curves.items(), strict=True):
        for name, curve in rules.items():
            axis.loglog(list(curve), [max(error, 1e-4) for error in curve.values()], "o-", ms=3, label=name)
        axis.set_title(title, fontsize=9)
    axes.flat[0].legend(fontsize=7)
    panels.supxlabel("network evaluations per sample")
    panels.supylabel("error: Frechet distance (Gaussian), covariance (mixture)")
    panels.savefig(path, dpi=65)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=3, help="of SMC on digits")
    parser.add_argument("--samples", type=float, default=1.0, help="of mixtures and networks, times the usual number")
    parser.add_argument("--figure", type=Path, help="write the picture here")
    parser.add_argument("--json", type=Path, help="write every number here")
    arguments = parser.parse_args()
    rows, curves = analytic(arguments.samples)
    print(markdown(rows), by_tau(rows), sep="\n\n", flush=True)
    found: dict[str, Any] = {"analytic": rows, "curves": curves}
    if arguments.figure:
        figure(curves, arguments.figure)
    found["counter-example"] = counterexample(int(100000 * arguments.samples))
    print("\n", found["counter-example"], flush=True)
    found["plane"] = plane_evidence()
    print(listed(found["plane"]), flush=True)
    for name in ("digits", "digits-flow"):
        found[name] = network(name, max(8, int(240 * arguments.samples)))
        print(listed(found[name]), flush=True)
    found["ode"] = along_the_ode({"digits": 24, "digits-flow": 24, "emoji": 6})
    print(listed(found["ode"]), flush=True)
    found["evidence"] = evidence(arguments.keys)
    print(listed(found["evidence"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
