"""`method="auto"` and every method on a grid of tasks: what its rule was read off, and what following it costs.

    python examples/benchmarks/auto.py --fit [--figure docs/images/which_method.png]    # the tables, from auto.json
    python examples/benchmarks/auto_grid.py runs/auto.jsonl      # the grid: an hour of a core; goes on where it ended
    python examples/benchmarks/auto.py --pack runs/auto.jsonl    # auto.json from it, with a probe of every task

Tasks are in `auto_tasks.py`, methods and what is measured in `auto_grid.py`. A budget pays for 3, 8, 20 or 48 plain
chains that are scored once; it covers network rows, two more for a backward pass, and scores at the task's price.
Samplers and SVDD are given a temperature that was chosen on a thousand other samples, for nothing.

Regret of a method in a cell (a task at a budget), for a goal: (best - its own) / (best - unsteered), means over five
keys. The best of twenty noisy means is too good by chance. So the best method is chosen on four keys and measured on
the fifth, in turn, which is fair; `naive` is the regret against the best mean of all five. Standard errors are the
jackknife's over keys. Cells in which no method gains two standard errors are left out, as nothing is at stake there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Collection, Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from steer.evaluation import choice
from steer.evaluation.choice import Setting

STORED, KEYS = Path(__file__).with_suffix(".json"), 5
GOALS = {"best": "best sample, by the reward", "judge": "best sample, by the judge", "population": "population"}
SEARCHES = ("svdd argmax", "rbf", "smc", "best_of_n", "beam", "dts_star", "noise zero-order", "noise paths")
FIXED = {"best": SEARCHES, "judge": SEARCHES, "population": ("importance_sampling", "smc", "fk_steering", "dts", "tds")}
FALLBACK = {"best": "best_of_n", "judge": "best_of_n", "population": "importance_sampling"}  # of what cannot be run
CONSTANTS: dict[str, dict[str, tuple[float, ...]]] = {  # of the rule, and the values that are tried
    "best": {"CANDIDATES": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)},
    "judge": {"CANDIDATES": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)},
    "population": {"DEAR": (0.5, 5.0, 50.0, math.inf)},
}
Policy = Callable[[str, int], str]
Cell = dict[str, list[float]]  # method -> what each key reached
Table = dict[str, dict[str, Any]]


def values(facts: dict[str, Any], number: int, goal: str) -> Cell:
    """What every method reached in a cell, key by key, unsteered being 0; of populations, minus the squared error."""
    made = facts.get(goal, [{}] * (number + 1))[number]
    return {m: [-((v / 1e3) ** 2) if goal == "population" else v / 1e3 for v in of] for m, of in made.items()}


def mean(of: list[float], goal: str) -> float:
    """Over keys; of squared errors, minus the root."""
    return -math.sqrt(-fmean(of)) if goal == "population" else fmean(of)


class Regrets:
    """Of choices in the cells of a table, for a goal."""

    def __init__(self, table: Table, goal: str) -> None:
        self.goal, self.cells = goal, {}
        for task, facts in table.items():
            for number in range(len(facts["chains"])):
                made = values(facts, number, goal)
                if len(made) < 3:
                    continue
                unsteered = mean(made["rollout"], goal) if goal == "population" else 0.0
                best = [self._best(made, key) for key in (None, *range(KEYS))]
                held_out = mean([made[best[key + 1]][key] for key in range(KEYS)], goal)
                error = max(self._error(made[name]) for name in (best[0], "rollout"))
                if held_out > unsteered + 2.0 * error:
                    self.cells[task, number] = made, unsteered, best[0], held_out

    def _error(self, of: list[float]) -> float:
        """Standard error of a mean, by the jackknife."""
        return jackknife([mean([v for i, v in enumerate(of) if i != key], self.goal) for key in range(KEYS)])

    def _best(self, made: Cell, without: int | None) -> str:
        """The best method by all keys but one."""
        kept = {m: [v for i, v in enumerate(of) if i != without] for m, of in made.items() if not m.startswith("auto")}
        return max(kept, key=lambda method: mean(kept[method], self.goal))

    def of(self, policy: Policy, tasks: Collection[str] | None = None) -> list[tuple[float, float, list[float]]]:
        """Regret of a policy in every cell: naive, fair, and fair with each key left out."""
        found = []
        for (task, number), (made, unsteered, best, held_out) in self.cells.items():
            if tasks is None or task in tasks:
                own = made.get(policy(task, number)) or made[FALLBACK[self.goal]]
                gap, naive_gap = held_out - unsteered, mean(made[best], self.goal) - unsteered
                without = [[v for i, v in enumerate(own) if i != key] for key in range(KEYS)]
                found.append((
                    1.0 - (mean(own, self.goal) - unsteered) / naive_gap,
                    1.0 - (mean(own, self.goal) - unsteered) / gap,
                    [1.0 - (mean(kept, self.goal) - unsteered) / gap for kept in without],
                ))  # fmt: skip
        return found

    def shown(self, policy: Policy, tasks: Collection[str] | None = None) -> str:
        """Mean fair regret with its standard error, and the naive one."""
        found = self.of(policy, tasks)
        if not found:
            return "–"
        naive, fair, without = zip(*found, strict=True)
        error = jackknife([fmean(of) for of in zip(*without, strict=True)])
        return f"{fmean(fair):.3f} ± {error:.3f} ({fmean(naive):.3f})"


def jackknife(without: list[float]) -> float:
    """Standard error of a statistic, from its values with each key left out."""
    centre = fmean(without)
    return math.sqrt((len(without) - 1) / len(without) * sum((value - centre) ** 2 for value in without))


def by_rule(table: Table, goal: str, constants: dict[str, float]) -> Policy:
    """What `steer.evaluation.choice` chooses without a probe, under other constants."""

    def policy(task: str, number: int) -> str:
        facts, kept = table[task], {name: getattr(choice, name) for name in constants}
        setting = Setting(
            "population" if goal == "population" else "best", facts["chains"][number], facts["steps"],
            facts["stochastic"], facts["steps"], facts["price"], groupwise=False,
        )  # fmt: skip
        try:
            for name, value in constants.items():
                setattr(choice, name, value)
            chosen = choice.choose(setting, None)
        finally:
            for name, value in kept.items():
                setattr(choice, name, value)
        return "svdd argmax" if chosen.method == "svdd" else chosen.method

    return policy


def leave_one_out(table: Table, goal: str) -> tuple[Policy, list[dict[str, float]]]:
    """For every task what the rule chooses with its constants fitted to the others, and these constants."""
    regrets, constants = Regrets(table, goal), CONSTANTS[goal]
    options = [dict(zip(constants, each, strict=True)) for each in product(*constants.values())]
    tasks = sorted({task for task, _ in regrets.cells})
    policies = [by_rule(table, goal, option) for option in options]
    by_task = [{task: [fair for _, fair, _ in regrets.of(policy, {task})] for task in tasks} for policy in policies]
    best = {}
    for task in tasks:
        losses = [fmean([r for other in tasks if other != task for r in found[other]]) for found in by_task]
        best[task] = losses.index(min(losses))
    return (lambda task, number: policies[best[task]](task, number)), [options[i] for i in best.values()]


def groups(table: Table) -> dict[str, set[str]]:
    """Tasks by what the issue asks about."""
    few = {task for task in table if task.startswith("few steps")}
    return {"all": set(table), "slow rewards": {t for t in table if table[t]["price"]}, "few steps": few}


def ordering(table: Table, samples: str) -> str:
    """How often a probe is right about whether choosing early (SVDD argmax) beats best-of-N, where that is clear."""
    right = total = ahead = 0
    for facts in table.values():
        for number in range(len(facts["chains"]) if facts["stochastic"] and not facts["price"] else 0):
            made = values(facts, number, "best")
            if "svdd argmax" not in made:
                continue
            paired = [a - b for a, b in zip(made["svdd argmax"], made["best_of_n"], strict=True)]
            error = jackknife([fmean(paired[:key] + paired[key + 1 :]) for key in range(KEYS)])
            if abs(fmean(paired)) > 2.0 * error:
                pays = fmean(paired) > 0.0
                right += sum((max(ranks, default=0.0) >= 0.4) == pays for ranks in facts[samples])
                total, ahead = total + len(facts[samples]), ahead + pays * len(facts[samples])
    return f"right {right} times of {total}, where always saying SVDD is right {ahead} times"


def tables(table: Table) -> Iterator[str]:
    """All of it, line by line, in Markdown."""
    for goal, title in GOALS.items():
        regrets, parts = Regrets(table, goal), groups(table)
        tasks = {task for task, _ in regrets.cells}
        rule, fitted = leave_one_out(table, goal)
        yield f"\n### {title}: {len(regrets.cells)} cells of {len(tasks)} tasks\n"
        yield "| | " + " | ".join(f"{name} ({len(tasks & of)} tasks)" for name, of in parts.items()) + " |"
        yield "|---|" + "---|" * len(parts)
        name = "auto, population" if goal == "population" else "auto"
        policies: dict[str, Policy] = {"auto, with its probe": lambda *_, name=name: name}
        policies["its rule, each task left out of the fit"] = rule
        policies |= {f"always {method}": lambda *_, method=method: method for method in FIXED[goal]}
        for label, policy in policies.items():
            yield f"| {label} | " + " | ".join(regrets.shown(policy, tasks & of) for of in parts.values()) + " |"
        yield f"\nconstants, fitted without each task in turn: {sorted({str(constants) for constants in fitted})}"
    yield "\n### population: the largest budget, free rewards, medians over tasks\n"
    yield "| | error of log evidence, root mean square | spread, of the exact one |\n|---|---|---|"
    for method in ("auto, population", *FIXED["population"]):
        found = [f["largest budget"].get(method) for f in table.values() if not f["price"] and f["stochastic"]]
        evidence, spread = zip(*(each for each in found if each is not None and math.isfinite(each[0])), strict=True)
        yield f"| {method} ({len(evidence)} tasks) | {median(evidence):.2f} | {math.exp(median(spread)):.2f} |"
    yield f"\nSVDD argmax or best-of-N, told by 16 samples: {ordering(table, '16')}; by 4: {ordering(table, '4')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, nargs="+", help="files of the grid")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    if given.pack:
        from auto_grid import packed

        STORED.write_text(json.dumps(packed(given.pack), separators=(",", ":")) + "\n")
    table = json.loads(STORED.read_text())
    if given.fit:
        print("\n".join(tables(table)))
    if given.figure:
        from auto_figure import draw

        draw(table, given.figure)


if __name__ == "__main__":
    main()
