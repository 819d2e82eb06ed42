"""What four samples tell before any budget is spent: what a process and a reward allow, and what to run on them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.objective import Objective, check_finite, check_temperature, num_problems, open_objective
from ..cost import Cost
from ..errors import BudgetError, NotDifferentiableError
from ..key import Key, as_key
from ..processes.gaussian import has_levels, is_gaussian
from ..types import ReverseProcess, Reward

_PROBED = 8  # levels at which predictions are scored, at most
_USABLE = 0.4  # rank correlation from which a prediction is worth selecting by
_SAME = 1e-3  # samples that differ by less than this share of their spread are the same


@dataclass(frozen=True)
class Sight:
    """How far the reward sees from level k: rank correlation of r(x0_hat) with the final reward of the same chain.

    rank_correlation: mean over problems; None where the scores at that level, or at the end, are all alike.
    error:            mean of |r(x0_hat) - final reward|.
    """

    k: int
    rank_correlation: float | None
    error: float


@dataclass(frozen=True)
class Gradient:
    """The gradient of r(x0_hat(x)) / temperature in x at level k, where there is one.

    why:  what stands in its way; "" where it is available.
    norm: its length. push: the shift of a guided proposal in units of the step's own noise, norm times std.
    """

    available: bool
    why: str = ""
    k: int = 0
    norm: float = math.nan
    push: float = math.nan


@dataclass(frozen=True)
class Preflight:
    """What a few samples of a process say about steering it by a reward. `print` it.

    samples, problems, steps: what was run: chains per problem, problems, steps of a chain.
    stochastic_steps: how many of the steps draw noise; 0 is an ODE.
    seed_effect:  how much samples from different starting noises differ, in standard deviations of a sample's entries
                  (share of tokens that differ, for tokens); None where every chain starts at one state.
    noise_effect: the same of samples from one starting noise; None where no step draws.
    mean, std, best: of the final rewards. forbidden: how many of them are -inf.
    sights:       how early the reward knows, see `Sight`.
    gradient:     see `Gradient`.
    network_seconds, reward_seconds, decode_seconds: per prediction (all its rows), per score, per decoded sample.
    cost:         what this preflight spent.
    method, budget: what it recommends for `steer.sample`, rows per problem. advice: why, and what else, in sentences.
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
    sights: tuple[Sight, ...]
    gradient: Gradient
    network_seconds: float
    reward_seconds: float
    decode_seconds: float
    cost: Cost
    method: str
    budget: int
    advice: tuple[str, ...]

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise."""
        return self.stochastic_steps > 0

    @property
    def seeds_matter(self) -> bool:
        """Whether two chains end differently."""
        return max(self.seed_effect or 0.0, self.noise_effect or 0.0) > _SAME

    @property
    def usable_from(self) -> int | None:
        """The first probed level from which r(x0_hat) ranks samples as the end does; None where none does."""
        first = None
        for sight in self.sights:
            if not _usable(sight):
                first = None
            elif first is None:
                first = sight.k
        return first

    @property
    def clearest(self) -> Sight | None:
        """The level, of those probed before the last prediction, that ranks samples best; None where none does."""
        usable = [sight for sight in self.sights if sight.k < self.steps - 1 and _usable(sight)]
        return max(usable, key=lambda sight: sight.rank_correlation or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; NaN and infinities are None."""
        from ..files import plain

        derived = {"stochastic": self.stochastic, "seeds_matter": self.seeds_matter, "usable_from": self.usable_from}
        return plain({**asdict(self), **derived})

    def __str__(self) -> str:
        sights = "  ".join(f"{s.k}: {_signed(s.rank_correlation)}" for s in self.sights)
        if self.gradient.available:
            gradient = f"yes, length {self.gradient.norm:.3g} at step {self.gradient.k}"
            if not math.isnan(self.gradient.push):
                gradient += f", a push of {self.gradient.push:.3g} noise standard deviations"
        else:
            gradient = f"no: {self.gradient.why}"
        lines = [
            ("steps", f"{self.steps}, {_of(self.stochastic_steps, self.steps)} draw noise"),
            ("samples differ by", f"{_share(self.seed_effect)} between starting noises, "
                                  f"{_share(self.noise_effect)} from the same one"),
            ("reward", f"{self.mean:.4g} ± {self.std:.3g}, best {self.best:.4g}"
                       + (f", {self.forbidden} forbidden" if self.forbidden else "")),
            ("r(x0_hat) ranks", f"{sights}  (step: rank correlation with the end, {self.samples} samples)"),
            ("gradient", gradient),
            ("milliseconds", f"prediction {1e3 * self.network_seconds:.3g}, decode {1e3 * self.decode_seconds:.3g}, "
                             f"reward {1e3 * self.reward_seconds:.3g}"),
            ("recommended", f'method="{self.method}", budget={self.budget:,} network rows per problem'),
        ]  # fmt: skip
        table = "\n".join(f"{name:<18} {text}" for name, text in lines)
        return table + "\n" + "\n".join(f"- {sentence}" for sentence in self.advice)


