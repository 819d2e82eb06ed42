"""Minority generation on digits: rare styles within a class, and a digit thinned to 3 % of the training data.

    python examples/train/minority_digits.py generator     (once: the thinned model)
    python examples/benchmarks/minority_digits.py [--task styles thinned] [--budget 15000] [--keys 5] [--json FILE]
    python examples/benchmarks/minority_digits.py --choose --first 5 --keys 10  (among which "ours, agreed" was chosen)

Every method spends `budget` network rows, a row differentiated through counting three, and so draws as many samples as
it can afford. Everything is judged in features of `digits-judge`, which no method has seen, against the full set of
training scans. Columns: n, samples; minority, for `styles` the share of samples on the manifold that are farther from
the scans of their own class (judged) than nine in ten of these are from each other, for `thinned` the share on the
manifold that the judge takes for the thinned digit; then the metrics of `steer.minority_metrics`, recall of the first
50 samples; copies, the share closer to a training scan (pixels) than all but 1 % of held-out scans.
"Ours" is minority guidance (or self-guidance) of whose finished samples some are kept: "gate", those in the 1-NN ball
(times .9) of a training scan, in pixels; "by gated reward", the best of those by distance in pixels; "agreed", the best
by `steer.agreed_rarity` in pixels and in the features of eight small classifiers of what the model has seen:
rare within a class for `styles`, among all images for `thinned`, as the classifiers that guide were taught. Its
settings are chosen among nine on keys 5 and up, which are not reported (docs/minority.md says by which rule and how
often); the other ours on key 5.
± are standard errors over keys. DTS* gives one sample per tree, its best leaf; SMC's are drawn by weight.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import rewards, search
from steer.minority_sampling import (
    agreed_rarity,
    boost_and_skip,
    minority,
    minority_guidance,
    minority_metrics,
    self_guided,
)
from steer.minority_sampling.metrics import in_balls, knn_distance
from steer.rewards.digits import load_digit_net
from steer.rewards.nearest_neighbours import NeighbourDistance, OnManifold

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import minority_digits as trained
from digits_data import Digits, splits

TREES = ALIKE = 50
CHOSEN = {
    "styles": "ours: minority guidance, w 4, best 1/6 agreed",
    "thinned": "ours: minority guidance, w 4, best 1/5 agreed",
}
Method = Callable[[int, int], tuple[Tensor, float]]
"""(budget, key) -> images (M, 1, 8, 8) in [0, 1], rows spent."""


def drawn(result: steer.Result) -> tuple[Tensor, float]:
    """As many draws by weight as there were particles, and the rows they cost."""
    return result.draw(result.reward.shape[1]).decoded, result.cost.nfe + 2.0 * result.cost.grads


def chains(process: Any, rows: int) -> Method:
    """Chains of a process at that many rows each, run once for all that select from them."""

    @functools.cache
    def run(budget: int, key: int) -> tuple[Tensor, float]:
        return drawn(steer.rollout(process, ink, particles=budget // rows, key=key, keep_states=False))

    return run


def kept(method: Method, select: Callable[[Tensor], Tensor]) -> Method:
    """Those of a method's images that `select` points at."""

    def run(budget: int, key: int) -> tuple[Tensor, float]:
        images, spent = method(budget, key)
        return images[select(images)], spent

    return run


def inside(gate: Any) -> Callable[[Tensor], Tensor]:
    """Images that a gate allows."""
    return lambda images: gate(images) > -math.inf


def best(reward: Any, share: float) -> Callable[[Tensor], Tensor]:
    """The best share of images by a reward, without those that it forbids."""

    def select(images: Tensor) -> Tensor:
        scores, order = reward(images).sort(descending=True, stable=True)
        count = round(share * len(images))
        return order[:count][scores[:count] > -math.inf]

    return select


def ink(images: Tensor) -> Tensor:
    """A reward for samplers that need one and use none."""
    return images.flatten(1).mean(1)


