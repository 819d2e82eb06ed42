"""A few unsteered samples, measured before a run: what a process and a reward allow, and which method to use."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.loop import Loop
from ..core.objective import FINISHED, Objective
from ..core.run import Run
from ..core.tilt import Expected, Tilt
from ..core.trajectory import Trajectory
from ..cost import rows_between
from ..errors import BudgetError, NotDifferentiableError
from ..key import Key
from ..processes.gaussian import has_levels
from ..processes.second_order import noisy
from ..types import GaussianTransition, ReverseProcess, Reward
from .advice import advice
from .choice import Setting, choose, price_of
from .findings import Gradient, PredictionReliability, Preflight

_PROBED = 8  # steps at which predictions are scored, at most
_CHAINS = 16  # what the recommended budget pays for


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
    found = probed(run, samples, _evenly(run.process.steps, _PROBED), gradient=True).found
    setting = Setting.of(run, "best", _CHAINS, price_of(found.price))
    best, population = choose(setting, found), choose(setting._replace(goal="population"), found)
    said = {"options": dict(best.options), "advice": advice(found, best, population)}
    return replace(found, method=best.method, budget=_CHAINS * setting.rows, **said)


class Probe(NamedTuple):
    """Unsteered samples and what they say.

    found:  the measurements, without a recommendation.
    x:      the samples, [B, n, *event].
    reward: their scores, [B, n].
    root:   slot of the noise that each began from, [B, n].
    """

    found: Preflight
    x: Tensor
    reward: Tensor
    root: Tensor


def probed(run: Run, samples: int, levels: Collection[int], *, gradient: bool) -> Probe:
    """Runs `samples` plain chains for each problem, and measures them.

    levels: at which predictions are scored. gradient: whether that of the reward is measured too.
    """
    process, objective, meter, key, batch = run.process, run.objective, run.meter, run.key, run.problems
    drawing = [k for k in range(process.steps) if process.stochastic(k)]
    x = process.prior(key.fold("prior"), batch, samples)
    root = torch.arange(samples, device=x.device) // (2 if drawing else 1)
    x = x[:, root]  # two chains from every starting noise, where they differ
    start, middle = x, next((k for k in drawing if k >= process.steps // 2), process.steps // 2)
    halfway, seen, loop, clock = x, {}, Loop(run), _Clock(x.device)
    with loop.keeping_partial(), torch.no_grad():
        for k in range(process.steps):
            loop.partial = Trajectory.begin(process, x, k=k)
            halfway = x if k == middle else halfway
            with clock.timing("network", rows_between(process, k, k + 1)):
                x0 = process.denoise(x, k, key)
            if k in levels:
                with clock.timing("reward"):
                    seen[k] = objective(process.complete(x, x0), f"of predictions at step {k} of {process.steps}")
            x = process.transition(x, x0, k).sample(key.fold("step").at(k))
        loop.partial = Trajectory.begin(process, x, k=process.steps)
        with clock.timing("reward"):
            final = objective(x, FINISHED)
    spent = meter.cost()  # before the gradient, whose forward pass takes longer
    seed_effect, noise_effect = _effects(process, x, noisy(process, start), bool(drawing))
    finite = final[final.isfinite()]
    slope = Gradient(False, "not looked for", middle)
    if gradient:
        slope = _gradient(process, objective, halfway, middle, run.temperature, key)
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
        price=clock.price,
        cost=meter.cost(),
        method="",
        options={},
        budget=0,
        advice=(),
    )
    return Probe(found, x, final, root.expand(batch, -1))


class _Clock:
    """The fastest call of each kind, per row: other work on the machine slows some calls down, and none up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.fastest = device, {"network": math.inf, "reward": math.inf}

    @contextmanager
    def timing(self, kind: str, rows: int = 1) -> Iterator[None]:
        """Times a call of so many rows a sample."""
        began = self._now()
        yield
        self.fastest[kind] = min(self.fastest[kind], (self._now() - began) / rows)

    @property
    def price(self) -> float:
        """Of a score with its decode, in network rows."""
        return self.fastest["reward"] / max(self.fastest["network"], 1e-12)

    def _now(self) -> float:
        if self.device.type == "cuda":  # whose calls return before they are done
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _temperatures(final: Tensor, groupwise: bool, pooled: bool, temperature: float) -> tuple[Expected, ...]:
    """What to expect of temperatures, that of the call among them, by the final rewards [B, n]."""
    if groupwise or not bool((final > -torch.inf).any(1).all()):
        return ()
    return Tilt.of(final, pooled=pooled).table(temperature)


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


def _evenly(steps: int, count: int) -> set[int]:
    """At most so many steps, evenly spaced, the first and the last among them."""
    return {round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}


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
