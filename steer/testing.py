"""Checks for parts of your own: samplers, transition rules, resamplers, rewards.

Each raises `CheckFailed`, which names what was expected and what came, or returns the largest |z| of its statistics.
The targets are known in closed form, so the statistical checks need no reference implementation. docs/extending.md
shows them at work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .core.resampling import Resampler
from .errors import NonFiniteError, SteerError
from .key import Key, as_key
from .models.chain import chain_law
from .models.mixture import Exact, ExactStep, GaussianMixture, gaussian, gaussian_mixture
from .particles.proposals import bootstrap, guided
from .particles.selection import resample
from .processes.gaussian import GaussianProcess, from_denoiser
from .processes.schedules import VP, RectifiedFlow, uniform_times
from .processes.transitions import ode
from .results.result import Law, Result
from .samplers.smc import smc
from .types import QuadraticForm, RewardSpec, Rule

LIMIT = 4.0
"""A statistic with |z| above this fails: 6e-5 two-sided for one normal."""


class CheckFailed(AssertionError):
    """A part does not keep its contract. The message says which, what was expected and what came."""


def check_sampler(
    method: Callable[..., Result],
    *,
    law: Law = "target",
    particles: int = 12,
    runs: int = 256,
    key: Key | int = 0,
    **options: Any,
) -> float:
    """Puts a method through what every method of `steer.methods()` owes.

    Shapes, dtypes and normalised weights; `result.law`; the same result for the same key and another for another; the
    global random generator left alone; costs equal to a spy's count; the budget kept; no influence of other problems
    in the batch; no autograd graph left; NaN rewards refused with what was paid for in `.partial`; and for a sampler of
    a distribution, weighted means and normalizing constants equal to the closed form.

    Args:
        method: `f(process, reward, *, batch, particles, budget, temperature, key, ...) -> Result`.
        law: what its weighted means estimate, as `Result.law`: "none" for a search, whose samples are not compared.
        particles: N of the statistical runs; more where weights are rarely usable.
        runs: independent problems that statistics are taken over.
        key: names the draws of the checks.
        options: passed on to the method.

    Returns:
        The largest |z| met, 0 for a search.

    Raises:
        CheckFailed: naming the first promise that is broken.

    Cost: some 30 runs on mixtures in the plane, a few seconds.
    """
    key = as_key(key)

    def run(process: GaussianProcess, reward: Callable[..., Any], **more: Any) -> Result:
        return method(process, reward, **{**options, **more})

    _check_result(run, law, key)
    _check_repeats(run, key)
    _check_cost(run, key)
    _check_independence(run, key)
    _check_bad_reward(run, key)
    return 0.0 if law == "none" else _check_distribution(run, law, particles, runs, key)


def check_rule(rule: Rule, *, converges: bool = True, runs: int = 512, key: Key | int = 0) -> float:
    """Checks a transition rule: its density, its noise scale, what it leaves as steps get small, and its weights.

    Args:
        rule: `rule(x, x0, here, there) -> Transition` with `rule.std(here, there)`.
        converges: whether its chain tends to the data as steps get small. Rules whose noise does not shrink with the
            step, as `steer.cps` and `steer.churn`, do not.
        runs: independent problems of the statistical part.
        key: names the draws of the checks.

    Returns:
        The largest |z| of SMC under the rule, with and without guidance, against the exact distribution of the chain.

    Raises:
        CheckFailed: where `std` is not that of the transition, the log-density is not that of what is drawn, particles
            influence one another, or the chain does not tend to the data as its steps get small.

    Cost: about ten seconds.
    """
    key, worst_z = as_key(key), 0.0
    for schedule in (VP(), RectifiedFlow()):
        process = _gaussian_chain(schedule, rule, 8)
        for k in range(process.steps):
            _check_transition(process, k, key.fold("transition"))
        if converges:
            _check_small_steps(schedule, rule)
        noisy = any(process.stochastic(k) for k in range(process.steps))
        for proposal in (bootstrap, guided(0.2)) if noisy else (bootstrap,):
            result = smc(
                process,
                _LINEAR,
                batch=runs,
                particles=12,
                proposal=proposal,
                selection=resample(threshold=0.5 if noisy else 0.0),
                key=key.fold("smc"),
            )
            score, name = worst(z_scores(result, chain_law(process).exact(_LINEAR)))
            if not score < LIMIT:
                raise CheckFailed(
                    f"SMC under {rule} on {schedule} misses the chain's own exact {name} by {score:.1f} standard "
                    f"errors (limit {LIMIT}): its log_prob or shift does not go with what it draws"
                )
            worst_z = max(worst_z, score)
    return worst_z


def check_resampler(resampler: Resampler, *, runs: int = 4096, key: Key | int = 0) -> float:
    """Checks that a resampler makes, in expectation, N W_n copies of particle n, also where N changes.

    Args:
        resampler: `(log_weight [B, N], key, count) -> ancestors [B, count]`.
        runs: independent problems that counts are averaged over.
        key: names the draws.

    Returns:
        The largest |z| of mean numbers of copies.

    Raises:
        CheckFailed: where numbers of copies are biased, or ancestors have another shape or range.
    """
    weight = torch.tensor([0.05, 0.3, 0.0, 0.25, 0.1, 0.3], dtype=torch.float64)
    log_weight, worst_z = weight.log().expand(runs, -1), 0.0
    for count in (6, 4, 9):
        ancestors = resampler(log_weight.clone(), as_key(key).fold("resampler", count), count)
        if ancestors.shape != (runs, count) or ancestors.dtype != torch.int64:
            raise CheckFailed(f"ancestors must be int64 of shape {(runs, count)}, got {_described(ancestors)}")
        if bool((ancestors < 0).any() | (ancestors >= 6).any()):
            raise CheckFailed(f"ancestors are indices in [0, 6), got {int(ancestors.min())} to {int(ancestors.max())}")
        copies = torch.nn.functional.one_hot(ancestors, 6).double().sum(1) - count * weight
        for n, column in enumerate(copies.T):
            score = abs(z(column))
            if not score < LIMIT:
                raise CheckFailed(
                    f"particle {n} of weight {weight[n]:.2f} must get {count * weight[n]:.2f} copies of {count} on "
                    f"average, got {float(column.mean() + count * weight[n]):.3f} over {runs} runs (z = {score:.1f})"
                )
            worst_z = max(worst_z, score)
    return worst_z


def check_reward(reward: Callable[..., Any], samples: Tensor, *, prompts: Sequence[str] | None = None) -> None:
    """Checks that a reward is a function of its samples, and keeps what its `spec` says.

    One finite number (or -inf) a sample; the same scores twice, in any order and in parts (unless `spec.scope` is
    "groupwise"); samples left as they were; scores within `spec.bounds`; a gradient where `spec.gradient` is "exact",
    equal to finite differences along a random direction, and none where it is "none".

    Args:
        reward: `f(samples) -> [M]`, or `f(samples, prompts=...)`.
        samples: at least three samples of the kind it is meant for, [M, *event], different from one another.
        prompts: M texts, for a reward that reads them.

    Raises:
        CheckFailed: naming the first promise that is broken.
    """
    if len(samples) < 3:
        raise SteerError(f"a reward is checked on at least three different samples, got {len(samples)}")
    spec = getattr(reward, "spec", None)
    spec = spec if isinstance(spec, RewardSpec) else RewardSpec()

    def scored(x: Tensor, rows: Sequence[int]) -> Tensor:
        texts = {} if prompts is None else {"prompts": [prompts[row] for row in rows]}
        return torch.as_tensor(reward(x, **texts))

    everyone, before = list(range(len(samples))), samples.clone()
    with torch.no_grad():
        scores = scored(samples, everyone)
    if scores.shape != (len(samples),):
        raise CheckFailed(
            f"{len(samples)} samples must get scores of shape ({len(samples)},), got {_described(scores)}"
        )
    if not torch.equal(samples, before):
        raise CheckFailed("the reward wrote into its samples; work on a copy")
    if bool(scores.isnan().any() | (scores == torch.inf).any()):
        raise CheckFailed(f"scores must be finite, or -inf to forbid a sample, got {scores.tolist()}")
    low, high = spec.bounds
    if bool(((scores < low) & (scores > -torch.inf)).any() | (scores > high).any()):
        raise CheckFailed(f"scores must be in the bounds {spec.bounds} that the spec states, got {scores.tolist()}")
    with torch.no_grad():
        kept = scores.clone()
        again = scored(samples, everyone)
        if not torch.equal(kept, scores):
            raise CheckFailed("a second call changed the scores of the first: return a new tensor every time")
        _same("called twice", again, scores)
        if spec.scope == "pointwise":
            flipped = scored(samples.flip(0), everyone[::-1]).flip(0)
            _same("in reverse order", flipped, scores)
            parts = [scored(samples[i : i + 1], [i]) for i in everyone]
            _same("one by one", torch.cat(parts), scores)
    _check_gradient(scored, samples, everyone, spec)


def z_scores(result: Result, target: Exact, mixture: GaussianMixture | None = None) -> dict[str, float]:
    """z of the normalizing constant, means and second moments over the problems of a result.

    Every one is exactly unbiased at any number of particles: for a weighted population with evidence estimate Z_hat and
    weighted mean f_hat, E[Z_hat (f_hat - E f)] = 0 and E[Z_hat] = Z. Problems are independent, so the mean over its
    standard error is a standard normal up to the central limit.

    Args:
        result: of B problems of one target, [B, N, D].
        target: the closed form, `process.exact(reward)`.
        mixture: also compares the masses of the tilted modes.

    Returns:
        Name of the statistic -> z.
    """
    relative = (result.log_evidence - target.log_evidence).exp()
    centred = result.mean(lambda x: x.double().flatten(1) - target.mean)
    square = result.mean(lambda x: (x.double().flatten(1) - target.mean).square() - target.cov.diagonal())
    columns = {"evidence": relative - 1.0}
    columns |= {f"mean{i}": relative * centred[:, i] for i in range(centred.shape[1])}
    columns |= {f"variance{i}": relative * square[:, i] for i in range(square.shape[1])}
    if mixture is not None:
        tilted = GaussianMixture(target.means, target.covs, target.weights)
        masses = result.mean(lambda x: tilted.responsibilities(x.double().flatten(1)) - target.weights)
        columns |= {f"mass{i}": relative * masses[:, i] for i in range(masses.shape[1])}
    return {name: z(column) for name, column in columns.items()}


def z(values: Tensor) -> float:
    """Mean over its standard error. A column without spread passes only at exactly zero."""
    error = values.std() / math.sqrt(len(values))
    if error == 0.0:
        return 0.0 if bool((values.abs() < 1e-12).all()) else math.inf
    return float(values.mean() / error)


def worst(scores: dict[str, float]) -> tuple[float, str]:
    """The largest |z| and its name; NaN counts as infinite."""
    return max((math.inf if math.isnan(value) else abs(value), name) for name, value in scores.items())


class _Linear:
    """r(x) = b'x."""

    vector = torch.tensor([0.5, -0.3], dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        return x.double() @ self.vector

    def quadratic_form(self, size: int) -> QuadraticForm:
        return QuadraticForm(torch.zeros(size, size, dtype=torch.float64), self.vector, 0.0)


_LINEAR = _Linear()


def _mixture() -> GaussianMixture:
    covs = [[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 0.6]]]
    return GaussianMixture([[1.5, 0.0], [-1.5, 1.0]], covs, [0.6, 0.4])


