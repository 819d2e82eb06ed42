"""Runs of the grid of `auto.py`: every method on every task at four budgets, and what it reached."""

from __future__ import annotations

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from auto_tasks import Task, tasks
from torch import Tensor

import steer
from steer import search
from steer.core.population import weighted_mean
from steer.core.tilt import Tilt
from steer.search import selection

KEYS, FEATURES = 5, 4
POPULATIONS = ("importance_sampling", "smc", "fk_steering", "dts", "tds", "auto, population")
Cell = dict[str, Any]
# Methods, and whether they run at the temperature of the population; the others run at a quarter of it, for the best.
METHODS: dict[str, tuple[Callable[..., steer.Result], bool]] = {
    "rollout": (functools.partial(steer.rollout, keep_states=False), True),
    "importance_sampling": (steer.importance_sampling, True),
    "smc": (steer.smc, True),
    "fk_steering": (steer.fk_steering, True),
    "waste_free": (steer.waste_free, True),
    "particle_gibbs": (functools.partial(steer.particle_gibbs, sweeps=2), True),
    "tds": (steer.tds, True),
    "das": (steer.das, True),
    "psi": (steer.psi, True),
    "fkc": (steer.fkc, True),
    "driftlite": (steer.driftlite, True),
    "dts": (search.dts, True),
    "best_of_n": (search.best_of_n, False),
    "smc, cold": (steer.smc, False),
    "svdd": (search.svdd, False),
    "svdd argmax": (functools.partial(search.svdd, select="argmax"), False),
    "beam": (search.beam, False),
    "beam top": (functools.partial(search.beam, particles=4, candidates=None, select=selection.top()), False),
    "beam blocks": (
        functools.partial(search.beam, particles=1, candidates=None, block=3, select=selection.argmax()), False,
    ),
    "dts_star": (search.dts_star, False),
    "depth_first": (search.depth_first, False),
    "rbf": (search.rbf, False),
    "noise zero-order": (functools.partial(search.noise_search, strategy=search.zero_order()), False),
    "noise paths": (search.noise_search, False),
    "auto": (steer.sample, False),
    "auto, population": (steer.sample, True),
}  # fmt: skip

# On digits, all of these are run for "digits 3" only: they lose there, and at equal budget in docs/benchmarks.md.
DEAR = ("waste_free", "particle_gibbs", "das", "psi", "fkc", "driftlite", "depth_first")


class Exact:
    """Of a task: unsteered samples by weight, in place of the exact distribution, and what runs are held to.

    A population's features are its reward and some projections of its samples, in standard deviations of the exact
    distribution; and its spread.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.process = task, task.process()
        pool = []
        for i in range(0, task.samples, 512):
            run = steer.rollout(
                self.process, task.reward, particles=512, key=steer.Key(991, (str(i),)), keep_states=False
            )
            pool.append((run.reward, self.flat(run.x)))
        reward, flat = (torch.cat(parts, 1) for parts in zip(*pool, strict=True))
        tilt = Tilt.of(reward)
        try:
            self.temperature = tilt.temperature(ess=task.ess)
        except steer.SteerError:  # a reward that is mostly the same
            self.temperature = 0.25
        log_weight = (reward / self.temperature).log_softmax(1)
        self.log_evidence = float((reward / self.temperature).logsumexp(1) - math.log(reward.shape[1]))
        draw = torch.Generator().manual_seed(0)
        self.directions = torch.randn(flat.shape[2], FEATURES, generator=draw, dtype=torch.float64)
        features = self.features(reward, flat)
        self.mean = weighted_mean(log_weight, features)
        self.std = weighted_mean(log_weight, (features - self.mean).square()).sqrt().clamp_min(1e-9)
        self.variance = self.spread(log_weight, flat)
        self.unsteered = float(reward.mean())
        self.unsteered_judge = None if task.judge is None else float(self.judged(run).mean())

    def flat(self, x: Tensor) -> Tensor:
        """Samples [B, N, *event] as vectors: pixels, or one-hot tokens."""
        seen = x.flatten(0, 1)
        seen = torch.nn.functional.one_hot(seen) if not x.is_floating_point() else self.process.decode(x)
        return seen.reshape(*x.shape[:2], -1).double()

    def features(self, reward: Tensor, flat: Tensor) -> Tensor:
        """[B, N, 1 + FEATURES]."""
        return torch.cat([reward[..., None], flat @ self.directions], 2)

    def spread(self, log_weight: Tensor, flat: Tensor) -> Tensor:
        """Total variance by weight, [B]."""
        return weighted_mean(log_weight, (flat - weighted_mean(log_weight, flat)[:, None]).square().sum(2))

    def judged(self, result: steer.Result) -> Tensor:
        """The judge's scores [B, N]."""
        assert self.task.judge is not None
        return self.task.judge(result.decoded).double().view_as(result.reward)

    def measured(self, result: steer.Result, population: bool) -> Cell:
        """What every key reached."""
        place = result.reward.argmax(1, keepdim=True)
        cell: Cell = {"best": result.reward.gather(1, place)[:, 0]}
        if self.task.judge is not None:
            best = result.take(place)
            cell["judge"] = self.task.judge(best.decoded).double()
        if population and result.law != "none":
            flat, weight = self.flat(result.x), result.log_weight
            off = (weighted_mean(weight, self.features(result.reward, flat)) - self.mean) / self.std
            spread = 0.5 * (self.spread(weight, flat) / self.variance).clamp_min(1e-3).log()
            cell["error2"] = torch.cat([off.square(), spread[:, None].square()], 1).mean(1)
            cell["spread"] = spread
            cell["evidence"] = result.log_evidence - self.log_evidence
        return {name: [float(f"{v:.4g}") for v in values.tolist()] for name, values in cell.items()}


