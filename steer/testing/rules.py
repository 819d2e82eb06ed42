"""The check of transition rules."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..key import Key, as_key
from ..models.chain import chain_law
from ..models.mixture import gaussian
from ..particles.proposals import bootstrap, guided
from ..particles.selection import resample
from ..processes.gaussian import GaussianProcess
from ..processes.schedules import VP, RectifiedFlow
from ..processes.second_order import noisy, state_shape
from ..processes.transitions import ode
from ..samplers.smc import smc
from ..types import Rule
from .statistics import LIMIT, CheckFailed, worst, z_scores
from .targets import LINEAR, Nothing, gaussian_chain


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
        process = gaussian_chain(schedule, rule, 8)
        for k in range(process.steps):
            _check_transition(process, k, key.fold("transition"))
        if converges:
            _check_small_steps(schedule, rule)
        noisy = any(process.stochastic(k) for k in range(process.steps))
        for proposal in (bootstrap, guided(0.2)) if noisy else (bootstrap,):
            result = smc(
                process,
                LINEAR,
                batch=runs,
                particles=12,
                proposal=proposal,
                selection=resample(threshold=0.5 if noisy else 0.0),
                key=key.fold("smc"),
            )
            score, name = worst(z_scores(result, chain_law(process).exact(LINEAR)))
            if not score < LIMIT:
                raise CheckFailed(
                    f"SMC under {rule} on {schedule} misses the chain's own exact {name} by {score:.1f} standard "
                    f"errors (limit {LIMIT}): its log_prob or shift does not go with what it draws"
                )
            worst_z = max(worst_z, score)
    return worst_z


def _check_transition(process: GaussianProcess, k: int, key: Key) -> None:
    here, there = process.levels[k], process.levels[k + 1]
    shapes = {"x": state_shape(process, k), "x0": process.event}
    x, x0 = (key.fold(name).at(k).normal((2, 64, *shape)) for name, shape in shapes.items())
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
    if not torch.allclose(step.shift(torch.ones_like(x0)).mean, step.mean + 1.0):
        raise CheckFailed("shift(delta) must move the mean by delta")
    if not step.stochastic:
        if step.std != 0.0:
            raise CheckFailed(f"a step of std {step.std} is stochastic")
        return
    drawn = step.sample(key.at(k))
    away = (noisy(process, drawn) - step.mean) / step.std
    density = (-0.5 * away.square() - math.log(step.std) - 0.5 * math.log(2.0 * math.pi)).sum(2)
    if not torch.allclose(step.log_prob(drawn), density, rtol=1e-6, atol=1e-6):
        raise CheckFailed("log_prob must be the log-density of N(mean, std^2), summed over the event")
    spread = float(away.square().mean())
    if abs(spread - 1.0) > LIMIT * math.sqrt(2.0 / away.numel()):
        raise CheckFailed(f"draws from level {k} have {spread:.3f} times the variance that std says")


def _check_small_steps(schedule: Any, rule: Rule) -> None:
    """The chain's distribution tends to the data's: half the error, or nearly, for half the step."""
    data = gaussian([0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=schedule, steps=2, dtype=torch.float64)
    target = data.exact(Nothing())
    errors = []
    for steps in (50, 200):
        law = chain_law(gaussian_chain(schedule, rule, steps)).exact(Nothing())
        errors.append(float((law.cov - target.cov).norm() + (law.mean - target.mean).norm()))
    # Grids start at t = .9, below pure noise, where the prior N(0, sigma^2) is a little off: what that leaves stays.
    floor = chain_law(gaussian_chain(schedule, ode(), 200)).exact(Nothing())
    rest = float((floor.cov - target.cov).norm() + (floor.mean - target.mean).norm())
    if errors[1] > rest + 0.02 and errors[1] - rest > 0.5 * (errors[0] - rest):
        raise CheckFailed(
            f"as steps get small the chain must tend to the data; on {schedule} its mean and covariance are off by "
            f"{errors[0]:.3f} at 50 steps and {errors[1]:.3f} at 200, where {rest:.3f} is due to the start"
        )
