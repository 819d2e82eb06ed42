"""Search over the noise that a sampler begins from and draws on its way."""

from __future__ import annotations

from steer.core.event import OnStep
from steer.core.run import Run
from steer.cost import affordable, check_counts
from steer.errors import keep_partial
from steer.key import Key
from steer.results.result import Result
from steer.types import ReverseProcess, Reward

from .strategy import Strategy, StrategyResult
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

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number.
        particles: N searches per problem, independent except under `paths`, which compete; 1 by default, 2 for `paths`.
        budget: network rows (NFE x batch rows) per problem, never exceeded, and used up to less than the strategy's
            smallest move per chain; by default what 16 samples per chain cost.
        temperature: accepted as by every method, in units of the reward; changes nothing.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        strategy: how noises are tried: `zero_order()` by default, `random_search()`, `paths()` or `epsilon_greedy()`.
        keep: how many of the samples returned, the best, share the weight.
        chunk: states evaluated at once.
        on_step: called with an `Event` after every step. Raising `Stop`, or Ctrl-C, ends the search with the best
            samples so far, or with predictions where there are none.

    Returns:
        Result with x [B, n, *event], reward [B, n], and log_weight [B, n]: equal weights on the `keep` best, zero on
        the rest. n is N; under `random_search` it is the number of all samples. `law` is "none", log_evidence [B] is
        NaN.

    Raises:
        BudgetError: where the budget does not pay for the strategy's first samples.
        StateSpaceError: where `zero_order` or `epsilon_greedy` is to move noise that is not Gaussian.
        NotStochasticError: where `epsilon_greedy` searches the noise of steps that draw none; the others run on
            deterministic processes by design.
        NonFiniteError: where a reward is NaN or +inf.
        RewardError: where the reward raises, or returns something that is not one number per sample.
        ShapeError: where the reward returns another shape, or `batch` does not fit the process.
        Whatever is raised has in `.partial` the best samples so far, a Result, or before any the states last made, a
        Trajectory.

    Cost: per problem at most `budget` network rows; rewards as each strategy says.
    When: beside `best_of_n` at equal budget (examples/benchmarks/auto.py), `zero_order` wins on a smooth reward
        of an ODE from some 50 samples' worth on, and loses on most other tasks, by far where steps draw noise: it stays
        near its first noise. `paths` wins on ODEs with fewer than ten samples' worth.
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

    def result(found: StrategyResult) -> Result:
        return Result.from_search(run, found.x, found.reward, found.root, keep=keep, interrupted=found.interrupted)

    try:
        return result(strategy(run, chains, budget // rows // chains))
    except BaseException as error:
        best = getattr(error, "partial", None)
        if isinstance(best, StrategyResult):
            keep_partial(error, result(best._replace(interrupted=True)), instead=True)
        raise