def _exact_chain(schedule: Any, steps: int = 5) -> GaussianProcess:
    """A chain whose every transition is the true reverse kernel: no error of discretisation."""
    mixture, grid = _mixture(), uniform_times(schedule, steps)
    return gaussian_mixture(
        mixture.means,
        mixture.covs,
        mixture.weights,
        schedule=schedule,
        times=grid,
        transition=ExactStep(mixture),
        dtype=torch.float64,
    )


def _gaussian_chain(schedule: Any, rule: Rule, steps: int) -> GaussianProcess:
    """Gaussian data under a rule: every step is affine, so the distribution of the chain is known."""
    grid = uniform_times(schedule, steps, start=0.9)
    return gaussian(
        [0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=schedule, times=grid, transition=rule, dtype=torch.float64
    )


def _learned(steps: int = 5) -> GaussianProcess:
    """A process without a closed form of its steps, as a pretrained model is."""
    mixture = _mixture()
    return gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64)


def _check_result(run: Callable[..., Result], law: Law, key: Key) -> None:
    result = run(_learned(), _LINEAR, particles=6, batch=2, key=key)
    if result.x.shape[0] != 2 or result.x.shape[2:] != (2,) or result.reward.shape != result.x.shape[:2]:
        raise CheckFailed(f"x must be [B, N, *event] and reward [B, N], got {_described(result.x, result.reward)}")
    for name in ("reward", "log_weight", "log_evidence"):
        tensor = getattr(result, name)
        if tensor.dtype != torch.float64 or tensor.requires_grad:
            raise CheckFailed(f"{name} must be float64 without a gradient, got {_described(tensor)}")
    total = result.log_weight.exp().sum(1)
    if not torch.allclose(total, torch.ones_like(total)):
        raise CheckFailed(f"weights must sum to one within each problem, got {total.tolist()}")
    if not torch.allclose(result.reward, _LINEAR(result.x.flatten(0, 1)).view(result.reward.shape)):
        raise CheckFailed("result.reward must be the reward of result.x")
    if result.law != law:
        raise CheckFailed(f"result.law must be {law!r}, got {result.law!r}; set it where the Result is made")


