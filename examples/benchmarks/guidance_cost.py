"""What each hook costs per step: in the ledger, and in microseconds beside the network.

    python examples/benchmarks/guidance_cost.py [--out cost.json]

A Gaussian model of 64 coordinates, whose prediction is a few multiplications, 20 ancestral steps, 8 problems of 8
particles, float32; the potential is a quadratic. Ledger entries are per particle and step. Time is what a step takes
beyond the same rollout without hooks, the minimum CPU time over interleaved rounds on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import steer
from steer import guidance as g

SIZE, STEPS, BATCH, PARTICLES = 64, 20, 8, 8


def potential(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x - 0.5).square().sum(1)


def cases() -> dict[str, Any]:
    process = steer.models.gaussian(torch.zeros(SIZE), 0.5, steps=STEPS)
    other = steer.models.gaussian(torch.ones(SIZE), 0.5, steps=STEPS)
    ode = process.with_rule(steer.ode())
    plain = {"halvings": 0}
    hooks = {
        "none": g.Hooks(),
        "start: prior guidance": g.prior_guidance(process, -2.0),
        "score: identity": g.Hooks(score=(lambda at: at.score,)),
        "x0: identity": g.Hooks(x0=(lambda at: at.x0,)),
        "mean: identity": g.Hooks(mean=(lambda at: at.mean,)),
        "score: density guidance": g.density_guidance(process, q=0.45),
        "score, mean: the same, stochastic": g.density_guidance(process, q=0.45, noise=0.2),
        "mean: MPGD": g.mpgd(potential, **plain),
        "mean: MPGD, backtracking": g.mpgd(potential),
        "mean: DPS": g.dps(potential, **plain),
        "mean: LGD, 4 samples": g.lgd(potential, **plain),
        "mean: UGD, 4 iterations": g.ugd(potential, **plain),
        "mean: TFG, defaults": g.tfg(potential),
        "after: corrector": g.corrector(),
    }
    found: dict[str, Any] = {name: g.guide(ode if "density" in name else process, hook) for name, hook in hooks.items()}
    found["x0: classifier-free"] = g.classifier_free(process, other, 2.0)
    found["x0: classifier-free, damped"] = g.classifier_free(process, other, 2.0, damped=True)
    found["x0: classifier-free, dropped at 10 of 20"] = g.classifier_free(process, other, 2.0, until=10)
    found["recur, twice"] = g.recur(process, 2)
    found["restart (.3, 2, 1)"] = g.restart(process, [(0.3, 2.0, 1)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    processes, rows = cases(), BATCH * PARTICLES * STEPS

    def run(process):
        return steer.rollout(process, lambda x: x[:, 0], batch=BATCH, particles=PARTICLES, keep_states=False)

    costs = {name: run(process).cost for name, process in processes.items()}
    best = dict.fromkeys(processes, float("inf"))
    for _ in range(arguments.rounds):
        for name, process in processes.items():
            began = time.process_time()
            run(process)
            best[name] = min(best[name], time.process_time() - began)
    table = []
    print(f"{'hook':42s} {'rows':>5s} {'grads':>6s} {'potentials':>10s} {'added us per step':>18s}")
    for name, cost in costs.items():
        added = 1e6 * (best[name] - best["none"]) / STEPS
        scored = (cost.rewards - BATCH * PARTICLES) / rows
        table.append({"hook": name, "rows": cost.nfe / rows, "grads": cost.grads / rows, "potentials": scored,
                      "us_per_step": added})  # fmt: skip
        print(f"{name:42s} {cost.nfe / rows:5.2f} {cost.grads / rows:6.2f} {scored:10.2f} {added:18.0f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
