"""Every particle sampler on digits, at equal budget, beside the exact conditional data.

    python examples/benchmarks/digits_samplers.py [--budget 4000] [--keys 5] [--targets 3 8 even odd] [--json FILE]

The model is the unconditional `digits`; the reward is log p(target | image) of `digits-classifier` at temperature 1, so
the law to sample is a posterior over images and the exact answer is at hand: the scans of that digit, or of all even or
odd ones, themselves. Budgets count network rows; a row differentiated through is charged three (one forward, a backward
of two), so methods with gradients get a third of the particles (DriftLite, which differentiates more often, a quarter).
Columns, means over digits with standard errors over keys:

judge      held-out judge's probability of the target, by weight.
reward     by weight, in nats.
frechet    Fréchet distance in the judge's features, weighted population against the train scans of the target. It falls
           with the number of distinct samples, so the row "real scans" is a class-matched draw of as many as a method's
           ESS allows at most, N.
kernel     kernel distance (unbiased MMD^2 of the kernel (x.y / D + 1)^3), same features.
diversity  mean distance of two draws, by weight, in the judge's features (real scans beside).
ess, roots effective sample size, and distinct starting particles among those with weight.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import steer
from steer import rewards, search
from steer.rewards.digits import load_digit_net

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from digits_data import splits
from digits_quality import frechet_distance

Row = dict[str, float]
# A method, and into how many rows' worth of its ledger a budget is divided to pay for its gradients.
METHODS: dict[str, tuple[Callable[..., steer.Result], int]] = {
    "unsteered": (functools.partial(steer.rollout, keep_states=False), 1),
    "best-of-N, 16 best": (functools.partial(search.best_of_n, keep=16), 1),
    "importance sampling": (steer.importance_sampling, 1),
    "SMC": (steer.smc, 1),
    "SMC, waste-free moves": (steer.waste_free, 1),
    "particle Gibbs": (functools.partial(steer.particle_gibbs, sweeps=2), 1),
    "DTS": (search.dts, 1),
    "DTS, the paper's build": (functools.partial(search.dts, build="boltzmann", levels=4), 1),
    "FK steering, max": (functools.partial(steer.fk_steering, potential=steer.maximum), 1),
    "SMC, guided": (functools.partial(steer.smc, proposal=steer.guided(0.5)), 3),
    "TDS": (steer.tds, 3),
    "DAS": (steer.das, 3),
    "Ψ (pCNL, then SMC)": (functools.partial(steer.psi, proposal=steer.bootstrap), 3),
    "FKC": (steer.fkc, 3),
    "DriftLite (VCG-SMC)": (steer.driftlite, 4),
}
TARGETS = {**{str(d): [d] for d in range(10)}, "even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of two sets of features under the cubic kernel of KID (Bińkowski et al. 2018)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1.0) ** 3

    def within(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return (within(kernel(first, first)) + within(kernel(second, second)) - 2 * kernel(first, second).mean()).item()


def measure(images: Tensor, weight: Tensor, reward: Tensor, drawn: Tensor, real: Tensor, digits: list[int]) -> Row:
    """Columns of weighted images, of which `drawn` are draws by weight, beside features of real scans."""
    network = load_digit_net("digits-judge")
    judged = network(images).softmax(1)[:, digits].sum(1)
    features = network.features(drawn)
    return {
        "judge": (weight * judged).sum().item(),
        "reward": (weight * reward).sum().item(),
        "frechet": frechet_distance(features, real),
        "kernel": kernel_distance(features, real),
        "diversity": torch.pdist(features).mean().item(),
        "ess": 1.0 / weight.square().sum().item(),
    }


def run(budget: int, keys: int, targets: list[str], methods: list[str]) -> dict[str, list[list[Row]]]:
    """rows[method][key][target]."""
    process, data = steer.load("digits", steps=50), splits().train
    unit = (data.images / 2 + 0.5).clamp(0, 1)
    scans = {t: unit[torch.isin(data.labels, torch.tensor(TARGETS[t]))] for t in targets}
    features = {t: load_digit_net("digits-judge").features(images) for t, images in scans.items()}
    rows: dict[str, list[list[Row]]] = {name: [] for name in ("real scans", *methods)}
    count = budget // process.steps
    for key in range(keys):
        each = []
        for t in targets:
            index = (steer.Key(key).fold("real").uniform((1, count))[0] * len(scans[t])).long()
            chosen, equal = scans[t][index], torch.full((count,), 1.0 / count, dtype=torch.float64)
            score = rewards.DigitLogProb(TARGETS[t])(chosen)
            row = measure(chosen, equal, score, chosen, features[t], TARGETS[t])
            each.append(row | {"roots": float(count), "nfe": 0.0, "grads": 0.0, "seconds": 0.0})
        rows["real scans"].append(each)
        for name in methods:
            (method, share), each = METHODS[name], []
            for t in targets:
                result = method(process, rewards.DigitLogProb(TARGETS[t]), budget=budget // share, key=key)
                weight, drawn = result.log_weight[0].exp(), result.draw(count, key=key).decoded
                row = measure(result.decoded, weight, result.reward[0], drawn, features[t], TARGETS[t])
                alive = result.root[result.log_weight > -torch.inf].unique().numel()
                cost = result.cost
                spent = {"nfe": float(cost.nfe), "grads": float(cost.grads), "seconds": cost.seconds["total"]}
                each.append(row | {"roots": float(alive)} | spent)
            rows[name].append(each)
    return rows


def table(rows: dict[str, list[list[Row]]]) -> str:
    """Markdown, mean ± standard error over keys."""
    columns = ("judge", "reward", "frechet", "kernel", "diversity", "ess", "roots", "nfe", "grads")
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, keys in rows.items():
        cells = []
        for column in columns:
            means = [sum(row[column] for row in every) / len(every) for every in keys]
            mean = sum(means) / len(means)
            error = math.sqrt(sum((m - mean) ** 2 for m in means) / len(means) / max(1, len(means) - 1))
            plain = column in ("nfe", "grads", "ess", "roots")
            cells.append(f"{mean:,.0f}" if plain else f"{mean:.3f} ± {error:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=4000)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[str(d) for d in range(10)])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(arguments.budget, arguments.keys, arguments.targets, arguments.methods)
    print(table(rows))
    if arguments.json:
        facts = {"budget": arguments.budget, "targets": arguments.targets, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