def annealed(process: Any, exponent: float) -> Method:
    """p^exponent by Feynman-Kac correctors: one row and one backward pass per step."""
    return lambda budget, key: drawn(
        steer.fkc(process, exponent=exponent, particles=budget // (3 * process.steps), key=key)
    )


def by_smc(process: Any, reward: Any, temperature: float) -> Method:
    """The reward's tilt by SMC."""
    return lambda budget, key: drawn(
        steer.smc(process, reward, temperature=temperature, particles=budget // process.steps, key=key)
    )


def by_trees(process: Any, reward: Any) -> Method:
    """The best leaf of each of `TREES` trees."""

    def run(budget: int, key: int) -> tuple[Tensor, float]:
        result = search.dts_star(process, reward, batch=TREES, budget=budget // TREES, key=key)
        return result.process.decode(result.best[:, None]), float(result.cost.nfe)

    return run


def agreed(process: steer.GaussianProcess, seen: Digits, classifier: Any, task: str) -> dict[str, Method]:
    """Minority guidance at some strengths, of whose samples the best by what feature spaces agree on are kept."""
    spaces = [lambda images: images.flatten(1), *trained.feature_nets(seen)]
    reward, found = agreed_rarity(_unit(seen.images), spaces, groups=seen.labels if task == "styles" else None), {}
    for scale in (2.0, 4.0, 6.0):
        guided = chains(minority(process, minority_guidance(classifier, scale=scale)), process.steps)
        for share in (8, 6, 5):
            found[f"ours: minority guidance, w {scale:g}, best 1/{share} agreed"] = kept(
                guided, best(reward, 1 / share)
            )
    return found


def methods(process: steer.GaussianProcess, seen: Digits, classifier: Any) -> dict[str, Method]:
    """Every published method by name, at every strength, and gated ones."""
    scans, steps = _unit(seen.images), process.steps
    reward, strict, loose = NeighbourDistance(scans), OnManifold(scans, k=1, radius=0.9), OnManifold(scans, k=1)
    base = chains(process, steps)
    guided = {w: chains(minority(process, minority_guidance(classifier, scale=w)), steps) for w in (2.0, 4.0, 6.0)}
    found = {"base": base, "base, gate 1": kept(base, inside(loose))}
    found |= {f"minority guidance, w {w:g}": guided[w] for w in (2.0, 6.0)}
    for scale, signal, every in ((1.0, 0.5, 5), (2.0, 0.5, 5), (5.0, 0.9, 5), (3.0, 0.75, 2)):
        hooks = self_guided(scale, signal=signal, every=every)
        name = f"self-guided, w {scale:g}, signal {signal}, every {every}"
        found[name] = chains(minority(process, hooks), steps + 3 * hooks.extra[0](process))
        if signal > 0.5:
            found[f"ours: {name}, gate 1"] = kept(found[name], inside(loose))
    for kappa in (0.2, 0.7):
        boosted = minority(process, boost_and_skip(kappa))
        found[f"Boost-and-Skip, kappa {kappa}"] = chains(boosted, boosted.steps)
    for exponent in (0.9,):
        found[f"temperature {1 / exponent:.2f}"] = annealed(process, exponent)
    for temperature in (0.5, 0.25):
        found[f"reward, SMC, T {temperature}"] = by_smc(process, reward, temperature)
    found["reward, best tenth"] = kept(base, best(reward, 0.1))
    found["reward, DTS*"] = by_trees(process, reward)
    for scale, name, gate in ((2.0, "gate 1", loose), (6.0, "gate 1", loose), (6.0, "gate .9", strict)):
        found[f"ours: minority guidance, w {scale:g}, {name}"] = kept(guided[scale], inside(gate))
    for share, name, gate in ((0.25, "best quarter", loose), (0.1, "best tenth", strict)):
        tent = rewards.gate(reward, by=gate, least=0.0)
        found[f"ours: minority guidance, w 4, {name} by gated reward"] = kept(guided[4.0], best(tent, share))
    return found


class Judge:
    """Metrics of images, in features of the held-out network."""

    def __init__(self, task: str):
        self.task, self.net, data = task, load_digit_net("digits-judge"), splits().train
        self.scans = _unit(data.images).flatten(1)
        self.real, self.labels = self.features(_unit(data.images)), data.labels
        held_out = torch.cdist(_unit(splits().held_out.images).flatten(1), self.scans).amin(1)
        self.copy = held_out.quantile(0.01)
        self.limit = torch.zeros(10, dtype=torch.float64)
        for digit in range(10):
            own = self.real[self.labels == digit]
            others = torch.cdist(own, own).fill_diagonal_(math.inf)
            self.limit[digit] = others.topk(5, largest=False).values.mean(1).quantile(0.9)

    def features(self, images: Tensor) -> Tensor:
        return self.net.features(images).double()

    def __call__(self, images: Tensor) -> dict[str, float]:
        features, seen_as = self.features(images), self.net(images).argmax(1)
        metrics = minority_metrics(features, self.real)
        on = in_balls(features, self.real)
        if self.task == "thinned":
            rare = seen_as == trained.THINNED
        else:
            distance = torch.zeros(len(images), dtype=torch.float64)
            for digit in seen_as.unique().tolist():
                chosen = seen_as == digit
                distance[chosen] = knn_distance(features[chosen], self.real[self.labels == digit])
            rare = distance > self.limit[seen_as]
        names = ("precision", "distance", "outlier", "rarity")
        found = {"n": float(len(images)), "minority": (rare & on).double().mean().item()}
        # Balls of fewer samples are larger: recall is compared at one count.
        found["recall"] = in_balls(self.real, features[:ALIKE]).double().mean().item()
        nearest = torch.cdist(images.flatten(1), self.scans).amin(1)
        found["copies"] = (nearest < self.copy).double().mean().item()
        return found | {name: getattr(metrics, name) for name in names}


def _unit(images: Tensor) -> Tensor:
    return (images / 2 + 0.5).clamp(0, 1)


def run(task: str, budget: int, keys: range, only: str, choose: bool) -> dict[str, list[dict[str, float]]]:
    """rows[method][key]."""
    judge, data = Judge(task), splits()
    if task == "thinned":
        process, seen, name = trained.load_generator(), trained.thinned(data.train), "digits-thinned"
    else:
        process, seen, name = steer.load("digits"), data.train, "digits"
    rows = {"held-out scans": [judge(_unit(data.held_out.images)) | {"rows": 0.0}]}
    classifier = trained.load_classifier(name)
    ours = agreed(process, seen, classifier, task)
    every = {"base": chains(process, process.steps)} | ours
    if not choose:
        every = methods(process, seen, classifier) | {CHOSEN[task]: ours[CHOSEN[task]]}
    for label, method in every.items():
        if only not in label:
            continue
        for key in keys:
            images, spent = method(budget, key)
            rows.setdefault(label, []).append(judge(images) | {"rows": spent})
            print(json.dumps([task, label, key, rows[label][-1]]), file=sys.stderr, flush=True)
    return rows


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, mean ± standard error over keys."""
    columns = ("minority", "precision", "recall", "distance", "outlier", "rarity", "copies")
    lines = ["| method | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, keys in rows.items():
        cells = []
        for column in columns:
            values = torch.tensor([row[column] for row in keys], dtype=torch.float64)
            error = f" ± {values.std() / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{error}")
        lines.append(f"| {name} | {keys[0]['n']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=("styles", "thinned"), default=["styles", "thinned"])
    parser.add_argument("--budget", type=int, default=15_000)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first key")
    parser.add_argument("--choose", action="store_true", help="the settings of ours, agreed, and the base")
    parser.add_argument("--only", default="", help="run methods whose name holds this text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every, first = {}, arguments.first
    for task in arguments.task:
        keys = range(first, first + arguments.keys)
        every[task] = run(task, arguments.budget, keys, arguments.only, arguments.choose)
        print(f"\n{task}\n\n{table(every[task])}", flush=True)
    if arguments.json:
        facts = {"budget": arguments.budget, "keys": arguments.keys, "torch": torch.__version__, "rows": every}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
