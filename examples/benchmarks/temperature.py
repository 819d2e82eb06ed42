"""Whether a temperature that was chosen for an ESS has that ESS: the table of docs/temperature.md.

    python examples/benchmarks/temperature.py [--keys 12] [--truth 2048] [--json FILE]

For every task, ESS share and key, `steer.smc(process, reward, ess=share, key=key)` chooses a temperature by its pilot.
The ESS that it has is measured on `--truth` other unsteered samples, weighted by exp(r / temperature): their own ESS,
over their number. Reported are its median and range over keys, how many keys are within a factor 1.5 of what was asked,
and, at the median temperature, the expected mean reward and the KL to the model.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

import steer
from steer import rewards
from steer.core.tilt import Tilt

SHARES = (0.8, 0.5, 0.25, 0.1)


def mixture(dimension: int) -> tuple[Any, Any]:
    """Four Gaussians in that many dimensions, and a linear reward."""
    draw = torch.Generator().manual_seed(dimension)
    means = 1.5 * torch.randn(4, dimension, generator=draw, dtype=torch.float64)
    direction = torch.randn(dimension, generator=draw, dtype=torch.float64)
    return steer.models.gaussian_mixture(means, [0.3] * 4, steps=20), rewards.Linear(direction)


def tasks() -> dict[str, tuple[Any, Any]]:
    """Name -> process and reward."""
    digits, letters = steer.load("digits", steps=12), steer.load("letters")
    return {
        "mixture, 2-d": mixture(2),
        "mixture, 16-d": mixture(16),
        "digits, log p(3)": (digits, rewards.DigitLogProb(3)),
        "digits, ink": (digits, rewards.Ink()),
        "digits, jpeg": (digits, rewards.from_specs(["jpeg"], None)),
        "letters, number of e": (letters, rewards.from_specs(["letters:e"], letters.text)),
    }


def measure(process: Any, reward: Any, keys: int, truth: int) -> list[dict[str, Any]]:
    """A row for each ESS share that was asked for."""
    pool = [steer.rollout(process, reward, particles=256, key=steer.Key(77, (str(i),))) for i in range(truth // 256)]
    tilt = Tilt.of(torch.cat([run.reward for run in pool], 1))
    rows = []
    for share in SHARES:
        chosen = []
        for key in range(keys):
            try:
                chosen.append(steer.smc(process, reward, ess=share, particles=2, key=key).temperature_choice)
            except steer.SteerError:  # ties for the best: no temperature goes as low
                continue
        if not chosen:
            continue
        found = sorted(tilt.ess(choice.temperature) for choice in chosen)
        temperature = sorted(choice.temperature for choice in chosen)[len(chosen) // 2]
        rows.append({
            "asked": share, "samples": chosen[0].samples, "temperature": temperature, "chosen": len(chosen),
            "ess": found[len(found) // 2], "lowest": found[0], "highest": found[-1],
            "within": sum(1.0 / 1.5 <= ess / share <= 1.5 for ess in found),
            "factor": sum(choice.ess_factor for choice in chosen) / len(chosen),
            "unsteered": tilt.mean(), "reward": tilt.mean(temperature), "kl": tilt.kl(temperature),
        })  # fmt: skip
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=12)
    parser.add_argument("--truth", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of runs with two particles, which are not looked at
    table = {}
    print("| task | asked | samples | temperature | ESS: median (range) | within 1.5 | factor said | reward | KL |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (process, reward) in tasks().items():
        table[name] = measure(process, reward, given.keys, given.truth)
        for row in table[name]:
            print(
                f"| {name} | {row['asked']} | {row['samples']} | {row['temperature']:.3g} | {row['ess']:.2f} "
                f"({row['lowest']:.2f} to {row['highest']:.2f}) | {row['within']} of {row['chosen']} | "
                f"{row['factor']:.2f} | {row['unsteered']:.3g} → {row['reward']:.3g} | {row['kl']:.2f} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
