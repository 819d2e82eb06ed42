"""Rollover budget forcing and what it is compared with, on the embedded flow and its few-step twin.

    python examples/benchmarks/rbf_digits.py [--reward digit | jpeg] [--budgets 50 100 250 500 1000] [--out FILE]

The table of Kim et al. 2025 (2503.19385) on digits: `digits-flow` in 10 steps, as they run FLUX, and the twin that
`examples/train/digits_flow_twin.py` distils from it in 5. "digit" asks the unlabelled model for log p(d | image) of
`digits-classifier`; "jpeg" asks the model of digit d for small files (kilobytes, negated). In parentheses the
probability of d in the eyes of the held-out `digits-judge`. Nothing is differentiated.

linear-ODE   Euler steps of the flow. Methods that choose among draws of a step have none here.
linear-SDE   ancestral steps, uniform in the flow's time.
VP-SDE       the flow converted to a variance-preserving path, ancestral steps, uniform in its time. An ancestral step
             sees a path only at its ends, so the two SDEs differ in where their levels lie: VP's lie higher.
linear-SDE, 3t²  the paper's: Euler-Maruyama with g = 3 t^2. Not run unless asked for by --columns.

Two chains for SoP, CoDe (blocks of 2), SVDD (argmax) and RBF, as in the paper; what the budget pays beyond becomes
candidates or rounds. Network rows are equal by the ledger, reward calls are not: best-of-N scores finished samples
only. Cells are the reward of the best sample, averaged over digits and keys, with the standard error over keys (digits
are fixed); below a table, the ordering within each column by paired differences to best-of-N and to RBF, best method
first. The defaults take about a quarter of an hour a reward on one busy core.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import rewards, search
from steer.search import selection

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))
from digits_flow_twin import TEACHER, TWIN, process

MODELS = {"digits-flow": (TEACHER, 10), "digits-flow-twin": (TWIN, 5)}
Process = steer.GaussianProcess
COLUMNS: dict[str, Callable[[Process], Process]] = {
    "linear-ODE": lambda flow: flow.with_rule(steer.ode()),
    "linear-SDE": lambda flow: flow.with_rule(steer.ddim(eta=1.0)),
    "VP-SDE": lambda flow: steer.convert(flow, steer.VP()).with_rule(steer.ddim(eta=1.0)),
    "linear-SDE, 3t²": lambda flow: flow.with_rule(steer.euler_maruyama(lambda at: 3.0 * at.t**2)),
}
METHODS: dict[str, Callable[..., steer.Result]] = {
    "best-of-N": search.best_of_n,
    "SoP": functools.partial(search.noise_search, strategy=search.paths()),
    "SMC": steer.smc,
    "CoDe": functools.partial(search.beam, particles=2, candidates=None, block=2, select=selection.argmax()),
    "SVDD": functools.partial(search.svdd, particles=2, select="argmax"),
    "RBF": search.rbf,
}
ON_ODE = ("best-of-N", "SoP")
TEMPERATURES = {"digit": 0.2, "jpeg": 0.02}  # of SMC; the others take the best
Cell = dict[str, Tensor]


def measure(model: str, column: str, method: str, reward: str, budget: int, digits: list[int], keys: int) -> Cell:
    """Rewards and judged probabilities (digits, keys) of the best samples, and what one of them cost."""
    folder, steps = MODELS[model]
    best, judged, calls = [], [], []
    for digit in digits:
        made = COLUMNS[column](process(folder, steps, steer.ode(), digit if reward == "jpeg" else None))
        score = rewards.JPEGSize(sign=-1) if reward == "jpeg" else rewards.DigitLogProb(digit)
        options: dict[str, Any] = {"temperature": TEMPERATURES[reward], "batch": keys, "key": digit}
        result = METHODS[method](made, score, budget=budget, **options)
        assert result.cost.nfe <= budget * keys
        best.append(result.reward.amax(1).double())
        judged.append(rewards.judge(digit)(made.decode(result.best[:, None])).double())
        calls.append(result.cost.rewards / keys)
    return {"reward": torch.stack(best), "judge": torch.stack(judged), "calls": torch.tensor(calls)}


def mean_error(numbers: Tensor) -> tuple[float, float]:
    """Mean of (digits, keys) and its standard error: digits are fixed, keys are drawn."""
    within = numbers.var(1) / numbers.shape[1]
    return numbers.mean().item(), (within.sum().sqrt() / len(numbers)).item()


def shown(numbers: Tensor, places: int = 3) -> str:
    mean, error = mean_error(numbers)
    return f"{mean:.{places}f} ± {error:.{places}f}"


def differences(cells: dict[str, Cell], base: str, sign: int) -> str:
    """Paired differences of the rewards of all other methods to one, best method first."""
    gains = {name: sign * (cell["reward"] - cells[base]["reward"]) for name, cell in cells.items() if name != base}
    order = sorted(gains, key=lambda name: -sign * gains[name].mean().item())
    return ", ".join(f"{name} {shown(gains[name])}" for name in order)


def table(cells: dict[str, dict[str, Cell]], columns: list[str]) -> str:
    """Markdown: methods by columns, and the ordering within every column."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in METHODS:
        row = [cells[column].get(name) for column in columns]
        texts = [f"{shown(c['reward'])} ({shown(c['judge'], 2)})" if c else "–" for c in row]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines.append("")
    for column in columns:
        lines.append(f"{column}, less best-of-N: {differences(cells[column], 'best-of-N', 1)}")
        if "RBF" in cells[column]:
            lines.append(f"{column}, RBF less: {differences(cells[column], 'RBF', -1)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=TEMPERATURES, default="digit")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 250, 500, 1000])
    parser.add_argument("--digits", type=int, nargs="+", default=[1, 3, 5, 7, 8])
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS)[:3])
    parser.add_argument("--out", type=Path, help="write every number here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for budget in arguments.budgets:
        for model in arguments.models:
            cells = {
                column: {
                    name: measure(model, column, name, arguments.reward, budget, arguments.digits, arguments.keys)
                    for name in METHODS
                    if column != "linear-ODE" or name in ON_ODE
                }
                for column in arguments.columns
            }
            print(f"\n{model}, {MODELS[model][1]} steps, {budget} rows\n")
            print(table(cells, arguments.columns), flush=True)
            runs.setdefault(model, {})[str(budget)] = cells
    if arguments.out:
        facts = {"reward": arguments.reward, "digits": arguments.digits, "keys": arguments.keys}
        facts |= {"torch": torch.__version__, "steer": steer.__version__, "runs": runs}
        arguments.out.write_text(json.dumps(facts, indent=1, default=Tensor.tolist) + "\n")


if __name__ == "__main__":
    main()
