"""Nodes per second of array trees against trees of Python objects, in the same run.

    python examples/benchmarks/tree.py [--grow 1000000] [--rounds 3] [--out FILE]

Trees on an eight-mode mixture in the plane with 50 steps and nodes at ten levels, where the network is nearly free, so
that bookkeeping is what is measured; by the paper's build (Algorithm 1), and by the default one, whose simulations
begin at all depths and so make fewer nodes each. Objects follow the same rules: one tree after the other, one Python
object a node, the W simulations of a batch rolled out together from each level (which is the most that objects allow).
Reported: nodes made per second of CPU time, medians of rounds taken in turn, and per second besides network and reward:
selection, noise, steps, new nodes, values. Then the same of one process on every core, each with its part of 64 trees
of 16 simulations, by the clock; the memory of a node and its states; and growth to a million nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import steer
from steer import search
from steer.key import Key
from steer.search.trees.branching import expansion_costs

STEPS, LEVELS = 50, list(range(5, 50, 5))
CELLS = [(1, 1), (1, 9), (1, 16), (1, 64), *((trees, walkers) for trees in (16, 64) for walkers in (1, 16, 64))]


def problem() -> tuple[steer.GaussianProcess, steer.Reward]:
    """Eight modes on a ring, and the reward of DTS that asks for the last of them."""
    angle = 2 * math.pi * torch.arange(8) / 8
    means = 4.0 * torch.stack([angle.cos(), angle.sin()], 1)
    process = steer.models.gaussian_mixture(means, torch.full((8,), 0.09), steps=STEPS)

    def reward(x: torch.Tensor) -> torch.Tensor:
        return -0.5 * (x - means[7].to(x)).square().sum(1)

    return process, reward


@dataclass(eq=False)
class Node:
    """One node of the plain tree."""

    x: torch.Tensor | None
    x0: torch.Tensor | None = None
    depth: int = 0
    visits: int = 1
    value: float = 0.0
    predicted_reward: float = 0.0
    log_path_weight: float = 0.0
    children: list[Node] = field(default_factory=list)


class Objects:
    """One tree of Python objects; rollouts of a batch are made together, all else is a loop."""

    def __init__(self, process, reward, key, build):
        self.meter = steer.cost.Meter()
        self.process, self.reward, self.key, self.simulations = process.metered(self.meter), reward, key, 0
        self.ends, self.build, self.batches = [*LEVELS, process.steps], build, 0
        self.layers: list[list[Node]] = [[Node(None)], *([] for _ in self.ends)]
        self.rows = expansion_costs(process, self.ends)
        self.spent = [0] * len(self.rows)

    @property
    def nodes(self) -> int:
        return sum(map(len, self.layers))

    def simulate_batch(self, walkers: int) -> None:
        paths = self.selected(walkers) if self.build == "boltzmann" else self.apportioned(walkers)
        self.roll([[path for path in paths if path[-1].depth == depth] for depth in range(len(self.ends))])
        for path in paths if self.build == "boltzmann" else ():
            for node in path[-2::-1]:
                top = max(child.value for child in node.children)
                total = sum(math.exp(child.value - top) for child in node.children)
                node.value = top + math.log(total / len(node.children))
        self.simulations, self.batches = self.simulations + walkers, self.batches + 1

    def selected(self, walkers: int) -> list[list[Node]]:
        """Algorithm 1's descents by exp(value), with its widening."""
        uniforms = (
            self.key.fold("select").shifted(slot=self.simulations).uniform((1, walkers, len(self.ends)))[0].tolist()
        )
        paths = []
        for uniform in uniforms:
            path = [self.layers[0][0]]
            while (node := path[-1]).depth < len(self.ends) and len(node.children) >= 2.0 * node.visits**0.8:
                top = max(child.value for child in node.children)
                path.append(picked([math.exp(child.value - top) for child in node.children], uniform[node.depth], node))
            for node in path[: len(self.ends)]:
                node.visits += 1
            paths.append(path)
        return paths

    def apportioned(self, walkers: int) -> list[list[Node]]:
        """The default build: depths in turn by rows spent, nodes systematically by what they lack of their share."""
        depths = []
        for _ in range(walkers):
            depths.append(min(range(len(self.ends) if self.batches else 1), key=lambda depth: self.spent[depth]))
            self.spent[depths[-1]] += self.rows[depths[-1]]
        paths, counts = [], Counter(depths)
        for depth in range(max(depths) + 1):
            layer, more = self.layers[depth], counts[depth]
            for node in layer:
                for child in node.children:
                    child.log_path_weight = node.log_path_weight - math.log(len(node.children))
            if not more or depth == 0:
                paths += [[layer[0]]] * more
                continue
            share = [math.exp(node.log_path_weight) for node in layer]
            top = max(node.log_path_weight + node.predicted_reward for node in layer)
            tilted = [math.exp(node.log_path_weight + node.predicted_reward - top) for node in layer]
            plain, total = sum(share), sum(tilted)
            count = more + sum(len(node.children) for node in layer)
            lack = [
                max(0.0, 0.5 * (t / total + s / plain) * count - len(node.children))
                for t, s, node in zip(tilted, share, layer, strict=True)
            ]
            uniform = self.key.fold("grow").at(self.batches * len(self.ends) + depth).uniform((1, 1)).item()
            step, left, spot = sum(lack) / more, uniform * sum(lack) / more, iter(zip(lack, layer, strict=True))
            reached, node = 0.0, layer[-1]
            for _ in range(more):
                while reached <= left and (following := next(spot, None)):
                    reached, node = reached + following[0], following[1]
                paths.append([node])
                left += step
        return paths

    def roll(self, entering: list[list[list[Node]]]) -> None:
        """Paths go on from where they end, by depth; those under way at one level in one batch."""
        noise, under_way = self.key.shifted(slot=self.simulations).fold("step"), []
        for depth, (end, new) in enumerate(zip(self.ends, entering, strict=True)):
            under_way += new
            if not under_way:
                continue
            if depth == 0:
                x, x0, first = self.process.prior(self.key.fold("prior"), 1, len(new)), None, 0
            else:
                x, x0 = (torch.stack([getattr(path[-1], name) for path in under_way])[None] for name in ("x", "x0"))
                first = self.ends[depth - 1]
            for k in range(first, end):
                x0 = self.process.denoise(x, k) if x0 is None else x0
                x, x0 = self.process.transition(x, x0, k).sample(noise.at(k)), None
            scores = [0.0] * len(under_way)
            if end < self.process.steps:
                x0 = self.process.denoise(x, end)
            if end == self.process.steps or self.build == "unbiased":
                with self.meter.scoring(len(under_way)):
                    scores = self.reward(x[0] if x0 is None else x0[0]).tolist()
            for i, path in enumerate(under_way):
                node = Node(
                    x[0, i], None if x0 is None else x0[0, i], depth + 1, value=scores[i], predicted_reward=scores[i]
                )
                path[-1].children.append(node)
                path.append(node)
                self.layers[depth + 1].append(node)


