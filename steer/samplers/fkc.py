"""Feynman-Kac correctors: annealed, multiplied, guided and reward-tilted models, with weights that make them exact.

    x ~ N(0, sigma^2 / A), A the sum of the exponents
    for every level:
        predict with every model; score what the look-ahead asks about, and take the derivatives that are needed
        weight for what the drift of the transport does not follow, and resample where the ESS is low
        x' ~ a step of the weighted SDE (`weighted_sde.engine` has its equations)
    weight by what exp(r(x_0) / T) is still owed

Skreta et al. 2025, Props. 3.1 to 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..core.event import OnStep
from ..core.start import Start, prior
from ..core.temperature import Temperature
from ..core.trajectory import Trajectory
from ..key import Key
from ..particles.birth_death import BirthDeath
from ..particles.selection import Resample, resample
from ..particles.tempering import Tempering
from ..processes.gaussian import GaussianProcess
from ..results.result import Result
from ..types import Reward
from ..weighted_sde.composite import Composite, Exponents, compose
from ..weighted_sde.engine import FeynmanKac, KernelRatio, Noise
from ..weighted_sde.look_ahead import LookAhead, x0_hat
from ..weighted_sde.loop import check_choices, check_weighted, weighted_loop
from ..weighted_sde.pilot import default_transport, settle_composite
from ..weighted_sde.transports import Transport


def fkc(
    process: GaussianProcess | Sequence[GaussianProcess] | Composite,
    reward: Reward | None = None,
    *,
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
    transport: Transport | None = None,
    weight: KernelRatio | FeynmanKac | None = None,
    noise: Noise = 1.0,
    look_ahead: LookAhead | None = None,
    tempering: Tempering | None = None,
    selection: Resample | BirthDeath | None = None,
    active: tuple[float, float] | None = None,
    sigma_data: float = 1.0,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of prod_i q_i(x)^a_i exp(r(x) / temperature), and the log of its normalizing constant.

    fkc(process, exponent=2.0) anneals, fkc([a, b]) is a product, fkc(conditional, unconditional=other, guidance=w) the
    distribution that classifier-free guidance means, other^(1 - w) conditional^w; a reward tilts any of them.

    Args:
        process: a process, several on one path and grid, or a `steer.Composite`. Their transition rules are not used.
        reward: as `steer.smc`; None for the composite itself.
        exponent: a_i: one number for all, one each, or a function of the Level that gives one each.
        unconditional: a process; with guidance w the target is unconditional^(1 - w) process^w.
        guidance: w, given with `unconditional`.
        start: `steer.prior`, a start that knows the reward (exponents must sum to 1), or a Trajectory to resume.
        transport: `score_transport`, `half_transport`, `base_transport`, `flow_transport`, or a control (`vcg()`,
            `ecg()`; see `steer.driftlite`). By default the score where exponents sum to 1, else the flow.
        weight: `KernelRatio()` by default for a reward at noise 1 (not for flow and controls), else
            `FeynmanKac(probes=1)`. Kernel ratios need no derivative of the reward with `base_transport`.
        noise: v, injected noise over the models' own; weights are right for any (`FeynmanKac`).
        look_ahead: what the reward is asked about on the way: `x0_hat()`, `at_state()`, `ode_steps(n)`, `flow_map(f)`.
        tempering: exponent of the reward's value by level, as `steer.difference(tempering=...)`.
        selection: `steer.resample(...)`, below half of N by default, or `steer.birth_death()`.
        active: (low, high) of t outside which weights are dropped: biased, with a warning.
        sigma_data: standard deviation per coordinate that the step's integrals are exact for; any is right in the
            limit.
        Others: as `steer.smc`.

    Returns:
        Result with x [B, N, *event], reward [B, N] (zeros without one), log_weight [B, N], and log_evidence [B], the
        log of the integral of the target. At finite steps both are biased by O(1 / steps); halve the steps to see by
        how much.

    Raises:
        SteerError: for parts that do not go together.
        ModelError: for components on different paths or grids.
        Others: as `steer.smc`. Warns (UserWarning) of an active interval, of noise v < 1 - 1 / A, and of targets that
            it can see are not normalisable.

    Cost: per problem N K network rows per component, K = process.steps, and with FeynmanKac weights of a reward up to
    twice that; backward passes where derivatives are needed: one per probe for a divergence, one for a gradient of the
    value.

    Source: Skreta et al. 2025 (2503.02819), Props. 3.1 to 3.4 and 4.1.
    Differs: A != 1 moves along the probability flow by default (weights of their score transport have no finite
    variance in the noise phase for A > 1.21); systematic resampling by ESS instead of at every step; the normalizing
    constant keeps its x-independent term; coefficients are integrated over steps; the last step is the prediction;
    nothing is clamped.
    """
    target = compose(process, exponent=exponent, unconditional=unconditional, guidance=guidance)
    transport = transport or default_transport(target)
    if weight is None:
        by_kernel = reward is not None and noise == 1.0 and not transport.flow
        weight = KernelRatio() if by_kernel else FeynmanKac(probes=1)
    check_choices(target, transport, weight, noise, active)
    common: dict[str, Any] = {"batch": batch, "key": key, "seed": seed}
    choices: dict[str, Any] = {"transport": transport, "weight": weight, "noise": noise, "active": active}
    choices |= {"look_ahead": look_ahead or x0_hat(), "tempering": tempering, "sigma_data": sigma_data}
    choices |= {"start": start, "selection": selection or resample(), "particles": particles}
    check = partial(check_weighted, target, reward, on_step=on_step, **choices, **common)
    asked = settle_composite(
        target, reward, temperature=temperature, ess=ess, kl=kl, budget=budget, check=check, **common
    )
    result, _ = weighted_loop(
        target,
        reward,
        budget=asked.budget,
        temperature=asked.temperature,
        keep_states=keep_states,
        on_step=asked.on_step(on_step),
        name="fkc",
        **choices,
        **common,
    )
    return asked.told(result)
