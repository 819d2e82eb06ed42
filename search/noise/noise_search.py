"""Search over the noise that a sampler begins from and draws on its way."""

from __future__ import annotations

from steer.core.event import OnStep
from steer.core.run import Run
from steer.cost import affordable, check_counts
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .strategy import Strategy
from .zero_order import zero_order


def noise_search(
    process: ReverseProcess,
    reward: Reward,
    *,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: float = 1.0,
    key: Key | int = 0,
    seed: int | None = None,
    strategy: Strategy | None = None,
    keep: int = 1,
    chunk: int = 256,
    on_step: OnStep | None = None,
) -> Result:
    """The best samples of N searches over noise.

    particles: N searches per problem, independent but for `paths`, which compete; 1 by default, 2 for `paths`.
    budget:    network rows per problem, never exceeded, used but for less than the strategy's smallest move per chain;
               by default what 16 samples per chain cost.
    strategy:  `zero_order()` by default; `random_search()`, `paths()`, `epsilon_greedy()`.
    keep:      how many of the samples returned share the weight. temperature changes nothing.
    chunk:     states evaluated at once. on_step: called after every step; `Stop` or an interrupt returns the best
               samples so far, or predictions where there are none.

    random_search, zero_order and paths run on deterministic processes by design, epsilon_greedy searches the noise of
    the steps and needs it.
    Returns x (B, n, *event), reward, log_weight (B, n); log_evidence NaN.
    Raises BudgetError, StateSpaceError (zero_order, epsilon_greedy on states without Gaussian noise),
    NotStochasticError, NonFiniteError, RewardError.
    Source: Ma et al. 2025 (2501.09732); Ramesh & Mardani 2025 (2506.03164) for epsilon_greedy.
    """
    check_counts(keep=keep)
    strategy = strategy or zero_order()
    run = Run.open(
        "noise_search",
        process,
        reward,
        batch=batch,
        temperature=temperature,
        key=key,
        seed=seed,
        on_step=on_step,
        chunk=chunk,
    )
    least, rows, chains = strategy.least(run.process), run.process.rows, particles or strategy.chains
    budget = 16 * run.process.steps * rows * chains if budget is None else budget
    most = affordable(least * rows, particles=particles, budget=budget)
    chains = min(chains, most) if particles is None else particles
    found = strategy(run, chains, budget // rows // chains)
    return Result.from_search(run, found.x, found.reward, found.root, keep=keep, interrupted=found.interrupted)