def picked(weights: list[float], uniform: float, node: Node) -> Node:
    left = uniform * sum(weights)
    for weight, child in zip(weights, node.children, strict=True):
        left -= weight
        if left <= 0:
            return child
    return node.children[-1]


def objects(build: str, trees: int, walkers: int, batches: int) -> tuple[int, float, float]:
    """Nodes, CPU seconds, and those of them spent on network and reward."""
    process, reward = problem()
    cpu, wall = time.process_time(), time.perf_counter()
    built = [Objects(process, reward, Key(i), build) for i in range(trees)]
    for tree in built:
        for _ in range(batches):
            tree.simulate_batch(walkers)
    elsewhere = sum(tree.meter.seconds["network"] + tree.meter.seconds["reward"] for tree in built)
    share, cpu = elsewhere / (time.perf_counter() - wall), time.process_time() - cpu
    return sum(tree.nodes for tree in built), cpu, cpu * share


def arrays(build: str, trees: int, walkers: int, batches: int) -> tuple[int, float, float]:
    """The same of steer's trees."""
    process, reward = problem()
    cpu, wall = time.process_time(), time.perf_counter()
    run = search.dts(
        process, reward, build=build, levels=LEVELS, batch=trees, walkers=walkers, particles=walkers * batches
    )
    share = (run.cost.seconds["network"] + run.cost.seconds["reward"]) / (time.perf_counter() - wall)
    cpu = time.process_time() - cpu
    return run.tree.nodes, cpu, cpu * share


