"""Reward against network rows for every search, on the embedded digits.

    python examples/benchmarks/search_digits.py [--reward jpeg | digit] [--budgets 1000 4000] [--reach 10000]
        [--keys 5] [--json FILE]

"jpeg" asks for images that compress well (kilobytes, negated), a reward no network was trained for. "digit" asks for
log p(3 | image) of `digits-classifier`, and `digits-judge`, which has another architecture and other data, says how
sure it is of the winners. One unlabelled model, 25 steps, DDIM(1); rows marked ODE run on its deterministic twin.
Every method spends the same number of rows, and reports the best sample it found: the mean over independent keys
(problems of one batch) and its standard error, the difference to best-of-N of the same key, and the wall time of all
keys together. --reach asks which of the budgets is the first at which a method's mean is best-of-N's at another one.
The default takes about three minutes on one free core.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import steer
from steer import rewards, search
from steer.search import selection, values

STEPS = 25
REWARDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {  # and the temperature of what has one
    "jpeg": (rewards.JPEGSize(sign=-1), 0.02),
    "digit": (rewards.DigitLogProb(3), 0.2),
}
# A search at a budget: its options and whether it runs on the ODE.
METHODS: dict[str, tuple[Callable[..., steer.Result], bool]] = {
    "best-of-N": (search.best_of_n, False),
    "SVDD, M = 20": (functools.partial(search.svdd, candidates=20), False),
    "SVDD, argmax, M = 20": (functools.partial(search.svdd, candidates=20, select="argmax"), False),
    "SVDD-R, M = 4": (functools.partial(search.svdd, candidates=4, replace=0.05), False),
    "CoDe, blocks of 5": (
        functools.partial(search.beam, particles=1, candidates=None, block=5, select=selection.argmax()), False,
    ),
    "breadth-first, every 5": (functools.partial(search.beam, block=5), False),
    "breadth-first, every step": (search.beam, False),
    "TreeG, A = 4": (functools.partial(search.beam, particles=4, candidates=None, select=selection.top()), False),
    "TreeG, A = 4, look-ahead 3": (
        functools.partial(
            search.beam, particles=4, candidates=None, select=selection.top(), value=values.look_ahead(3)
        ), False,
    ),
    "RBF": (search.rbf, False),
    "DTS*": (search.dts_star, False),
    "DTS*, the paper's widening": (functools.partial(search.dts_star, widening=(2.0, 0.8)), False),
    "depth-first": (functools.partial(search.depth_first, particles=4), False),
    "noise: zero-order (ODE)": (search.noise_search, True),
    "noise: paths (ODE)": (functools.partial(search.noise_search, strategy=search.paths()), True),
    "noise: paths": (functools.partial(search.noise_search, strategy=search.paths()), False),
    "noise: epsilon-greedy": (functools.partial(search.noise_search, strategy=search.epsilon_greedy()), False),
}  # fmt: skip


def measure(name: str, budget: int, keys: int, reward: str) -> dict[str, Any]:
    """The best samples of one method on every key: their rewards, the judge's probabilities, what was spent."""
    method, ode = METHODS[name]
    process = steer.load("digits", steps=STEPS, transition=steer.ode() if ode else None)
    score, temperature = REWARDS[reward]
    result = method(process, score, budget=budget, batch=keys, temperature=temperature, key=0)
    images = process.decode(result.best[:, None])
    return {
        "best": result.reward.amax(1).tolist(), "judge": rewards.judge(3)(images).tolist(),
        "nfe": result.cost.nfe / keys, "rewards": result.cost.rewards / keys, "seconds": result.cost.seconds["total"],
    }  # fmt: skip


def reached(table: dict[str, dict[str, Any]], keys: int, reward: str, rows: int) -> dict[str, int | None]:
    """For each method the first budget with a mean at or above best-of-N's at `rows`, None for none; printed."""
    goal = measure("best-of-N", rows, keys, reward)["best"]
    print(f"\nbest-of-N at {rows:,} rows has {over_keys(goal)}; first of the budgets to have it\n")
    print("| method | rows |\n|---|---|")
    first: dict[str, int | None] = {}
    for name in next(iter(table.values())):
        enough = [int(budget) for budget, runs in table.items() if sum(runs[name]["best"]) >= sum(goal)]
        first[name] = min(enough, default=None)
        print(f"| {name} | {first[name] or '-'} |", flush=True)
    return first


def over_keys(numbers: list[float]) -> str:
    """Mean and standard error."""
    mean = sum(numbers) / len(numbers)
    spread = sum((number - mean) ** 2 for number in numbers)
    return f"{mean:.4f} ± {math.sqrt(spread / len(numbers) / max(1, len(numbers) - 1)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=REWARDS, default="jpeg")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--reach", type=int, help="rows at which best-of-N sets the goal")
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="write every number here")
    arguments = parser.parse_args()
    judged = arguments.reward == "digit"
    torch.set_num_threads(1)
    table: dict[str, dict[str, Any]] = {}
    for budget in arguments.budgets:
        heads = ["method", "reward of the best", "less best-of-N", *(["judge p(3)"] if judged else [])]
        heads += ["rows", "rewards", "s"]
        print(f"\n{budget} network rows, {arguments.keys} keys\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        runs = table[str(budget)] = {}
        for name in dict.fromkeys(["best-of-N", *arguments.methods]):
            run = runs[name] = measure(name, budget, arguments.keys, arguments.reward)
            paired = [a - b for a, b in zip(run["best"], runs["best-of-N"]["best"], strict=True)]
            cells = [name, over_keys(run["best"]), over_keys(paired), *([over_keys(run["judge"])] if judged else [])]
            cells += [f"{run['nfe']:,.0f}", f"{run['rewards']:,.0f}", f"{run['seconds']:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    first = reached(table, arguments.keys, arguments.reward, arguments.reach) if arguments.reach else None
    if arguments.json:
        facts = {"reward": arguments.reward, "torch": torch.__version__, "steer": steer.__version__, "runs": table}
        facts |= {"reached": first}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
