"""What `steer.preflight` found, how it reads, and the method that it recommends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..core.tilt import Expected
from ..cost import Cost

_USABLE = 0.4  # rank correlation from which a prediction is worth selecting by
_COARSE = 8  # samples below which their ranking is mostly chance
SAME = 1e-3  # samples that differ by less than this share of their spread are the same


@dataclass(frozen=True)
class PredictionReliability:
    """How well r(x0_hat) at step k predicts the final reward of the same chain.

    Args:
        k: The step.
        rank_correlation: Spearman's, a mean over problems; None where the scores at that step, or at the end, are
            all equal.
        error: Mean of |r(x0_hat) - final reward|.
    """

    k: int
    rank_correlation: float | None
    error: float


@dataclass(frozen=True)
class Gradient:
    """The gradient of r(x0_hat(x)) / temperature in x at step k, if there is one.

    Args:
        available: Whether there is.
        why: Why not; "" where it is available.
        k: The step.
        norm: Its length.
        push: How far a guided proposal would shift the step, in standard deviations of the step's own noise.
    """

    available: bool
    why: str = ""
    k: int = 0
    norm: float = math.nan
    push: float = math.nan


@dataclass(frozen=True)
class Preflight:
    """What a few samples of a process say about steering it by a reward. `print` it.

    Args:
        samples, problems, steps: What was run: chains per problem, problems, steps of a chain.
        stochastic_steps: How many of the steps draw noise; 0 is an ODE.
        seed_effect: How much samples from different starting noises differ, in standard deviations of a sample's
            entries (share of tokens that differ, for tokens); None where every chain starts at one state.
        noise_effect: The same for samples from one starting noise; None where no step draws noise.
        mean, std, best: Of the final rewards.
        forbidden: How many of them are -inf.
        sights: How early predictions rank samples, one entry for each probed step.
        gradient: Whether the reward has one, and its size.
        temperatures: What samplers of p(x) exp(r(x) / temperature) can expect of a temperature: ESS, mean reward and KL
            to the model. Empty for rewards that score a sample against others, and where no sample is allowed.
        network_seconds, reward_seconds, decode_seconds: Per prediction (all its rows), per score, per decoded sample.
        price: Of a score with its decode, in network rows, by the fastest call of each.
        cost: What this preflight spent.
        method, options, budget: Recommended for one best sample, as `steer.sample` takes them, and what `method="auto"`
            chooses; the budget in NFE (network rows) per problem.
        advice: The reasons, and further advice, in sentences; the decisive one first.
    """

    samples: int
    problems: int
    steps: int
    stochastic_steps: int
    seed_effect: float | None
    noise_effect: float | None
    mean: float
    std: float
    best: float
    forbidden: int
    sights: tuple[PredictionReliability, ...]
    gradient: Gradient
    temperatures: tuple[Expected, ...]
    network_seconds: float
    reward_seconds: float
    decode_seconds: float
    price: float
    cost: Cost
    method: str
    options: dict[str, Any]
    budget: int
    advice: tuple[str, ...]

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        return self.stochastic_steps > 0

    @property
    def seeds_matter(self) -> bool:
        """Whether two chains end differently."""
        return max(self.seed_effect or 0.0, self.noise_effect or 0.0) > SAME

    @property
    def rewards_differ(self) -> bool:
        """Whether the samples have different rewards."""
        return self.std > 1e-9 * max(1.0, abs(self.best)) or 0 < self.forbidden < self.samples * self.problems

    @property
    def coarse(self) -> bool:
        """Whether these samples are too few to rank anything."""
        return self.samples < _COARSE

    @property
    def usable_from(self) -> int | None:
        """The first probed step from which r(x0_hat) ranks samples as the final reward does; None if there is none."""
        first = None
        for sight in self.sights:
            if not _usable(sight):
                first = None
            elif first is None:
                first = sight.k
        return first

    @property
    def clearest(self) -> PredictionReliability | None:
        """The step, of those probed before the last prediction, that ranks samples best; None where none does."""
        usable = [sight for sight in self.sights if sight.k < self.steps - 1 and _usable(sight)]
        return max(usable, key=lambda sight: sight.rank_correlation or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; NaN and infinities are None."""
        from ..files import plain

        derived = {"stochastic": self.stochastic, "seeds_matter": self.seeds_matter, "usable_from": self.usable_from}
        return plain({**asdict(self), **derived})

    def __str__(self) -> str:
        sights = "  ".join(f"{s.k}: {signed(s.rank_correlation)}" for s in self.sights)
        if self.gradient.available:
            gradient = f"yes, length {self.gradient.norm:.3g} at step {self.gradient.k}"
            if not math.isnan(self.gradient.push):
                gradient += f", shifts a step by {self.gradient.push:.3g} standard deviations of its noise"
        else:
            gradient = f"no: {self.gradient.why}"
        reward = f"{self.mean:.4g} ± {self.std:.3g}, best {self.best:.4g}"
        if self.forbidden:
            reward += f", {self.forbidden} forbidden"
        network, decode, score = (
            f"{1e3 * seconds:.3g}" for seconds in (self.network_seconds, self.decode_seconds, self.reward_seconds)
        )
        between, within = _share(self.seed_effect), _share(self.noise_effect)
        options = "".join(f', {name}="{value}"' for name, value in self.options.items())
        lines = {
            "steps": f"{self.steps}, {_of(self.stochastic_steps, self.steps)} draw noise",
            "samples differ by": f"{between} between starting noises, {within} from the same one",
            "reward": reward,
            "r(x0_hat) ranks": f"{sights}  (step: rank correlation with the final reward, {self.samples} samples)",
            "gradient": gradient,
            "milliseconds": f"prediction {network}, decode {decode}, reward {score}",
            "recommended": f'method="{self.method}"{options}, budget={self.budget:,} NFE (network rows) per problem',
        }
        table = "\n".join(f"{name:<18} {text}" for name, text in lines.items())
        return "\n".join([table, *self._temperatures(), *(f"- {sentence}" for sentence in self.advice)])

    def _temperatures(self) -> Iterator[str]:
        """The table of temperatures, line by line."""
        if self.temperatures:
            of = self.samples * self.problems
            yield f"{'temperature':<18} {'expected ESS':>12}  {'mean reward':>12}  KL to the model (of {of} samples)"
        for row in self.temperatures:
            yield f"{row.temperature:<18.3g} {row.ess:>12.0%}  {row.reward:>12.4g}  {row.kl:.2g} nats"


def _usable(sight: PredictionReliability) -> bool:
    """Whether predictions at that step are worth selecting by."""
    return sight.rank_correlation is not None and sight.rank_correlation > _USABLE - 1e-9


def _of(count: int, total: int) -> str:
    """A count in words, where it is all or none."""
    return "all" if count == total else "none" if count == 0 else str(count)


def _share(effect: float | None) -> str:
    """An effect as text."""
    return "–" if effect is None else f"{effect:.2g}"


def signed(value: float | None) -> str:
    """A correlation as text, with its sign."""
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")
