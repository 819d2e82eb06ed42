"""What is left of a run that a fault ends: every method, with the network, the reward or on_step failing at some call.

    python examples/benchmarks/faults.py [--methods smc dts] [--calls 8] [--out faults.json]

Methods run on a mixture of two Gaussians in 6 steps. Each fault is planted at the first call, the last, and calls
evenly spaced between them, one at a time. An outcome is

    same, changed         the run went on, with the result of a run without the fault or another (half precision)
    result                a Result, marked interrupted
    named, own            an error of steer's, or the fault's own exception; `.partial` holds what was paid for
    named, own: LOST      the same, without `.partial`
    NaN                   a Result or batch with NaN where a run without the fault has none

The goal is no LOST and no NaN.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steer
from steer import grpo, search


def collect(process: Any, reward: Any, *, particles: int, key: int, method: Any = None, **_: Any) -> grpo.RolloutBatch:
    """`grpo.collect` with the arguments of a method."""
    return grpo.collect(process, reward, group_size=particles, key=key, method=method, temperature=5.0)


METHODS: dict[str, Callable[..., Any]] = {
    "rollout": steer.rollout,
    "importance_sampling": steer.importance_sampling,
    "smc": steer.smc,
    "fkc": steer.fkc,
    "driftlite": partial(steer.driftlite, passes=2),
    "psi": partial(steer.psi, start=steer.pcnl(chains=2, burn_in=3, kept=4)),
    "fk_steering": steer.fk_steering,
    "tds": steer.tds,
    "das": steer.das,
    "particle_gibbs": partial(steer.particle_gibbs, sweeps=2),
    "waste_free": steer.waste_free,
    "best_of_n": partial(search.best_of_n, chunk=3),
    "svdd": partial(search.svdd, candidates=3, particles=3),
    "dts": partial(search.dts, levels=[3], walkers=4),
    "dts_star": partial(search.dts_star, levels=[3], walkers=4),
    "beam": search.beam,
    "depth_first": partial(search.depth_first, particles=2, budget=60),
    "rbf": partial(search.rbf, quota=3, particles=2),
    "noise_search": partial(search.noise_search, particles=2, budget=120),
    "collect": collect,
    "collect from smc": partial(collect, method=steer.smc),
}


class OurError(Exception):
    """An error of the user's own."""


def raising(kind: type[BaseException], *words: Any) -> Callable[..., Any]:
    """A fault that raises a new error."""

    def fault(*_: Any) -> Any:
        raise kind(*words)

    return fault


