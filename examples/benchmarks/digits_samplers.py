"""Every particle sampler on digits, at equal budget, beside the exact conditional data.

    python examples/benchmarks/digits_samplers.py [--budget 4000] [--keys 5] [--digits 3 8] [--json FILE]

The model is the unconditional `digits`; the reward is log p(digit | image) of `digits-classifier` at temperature 1, so
the target is a posterior over images and the exact answer is at hand: the scans of that digit themselves. Budgets count
network rows; a row differentiated through is charged three (one forward, a backward of two), so methods with gradients
get a third of the particles. Columns, means over digits with standard errors over keys:

judge      held-out judge's probability of the digit, by weight.
reward     by weight, in nats.
frechet    Fréchet distance in the judge's features, weighted population against the train scans of that digit. It falls
           with the number of distinct samples, so the row "real scans" is a class-matched draw of as many as a method's
           ESS allows at most, N.
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

import rewards
import search
import steer
from rewards.digits import load_digit_net

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from digits_data import splits
from digits_quality import frechet_distance

METHODS: dict[str, Callable[..., steer.Result]] = {
    "unsteered": functools.partial(steer.rollout, keep_states=False),
    "best-of-N, 16 best": functools.partial(search.best_of_n, keep=16),
    "importance sampling": steer.importance_sampling,
    "SMC": steer.smc,
    "FK steering, max": functools.partial(steer.fk_steering, potential=steer.maximum),
}
GRADIENTS: dict[str, Callable[..., steer.Result]] = {
    "SMC, guided": functools.partial(steer.smc, proposal=steer.guided(0.5)),
    "TDS": steer.tds,
    "DAS": steer.das,
    "Ψ (pCNL, then SMC)": functools.partial(steer.psi, proposal=steer.bootstrap),
}


def weighted_features(result: steer.Result, count: int, key: int) -> Tensor:
    """Judge features of `count` draws by weight, (count, F)."""
    return load_digit_net("digits-judge").features(result.draw(count, key=key).decoded)


def measure(result: steer.Result, digit: int, real: Tensor, key: int) -> dict[str, float]:
    """One run's row."""
    features = weighted_features(result, result.reward.shape[1], key)
    judged = result.mean(lambda x: rewards.judge(digit)(result.process.decode(x[None])))
    return {
        "judge": judged.item(),
        "reward": result.mean_reward.item(),
        "frechet": frechet_distance(features, real),
        "diversity": torch.pdist(features).mean().item(),
        "ess": result.ess.item(),
        "roots": float(result.root[result.log_weight > -torch.inf].unique().numel()),
        "nfe": float(result.cost.nfe),
        "grads": float(result.cost.grads),
        "seconds": result.cost.seconds["total"],
    }


def real_row(real: Tensor, digit_images: Tensor, digit: int, count: int, key: int) -> dict[str, float]:
    """The same columns for `count` real scans, drawn with replacement."""
    index = (steer.Key(key).fold("real").uniform((1, count))[0] * len(real)).long()
    score = rewards.DigitLogProb(digit)(digit_images)
    return {
        "judge": rewards.judge(digit)(digit_images).mean().item(), "reward": score.mean().item(),
        "frechet": frechet_distance(real[index], real), "diversity": torch.pdist(real[index]).mean().item(),
        "ess": float(count), "roots": float(count), "nfe": 0.0, "grads": 0.0, "seconds": 0.0,
    }  # fmt: skip


def run(budget: int, keys: int, digits: list[int]) -> dict[str, list[list[dict[str, float]]]]:
    """rows[method][key][digit]."""
    process, data = steer.load("digits", steps=50), splits().train
    scans = {digit: (data.images[data.labels == digit] / 2 + 0.5).clamp(0, 1) for digit in digits}
    features = {digit: load_digit_net("digits-judge").features(images) for digit, images in scans.items()}
    rows: dict[str, list[list[dict[str, float]]]] = {name: [] for name in ("real scans", *METHODS, *GRADIENTS)}
    for key in range(keys):
        count = budget // process.steps
        rows["real scans"].append([real_row(features[d], scans[d], d, count, key) for d in digits])
        for share, methods in ((1, METHODS), (3, GRADIENTS)):
            for name, method in methods.items():
                each = []
                for digit in digits:
                    result = method(process, rewards.DigitLogProb(digit), budget=budget // share, key=key)
                    each.append(measure(result, digit, features[digit], key))
                rows[name].append(each)
    return rows


def table(rows: dict[str, list[list[dict[str, float]]]]) -> str:
    """Markdown, mean ± standard error over keys."""
    columns = ("judge", "reward", "frechet", "diversity", "ess", "roots", "nfe", "grads")
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, keys in rows.items():
        cells = []
        for column in columns:
            means = [sum(row[column] for row in digits) / len(digits) for digits in keys]
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
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = run(arguments.budget, arguments.keys, arguments.digits)
    print(table(rows))
    if arguments.json:
        facts = {"budget": arguments.budget, "digits": arguments.digits, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
