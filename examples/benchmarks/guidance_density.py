"""Density guidance: log-density asked for and got, in nats, in 32 dimensions.

    python examples/benchmarks/guidance_density.py [--out density.json]

Mixtures of 1, 2 and 4 modes of std .5, probability-flow ODE in 256 and 1024 steps equally spaced in log-SNR from -10 to
9, 256 samples from the median norm of the prior; paired differences to the unguided samples, standard errors below .08.
Then the stochastic variant (two modes, 1024 steps), and what is got when more is asked for than the density has.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

import steer
from steer import guidance as g
from steer.processes import schedules

SIZE, SCHEDULE = 32, steer.VP()


def mixture(modes: int, steps: int) -> steer.GaussianProcess:
    ratios = (math.exp(5.0 - 9.5 * i / steps) for i in range(steps + 1))
    times = (*(schedules.time_at(SCHEDULE, math.atan(ratio)) for ratio in ratios), 0.0)
    means = steer.Key(3).fold("means").normal((1, 4, SIZE))[0, :modes]
    return steer.models.gaussian_mixture(
        means, [0.25] * modes, [0.7, 0.3, 0.6, 0.4][:modes], schedule=SCHEDULE, times=times, transition=steer.ode(),
        dtype=torch.float64,
    )  # fmt: skip


def change(process: steer.GaussianProcess, hooks: g.Hooks) -> tuple[float, float, float]:
    """Mean change of log p_0, its standard error, and the largest share clamped at any level."""
    found = []
    for each in (hooks, g.Hooks()):
        run = steer.rollout(
            g.guide(process, g.prior_guidance(process) + each), lambda x: x[:, 0], particles=256, keep_states=False
        )
        clamped = max((mean for mean, _ in run.process.log.table("clamped").values()), default=0.0)
        found.append((process.reference.log_prob(run.x[0]), clamped))
    difference = found[0][0] - found[1][0]
    return float(difference.mean()), float(difference.std()) / 16.0, found[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []

    def report(case: str, asked: float, process: steer.GaussianProcess, hooks: g.Hooks) -> None:
        got, error, clamped = change(process, hooks)
        rows.append({"case": case, "asked": asked, "got": got, "error": error, "clamped": clamped})
        print(f"{case:36s} asked {asked:8.2f}  got {got:8.2f} +- {error:.2f}  clamped at most {clamped:.2f}")

    for modes in (1, 2, 4):
        for steps in (256, 1024):
            process = mixture(modes, steps)
            for q in (0.1, 0.25, 0.4, 0.57):
                hooks = g.density_guidance(process, q=q)
                report(f"{modes} modes, {steps} steps, q = {q}", g.delta_of(process, q), process, hooks)
    process = mixture(2, 1024)
    for noise in (0.2, 0.3):
        hooks = g.density_guidance(process, -19.0, noise=noise)
        report(f"stochastic, phi = {noise}", -19.0, process, hooks)
    for limit in (3.0, math.inf):
        hooks = g.density_guidance(process, q=0.6, headroom=math.inf, limit=limit)
        report(f"q = .6, limit {limit}", g.delta_of(process, 0.6), process, hooks)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
