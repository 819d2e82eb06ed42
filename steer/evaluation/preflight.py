"""A few unsteered samples, measured before a run: what a process and a reward allow, and which method to use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.loop import Loop
from ..core.objective import FINISHED, Objective
from ..core.run import Run
from ..core.tilt import Expected, Tilt
from ..core.trajectory import Trajectory
from ..cost import Cost
from ..errors import BudgetError, NotDifferentiableError
from ..key import Key
from ..processes.gaussian import has_levels, is_gaussian
from ..processes.second_order import noisy
from ..types import GaussianTransition, ReverseProcess, Reward

_PROBED = 8  # steps at which predictions are scored, at most
_USABLE = 0.4  # rank correlation from which a prediction is worth selecting by
_SAME = 1e-3  # samples that differ by less than this share of their spread are the same


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
        cost: What this preflight spent.
        method, budget: Recommended for `steer.sample`; the budget in NFE (network rows) per problem.
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
        sights = "  ".join(f"{s.k}: {_signed(s.rank_correlation)}" for s in self.sights)
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
        lines = {
            "steps": f"{self.steps}, {_of(self.stochastic_steps, self.steps)} draw noise",
            "samples differ by": f"{between} between starting noises, {within} from the same one",
            "reward": reward,
            "r(x0_hat) ranks": f"{sights}  (step: rank correlation with the final reward, {self.samples} samples)",
            "gradient": gradient,
            "milliseconds": f"prediction {network}, decode {decode}, reward {score}",
            "recommended": f'method="{self.method}", budget={self.budget:,} NFE (network rows) per problem',
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
    """What steering this process by this reward can gain, and how: from a few unsteered samples.

    Args:
        process: The model.
        reward: Function of samples [M, ...] to [M]; higher is better.
        samples: Chains per problem, in pairs that share their starting noise where steps draw noise of their own.
            Four show what is broken, but rank coarsely; take 16 where the ranking decides.
        batch: Independent problems; a conditioned process fixes it.
        temperature: > 0; scales the gradient that is reported, and gets a line in the table of temperatures.
        key: Random seed.
        seed: Another name for `key`.

    Returns:
        The measurements, and a recommended method and budget. `print` it.

    Raises:
        BudgetError: Fewer than four samples.
        SteerError: What a run would raise, with the same message: RewardError, NonFiniteError, ShapeError, ... The
            reward is called after the first prediction, so a broken one costs next to nothing.

    Cost: per problem, samples * K NFE (K = process.steps; times process.rows), one prediction with a backward pass,
    and as many rewards as `samples` at no more than nine steps.
    """
    if samples < 4:
        raise BudgetError(f"preflight ranks samples, and needs at least 4 of them; got samples={samples}")
    run = Run.open(
        "preflight", process, reward, batch=batch, temperature=temperature, key=key, seed=seed, groupwise=True
    )
    process, objective, meter, key, batch = run.process, run.objective, run.meter, run.key, run.problems
    drawing = [k for k in range(process.steps) if process.stochastic(k)]
    x = process.prior(key.fold("prior"), batch, samples)
    if drawing:
        x = x[:, torch.arange(samples, device=x.device) // 2]  # two chains from every starting noise
    start, middle = x, next((k for k in drawing if k >= process.steps // 2), process.steps // 2)
    halfway, seen, loop = x, {}, Loop(run)
    with loop.keeping_partial(), torch.no_grad():
        for k in range(process.steps):
            loop.partial = Trajectory.begin(process, x, k=k)
            halfway = x if k == middle else halfway
            x0 = process.denoise(x, k, key)
            if k in _probed(process.steps):
                seen[k] = objective(process.complete(x, x0), f"of predictions at step {k} of {process.steps}")
            x = process.transition(x, x0, k).sample(key.fold("step").at(k))
        loop.partial = Trajectory.begin(process, x, k=process.steps)
        final = objective(x, FINISHED)
    spent = meter.cost()  # before the gradient, whose forward pass takes longer
    slope = _gradient(process, objective, halfway, middle, run.temperature, key)
    seed_effect, noise_effect = _effects(process, x, noisy(process, start), bool(drawing))
    finite = final[final.isfinite()]
    found = Preflight(
        samples=samples,
        problems=batch,
        steps=process.steps,
        stochastic_steps=len(drawing),
        seed_effect=seed_effect,
        noise_effect=noise_effect,
        mean=float(finite.mean()) if len(finite) else math.nan,
        std=_spread(final),
        best=float(final.max()),
        forbidden=int((final == -torch.inf).sum()),
        sights=tuple(PredictionReliability(k, _rank_correlation(r, final), _error(r, final)) for k, r in seen.items()),
        gradient=slope,
        temperatures=_temperatures(final, objective.groupwise, process.problems is None, run.temperature),
        network_seconds=spent.seconds["network"] * process.rows / max(1, spent.nfe),
        reward_seconds=spent.seconds["reward"] / max(1, spent.rewards),
        decode_seconds=spent.seconds["decode"] / max(1, spent.decodes),
        cost=meter.cost(),
        method="",
        budget=0,
        advice=(),
    )
    method, advice = _recommended(found, process, objective.groupwise)
    particles = 1 if method == "rollout" else 16
    return replace(found, method=method, budget=particles * process.steps * process.rows, advice=advice)


def _temperatures(final: Tensor, groupwise: bool, pooled: bool, temperature: float) -> tuple[Expected, ...]:
    """What to expect of temperatures, that of the call among them, by the final rewards [B, n]."""
    if groupwise or not bool((final > -torch.inf).any(1).all()):
        return ()
    return Tilt.of(final, pooled=pooled).table(temperature)


def _recommended(found: Preflight, process: ReverseProcess, groupwise: bool) -> tuple[str, tuple[str, ...]]:
    """A method and the reasons for it, the decisive one first."""
    gaussian, advice = is_gaussian(process), []
    if found.forbidden == found.samples * found.problems:
        method = "best_of_n"
        advice.append("every sample was forbidden (-inf): use a reward that says how far off a sample is")
    elif not found.seeds_matter:
        method = "rollout"
        advice.append(
            "every seed gives the same sample, so no method can select among them: more samples will not help; "
            "change the prompt, the guidance scale or the transition (steer.ddim(eta=1.0)), or use a "
            "model that is less distilled"
        )
    elif not found.std > 1e-9 * max(1.0, abs(found.best)) and not found.forbidden:
        method = "rollout"
        advice.append(
            f"nothing can be gained: all {found.samples * found.problems} samples score {found.best:.4g}; use a reward "
            "that distinguishes them, or more samples= if it does so only rarely"
        )
    elif groupwise:
        method = "best_of_n"
        advice.append(
            "the reward scores a sample against the others of its group, so it can rank finished samples only"
        )
    elif not found.stochastic:
        method = "noise_search" if gaussian else "best_of_n"
        cure = "process.with_rule(steer.ddim(eta=1.0))" if gaussian else "a stochastic rule (steer.unmask, say)"
        advice.append(
            "no step draws noise (an ODE): copies of a particle stay identical, so only starting noises can be "
            f"searched; for particle methods and trees use a stochastic transition, {cure}"
        )
    elif (sight := found.clearest) is None:
        method = "best_of_n"
        advice.append(
            "at no step before the last does r(x0_hat) rank samples as the final reward does, so selecting early would "
            "be by chance: rank finished samples, or use a reward that can score predictions"
        )
    else:
        method = "smc"
        advice.append(
            f"r(x0_hat) ranks samples early: at step {sight.k} of {found.steps} its rank correlation with the final "
            f"reward is {_signed(sight.rank_correlation)}, so selecting early can pay: smc for a population, "
            "search.dts_star for one best sample"
        )
        early = found.usable_from or 0
        if early > 0.25 * found.steps:
            advice.append(
                f"before step {early} its ranking is mostly chance; selecting there mostly costs diversity: begin at "
                f"it, weight=steer.difference(at=range({early}, {found.steps - 1}))"
            )
    return method, (*advice, *_remarks(found, method))


def _remarks(found: Preflight, method: str) -> list[str]:
    """Further advice."""
    said = []
    if method in ("smc", "best_of_n") and found.samples < 8 and found.std > 0.0:
        said.append(f"{found.samples} samples rank coarsely: use samples=16 before a decision that matters")
    if found.stochastic and found.seed_effect is not None and found.noise_effect is not None:
        if found.noise_effect < 0.1 * found.seed_effect:
            said.append(
                "steps draw noise, but the starting noise still decides nearly everything: prefer many starting noises"
            )
        elif found.seed_effect <= _SAME < found.noise_effect:
            said.append("the starting noise does not matter: all diversity comes from the noise of the steps")
    if found.gradient.available and method == "smc" and 0.0 < found.gradient.push < 10.0:
        said.append("the reward has a gradient of a useful size: try proposal=steer.guided(1.0)")
    elif found.gradient.available and found.gradient.push >= 10.0:
        said.append(
            f"the gradient would shift a step by {found.gradient.push:.3g} standard deviations of its noise: raise the "
            "temperature, or use a small guidance scale"
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
        return Gradient(False, "the reward scores a sample against the others of its group", k)
    try:
        _, _, gradient = objective.value_and_grad(x[:, :1], k, 1.0 / temperature, key)
    except NotDifferentiableError:
        return Gradient(False, "the reward returns scores without one", k)
    except torch.OutOfMemoryError:
        return Gradient(False, "the backward pass runs out of memory; try from_pipeline(checkpoint_decode=True)", k)
    except RuntimeError as error:  # autograd's own: a module that cannot be differentiated
        return Gradient(False, f"the backward pass raised {next(iter(str(error).splitlines()), 'RuntimeError')}", k)
    norm = float(gradient.double().flatten(2).norm(dim=2).mean())
    if not math.isfinite(norm):
        return Gradient(False, "it is not finite", k)
    if norm == 0.0:
        return Gradient(False, "it is zero", k)
    step = process.transition(x[:, :1], noisy(process, x[:, :1]), k)
    std = step.std if isinstance(step, GaussianTransition) else 0.0
    return Gradient(True, "", k, norm, norm * std if std > 0.0 else math.nan)


def _effects(process: ReverseProcess, x: Tensor, start: Tensor, paired: bool) -> tuple[float | None, float | None]:
    """How much samples differ between starting states, and from the same one: see Preflight."""
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


def _usable(sight: PredictionReliability) -> bool:
    """Whether predictions at that step are worth selecting by."""
    return sight.rank_correlation is not None and sight.rank_correlation > _USABLE - 1e-9


def _probed(steps: int) -> set[int]:
    """At most eight steps, evenly spaced, the first and the last among them."""
    return {round(i * (steps - 1) / max(1, _PROBED - 1)) for i in range(_PROBED)}


def _rank_correlation(scores: Tensor, final: Tensor) -> float | None:
    """Spearman's, within problems, averaged over those where neither side is constant."""
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
    """Mean absolute difference, where both are finite."""
    both = scores.isfinite() & final.isfinite()
    return float((scores - final)[both].abs().mean()) if bool(both.any()) else math.nan


def _spread(scores: Tensor) -> float:
    """Standard deviation within problems of the scores that are finite, averaged over problems."""
    spreads = [float(row[row.isfinite()].std()) for row in scores if int(row.isfinite().sum()) > 1]
    return sum(spreads) / len(spreads) if spreads else 0.0


def _of(count: int, total: int) -> str:
    """A count in words, where it is all or none."""
    return "all" if count == total else "none" if count == 0 else str(count)


def _share(effect: float | None) -> str:
    """An effect as text."""
    return "–" if effect is None else f"{effect:.2g}"


def _signed(value: float | None) -> str:
    """A correlation as text, with its sign."""
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")
