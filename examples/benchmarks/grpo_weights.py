"""How far steered rows can be weighted back to the policy: ESS, surviving seeds and error over strength.

    python examples/benchmarks/grpo_weights.py [--groups 400] [--rows 64]

A Gaussian policy N(0, .75) and r = 2 x, so that Var(r) = 3 and the policy's mean is 0 exactly; strength is 1 / T. Each
line is `steer.smc` at that strength: the ESS of weights back to the policy, and of these summed by starting noise
(surviving seeds), both over N; the policy's mean from self-normalised weights with its standard error, its root mean
square error, to compare with that of N independent rows, and the unweighted mean.
"""

from __future__ import annotations

import argparse
import functools
import math

import torch

import steer
from steer import grpo, rewards

SAMPLERS = {
    "plain": steer.smc,
    "guided": functools.partial(steer.smc, proposal=steer.guided(1.0)),
    "resampling always": functools.partial(steer.smc, selection=steer.resample(threshold=1.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    groups, rows = options.groups, options.rows
    policy = steer.models.gaussian([0.0], [[0.75]], schedule=steer.RectifiedFlow(), steps=options.steps)
    print(
        f"{'strength':>8s} {'Var':>5s}  {'sampler':18s} {'ESS/N':>6s} {'seeds/N':>7s} {'mean':>14s} {'rms':>6s} "
        f"{'unweighted':>11s}"
    )
    for strength in (0.25, 0.5, 0.75, 1.0, 2.0, 8.0):
        for name, method in SAMPLERS.items():
            batch = grpo.collect(
                policy, rewards.Linear([2.0]), groups=groups, group_size=rows, method=method, key=3,
                temperature=1.0 / strength, objective="tilted_sft",
            )  # fmt: skip
            x = batch.x0[:, 0].double().view(groups, rows)
            mean = (batch.weights().double().view(groups, rows) * x).mean(1)
            error = float(mean.std() / math.sqrt(groups))
            ess, roots = (float(n.mean()) / rows for n in (batch.ess(), batch.effective_roots()))
            print(
                f"{strength:8.2f} {3 * strength**2:5.2f}  {name:18s} {ess:6.2f} {roots:7.2f} "
                f"{mean.mean():8.3f}±{error:.3f} {mean.square().mean().sqrt():6.2f} {x.mean():10.3f}"
            )
    print(f"rms of {rows} independent rows: {math.sqrt(0.75 / rows):.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