def equivalents(cost: steer.Cost, price: int, keys: int) -> float:
    """Network rows per key, backward passes counted as two and scores at their price."""
    return (cost.nfe + 2 * cost.grads + price * cost.rewards) / keys


def automatic(process: Any, task: Task, budget: int, temperature: float, goal: str) -> Any:
    """A run of `auto` in a cell, whose budget is told in network rows and with the price of a score."""
    rows = budget * process.steps // (process.steps + task.price)
    result = steer.sample(
        process, task.reward, method="auto", goal=goal, reward_price=task.price, budget=rows, batch=KEYS,
        temperature=temperature,
    )  # fmt: skip
    spent = equivalents(result.cost, task.price, KEYS)
    assert spent <= budget, (spent, budget)
    return result, spent, rows


def within(method: Callable[..., steer.Result], process: Any, task: Task, budget: int, options: Cell) -> Any:
    """A run that spends the budget, of rows and of whatever else has a price, and no more; None where none does."""
    rows, found, tried = max(1, budget // (1 + task.price)), None, set()
    while rows <= budget and rows not in tried and len(tried) < 8:
        tried.add(rows)
        try:
            result = method(process, task.reward, budget=rows, batch=KEYS, key=0, **options)
        except steer.BudgetError:
            rows *= 2
            continue
        spent = equivalents(result.cost, task.price, KEYS)
        if spent <= budget and (found is None or spent > found[1]):
            found = result, spent, rows
        if spent <= budget and (spent > 0.93 * budget or len(tried) > 3):
            break
        rows = int(budget * result.cost.nfe / KEYS / spent) - (spent > budget and len(tried) > 2)
    return found


def grid(out: Path, names: list[str], only: list[str] | None) -> None:
    """Adds the missing cells to a file, a JSON line each."""
    warnings.simplefilter("ignore")
    done = {(row["task"], row["budget"], row["method"]) for row in read(out)}
    for name in names:
        task = tasks()[name]
        lean = name.startswith(("digits", "few steps", "flow")) and name != "digits 3"
        methods = [m for m in METHODS if (only is None or m in only) and not (lean and m in DEAR)]
        methods = methods if task.ess == 0.2 else [method for method in methods if METHODS[method][1]]
        process = task.process()
        budgets = [chains * (process.steps * process.rows + task.price) for chains in task.chains]
        missing = [(b, m) for m in methods for b in budgets if (name, b, m) not in done]
        if not missing:
            continue
        exact = Exact(task)
        for budget, method in missing:
            cell: Cell = {"task": name, "budget": budget, "method": method}
            began = time.process_time()
            run, hot = METHODS[method]
            try:
                heat = exact.temperature * (1.0 if hot else 0.25)
                if method.startswith("auto"):
                    ran = automatic(process, task, budget, exact.temperature, "population" if hot else "best")
                else:
                    ran = within(run, process, task, budget, {"temperature": heat})
            except (steer.NotStochasticError, steer.StateSpaceError, steer.NotDifferentiableError) as error:
                cell["cannot"] = type(error).__name__
            else:
                if ran is None:
                    cell["cannot"] = "BudgetError"
                else:
                    cell |= {"spent": round(ran[1]), "rows": ran[2], **exact.measured(ran[0], hot)}
                    cell |= {} if ran[0].method_choice is None else {"chose": ran[0].method_choice.method}
            cell["cpu"] = round(time.process_time() - began, 2)
            cell |= {"unsteered": exact.unsteered, "unsteered_judge": exact.unsteered_judge}
            with out.open("a") as file:
                file.write(json.dumps(cell) + "\n")


def read(path: Path) -> Iterator[Cell]:
    """The cells of a file."""
    if path.exists():
        yield from (json.loads(line) for line in path.read_text().splitlines())


def packed(files: list[Path]) -> dict[str, Any]:
    """The grid as one small table: task by task, per goal and budget, what each method reached with every key.

    Rewards are in thousandths of the largest gain over unsteered samples in their task, populations in thousandths of
    a standard deviation. Of the largest budget also the error of the log evidence and the log of the spread's ratio.
    """
    rows, table = [row for file in files for row in read(file)], {}
    probes = {row["task"]: row for row in rows if "probe" in row}
    for name, task in tasks().items():
        cells = {(row["budget"], row["method"]): row for row in rows if row["task"] == name and "unsteered" in row}
        budgets = sorted({budget for budget, _ in cells})
        facts: dict[str, Any] = {"price": task.price, "ess": task.ess, "chains": list(task.chains)}
        table[name] = facts | {k: probes[base(name)][k] for k in ("steps", "stochastic", "16", "4")}
        for goal, column in (("best", "best"), ("judge", "judge"), ("population", "error2")):
            made = {at: row[column] for at, row in cells.items() if column in row}
            if goal != "population":  # the same chains as best_of_n
                made = {at: of for at, of in made.items() if at[1] != "importance_sampling"}
            if (goal != "population" and task.ess != 0.2) or not made:
                continue
            if goal == "population":
                made = {at: [v**0.5 for v in of] for at, of in made.items()}
            else:
                unsteered = next(iter(cells.values()))["unsteered" if goal == "best" else "unsteered_judge"]
                scale = max(max(sum(of) / KEYS for of in made.values()) - unsteered, 1e-9)
                made = {at: [(v - unsteered) / scale for v in of] for at, of in made.items()}
            table[name][goal] = [
                {m: [round(1e3 * v) for v in of] for (b, m), of in made.items() if b == budget} for budget in budgets
            ]
        table[name]["largest budget"] = {
            method: [round((sum(v * v for v in row["evidence"]) / KEYS) ** 0.5, 2), round(sum(row["spread"]) / KEYS, 2)]
            for (budget, method), row in cells.items()
            if budget == budgets[-1] and "evidence" in row and method in POPULATIONS
        }
    return table


def base(name: str) -> str:
    """The task of which this one differs in price or temperature alone."""
    return name.partition(", price")[0].removesuffix(", cold").removesuffix(", warm")


def probes(out: Path) -> None:
    """Adds to the file what 16 and 4 unsteered samples say of every task, five times: ranks on the way."""
    for name, task in tasks().items():
        if base(name) != name:
            continue
        process, row = task.process(), {"task": name, "probe": True}
        row |= {"steps": process.steps, "stochastic": sum(map(process.stochastic, range(process.steps)))}
        for samples in (16, 4):
            found = [steer.preflight(process, task.reward, samples=samples, key=1000 + key) for key in range(KEYS)]
            early = [[s.rank_correlation or 0.0 for s in f.sights if s.k < process.steps - 1] for f in found]
            row[str(samples)] = [[round(rank, 2) for rank in ranks] for ranks in early]
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    arguments = [argument.split("|") for argument in sys.argv[2:]]
    grid(Path(sys.argv[1]), *(arguments + [list(tasks()), None][len(arguments) :]))
    if not arguments:
        probes(Path(sys.argv[1]))
