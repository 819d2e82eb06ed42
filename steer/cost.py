"""The ledger: what a run spent, counted where the network, the reward and the decoder are called."""

from __future__ import annotations

import math
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calls import Answer, call
from .errors import BudgetError, SteerError
from .finite import FiniteWatch


@dataclass(frozen=True)
class Cost:
    """What a run spent, over all its problems.

    nfe:        network rows evaluated (a guidance pair counts 2).
    grads:      network rows differentiated through; a backward pass costs about two forward passes.
    rewards:    samples scored.
    decodes:    states decoded.
    seconds:    wall time by kind ("network", "gradient", "reward", "decode", "total"). On a GPU, calls return before
                the device is done, so only "total" and calls that read a result are exact.
    peak_bytes: peak memory of the device (CUDA) or of the process (CPU) so far.
    """

    nfe: int = 0
    grads: int = 0
    rewards: int = 0
    decodes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        kinds = {**self.seconds, **other.seconds}
        return Cost(
            self.nfe + other.nfe,
            self.grads + other.grads,
            self.rewards + other.rewards,
            self.decodes + other.decodes,
            {kind: self.seconds.get(kind, 0.0) + other.seconds.get(kind, 0.0) for kind in kinds},
            max(self.peak_bytes, other.peak_bytes),
        )

    def seconds_left(self, total: int) -> float:
        """Seconds for the rest of `total` network rows, at the speed so far; NaN where no row was evaluated yet."""
        return self.seconds["total"] * max(0, total - self.nfe) / self.nfe if self.nfe else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The ledger as plain JSON types."""
        return asdict(self)


class Stopwatch:
    """Adds the wall time of a `with` block to one kind. A generator would take four times as long, at every step."""

    __slots__ = ("began", "kind", "seconds")

    def __init__(self, seconds: dict[str, float], kind: str) -> None:
        self.seconds, self.kind = seconds, kind

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.kind] += time.perf_counter() - self.began


class Meter:
    """Counts calls while a run is in progress, and looks at what they return (`finite`).

    The one mutable object of a run besides a search tree.
    """

    def __init__(self) -> None:
        self.finite = FiniteWatch()
        self.nfe = self.grads = self.rewards = self.decodes = 0
        self.seconds = {"network": 0.0, "gradient": 0.0, "reward": 0.0, "decode": 0.0}
        self._began = time.perf_counter()

    def network(self, rows: int) -> Stopwatch:
        """Counts `rows` network evaluations."""
        self.nfe += rows
        return Stopwatch(self.seconds, "network")

    def gradient(self, rows: int) -> Stopwatch:
        """Counts `rows` backward passes."""
        self.grads += rows
        return Stopwatch(self.seconds, "gradient")

    def scoring(self, rows: int) -> Stopwatch:
        """Counts `rows` reward evaluations."""
        self.rewards += rows
        return Stopwatch(self.seconds, "reward")

    def decoding(self, rows: int) -> Stopwatch:
        """Counts `rows` decoded states."""
        self.decodes += rows
        return Stopwatch(self.seconds, "decode")

    def call(self, kind: str, k: int, function: Callable[..., Answer], *tensors: Tensor, named: str = "") -> Answer:
        """function(*tensors), by whatever stands between the run and its models (`steer.calls`)."""
        return call(self, kind, k, function, *tensors, named=named)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Network rows, gradients, rewards and decodes so far. Set, to count what was paid elsewhere."""
        return self.nfe, self.grads, self.rewards, self.decodes

    @counts.setter
    def counts(self, counts: Sequence[int]) -> None:
        self.nfe, self.grads, self.rewards, self.decodes = counts

    @property
    def spent(self) -> dict[str, Any]:
        """All of the ledger, also wall time so far. Set, to go on from there."""
        return {"counts": list(self.counts), "seconds": {**self.cost().seconds}}

    @spent.setter
    def spent(self, spent: Mapping[str, Any]) -> None:
        self.counts = spent["counts"]
        self.seconds.update({kind: spent["seconds"][kind] for kind in self.seconds})
        self._began = time.perf_counter() - spent["seconds"]["total"]

    def paid(self, cost: Cost) -> None:
        """Counts what another run has spent for this one; wall time runs on by itself."""
        self.counts = tuple(map(sum, zip(self.counts, (cost.nfe, cost.grads, cost.rewards, cost.decodes), strict=True)))
        for kind in self.seconds:
            self.seconds[kind] += cost.seconds.get(kind, 0.0)

    def cost(self) -> Cost:
        """What was spent so far."""
        seconds = {**self.seconds, "total": time.perf_counter() - self._began}
        return Cost(self.nfe, self.grads, self.rewards, self.decodes, seconds, _peak_bytes())


def rows_at(process: Any, k: int) -> int:
    """Network rows of one prediction at level k: `process.rows`, or fewer where guidance begins late or ends early."""
    at = getattr(process, "rows_at", None)
    return process.rows if at is None else at(k)


def rows_between(process: Any, first: int, last: int) -> int:
    """Network rows of one particle's predictions at levels first to last - 1."""
    return sum(rows_at(process, k) for k in range(first, last))


def check_counts(**counts: Any) -> None:
    """Raises SteerError where a number, by its name, is not a whole one of at least 1; None is one not given."""
    for name, count in counts.items():
        if count is None:
            continue
        if isinstance(count, bool) or not hasattr(count, "__index__"):
            raise SteerError(f"{name} is a whole number, got {count!r} of type {type(count).__name__}; pass an int")
        if count < 1:
            raise SteerError(f"{name} must be at least 1, got {count}")


def affordable(
    rows: int | Callable[[int], int],
    *,
    particles: int | None,
    budget: int | None,
    default: int = 16,
    before: int = 0,
) -> int:
    """How many particles per problem to run.

    Args:
        rows: network rows of one particle, or a rising function from their number to the rows of all.
        particles: the number itself. Given together with a budget it is checked against it.
        budget: network rows per problem, never exceeded.
        default: the number where neither is given.
        before: rows spent whatever their number.

    Raises:
        BudgetError: the budget pays for fewer than asked for; says what would be enough.
    """
    check_counts(particles=particles)
    if budget is None:
        return default if particles is None else particles
    price = rows if callable(rows) else lambda count: rows * count
    check_counts(budget=max(budget, 1))  # one that pays for nothing is told so below
    left = max(0, budget - before)
    most = bisect_right(range(1, left // price(1) + 1), left, key=price)
    if most < (particles or 1):
        raise BudgetError(
            f"a budget of {budget} network rows per problem pays for {most} particle(s) at {price(1)} rows "
            f"{'or more ' if callable(rows) else ''}each, {f'after {before} for their start, ' if before else ''}and "
            f"{particles or 1} were asked for; raise the budget to {before + price(particles or 1)}, or take fewer "
            "steps"
        )
    return particles or most


def _peak_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