def _check_repeats(run: Callable[..., Result], key: Key) -> None:
    before = torch.get_rng_state()
    first, again, other = (run(_learned(), _LINEAR, particles=6, key=k) for k in (key, key, key.fold("other")))
    if not (torch.equal(first.x, again.x) and torch.equal(first.log_weight, again.log_weight)):
        raise CheckFailed("the same key must give the same result to the last bit: draw from the key alone")
    if torch.equal(first.x, other.x):
        raise CheckFailed("another key must give another result")
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed("torch's global generator was drawn from: draw from the key alone")


def _check_cost(run: Callable[..., Result], key: Key) -> None:
    model, counted = _learned(), {"rows": 0, "scored": 0}

    def denoise(x: Tensor, t: float) -> Tensor:
        counted["rows"] += x.shape[0] * x.shape[1]
        return model.denoiser(x, t)

    def score(x: Tensor) -> Tensor:
        counted["scored"] += len(x)
        return _LINEAR(x)

    process = from_denoiser(denoise, model.schedule, model.times, event=model.event, dtype=model.dtype)
    for given in ({"particles": 7}, {"budget": 83}):
        counted.update(rows=0, scored=0)
        cost = run(process, score, batch=2, key=key, **given).cost
        if (cost.nfe, cost.rewards) != (counted["rows"], counted["scored"]):
            raise CheckFailed(
                f"result.cost must count every call, {counted['rows']} network rows and {counted['scored']} rewards; "
                f"got {cost.nfe} and {cost.rewards}: evaluate on the run's own process and objective"
            )
        if "budget" in given and cost.nfe > 2 * 83:
            raise CheckFailed(f"a budget of 83 network rows per problem was exceeded: {cost.nfe / 2:g}")