def preflight(
    process: ReverseProcess,
    reward: Reward,
    *,
    samples: int = 4,
    batch: int = 1,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
) -> Preflight:
    """What can be gained by steering this process by this reward, and how: from a few unsteered samples.

    samples:     chains per problem, in pairs that share their starting noise where steps draw noise of their own. Four
                 show what is broken; a rank correlation of four is coarse, and 16 are worth their price where it
                 decides much.
    temperature: > 0; scales the gradient that is reported.

    Cost per problem: samples * K network rows (K = process.steps, times process.rows), one prediction with a backward
    pass, and as many rewards as `samples` at no more than nine levels.
    Raises what a run would raise, with the same message: RewardError, NonFiniteError, ShapeError, ... The reward is
    called after the first prediction, so a broken one costs next to nothing.
    """
    temperature, key = check_temperature(temperature), as_key(key, seed)
    if samples < 4:
        raise BudgetError(f"preflight ranks samples, and needs at least 4 of them, got samples={samples}")
    process, objective, meter = open_objective(process, reward, groupwise=True)
    batch = num_problems(process, batch)
    drawing = [k for k in range(process.steps) if process.stochastic(k)]
    x = process.prior(key.fold("prior"), batch, samples)
    if drawing:
        x = x[:, torch.arange(samples, device=x.device) // 2]  # two chains from every starting noise
    start, middle = x, next((k for k in drawing if k >= process.steps // 2), process.steps // 2)
    halfway, seen = x, {}
    with torch.no_grad():
        for k in range(process.steps):
            halfway = x if k == middle else halfway
            x0 = process.denoise(x, k, key)
            if k in _probed(process.steps):
                seen[k] = objective(process.complete(x, x0))
                check_finite(seen[k], f"of predictions at level {k} of {process.steps}")
            x = process.transition(x, x0, k).sample(key.fold("step").at(k))
        final = objective(x)
        check_finite(final, "of the finished samples")
    spent = meter.cost()  # before the gradient, whose forward pass takes longer
    slope = _gradient(process, objective, halfway, middle, temperature, key)
    seed_effect, noise_effect = _effects(process, x, start, bool(drawing))
    finite = final[final.isfinite()]
    found = Preflight(
        samples=samples, problems=batch, steps=process.steps, stochastic_steps=len(drawing), seed_effect=seed_effect,
        noise_effect=noise_effect, mean=float(finite.mean()) if len(finite) else math.nan, std=_spread(final),
        best=float(final.max()), forbidden=int((final == -torch.inf).sum()),
        sights=tuple(Sight(k, _rank_correlation(r, final), _error(r, final)) for k, r in seen.items()),
        gradient=slope,
        network_seconds=spent.seconds["network"] * process.rows / max(1, spent.nfe),
        reward_seconds=spent.seconds["reward"] / max(1, spent.rewards),
        decode_seconds=spent.seconds["decode"] / max(1, spent.decodes),
        cost=meter.cost(), method="", budget=0, advice=(),
    )  # fmt: skip
    method, advice = _recommended(found, process, objective.groupwise)
    particles = 1 if method == "rollout" else 16
    return replace(found, method=method, budget=particles * process.steps * process.rows, advice=advice)


def _recommended(found: Preflight, process: ReverseProcess, groupwise: bool) -> tuple[str, tuple[str, ...]]:
    """A method and the reasons for it, the decisive one first."""
    gaussian, advice = is_gaussian(process), []
    if found.forbidden == found.samples * found.problems:
        method = "best_of_n"
        advice.append(
            "every sample was forbidden (-inf): a reward that says how far off a sample is would guide better"
        )
    elif not found.seeds_matter:
        method = "rollout"
        advice.append(
            "every seed gives the same sample, so there is nothing to choose from: a run on more noise will not help; "
            "change the prompt, the guidance scale or the transition (steer.ddim(eta=1.0)), or use a model that is not "
            "distilled so far"
        )
    elif not found.std > 1e-9 * max(1.0, abs(found.best)) and not found.forbidden:
        method = "rollout"
        advice.append(
            f"nothing can be gained: all {found.samples * found.problems} samples score {found.best:.4g}; use a reward "
            "that tells them apart, or more samples=, if it only rarely does"
        )
    elif groupwise:
        method = "best_of_n"
        advice.append("the reward scores samples against their group, so only finished samples can be ranked by it")
    elif not found.stochastic:
        method = "noise_search" if gaussian else "best_of_n"
        cure = "process.with_rule(steer.ddim(eta=1.0))" if gaussian else "a stochastic rule (steer.unmask, say)"
        advice.append(
            "no step draws noise (an ODE): copies of a particle stay copies, so only starting noises can be chosen; "
            f"for particle methods and trees open it on noise, {cure}"
        )
    elif (sight := found.clearest) is None:
        method = "best_of_n"
        advice.append(
            "r(x0_hat) ranks no unfinished samples as the end does, so selecting on the way would be by chance: rank "
            "finished samples, or find a reward that reads unfinished ones"
        )
    else:
        method = "smc"
        advice.append(
            f"r(x0_hat) ranks unfinished samples: at step {sight.k} of {found.steps} its rank correlation with the end "
            f"is {_signed(sight.rank_correlation)}; so selection on the way can pay: smc for a population, "
            "search.dts_star for one best sample"
        )
        early = found.usable_from or 0
        if early > 0.25 * found.steps:
            advice.append(
                f"what it says before step {early} is mostly chance, and selection there mostly costs variety"
            )
    return method, (*advice, *_remarks(found, method))


def _remarks(found: Preflight, method: str) -> list[str]:
    """What else is worth knowing before the run."""
    said = []
    if method in ("smc", "best_of_n") and found.samples < 8 and found.std > 0.0:
        said.append(f"{found.samples} samples rank coarsely: samples=16 before a decision that matters")
    if found.stochastic and found.seed_effect is not None and found.noise_effect is not None:
        if found.noise_effect < 0.1 * found.seed_effect:
            said.append("steps draw noise, and starting noise still decides nearly everything: prefer many starts")
        elif found.seed_effect <= _SAME < found.noise_effect:
            said.append("the starting noise does not matter: all variety comes from the steps")
    if found.gradient.available and method == "smc" and 0.0 < found.gradient.push < 10.0:
        said.append("the reward's gradient is there and of a useful size: try proposal=steer.guided(1.0)")
    elif found.gradient.available and found.gradient.push >= 10.0:
        said.append(
            f"the gradient would move a step by {found.gradient.push:.3g} of its own noise: raise the temperature or "
            "guide by a small scale"
        )
    per_sample = found.reward_seconds + found.decode_seconds
    if method == "smc" and per_sample > found.network_seconds > 0.0:
        said.append(
            f"scoring costs {per_sample / found.network_seconds:.1f} times a prediction: score at a few levels only "
            f"(weight=steer.difference(at=range({found.usable_from or 0}, {found.steps}, 5))), or use best_of_n, which "
            "scores once per sample"
        )
    if found.forbidden:
        said.append(f"{found.forbidden} of {found.samples * found.problems} samples are forbidden (-inf)")
    return said


def _gradient(
    process: ReverseProcess, objective: Objective, x: Tensor, k: int, temperature: float, key: Key
) -> Gradient:
    """The gradient for the first particle of every problem, or why there is none."""
    if not has_levels(process):
        return Gradient(False, f"states of {type(process).__name__} lie on no Gaussian path", k)
    if objective.groupwise:
        return Gradient(False, "the reward scores samples against their group", k)
    try:
        _, _, gradient = objective.value_and_grad(x[:, :1], k, 1.0 / temperature, key)
    except NotDifferentiableError:
        return Gradient(False, "the reward returns scores without one", k)
    except torch.OutOfMemoryError:
        return Gradient(False, "memory runs out in the backward pass; try from_pipeline(checkpoint_decode=True)", k)
    except RuntimeError as error:  # autograd's own: a module that cannot be differentiated
        return Gradient(False, f"the backward pass raised {next(iter(str(error).splitlines()), 'RuntimeError')}", k)
    norm = float(gradient.double().flatten(2).norm(dim=2).mean())
    if not math.isfinite(norm):
        return Gradient(False, "it is not finite", k)
    if norm == 0.0:
        return Gradient(False, "it is zero", k)
    std = getattr(process.transition(x[:, :1], x[:, :1], k), "std", 0.0)
    return Gradient(True, "", k, norm, norm * std if std > 0.0 else math.nan)


def _effects(process: ReverseProcess, x: Tensor, start: Tensor, paired: bool) -> tuple[float | None, float | None]:
    """How much samples differ between starting states, and from one: see Preflight."""
    scattered = not torch.equal(start, start[:, :1].expand_as(start))
    between = _difference(x[:, ::2], x[:, ::2].roll(1, 1)) if paired else _difference(x, x.roll(1, 1))
    within = _difference(x[:, 0::2][:, : x.shape[1] // 2], x[:, 1::2]) if paired else None
    if not scattered:
        return None, between if within is None else max(between, within)
    return between, within


def _difference(a: Tensor, b: Tensor) -> float:
    """Root mean square difference over sqrt(2), in standard deviations of all entries; for tokens, the share."""
    if not a.is_floating_point():
        return float((a != b).double().mean())
    spread = float(a.double().std())
    return float((a.double() - b.double()).square().mean().div(2.0).sqrt()) / (spread or 1.0)


def _usable(sight: Sight) -> bool:
    return sight.rank_correlation is not None and sight.rank_correlation > _USABLE - 1e-9


def _probed(steps: int) -> set[int]:
    """At most eight levels, evenly spaced, the first and the last prediction among them."""
    return {round(i * (steps - 1) / max(1, _PROBED - 1)) for i in range(_PROBED)}


def _rank_correlation(scores: Tensor, final: Tensor) -> float | None:
    """Spearman's, within problems and averaged over those where both sides rank anything."""
    found = []
    for a, b in zip(scores, final, strict=True):
        a, b = _ranks(a), _ranks(b)
        a, b = a - a.mean(), b - b.mean()
        scale = float(a.square().sum() * b.square().sum()) ** 0.5
        if scale > 0.0:
            found.append(float((a * b).sum()) / scale)
    return sum(found) / len(found) if found else None


def _ranks(scores: Tensor) -> Tensor:
    """Ranks, ties sharing their mean rank."""
    return (scores[:, None] > scores).double().sum(1) + 0.5 * (scores[:, None] == scores).double().sum(1)


def _error(scores: Tensor, final: Tensor) -> float:
    both = scores.isfinite() & final.isfinite()
    return float((scores - final)[both].abs().mean()) if bool(both.any()) else math.nan


def _spread(scores: Tensor) -> float:
    """Standard deviation within problems of the scores that are finite, averaged over problems."""
    spreads = [float(row[row.isfinite()].std()) for row in scores if int(row.isfinite().sum()) > 1]
    return sum(spreads) / len(spreads) if spreads else 0.0


def _of(count: int, total: int) -> str:
    return "all" if count == total else "none" if count == 0 else str(count)


def _share(effect: float | None) -> str:
    return "–" if effect is None else f"{effect:.2g}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")
