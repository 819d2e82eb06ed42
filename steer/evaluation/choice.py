"""Which method for which goal: the one rule of `method="auto"` and of `steer.preflight`.

Read off the grid of examples/benchmarks/auto.py; what it costs to follow it there is in docs/which_method.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from ..core.run import Run
from ..cost import rows_between
from ..errors import SteerError
from .findings import Preflight

Goal = Literal["best", "population", "rollouts"]

CHEAP = 3.0  # network rows; a score that was timed below this counts nothing
DEAR = 0.5  # network rows; from this price of a score on, populations are scored at the end alone
CANDIDATES = 2.5  # of every step, from which choosing among them beats choosing among finished samples


class Setting(NamedTuple):
    """What is known before anything is measured.

    goal:       what is wanted.
    chains:     what the budget pays for, in plain chains that are scored once.
    steps:      of a chain, of which `stochastic` say that they draw noise.
    rows:       of the network for one chain.
    price:      of a score with its decode, in network rows.
    groupwise:  whether the reward scores a sample against others.
    """

    goal: Goal
    chains: float
    steps: int
    stochastic: int
    rows: int
    price: float
    groupwise: bool

    @classmethod
    def of(cls, run: Run, goal: Goal, chains: float, price: float) -> Setting:
        """That of a run."""
        process = run.process
        drawing = sum(process.stochastic(k) for k in range(process.steps))
        rows = rows_between(process, 0, process.steps)
        return cls(goal, chains, process.steps, drawing, rows, price, run.objective.groupwise)

    @property
    def candidates(self) -> float:
        """How many candidates of every step the budget pays for, each predicted and scored."""
        return self.chains * (self.rows + self.price) / (self.rows + self.price * (self.steps + 1))


@dataclass(frozen=True)
class Chosen:
    """A method and why.

    method:  a name of `steer.methods()`.
    why:     the reason, a sentence without a full stop.
    options: of the method, by keyword.
    early:   whether it scores predictions at every step, and not finished samples alone.
    """

    method: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)
    early: bool = False

    def scores(self, steps: int) -> int:
        """Scores, at most, for as many network rows as a plain chain has."""
        return steps + 1 if self.early else 1

    @property
    def call(self) -> str:
        """The method with its options, as one would write it."""
        return f"{self.method}({self.written})" if self.options else self.method

    @property
    def written(self) -> str:
        """The options as in a call."""
        return ", ".join(f"{name}={value!r}".replace("'", '"') for name, value in self.options.items())


def price_of(timed: float) -> float:
    """The price of a score that was timed, in network rows: 0 or a power of ten, so that runs agree on it."""
    return 10.0 ** round(math.log10(timed)) if timed >= CHEAP else 0.0


def check_goal(goal: str) -> None:
    """Raises SteerError for what is no goal."""
    if goal not in get_args(Goal):
        raise SteerError(f"goal must be one of {', '.join(get_args(Goal))}, got {goal!r}")


def samples_that_help(setting: Setting, priced: bool) -> int:
    """How many unsteered samples can change the choice, at most; priced: whether the price of a score is known."""
    searchable = bool(setting.stochastic) and setting.candidates >= CANDIDATES
    if setting.goal == "rollouts" or setting.groupwise or (priced and setting.goal == "best" and not searchable):
        return 0
    if setting.goal == "best":
        return 16
    return 0 if priced or not setting.stochastic else 4  # of which the time of a score is all that is looked at


def choose(setting: Setting, found: Preflight | None) -> Chosen:
    """The method, by what is known and by what unsteered samples have shown, if there are any."""
    if setting.goal == "rollouts":
        return Chosen("rollout", "a trainer learns from the model's own samples, which no selection has changed")
    return _for_population(setting) if setting.goal == "population" else _for_best(setting, found)


def _for_best(setting: Setting, found: Preflight | None) -> Chosen:
    if setting.groupwise:
        why = "the reward scores a sample against the others of its group, so it can rank finished samples only"
        return Chosen("best_of_n", why)
    if found is not None and (without := _nothing_to_follow(found)) is not None:
        return without
    if not setting.stochastic:
        why = "no step draws noise (an ODE): copies of a chain stay identical, and only finished samples differ"
        return Chosen("best_of_n", why)
    if setting.candidates < CANDIDATES:
        dear = f" at {setting.price:g} network rows a score" if setting.price else ""
        why = (
            f"{setting.candidates:.1f} candidates of every step, predicted and scored{dear}, are all that the budget "
            f"pays for, and fewer than {CANDIDATES:g} are worth less than as many finished samples"
        )
        return Chosen("best_of_n", why)
    if found is not None and not found.coarse and found.clearest is None:
        why = (
            f"before its last step r(x0_hat) does not rank {found.samples * found.problems} samples as the final "
            "reward does, so choosing early would be by chance"
        )
        return Chosen("best_of_n", why)
    why = (
        f"the budget pays for {int(setting.candidates)} scored candidates of every step, and keeping the best at each "
        "gives higher rewards than choosing among finished samples"
    )
    return Chosen("svdd", why, {"select": "argmax"}, early=True)


def _nothing_to_follow(found: Preflight) -> Chosen | None:
    """The method where unsteered samples show that no prediction can be followed."""
    count = found.samples * found.problems
    if found.forbidden == count:
        why = f"all {count} samples were forbidden (-inf): use a reward that says how far off a sample is"
        return Chosen("best_of_n", why)
    if not found.seeds_matter:
        why = (
            "every seed gives the same sample, so no method can select among them: more samples will not help; change "
            "the prompt, the guidance scale or the transition (steer.ddim(eta=1.0)), or use a model that is less "
            "distilled"
        )
        return Chosen("rollout", why)
    if not found.rewards_differ:
        why = (
            f"all {count} samples score {found.best:.4g}: nothing can be gained, unless the reward tells samples apart "
            "only rarely, which more finished samples would show"
        )
        return Chosen("best_of_n", why)
    return None


def _for_population(setting: Setting) -> Chosen:
    if setting.price >= DEAR:
        why = f"at {setting.price:g} network rows a score, samples are scored once and weighted at the end"
        return Chosen("importance_sampling", why)
    if not setting.stochastic:
        why = "no step draws noise (an ODE), so copies of a sample stay identical: samples are weighted at the end"
        return Chosen("importance_sampling", why)
    why = "scores are cheap, and resampling at a few levels on the way leaves more samples with weight at the end"
    return Chosen("fk_steering", why, early=True)