def _check_independence(run: Callable[..., Result], key: Key) -> None:
    alone, together = (run(_learned(), _LINEAR, particles=6, batch=batch, key=key) for batch in (1, 3))
    if not torch.allclose(together.x[:1], alone.x, rtol=1e-9, atol=1e-9):
        raise CheckFailed("a problem must give the same result alone and in a batch: particles interact within axis 0")
    if torch.equal(together.x[0], together.x[1]):
        raise CheckFailed("the problems of a batch must have noise of their own")


def _check_bad_reward(run: Callable[..., Result], key: Key) -> None:
    def reward(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) == 2, torch.nan, _LINEAR(x))

    try:
        run(_learned(), reward, particles=6, key=key)
    except NonFiniteError:
        return
    except Exception as error:
        raise CheckFailed(f"a NaN reward must be a NonFiniteError, got {type(error).__name__}: {error}") from error
    raise CheckFailed("a NaN reward went unnoticed: check scores with steer.core.objective.check_finite")


def _check_distribution(run: Callable[..., Result], law: Law, particles: int, runs: int, key: Key) -> float:
    found = 0.0
    for schedule in (VP(), RectifiedFlow()):
        process = _exact_chain(schedule)
        target = process.exact(_LINEAR if law == "target" else _Nothing())
        for problems in (runs, 16 * runs):  # a chance excess is judged by more problems under another key
            result = run(process, _LINEAR, batch=problems, particles=particles, key=key.fold("law", problems))
            if law == "model":
                result = replace(result, log_evidence=torch.zeros_like(result.log_evidence))
            score, name = worst(z_scores(result, target, _mixture()))
            if score < LIMIT:
                break
        else:
            raise CheckFailed(
                f"on {schedule}, {name} is off by {score:.1f} standard errors over {16 * runs} runs (limit {LIMIT}): "
                f"weighted means do not estimate what law={law!r} says"
            )
        found = max(found, score)
    return found


class _Nothing:
    """r(x) = 0."""

    def quadratic_form(self, size: int) -> QuadraticForm:
        return QuadraticForm(torch.zeros(size, size).double(), torch.zeros(size).double(), 0.0)


