"""Nodes per second of array trees against trees of Python objects, in the same run.

    python examples/benchmarks/tree.py [--grow 1000000] [--out FILE]

Both build the trees of Algorithm 1 on an eight-mode mixture in the plane with 50 steps and nodes at ten levels, where
the network is nearly free, so that bookkeeping is what is measured. Objects: one tree after the other, one Python
object a node, the W walks of a sweep rolled out in one batch from each level (which is the most that objects allow).
Reported: nodes made per second of CPU time, and per second besides network and reward: selection, noise, steps, new
nodes, values.
"paper" makes the same trees as "objects"; "default" is the unbiased build, whose walks are shorter and so make fewer
nodes each. Then the memory of a node and its states, and growth to a million nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import search
import steer
from steer.key import Key

STEPS, LEVELS = 50, list(range(5, 50, 5))


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
    depth: int
    visits: int = 1
    value: float = 0.0
    children: list[Node] = field(default_factory=list)


class Objects:
    """Boltzmann trees of Python objects; rollouts of a sweep are batched, all else is a loop."""

    def __init__(self, process, reward, key):
        self.meter = steer.cost.Meter()
        self.process, self.reward, self.key, self.walk = process.metered(self.meter), reward, key, 0
        self.root, self.ends, self.nodes = Node(None, 0), [*LEVELS, process.steps], 1

    def select(self, uniform: list[float]) -> list[Node]:
        path = [self.root]
        while (node := path[-1]).depth < len(self.ends) and len(node.children) >= 2.0 * node.visits**0.8:
            top = max(child.value for child in node.children)
            weights = [math.exp(child.value - top) for child in node.children]
            left = uniform[node.depth] * sum(weights)
            chosen = len(weights) - 1
            for i, weight in enumerate(weights):
                left -= weight
                if left <= 0:
                    chosen = i
                    break
            path.append(node.children[chosen])
        for node in path[: len(self.ends)]:
            node.visits += 1
        return path

    def sweep(self, walkers: int) -> None:
        uniforms = self.key.fold("select").shifted(slot=self.walk).uniform((1, walkers, len(self.ends)))[0].tolist()
        paths = [self.select(uniform) for uniform in uniforms]
        noise, x = self.key.shifted(slot=self.walk).fold("step"), None
        entering = sorted((path for path in paths if path[-1].depth < len(self.ends)), key=lambda path: path[-1].depth)
        under_way: list[list[Node]] = []
        for depth, end in enumerate(self.ends):
            new = [path for path in entering if path[-1].depth == depth and path not in under_way]
            under_way += new
            if not under_way:
                continue
            if depth == 0:
                x, first = self.process.prior(self.key.fold("prior"), 1, len(new)), 0
            else:
                x, first = torch.stack([path[-1].x for path in under_way])[None], self.ends[depth - 1]
            for k in range(first, end):
                x = self.process.transition(x, self.process.denoise(x, k), k).sample(noise.at(k))
            scores = None
            if depth == len(self.ends) - 1:
                with self.meter.scoring(len(under_way)):
                    scores = self.reward(x[0]).tolist()
            for i, path in enumerate(under_way):
                node = Node(x[0, i], depth + 1, value=scores[i] if scores else 0.0)
                path[-1].children.append(node)
                path.append(node)
                self.nodes += 1
        for path in paths:
            for node in path[-2::-1]:
                top = max(child.value for child in node.children)
                total = sum(math.exp(child.value - top) for child in node.children)
                node.value = top + math.log(total / len(node.children))
        self.walk += walkers


def objects(trees: int, walkers: int, sweeps: int) -> tuple[int, float, float]:
    """Nodes, CPU seconds, and those of them spent on network and reward."""
    process, reward = problem()
    cpu, wall = time.process_time(), time.perf_counter()
    built = [Objects(process, reward, Key(i)) for i in range(trees)]
    for tree in built:
        for _ in range(sweeps):
            tree.sweep(walkers)
    elsewhere = sum(tree.meter.seconds["network"] + tree.meter.seconds["reward"] for tree in built)
    share, cpu = elsewhere / (time.perf_counter() - wall), time.process_time() - cpu
    return sum(tree.nodes for tree in built), cpu, cpu * share


def arrays(build: str, trees: int, walkers: int, sweeps: int) -> tuple[int, float, float]:
    """The same of steer's trees."""
    process, reward = problem()
    cpu, wall = time.process_time(), time.perf_counter()
    run = search.dts(
        process, reward, build=build, levels=LEVELS, batch=trees, walkers=walkers, particles=walkers * sweeps
    )
    share = (run.cost.seconds["network"] + run.cost.seconds["reward"]) / (time.perf_counter() - wall)
    cpu = time.process_time() - cpu
    return run.tree.nodes, cpu, cpu * share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grow", type=int, default=1_000_000, help="nodes to grow one batch of trees to")
    parser.add_argument("--nodes", type=int, default=40_000, help="nodes to make in each cell, roughly")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = []
    print(f"{'trees':>5} {'walks':>5} | thousand nodes / s      | besides network, reward")
    print(f"{'':11} | {'objects':>7} {'paper':>7} {'default':>7} | {'objects':>7} {'paper':>7} {'default':>7}")
    for trees in (1, 16, 64):
        for walkers in (1, 16, 64):
            sweeps = max(10, min(400, options.nodes // (trees * walkers * 9)))
            cells = {"boltzmann": arrays("boltzmann", trees, walkers, sweeps)}
            cells["unbiased"] = arrays("unbiased", trees, walkers, sweeps)
            # Trees of objects are independent of one another: a few of them give the rate of all.
            cells["objects"] = objects(min(trees, 4), walkers, sweeps)
            order = [cells[name] for name in ("objects", "boltzmann", "unbiased")]
            whole = [nodes / total / 1e3 for nodes, total, _ in order]
            alone = [nodes / (total - elsewhere) / 1e3 for nodes, total, elsewhere in order]
            print(f"{trees:5} {walkers:5} | {' '.join(f'{v:7.0f}' for v in whole)} | "
                  f"{' '.join(f'{v:7.0f}' for v in alone)}", flush=True)  # fmt: skip
            table.append({"trees": trees, "walkers": walkers, "all": whole, "besides": alone})
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
        options.out.write_text(json.dumps({"torch": torch.__version__, "speed": table, "growth": grown}, indent=2))


if __name__ == "__main__":
    main()
