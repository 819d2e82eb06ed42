"""Ψ-Sampler: MCMC on the tilted prior, then guided SMC from what it found.

    C chains of pCNL on N(x; 0, sigma^2 I) exp(r(x0_predictor(x)) / T_m), N particles from the states that they keep
    guided SMC from there, whose first weights count only what the start has not: r / T - r / T_m

Yoon et al. 2025, Secs. 4-5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.event import OnStep
from ..core.temperature import Temperature, settle
from ..cost import check_counts, rows_between
from ..errors import BudgetError, SteerError
from ..key import Key
from ..particles.langevin import pcnl
from ..particles.mcmc_start import MCMCStart
from ..particles.potentials import Potential, default_weight
from ..particles.proposals import Proposal, ProposalFunction, bootstrap, guided
from ..particles.selection import Resample, resample
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .smc import check_smc, smc


def psi(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: Temperature = 1.0,
    ess: float | None = None,
    kl: float | None = None,
    key: Key | int = 0,
    seed: int | None = None,
    start: MCMCStart | None = None,
    share: float = 0.5,
    proposal: Proposal | ProposalFunction | None = None,
    weight: Potential | None = None,
    selection: Resample | None = None,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature), from particles that begin where the reward is high.

    Args:
        particles: N of the SMC stage, 16 by default; MCMC then gets share / (1 - share) times its network rows.
        budget: network rows per problem of both stages, never exceeded: N is what (1 - share) of it pays for, and MCMC
            runs on the rest. Given with particles, MCMC runs on what they leave.
        start: `pcnl()` by default; `mala(...)`, `ula(...)`, for rewards without a gradient `pcn(...)` or
            `elliptical_slice(...)`, or settings of their own: chains, step size, x0_predictor, a temperature T_m other
            than the run's. burn_in and kept given there are kept to, and share
            then says nothing; left at None they are half each of what MCMC can pay for.
        share: MCMC's share of the network rows, in (0, 1).
        proposal: `guided()` by default, and `bootstrap` with a start that takes no gradient.
        Others: as `steer.smc`, of which this is a setting: smc(start=pcnl(...), proposal=guided()).

    Returns:
        Result as `steer.smc`; log_evidence is NaN, because MCMC does not see the normalizing constant of the
        distribution that it samples. `result.trajectory.diagnostics` has acceptance, step size, split R-hat and
        gradient norm, [B] each, see `pcnl`.

    Raises:
        BudgetError: where two network rows per chain and one particle cannot be paid for.
        Others: as `steer.smc` and `pcnl`.

    Cost: per problem C (1 + burn_in + kept) network rows, rewards and gradients, then those of guided `smc`.

    Source: Yoon et al. 2025 (Ψ-Sampler, 2506.01320), Secs. 4-5: pCNL at epsilon = .5, network rows half and half; five
    chains from the released configuration.
    Differs: the start's reward is not counted again in the first weights, ancestors and weights are kept between
    resamplings, the last reward is that of x_0, the step size is adapted, the SMC's transitions are the process's own
    (convert a flow with `steer.convert` for the paper's VP-SDE), and the weighted population is returned (`result.best`
    is the paper's answer).
    """
    if not 0.0 < share < 1.0:
        raise SteerError(f"share of the rows that MCMC gets must be in (0, 1), got {share}")
    common: dict[str, Any] = {"batch": batch, "key": key, "seed": seed}
    begin = start or pcnl()
    move = proposal or (guided() if begin.kernel.gradient else bootstrap)

    def planned(budget: int | None) -> tuple[int | None, MCMCStart]:
        if begin.burn_in is None and begin.kept is None:
            return _planned(process, begin, particles, budget, share)
        return particles, begin

    def check(budget: int | None) -> None:
        count, start = planned(budget)
        parts = (move, weight or default_weight(), selection or resample())
        given: dict[str, Any] = {"particles": count, "start": start, "keep_states": keep_states, "on_step": on_step}
        check_smc(process, reward, budget, parts=parts, **given, **common)

    asked = settle(process, reward, temperature=temperature, ess=ess, kl=kl, budget=budget, check=check, **common)
    particles, begin = planned(asked.budget)
    result = smc(
        process,
        reward,
        particles=particles,
        budget=asked.budget,
        temperature=asked.temperature,
        start=begin,
        proposal=move,
        weight=weight,
        selection=selection,
        keep_states=keep_states,
        on_step=asked.on_step(on_step),
        **common,
    )
    return asked.told(result).by("psi")


def _planned(
    process: ReverseProcess, start: MCMCStart, particles: int | None, budget: int | None, share: float
) -> tuple[int, MCMCStart]:
    """How many particles, and for how long the chains run."""
    chain, call = rows_between(process, 0, process.steps), start.rows(process)
    least = (1 + start.kernel.calls) * call  # where the chains begin, and one step
    check_counts(particles=particles, budget=budget)
    if budget is None:
        particles = particles or 16
        rows = max(least, round(particles * chain * share / (1.0 - share)))
    else:
        particles = particles or max(1, min(int((1.0 - share) * budget), budget - least) // chain)
        rows = budget - particles * chain
    if rows < least:
        raise BudgetError(
            f"a budget of {particles * chain + rows} network rows per problem leaves {max(0, rows)} for MCMC beside "
            f"{particles} particle(s), and {start.chains} chain(s) need {least}; raise the budget to "
            f"{particles * chain + least}, take fewer steps, or fewer chains (start=steer.pcnl(chains=1))"
        )
    steps = start.steps_for(process, rows)
    burn_in = steps // 2
    return particles, replace(start, burn_in=burn_in, kept=steps - burn_in)
