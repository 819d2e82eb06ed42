"""Waste-free SMC: few ancestors, and chains of MCMC moves on the paths of each.

    SMC on N particles; at the chosen levels, in place of its resampling:
        draw N / chain ancestors by their weights
        from each, chain - 1 times: path' = a pCN move of the noise that drove the path, replayed to this level;
            accept it with probability min(1, exp(S' - S)), S the log-potential
        keep every state of every chain

Dau & Chopin 2022, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Collection

from ..core.event import OnStep
from ..core.resampling import Resampler, systematic
from ..core.start import Start, prior
from ..core.temperature import Temperature
from ..key import Key
from ..particles.path_mcmc import path_moves
from ..particles.proposals import Proposal, ProposalFunction, bootstrap
from ..particles.selection import resample
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .smc import smc


def waste_free(
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
    start: Start = prior,
    proposal: Proposal | ProposalFunction = bootstrap,
    chain: int = 2,
    smallest: float = 0.05,
    levels: Collection[int] | None = None,
    resampler: Resampler = systematic,
    threshold: float = 0.5,
    on_step: OnStep | None = None,
) -> Result:
    """Equally weighted samples of p(x) exp(r(x) / temperature) by SMC whose copies MCMC on whole paths tells apart.

    Args:
        particles: N per problem, 16 by default; or budget, network rows per problem.
        chain: states kept of each of the N / chain ancestors drawn at these levels, >= 2.
        smallest: sizes of moves are log-uniform in [smallest, 1], see `steer.path_moves`.
        levels: timesteps at which few ancestors are drawn and moved, numbered from noise; by default [K], K =
            process.steps, the finished samples. With deterministic steps and threshold=0 that is MCMC on the noise of
            an ODE.
        resampler: log-weights [B, N] to ancestors [B, N / chain].
        threshold: elsewhere particles are resampled as in `smc`, where the ESS is below this share of N.
        Others: as `steer.smc`, of which this is a setting: smc(selection=resample(moves=path_moves(levels))).

    Returns:
        Result as `steer.smc`. `result.diagnostics` has the share of moves accepted at each level, [B] each.
        log_evidence is unbiased as in `smc`; its variance is known from repetitions alone (batch >= 2), because moved
        particles no longer descend from their ancestor's noise.

    Raises:
        StateSpaceError: where paths cannot be replayed: no Gaussian prior, or steps that are not `steer.Normal`.
        SteerError: for a weight that depends on the path, or levels that are not weighted.
        Others: as `steer.smc`.

    Cost: per problem N K network rows, and N (1 - 1 / chain) min(k + 1, K) more for every level k.

    Source: Dau & Chopin 2022 (2011.02328), Algorithm 2.
    Differs: moves are pCN on the noise of paths, see `steer.path_moves`.
    """
    moves = path_moves((process.steps,) if levels is None else levels, chain=chain, smallest=smallest)
    return smc(
        process,
        reward,
        batch=batch,
        particles=particles,
        budget=budget,
        temperature=temperature,
        ess=ess,
        kl=kl,
        key=key,
        seed=seed,
        start=start,
        proposal=proposal,
        selection=resample(resampler, threshold, moves=moves),
        on_step=on_step,
    ).by("waste_free")
