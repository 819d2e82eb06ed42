"""DriftLite on particles: DW-4 (or LJ-13) with a learned denoiser, annealed and tilted; the columns of its Table 1.

    python examples/benchmarks/driftlite_dw4.py [--system dw4] [--particles 600] [--steps 100] [--keys 3]

The model is the network of `examples/train/particle_systems.py` at temperature 2. Two targets: q^gamma, the system at
temperature 2 / gamma (gamma = 2 for DW-4, 2.5 for LJ-13, as Ren et al. 2025, 2509.21655, Table 1), and q tilted by
r = -lambda' sum_i |x_i - mean|^2 / 2 (lambda' = .5 and .8; the paper's reward is in an appendix that we have not seen).
Distances are to states of Metropolis chains run on the target's energy, so they contain the network's error too.

All methods get the same price: denoiser rows by the ledger, where a row that is differentiated through counts 2 more.
Mean and standard error over keys of
  dNLL       mean of the target's negative log-density (without normaliser), less the true mean;
  MMD        of states in data units, Gaussian kernel of the median distance (unbiased, root of its positive part);
  SWD        sliced Wasserstein-2 distance of states, data units, 64 directions;
  W1 RDF     Wasserstein-1 distance of interatomic distances;
  W1 energy  of negative log-densities;
  ESS        least on the way, over N.
"MCMC" is one state each of as many other chains: about the least that can be seen. Weighted methods are compared with
their weights, `guidance` (the paper's PG) without any. Cells are over the keys that finished; "-" where none did.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import steer

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))
import particle_systems as model

COLUMNS = ("dNLL", "MMD", "SWD", "W1 RDF", "W1 energy", "ESS")
GAMMA, SPRING = {"dw4": 2.0, "lj13": 2.5}, {"dw4": 0.5, "lj13": 0.8}
GRID = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


@dataclass(frozen=True)
class Task:
    """A target: the model to an exponent, times exp(-spring sum_i |x_i - mean|^2 / 2)."""

    system: model.System
    exponent: float
    spring: float

    @property
    def reward(self) -> Callable[[Tensor], Tensor] | None:
        """Of states (M, n - 1, d)."""
        scale = 0.5 * self.spring * self.system.scale**2
        return (lambda z: -scale * z.square().sum((1, 2))) if self.spring else None

    def nll(self, x: Tensor) -> Tensor:
        """Of positions (..., n, d), without the normaliser."""
        centred = x - x.mean(-2, keepdim=True)
        return 0.5 * self.exponent * self.system.energy(x) + 0.5 * self.spring * centred.square().sum((-1, -2))


class Truth:
    """States of Metropolis chains on a task's density, and distances to them."""

    def __init__(self, task: Task, key: steer.Key, chains: int, sweeps: int):
        self.task, self.key = task, key
        run = {"chains": chains, "sweeps": sweeps, "keep": 4}
        self.states = model.metropolis(task.system, lambda x: -task.nll(x), key, **run) * task.system.scale
        self.nll, self.distances = self.features(self.states)
        few = self.states[::4].flatten(1)
        self.width = float(torch.pdist(few[:1000]).median())
        self.own = self.kernel(few, few)
        self.own = (self.own.sum() - len(few)) / (len(few) * (len(few) - 1))

    def features(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-densities (M,) and interatomic distances (M, pairs) of states in data units."""
        x = self.task.system.positions(states / self.task.system.scale)
        return self.task.nll(x), self.task.system.distances(x)

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return (-0.5 * (torch.cdist(a.float(), b.float()) / self.width).square()).exp()

    def mmd(self, states: Tensor, weight: Tensor) -> float:
        few, mine = self.states[::4].flatten(1), states.flatten(1)
        w = weight.float()
        between = float((w @ self.kernel(mine, few)).mean())
        within = float((w @ self.kernel(mine, mine) @ w - w.square().sum()) / (1.0 - w.square().sum()))
        return math.sqrt(max(0.0, within + float(self.own) - 2.0 * between))

    def measure(self, states: Tensor, weight: Tensor) -> dict[str, float]:
        """Columns but ESS, of states (M, n - 1, d) in data units with weights (M,) that sum to one."""
        nll, distances = self.features(states)
        pairs = distances.shape[1]
        direction = self.key.fold("slices").normal((1, 64, math.prod(states.shape[1:])))[0]
        direction = (direction / direction.norm(dim=1, keepdim=True)).T
        mine, far = states.flatten(1) @ direction, self.states.flatten(1) @ direction
        gaps = torch.stack([quantiles(mine[:, i], weight) - quantiles(far[:, i]) for i in range(64)])
        rdf = quantiles(distances.flatten(), weight.repeat_interleave(pairs) / pairs)
        return {
            "dNLL": float((weight * nll).sum() - self.nll.mean()),
            "MMD": self.mmd(states, weight),
            "SWD": float(gaps.square().mean().sqrt()),
            "W1 RDF": float((rdf - quantiles(self.distances.flatten())).abs().mean()),
            "W1 energy": float((quantiles(nll, weight) - quantiles(self.nll)).abs().mean()),
        }


def quantiles(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Of weighted values, on GRID."""
    ordered, order = values.sort()
    if weight is None:
        return ordered[(GRID * len(ordered)).long()]
    return ordered[torch.searchsorted(weight[order].cumsum(0), GRID).clamp(max=len(ordered) - 1)]


def methods(task: Task, process: steer.GaussianProcess) -> dict[str, Callable[..., steer.Result]]:
    """What is compared: (key, particles) -> Result."""
    target = {"process": process, "reward": task.reward, "exponent": task.exponent, "look_ahead": steer.at_state()}
    fk, never = steer.FeynmanKac(probes=1), steer.resample(threshold=0.0)
    score = {**target, "transport": steer.score_transport, "weight": fk}
    table = {
        "guidance": lambda **o: steer.fkc(**score, selection=never, **o),
        "guided SMC": lambda **o: steer.fkc(**score, **o),
        "FKC, default": lambda **o: steer.fkc(**target, **o),
    }
    for name in ("vcg", "ecg"):
        table[name.upper()] = lambda name=name, **o: steer.driftlite(**target, control=name, selection=never, **o)
        table[f"{name.upper()}-SMC"] = lambda name=name, **o: steer.driftlite(**target, control=name, **o)
    return table


def price(cost: steer.Cost) -> float:
    """Rows in units of a forward pass."""
    return cost.nfe + 2.0 * cost.grads


def compare(task: Task, process: steer.GaussianProcess, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Rows of every method, one per key."""
    chains = {"chains": arguments.chains, "sweeps": arguments.sweeps}
    truth = Truth(task, steer.Key(1), **chains)
    others = Truth(task, steer.Key(2), **chains).states[::4]
    table = {"MCMC": [truth.measure(others, torch.full_like(others[:, 0, 0], 1.0 / len(others)))]}
    runs = {name: run for name, run in methods(task, process).items() if name in arguments.methods}
    spent = {name: price(run(key=0, particles=4).cost) / 4 for name, run in methods(task, process).items()}
    for name, run in runs.items():
        count = int(arguments.particles * spent["VCG-SMC"] / spent[name])
        for key in range(arguments.keys):
            began = time.perf_counter()
            try:
                result = run(key=key, particles=count)
            except steer.SteerError as error:  # coefficients of ECG can explode in the noise phase
                print(f"{name}, key {key}: {error}", file=sys.stderr)
                table.setdefault(name, []).append({"particles": count})
                continue
            seconds = time.perf_counter() - began
            weight = result.log_weight[0].exp()
            if name == "guidance":
                weight = torch.full_like(weight, 1.0 / count)
            row = truth.measure(result.x[0].double() * task.system.scale, weight)
            row |= {"ESS": min(float(s.ess.min()) for s in result.seen) / count, "particles": count}
            row |= {"price": price(result.cost), "seconds": seconds, "log evidence": float(result.log_evidence[0])}
            table.setdefault(name, []).append(row)
    return table


def show(title: str, table: dict[str, list[dict]]) -> None:
    """A markdown table."""
    print(f"\n{title}\n\n| method | N | " + " | ".join(COLUMNS) + " | seconds |\n" + "|---" * (len(COLUMNS) + 3) + "|")
    for name, rows in table.items():
        cells = []
        for column in (*COLUMNS, "seconds"):
            values = torch.tensor([row.get(column, math.nan) for row in rows], dtype=torch.float64)
            values = values[~values.isnan()]
            spread = (
                f" ± {values.std() / math.sqrt(len(values)):.1g}" if len(values) > 1 and column != "seconds" else ""
            )
            cells.append(f"{values.mean():.3g}{spread}" if len(values) else "-")
        print(f"| {name} | {rows[0].get('particles', '')} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Both targets of a system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=model.SYSTEMS, default="dw4")
    parser.add_argument("--tasks", nargs="+", choices=("anneal", "tilt"), default=("anneal", "tilt"))
    parser.add_argument("--methods", nargs="+", help="some of the rows; all by default")
    parser.add_argument("--particles", type=int, default=600, help="of VCG-SMC; the others get what costs the same")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--end", type=float, default=2e-3, help="the last noisy time of the path")
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--chains", type=int, default=4000)
    parser.add_argument("--sweeps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    system, schedule = model.SYSTEMS[arguments.system], steer.VP()
    times = model.times(schedule, arguments.steps, arguments.end)
    process = model.process(system, model.load(system), schedule, times)
    tasks = {
        "anneal": Task(system, GAMMA[system.name], 0.0),
        "tilt": Task(system, 1.0, SPRING[system.name]),
    }
    arguments.methods = arguments.methods or list(methods(tasks["tilt"], process))
    titles = {
        "anneal": f"{system.name}, annealed from temperature 2 to {2.0 / GAMMA[system.name]:.3g}",
        "tilt": f"{system.name} at temperature 2, tilted by -{SPRING[system.name]} sum |x - mean|^2 / 2",
    }
    tables = {}
    for name in arguments.tasks:
        tables[name] = compare(tasks[name], process, arguments)
        show(titles[name], tables[name])
    if arguments.out:
        arguments.out.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
