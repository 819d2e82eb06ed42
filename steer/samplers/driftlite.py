"""DriftLite: a drift, solved for at every step, that keeps the weights of a weighted SDE equal.

    as `fkc`, but at every level, in every problem:
        bases = grad rho, S_q and x at every particle; rate = what the log-weights gain without a drift
        theta = least weighted variance of rate + theta . cost (VCG), or the Galerkin solution (ECG): 3 x 3
        move along g^2 / 2 theta . bases, and weight for it

Ren et al. 2025, Secs. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from ..core.event import OnStep, of_pass
from ..core.loop import keeping
from ..core.objective import num_problems
from ..core.start import PreparedStart, Start, prior
from ..core.temperature import Temperature
from ..core.trajectory import Trajectory
from ..cost import Cost, affordable
from ..errors import SteerError
from ..key import Key, as_key
from ..particles.birth_death import BirthDeath
from ..particles.selection import Resample, resample
from ..particles.tempering import Tempering
from ..processes.gaussian import GaussianProcess
from ..results.result import Result
from ..types import Reward
from ..weighted_sde.composite import Composite, Exponents, compose
from ..weighted_sde.engine import FeynmanKac, Noise
from ..weighted_sde.look_ahead import LookAhead, x0_hat
from ..weighted_sde.loop import check_choices, check_weighted, rows_per_particle, weighted_loop
from ..weighted_sde.pilot import settle_composite
from ..weighted_sde.transports import ecg, vcg


def driftlite(
    process: GaussianProcess | Sequence[GaussianProcess] | Composite,
    reward: Reward | None = None,
    *,
    control: Literal["vcg", "ecg"] = "vcg",
    exponent: float | Sequence[float] | Exponents = 1.0,
    unconditional: GaussianProcess | None = None,
    guidance: float | None = None,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: Temperature = 1.0,
    ess: float | None = None,
    kl: float | None = None,
    key: Key | int = 0,
    seed: int | None = None,
    start: Start | Trajectory = prior,
    probes: int | None = 1,
    passes: int = 1,
    noise: Noise = 1.0,
    look_ahead: LookAhead | None = None,
    tempering: Tempering | None = None,
    selection: Resample | BirthDeath | None = None,
    sigma_data: float = 1.0,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of prod_i q_i(x)^a_i exp(r(x) / temperature) that hardly need their weights.

    At every step, in every problem, a drift b = g^2 / 2 (theta_1 grad rho + theta_2 S_q + theta_3 x) is chosen by a 3 x
    3 linear system over the particles, and the weights account for it.

    Args:
        control: "vcg" minimises the variance of the weights' rate; "ecg" solves the energy form of the same problem,
            and needs log q along the path (estimated; noise 1 only).
        probes: Rademacher probes for divergences, None for exact ones (D backward passes).
        passes: iterative refinement: a pass starts from the coefficients of the last one, with fresh noise, and
            corrects them. All passes together stay within the budget; the last one is returned. Events of pass i are
            called "driftlite, pass i".
        selection: `steer.resample(threshold=0)` is the paper's plain VCG and ECG, the default (half of N) its VCG-SMC.
            For a reward tilt keep the default: three bases cannot make such weights equal.
        Others: as `steer.fkc`, of which this is the setting transport=vcg() or ecg().

    Returns:
        Result as `steer.fkc`. The coefficients come from the particles they move, so log_evidence and means are biased
        by O(1 / N), beside O(1 / steps).

    Raises:
        SteerError: for an unknown control, passes below 1, or several passes from a Trajectory.
        Others: as `steer.fkc`, which also says what it warns of. In a later pass, `.partial` is the Result of the last
            whole one.

    Cost: per problem and pass N K network rows per component, N (K - 1) backward passes per probe; with a reward
    another N (K - 1) rows (unless the look-ahead needs no prediction) and N (K - 1) (1 + probes) backward passes.

    Source: Ren et al. 2025 (DriftLite, 2509.21655), Secs. 3 and 4.
    Differs: centred moments, unit-diagonal scaling and a ridge (see `vcg`, and `transports` for that of ECG); the state
    is a basis instead of f, which is proportional to it and zero on variance-exploding paths; coefficients are
    integrated over steps.
    """
    if control not in ("vcg", "ecg"):
        raise SteerError(f'control is "vcg" or "ecg", got {control!r}')
    if passes < 1:
        raise SteerError(f"passes must be at least 1, got {passes}")
    if passes > 1 and isinstance(start, Trajectory):
        raise SteerError("every pass of a refinement begins at the noise: give a start, not a Trajectory, or passes=1")
    target = compose(process, exponent=exponent, unconditional=unconditional, guidance=guidance)
    transport, look_ahead, key = vcg() if control == "vcg" else ecg(), look_ahead or x0_hat(), as_key(key, seed)
    weight = FeynmanKac(probes)
    check_choices(target, transport, weight, noise, None)
    choices: dict[str, Any] = {"weight": weight, "noise": noise, "look_ahead": look_ahead, "tempering": tempering}
    choices |= {"active": None, "sigma_data": sigma_data, "start": start, "selection": selection or resample()}

    def affords(budget: int | None, temperature: float) -> tuple[int | None, int | None]:
        """Particles and budget of a pass."""
        if passes == 1:
            return particles, budget
        per_pass = rows_per_particle(target, reward is not None, weight, look_ahead)
        before = start.prepare(target, temperature)[1] if isinstance(start, PreparedStart) else 0
        return affordable(passes * per_pass, particles=particles, budget=budget, before=passes * before), None

    def check(budget: int | None) -> None:
        count, budget = affords(budget, 1.0)
        given: dict[str, Any] = {"particles": count, "transport": transport, "on_step": on_step, **choices}
        check_weighted(target, reward, budget, batch=batch, key=key, **given)

    asked = settle_composite(
        target, reward, temperature=temperature, ess=ess, kl=kl, batch=batch, budget=budget, key=key, check=check
    )
    count, per_pass = affords(asked.budget, asked.temperature)
    problems, report = num_problems(target, batch) if passes > 1 else batch, asked.on_step(on_step)

    def run(key: Key, thetas: dict[int, Tensor] | None, number: int, spent: Cost) -> tuple[Result, dict[int, Tensor]]:
        name = "driftlite" if passes == 1 else f"driftlite, pass {number}"
        return weighted_loop(
            target,
            reward,
            batch=problems,
            particles=count,
            budget=per_pass,
            temperature=asked.temperature,
            key=key,
            seed=None,
            transport=replace(transport, memory=thetas),
            keep_states=keep_states,
            on_step=of_pass(report, name, spent),
            name=name,
            **choices,
        )

    result, thetas = run(key, None, 1, Cost())
    for i in range(1, passes):
        if result.interrupted:
            break
        spent = result.cost
        with keeping(replace(result, interrupted=True)):
            later, thetas = run(key.fold("pass", i), thetas, i + 1, spent)
        result = replace(later, cost=spent + later.cost).by("driftlite")
    return asked.told(result)