def part(build: str, trees: int, first: int, walkers: int, batches: int, gate: Any) -> int:
    """Nodes of some of the trees: those that a run of all has as its problems `first` on."""
    torch.set_num_threads(1)
    arrays(build, trees, walkers, 2)
    process, reward = problem()
    gate.wait()
    key = Key(0).shifted(problem=first)
    return search.dts(
        process, reward, build=build, levels=LEVELS, batch=trees, walkers=walkers, particles=walkers * batches, key=key
    ).tree.nodes


def on_every_core(build: str, trees: int, walkers: int, batches: int, cores: int) -> float:
    """Nodes per second by the clock, of trees dealt to one process for each core."""
    each = trees // cores
    with multiprocessing.Manager() as manager, ProcessPoolExecutor(cores) as pool:
        gate = manager.Barrier(cores + 1)
        parts = [pool.submit(part, build, each, each * core, walkers, batches, gate) for core in range(cores)]
        gate.wait()
        began = time.perf_counter()
        return sum(made.result() for made in parts) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grow", type=int, default=1_000_000, help="nodes to grow one batch of trees to")
    parser.add_argument("--nodes", type=int, default=40_000, help="nodes to make in each cell, roughly")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    print(f"{'':11} | {'thousand nodes / s':^31} | {'besides network and reward':^31}")
    print(f"{'':11} | {' | '.join(['     paper         default     '] * 2)}")
    print(f"{'trees':>5} {'sims':>5} | {' | '.join(['objects  arrays objects  arrays'] * 2)}")
    for trees, walkers in CELLS:
        batches = max(40, min(400, options.nodes // (trees * walkers * 9)))
        whole, alone = [], []
        for build in ("boltzmann", "unbiased"):
            # Trees of objects are independent of one another: a few of them give the rate of all.
            cases = [(objects, min(trees, 2)), (arrays, trees)]
            rounds = [[make(build, count, walkers, batches) for make, count in cases] for _ in range(options.rounds)]
            for runs in zip(*rounds, strict=True):
                whole.append(statistics.median(nodes / total / 1e3 for nodes, total, _ in runs))
                alone.append(statistics.median(nodes / (total - other) / 1e3 for nodes, total, other in runs))
        print(f"{trees:5} {walkers:5} | {' '.join(f'{v:7.1f}' for v in whole)} | "
              f"{' '.join(f'{v:7.1f}' for v in alone)}", flush=True)  # fmt: skip
        table.append({"trees": trees, "walkers": walkers, "all": whole, "besides": alone})
    cores = min(64, os.cpu_count() or 1)
    by_clock = {build: on_every_core(build, 64, 16, 100, cores) / 1e3 for build in ("boltzmann", "unbiased")}
    print(f"64 trees of 16 simulations on {cores} cores, thousand nodes / s by the clock: {by_clock}", flush=True)
    process, reward = problem()
    grown: list[dict[str, float]] = []
    for build in ("boltzmann", "unbiased"):
        tree, began, mark = None, time.process_time(), 0
        while tree is None or tree.nodes < options.grow:
            more = 160 if tree is None else 640
            run = search.dts(
                process, reward, build=build, levels=LEVELS, batch=64, walkers=64, particles=more, tree=tree
            )
            tree = run.tree
            if tree.nodes >= (mark + 1) * options.grow / 4 or tree.nodes >= options.grow:
                mark += 1
                seconds = time.process_time() - began
                held = tree.nbytes / tree.nodes
                print(f"{build}: {tree.nodes:9,} nodes, {tree.nodes / seconds / 1e3:6.0f} thousand / s, "
                      f"{held:4.0f} bytes a node (states and room to grow included)", flush=True)  # fmt: skip
                grown.append({"nodes": tree.nodes, "seconds": seconds, "bytes": held})
    if options.out:
        options.out.write_text(
            json.dumps({"torch": torch.__version__, "speed": table, "cores": by_clock, "growth": grown}, indent=2)
        )


if __name__ == "__main__":
    main()
