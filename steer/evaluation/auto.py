"""`method="auto"`: a few unsteered samples are measured, a method is chosen by the rule of `choice`, and it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.event import OnStep, after
from ..core.method_choice import MethodChoice
from ..core.objective import check_temperature
from ..core.run import Run
from ..core.temperature import Temperature
from ..cost import affordable, check_counts, rows_between
from ..errors import SteerError
from ..execution.distributed import current
from ..key import Key
from ..results.result import Result
from ..types import ReverseProcess, Reward
from .choice import Chosen, Goal, Setting, check_goal, choose, price_of, samples_that_help
from .methods import resolve
from .preflight import Probe, probed

LEAST = 4  # samples of a probe
SHARE = 8  # a probe gets at most the budget over this
LEVELS = (0.25, 0.5, 0.75)  # shares of the way at which it scores predictions


def auto(
    process: ReverseProcess,
    reward: Reward,
    *,
    goal: Goal = "best",
    reward_price: float | None = None,
    batch: int = 1,
    particles: int | None = None,
    budget: int | None = None,
    temperature: Temperature = 1.0,
    ess: float | None = None,
    kl: float | None = None,
    key: Key | int = 0,
    seed: int | None = None,
    keep: int = 1,
    on_step: OnStep | None = None,
) -> Result:
    """The method that fits a goal, chosen from measured facts: `result.method_choice` says which, and why.

    Args:
        process: the model as a reverse process; its weights are not changed.
        reward: samples [M, ...] to scores [M], in any unit. Higher is better, -inf forbids a sample.
        goal: "best", one sample of high reward; "population", samples of p(x) exp(r(x) / temperature); "rollouts", the
            model's own samples, for a trainer.
        reward_price: what a score costs (with its decode), in network rows. None: timed, and taken as 0 below 3 rows,
            else as the nearest power of ten, so that the same key chooses the same unless the time is near 3, 30, 300,
            ... rows: then give it.
        batch: B, independent problems; a process conditioned on prompts or labels has its own number. One method is
            chosen for all of them.
        particles: in place of a budget: what so many plain chains cost, 16 by default.
        budget: network rows (NFE x batch rows) per problem, never exceeded, the probe's included. Nor is the cost of as
            many plain chains, each scored once, in rows plus scores at their price.
        temperature: of the population, in units of the reward. Other goals do not depend on it.
        ess, kl: in place of a temperature: as `steer.smc`.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`, by its usual name; give one of them.
        keep: how many of the samples, the best, share the weight. A population is weighted by its method.
        on_step: called with an `Event` after every step of the chosen method; the probe's cost is counted in it.

    Returns:
        The chosen method's Result, which is that of the same call by name with `key.shifted(slot=n)` and the budget
        that is left, n being the probe's number of samples. Where one sample is sought, the probe's are candidates too,
        the first n of [B, n + N].

    Raises:
        SteerError: for other goals, and where `ess` or `kl` are given to one that follows no temperature.
        BudgetError: where the budget does not pay for one sample.
        Others: those of the chosen method, and of `steer.preflight`.

    Cost: the budget. The probe takes at most an eighth of it, where that pays for four samples; it has at most 16, and
        4 for a population, of which only the time of a score is looked at. There is none for trainers, nor at a known
        price for populations and where no search can be chosen. Each sample is scored once, and at three levels on the
        way.
    Source: the rule is read off examples/benchmarks/auto.py, and its regret is in docs/which_method.md.
    """
    check_goal(goal)
    check_counts(keep=keep)
    if goal != "population" and (ess is not None or kl is not None):
        raise SteerError(f'ess= and kl= choose the temperature of a population; goal="{goal}" follows none')
    if reward_price is not None and not 0.0 <= reward_price < math.inf:
        raise SteerError(f"reward_price is in network rows, 0 or more, got {reward_price}")
    fixed = 1.0 if temperature == "auto" else check_temperature(temperature)
    run = Run.open("auto", process, reward, batch=batch, temperature=fixed, key=key, seed=seed, groupwise=True)
    purse = Purse.of(run, particles, budget)
    setting = Setting.of(run, goal, purse.chains, reward_price or 0.0)
    probe = _probe(run, setting, purse, reward_price is not None)
    if probe is not None and reward_price is None:
        setting = setting._replace(price=_timed_price(run, probe))
    chosen = choose(setting, None if probe is None else probe.found)
    choice = MethodChoice(
        goal=goal,
        method=chosen.method,
        options=chosen.written,
        budget=purse.left(setting, chosen, run),
        samples=0 if probe is None else probe.reward.shape[1],
        rows=run.meter.nfe // run.problems,
        price=setting.price,
        why=chosen.why,
    )
    options: dict[str, Any] = {**chosen.options, "batch": batch, "budget": choice.budget, "temperature": fixed}
    if goal == "population":
        options |= {"temperature": temperature, "ess": ess, "kl": kl}
    result = resolve(chosen.method)(
        process,
        reward,
        key=run.key.shifted(slot=choice.samples),
        on_step=after(on_step, run.meter.cost()),
        **options,
    )
    run.meter.paid(result.cost)
    if goal == "best":
        result = _best_of_both(run, probe, result, keep)
    return replace(result, cost=run.meter.cost(), method_choice=choice).by("auto")


@dataclass(frozen=True)
class Purse:
    """What a problem's run may cost.

    budget: network rows.
    chain:  network rows of one plain chain.
    """

    budget: int
    chain: int

    @classmethod
    def of(cls, run: Run, particles: int | None, budget: int | None) -> Purse:
        """That of a budget, or of so many plain chains."""
        chain = rows_between(run.process, 0, run.process.steps)
        count = affordable(chain, particles=particles, budget=budget)
        return cls(count * chain if budget is None else budget, chain)

    @property
    def chains(self) -> float:
        """Plain chains that it pays for."""
        return self.budget / self.chain

    def left(self, setting: Setting, chosen: Chosen, run: Run) -> int:
        """Network rows that are left for a method, such that its scores are paid for too."""
        spent = (run.meter.nfe + setting.price * run.meter.rewards) / run.problems
        chains = (self.chains * (self.chain + setting.price) - spent) / (
            self.chain + setting.price * chosen.scores(setting.steps)
        )
        return math.floor(chains * self.chain + 1e-9)


def _probe(run: Run, setting: Setting, purse: Purse, priced: bool) -> Probe | None:
    """Unsteered samples, measured; None where they cannot change the choice, or a share of the budget pays for few."""
    steps = run.process.steps
    levels = {round(steps * share) for share in LEVELS}
    each = (setting.rows + setting.price * (len(levels) + 1)) / (setting.rows + setting.price)
    count = min(samples_that_help(setting, priced), int(purse.chains / SHARE / each)) // 2 * 2
    return None if count < LEAST else probed(run, count, levels, gradient=False)


def _timed_price(run: Run, probe: Probe) -> float:
    """The price of a score as it was timed: 0, or a power of ten. A journal remembers it, and ranks agree on one."""
    price = price_of(probe.found.price)
    answer = run.meter.call("price", -1, lambda _: {"price": torch.tensor(price, dtype=torch.float64)}, probe.reward)
    ranks = current()
    return float(answer["price"]) if ranks is None else float(ranks.least(int(answer["price"])))


def _best_of_both(run: Run, probe: Probe | None, result: Result, keep: int) -> Result:
    """The samples of the probe and of the method, of which the `keep` best share the weight."""
    x, reward, root = result.x, result.reward, result.root
    if probe is not None:
        x, reward = torch.cat([probe.x, x], 1), torch.cat([probe.reward, reward], 1)
        root = torch.cat([probe.root, root + probe.reward.shape[1]], 1)
    seen = result.seen[:-1]
    return Result.from_search(run, x, reward, root, keep=keep, seen=seen, interrupted=result.interrupted)
