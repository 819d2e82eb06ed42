"""The README's table and picture: digits that a classifier asks for, judged by one that was held out.

    python examples/benchmarks/digits_main_job.py [--keys 5] [--out docs/images/digits.png] [--json FILE]

Every digit in turn is the reward log p(digit | image) of `digits-classifier`, at temperature 1, and every method spends
the same number of network rows on it. Reported is the probability of the digit in the eyes of `digits-judge`, which
has another architecture and learned from other data: the mean over the samples a method returns (unsteered: all;
best-of-N: its 16 best; the others: by weight), over digits, with the standard error over keys. Gradients are spent
on top by the guided row; the ledger counts them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import steer
from steer import rewards, search
from steer.report.images import grid

METHODS: dict[str, Callable[..., steer.Result]] = {
    "unsteered": functools.partial(steer.rollout, keep_states=False),
    "best-of-N, 16 best": functools.partial(search.best_of_n, keep=16),
    "best-of-N, the best": search.best_of_n,
    "importance sampling": steer.importance_sampling,
    "SMC": steer.smc,
    "SMC, guided by the gradient": functools.partial(steer.smc, proposal=steer.guided(0.5)),
}
PICTURED = ("unsteered", "best-of-N, 16 best", "SMC")


def measure(process: steer.GaussianProcess, budget: int, keys: int) -> dict[str, list[list[dict[str, float]]]]:
    """For every method, key and digit: judge's probability, reward, ESS, and what was spent."""
    table: dict[str, list[list[dict[str, float]]]] = {name: [] for name in METHODS}
    for key in range(keys):
        for name, method in METHODS.items():
            runs = []
            for digit in range(10):
                result = method(process, rewards.DigitLogProb(digit), budget=budget, key=key)
                seen = result.mean(lambda x, digit=digit: rewards.judge(digit)(process.decode(x[None])))
                runs.append({
                    "judge": seen.item(), "reward": result.mean_reward.item(), "ess": result.ess.item(),
                    "nfe": result.cost.nfe, "grads": result.cost.grads, "rewards": result.cost.rewards,
                    "seconds": result.cost.seconds["total"],
                })  # fmt: skip
            table[name].append(runs)
    return table


def over_keys(runs: list[list[dict[str, float]]], column: str) -> tuple[float, float]:
    """Mean over digits and keys, and its standard error over keys."""
    means = [sum(run[column] for run in digits) / len(digits) for digits in runs]
    mean = sum(means) / len(means)
    spread = sum((value - mean) ** 2 for value in means)
    return mean, math.sqrt(spread / len(means) / max(1, len(means) - 1))


def markdown(table: dict[str, list[list[dict[str, float]]]]) -> str:
    """The table of the README."""
    lines = [
        "| method | held-out judge p(digit) | reward (nats) | ESS | network rows | backward rows |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in table.items():
        judged, scored = over_keys(runs, "judge"), over_keys(runs, "reward")
        cells = [f"{judged[0]:.3f} ± {judged[1]:.3f}", f"{scored[0]:.2f} ± {scored[1]:.2f}"]
        cells += [f"{over_keys(runs, column)[0]:,.0f}" for column in ("ess", "nfe", "grads")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(process: steer.GaussianProcess, budget: int, digit: int = 3, key: int = 0) -> Image.Image:
    """Sixteen samples of three methods side by side, with the judge's mean probability above them."""
    panels = []
    for name in PICTURED:
        result = METHODS[name](process, rewards.DigitLogProb(digit), budget=budget, key=key)
        drawn = result.draw(16, key=key)
        panels.append((name, grid(drawn.decoded, columns=4, least=64), rewards.judge(digit)(drawn.decoded).mean()))
    width, height = panels[0][1].size
    sheet = Image.new("RGB", (3 * width + 80, height + 48), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i, (name, panel, seen) in enumerate(panels):
        left = i * (width + 40)
        sheet.paste(panel, (left, 48))
        pen.text((left + 2, 14), f"{name}:  judge p({digit}) = {seen:.2f}", fill="black", font=font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=4000)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the picture here")
    parser.add_argument("--json", type=Path, help="write every run's numbers here")
    arguments = parser.parse_args()
    process = steer.load("digits", steps=50)
    if arguments.out:
        picture(process, arguments.budget).save(arguments.out)
    table = measure(process, arguments.budget, arguments.keys)
    print(markdown(table))
    if arguments.json:
        facts = {"budget": arguments.budget, "torch": torch.__version__, "steer": steer.__version__, "runs": table}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