def one(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A fault that makes one row another number."""

    def fault(x: Tensor, good: Tensor) -> Tensor:
        good = good.clone()
        (good.flatten(0, 1) if good.ndim > 1 else good)[len(good) // 2] = value
        return good

    return fault


def in_place(x: Tensor, good: Tensor) -> Tensor:
    """Overwrites what it was given."""
    good = good.clone()
    x.detach().mul_(0.0)
    return good


NAN, INF = math.nan, math.inf
RAISED: dict[str, Any] = {
    "RuntimeError": raising(RuntimeError, "boom"),
    "OutOfMemoryError": raising(torch.cuda.OutOfMemoryError, "CUDA out of memory"),
    "MemoryError": raising(MemoryError),
    "StopIteration": raising(StopIteration),
    "KeyboardInterrupt": raising(KeyboardInterrupt),
    "SystemExit": raising(SystemExit, 3),
    "an error of its own": raising(OurError),
}
FAULTS: dict[str, dict[str, Callable[..., Any]]] = {
    "network": {
        **RAISED,
        "one NaN": one(NAN),
        "NaN": lambda x, y: y * NAN,
        "infinite": lambda x, y: y * INF,
        "a column missing": lambda x, y: y[:, :-1],
        "a coordinate missing": lambda x, y: y[..., :1],
        "one row for all": lambda x, y: y[:1, :1],
        "half": lambda x, y: y.half(),
        "float64": lambda x, y: y.double(),
        "integers": lambda x, y: y.long(),
        "complex": lambda x, y: y.to(torch.complex128),
        "another device": lambda x, y: y.to("meta"),
        "None": lambda x, y: None,
        "a tuple": lambda x, y: (y,),
        "writes in place": in_place,
        "needs a gradient": lambda x, y: y * torch.ones(1, dtype=y.dtype, requires_grad=True),
    },
    "reward": {
        **RAISED,
        "AssertionError": raising(AssertionError),
        "Stop": raising(steer.Stop),
        "one NaN": one(NAN),
        "NaN": lambda x, s: s * NAN,
        "one inf": one(INF),
        "one -inf": one(-INF),
        "-inf": lambda x, s: torch.full_like(s, -INF),
        "huge": lambda x, s: s * 1e300,
        "one too few": lambda x, s: s[:-1],
        "a column": lambda x, s: s[:, None],
        "a scalar": lambda x, s: s.mean(),
        "half": lambda x, s: s.half(),
        "a list": lambda x, s: s.tolist(),
        "an array": lambda x, s: s.detach().numpy(),
        "integers": lambda x, s: s.round().long(),
        "booleans": lambda x, s: s > 0,
        "None": lambda x, s: None,
        "a string": lambda x, s: "a" * len(s),
        "a dictionary": lambda x, s: {"scores": s},
        "complex": lambda x, s: s.to(torch.complex128),
        "another device": lambda x, s: s.to("meta"),
        "writes in place": in_place,
    },
    "on_step": {
        **RAISED,
        "Stop": raising(steer.Stop),
        "writes in place": lambda event, _: event.state.x.mul_(0.0),
    },
}


class Planted:
    """A function that fails at one of its calls, counted from 0; at none where `at` is None."""

    def __init__(self, function: Callable[..., Any], fault: Callable[..., Any] | None, at: int | None) -> None:
        self.function, self.fault, self.at, self.calls = function, fault, at, 0

    def __call__(self, first: Any, *rest: Any) -> Any:
        good = self.function(first, *rest)
        self.calls += 1
        return self.fault(first, good) if self.calls - 1 == self.at and self.fault is not None else good


def process(wrap: Callable[[Any], Any] = lambda network: network) -> steer.GaussianProcess:
    """Two Gaussians in two dimensions, 6 steps, with a wrapped network."""
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    spread = 0.3 * torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    made = steer.models.gaussian_mixture(means, spread, torch.tensor([0.5, 0.5]), schedule=steer.VP(), steps=6)
    return replace(made, denoiser=wrap(made.denoiser))


def score(x: Tensor) -> Tensor:
    return x[:, 0].double()


def attempt(
    name: str, place: str = "", fault: Callable[..., Any] | None = None, at: int | None = None
) -> tuple[Any, dict[str, int]]:
    """What a method returns or raises with a fault planted, and the calls that each place has had."""
    planted = {
        "reward": Planted(score, fault, at if place == "reward" else None),
        "on_step": Planted(lambda event: None, fault, at if place == "on_step" else None),
    }

    def wrap(network: Any) -> Planted:
        planted["network"] = Planted(network, fault, at if place == "network" else None)
        return planted["network"]

    method: Any = METHODS[name]
    options: dict[str, Any] = {"particles": 8, "key": 0}
    if isinstance(method, partial):
        options, method = options | method.keywords, method.func
    model = process(wrap)
    if "on_step" in inspect.signature(method).parameters:
        options["on_step"] = planted["on_step"]
    try:
        found = method(model, planted["reward"], **options)
    except BaseException as error:
        found = error
    return found, {where: counted.calls for where, counted in planted.items()}


def numbers(found: Any) -> list[Tensor]:
    """What a Result or a batch says."""
    if isinstance(found, steer.Result):
        return [found.x, found.reward, found.log_weight, found.log_evidence]
    return [found.x_next, *found.rewards.values(), found.logp_old]


def outcome(found: Any, clean: Any) -> str:
    """The outcome of an attempt, in the words above."""
    if isinstance(found, BaseException):
        kind = "named" if isinstance(found, steer.SteerError) else "own"
        return kind if getattr(found, "partial", None) is not None else f"{kind}: LOST"
    pairs = list(zip(numbers(found), numbers(clean), strict=True))
    if any(bool(a.isnan().any()) and not bool(b.isnan().any()) for a, b in pairs):
        return "NaN"
    if getattr(found, "interrupted", False):
        return "result"
    same = all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    return "same" if same else "changed"


def points(calls: int, most: int) -> list[int]:
    """The first call, the last, and others evenly between, `most` in all."""
    count = min(calls, most)
    return sorted({round(i * (calls - 1) / max(1, count - 1)) for i in range(count)})


def survey(methods: list[str], most: int) -> Iterator[tuple[str, str, str, int, str]]:
    """(method, place, fault, call, outcome) of every attempt."""
    for name in methods:
        clean, calls = attempt(name)
        if isinstance(clean, BaseException):
            raise clean
        for place, faults in FAULTS.items():
            for kind, fault in faults.items():
                for at in points(calls[place], most) if calls[place] else ():
                    found, _ = attempt(name, place, fault, at)
                    yield name, place, kind, at, outcome(found, clean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--calls", type=int, default=8, help="calls at which each fault is planted, at most")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, table, bad = time.perf_counter(), dict[tuple[str, str], Counter[str]](), []
    for name, place, kind, at, what in survey(arguments.methods, arguments.calls):
        table.setdefault((place, kind), Counter())[what] += 1
        if "LOST" in what or what == "NaN":
            bad.append((name, place, kind, at, what))
    for (place, kind), counts in table.items():
        print(f"{place:8} {kind:22} " + "  ".join(f"{what} {count}" for what, count in counts.most_common()))
    every = sum(table.values(), Counter[str]())
    for attempt_ in bad:
        print("BAD", *attempt_)
    print(
        f"{every.total()} attempts, {len(arguments.methods)} methods, {len(table)} faults, {len(bad)} lost or NaN, "
        f"{time.perf_counter() - began:.0f} s: {dict(every.most_common())}"
    )
    if arguments.out:
        facts = {"attempts": every.total(), "outcomes": dict(every), "bad": bad}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