def _check_transition(process: GaussianProcess, k: int, key: Key) -> None:
    here, there = process.levels[k], process.levels[k + 1]
    x, x0 = (key.fold(name).at(k).normal((2, 64, 2)) for name in ("x", "x0"))
    step = process.transition(x, x0, k)
    std = process.rule.std(here, there)
    if not (math.isfinite(std) and std >= 0.0 and math.isclose(std, step.std, rel_tol=1e-9, abs_tol=1e-12)):
        raise CheckFailed(f"rule.std says {std} for the step from level {k}, and its transition has std {step.std}")
    some = torch.arange(40, -1, -3)
    if not torch.allclose(process.transition(x[:, some], x0[:, some], k).mean, step.mean[:, some]):
        raise CheckFailed("the mean of a particle's step must depend on that particle alone")
    half = process.transition(x.float(), x0.float(), k).mean
    if half.dtype != torch.float32:
        raise CheckFailed(f"a step keeps the dtype of its states, float32, got {half.dtype}")
    if not torch.allclose(step.shift(torch.ones_like(x)).mean, step.mean + 1.0):
        raise CheckFailed("shift(delta) must move the mean by delta")
    if not step.stochastic:
        if step.std != 0.0:
            raise CheckFailed(f"a step of std {step.std} is stochastic")
        return
    drawn = step.sample(key.at(k))
    away = (drawn - step.mean) / step.std
    density = (-0.5 * away.square() - math.log(step.std) - 0.5 * math.log(2.0 * math.pi)).sum(2)
    if not torch.allclose(step.log_prob(drawn), density, rtol=1e-6, atol=1e-6):
        raise CheckFailed("log_prob must be the log-density of N(mean, std^2), summed over the event")
    spread = float(away.square().mean())
    if abs(spread - 1.0) > LIMIT * math.sqrt(2.0 / away.numel()):
        raise CheckFailed(f"draws from level {k} have {spread:.3f} times the variance that std says")


def _check_small_steps(schedule: Any, rule: Rule) -> None:
    """The chain's distribution tends to the data's: half the error, or nearly, for half the step."""
    data = gaussian([0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=schedule, steps=2, dtype=torch.float64)
    target = data.exact(_Nothing())
    errors = []
    for steps in (50, 200):
        law = chain_law(_gaussian_chain(schedule, rule, steps)).exact(_Nothing())
        errors.append(float((law.cov - target.cov).norm() + (law.mean - target.mean).norm()))
    # Grids start at t = .9, below pure noise, where the prior N(0, sigma^2) is a little off: what that leaves stays.
    floor = chain_law(_gaussian_chain(schedule, ode(), 200)).exact(_Nothing())
    rest = float((floor.cov - target.cov).norm() + (floor.mean - target.mean).norm())
    if errors[1] > rest + 0.02 and errors[1] - rest > 0.5 * (errors[0] - rest):
        raise CheckFailed(
            f"as steps get small the chain must tend to the data; on {schedule} its mean and covariance are off by "
            f"{errors[0]:.3f} at 50 steps and {errors[1]:.3f} at 200, where {rest:.3f} is due to the start"
        )


def _check_gradient(scored: Callable[..., Tensor], samples: Tensor, rows: list[int], spec: RewardSpec) -> None:
    if not samples.is_floating_point() or spec.gradient not in ("exact", "none"):
        return
    x = samples.detach().double().requires_grad_() if spec.gradient == "exact" else samples.detach().requires_grad_()
    with torch.enable_grad():
        try:
            scores = scored(x, rows)
        except Exception as error:
            if spec.gradient == "none":
                return
            raise CheckFailed(
                f"the spec says gradient='exact', and on float64 samples that want one the reward raised {error}"
            ) from error
    if spec.gradient == "none":
        if scores.requires_grad:
            raise CheckFailed("the spec says gradient='none', and the scores carry one")
        return
    if not scores.requires_grad:
        raise CheckFailed("the spec says gradient='exact', and the scores carry none")
    finite = scores > -torch.inf
    (gradient,) = torch.autograd.grad(scores[finite].double().sum(), x)
    direction = Key(0).fold("direction").normal((1, *samples.shape))[0].to(x.dtype)
    step = 1e-4 * float(samples.detach().double().std() or 1.0)
    with torch.no_grad():
        up, down = (scored(x + sign * step * direction, rows).double() for sign in (1.0, -1.0))
    slope = (gradient * direction).flatten(1).sum(1)[finite]
    numeric = ((up - down) / (2.0 * step))[finite]
    if not torch.allclose(slope.double(), numeric, rtol=2e-2, atol=2e-2 * float(numeric.abs().max())):
        raise CheckFailed(
            f"the gradient along a random direction is {slope.tolist()}, and finite differences give {numeric.tolist()}"
        )


def _same(how: str, scores: Tensor, expected: Tensor) -> None:
    if not torch.allclose(scores.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
        raise CheckFailed(
            f"scores must not depend on the call: {how} they are {scores.tolist()}, and were {expected.tolist()}; say "
            "scope='groupwise' in the spec if a score is meant to depend on the other samples"
        )


def _described(*tensors: Any) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
