"""What collecting adds to the sampling loop one would write by hand, and what a stored step takes.

    python examples/benchmarks/grpo_overhead.py [--rounds 5] [--rows 96] [--steps 10] [--json FILE]

CPU time, least of interleaved rounds on one thread. Every figure is against a bare loop in the same run (predict, step,
torch.randn, one call of the reward at the end) that stores nothing and computes no density. "bare + log-probs" is the
loop of a trainer, which keeps states and log-probs. The limit is 5 % on digits-flow.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import steer
from steer import grpo


def bright(images: torch.Tensor) -> torch.Tensor:
    """A reward that costs nothing."""
    return images.flatten(1).mean(1)


def bare_loop(process: steer.GaussianProcess, rows: int, *, log_probs: bool) -> torch.Tensor:
    """Samples as one would draw them by hand."""
    x = torch.randn(1, rows, *process.event)
    kept = []
    with torch.no_grad():
        for k in range(process.steps):
            transition = process.transition(x, process.denoiser(x, process.times[k]), k)
            after = transition.mean + transition.std * torch.randn_like(x)
            if log_probs:
                kept.append((x, after, transition.log_prob(after)))
            x = after
        return bright(process.decode(x))


def fastest(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of each run over interleaved rounds, after one that warms up."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if i:
                best[name] = min(best[name], time.process_time() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("rows", 96), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    process = steer.load("digits-flow", steps=options.steps, transition=steer.flow_sde(0.7))

    def collect(**extra):
        return grpo.collect(process, bright, group_size=options.rows, **extra)

    runs = {
        "bare": lambda: bare_loop(process, options.rows, log_probs=False),
        "bare + log-probs": lambda: bare_loop(process, options.rows, log_probs=True),
        "collect": collect,
        "collect, bf16": lambda: collect(storage=torch.bfloat16),
        "collect, window of 2": lambda: collect(window=grpo.first_half(2)),
        "collect, window per row": lambda: collect(window=grpo.per_row(2)),
        "collect, smc": lambda: collect(method=steer.smc, temperature=5.0),
    }
    seconds = fastest(runs, options.rounds)
    table = {name: {"seconds": value, "over bare": value / seconds["bare"] - 1.0} for name, value in seconds.items()}
    for name, row in table.items():
        print(f"{name:24s} {row['seconds']:7.3f} s  {100 * row['over bare']:+6.1f} %")
    state = 4 * torch.Size(process.event).numel()
    for name, extra in (
        ("float32", {}),
        ("bf16", {"storage": torch.bfloat16}),
        ("float32, no means", {"means": False}),
    ):
        batch = collect(**extra)
        per_step = batch.nbytes / batch.rows / batch.mask.shape[1]
        table[f"bytes, {name}"] = {"per stored step": per_step, "of a state": per_step / state}
        print(f"{name:24s} {per_step:7.0f} bytes a stored step, {per_step / state:.2f} float32 states of {state}")
    if options.json:
        options.json.write_text(json.dumps(table))


if __name__ == "__main__":
    main()
