"""The step that the searches share: draw candidates of every chain, evaluate each once, keep some.

Candidate m of chain n is named by noise slot m N + n: more candidates, another number of them per level, or larger
chunks rename none of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from steer.core import log_weights
from steer.core.objective import Objective, check_finite, check_temperature, conditioned, open_run
from steer.core.trajectory import Seen, Trajectory
from steer.cost import Meter, affordable, check_counts
from steer.errors import NotStochasticError, SteerError
from steer.key import Key, as_key
from steer.results.result import Result
from steer.types import OnStep, ReverseProcess, Reward, Stop

from .selection import Choice, Selection
from .values import Value, X0Hat

Widths = int | Callable[[int], int] | None
"""Candidates per chain: a number, a function of the level they stand at, or None for what the budget pays."""


@dataclass(frozen=True, eq=False)
class Run:
    """A search in progress: what every one of them opens with and closes with. chunk: states evaluated at once."""

    process: ReverseProcess
    objective: Objective
    meter: Meter
    batch: int
    temperature: float
    key: Key
    chunk: int = 256

    @classmethod
    def open(
        cls, process: ReverseProcess, reward: Reward, batch: int, temperature: float, key: Key | int, chunk: int = 256
    ) -> Run:
        """A run with its own ledger."""
        temperature, key = check_temperature(temperature), as_key(key)
        check_counts(chunk=chunk)
        process, objective, meter = open_run(process, reward, key=key)
        return cls(process, objective, meter, conditioned(process, batch), temperature, key, chunk)

    def only(self, problem: int) -> Run:
        """The run of one problem of a conditioned process, for searches whose problems move at their own pace."""
        process = self.process.only(problem)
        return replace(self, process=process, objective=replace(self.objective, process=process))

    def begin(self, count: int) -> Trajectory:
        """`count` draws of the prior per problem."""
        return Trajectory.begin(self.process, self.process.prior(self.key.fold("prior"), self.batch, count))

    def predict(self, x: Tensor, k: int) -> Tensor:
        """Predictions of states (B, n, *event) at level k, in chunks."""
        return torch.cat([self.process.denoise(part, k) for part in self._parts(x)], 1)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        """Chunks of states (B, n, *event); what hooks draw for each is named by its slots."""
        for first in range(0, x.shape[1], self.chunk):
            self.meter.key = self.key.shifted(slot=first)
            yield x[:, first : first + self.chunk]

    def score(self, clean: Tensor, where: str = "of the finished samples") -> Tensor:
        """Rewards (B, n) of clean states, in chunks, checked."""
        scores = torch.cat([self.objective(part) for part in clean.split(self.chunk, 1)], 1)
        check_finite(scores, where)
        return scores

    def evaluate(self, x: Tensor, k: int, value: Value) -> tuple[Tensor | None, Tensor]:
        """Predictions, where the value reads them, and values (B, n) of states at level k: one call per state."""
        predictions, values = [], []
        for part in self._parts(x):
            x0 = self.process.denoise(part, k) if value.predicts else None
            predictions += [] if x0 is None else [x0]
            values.append(value(self.objective, part, k, x0))
        scores = torch.cat(values, 1)
        check_finite(scores, f"at level {k} of {self.process.steps}")
        return torch.cat(predictions, 1) if predictions else None, scores

    def step(self, state: Trajectory) -> Trajectory:
        """One level on, by the model's own transition from the prediction that the state carries."""
        model = self.process.transition(state.x, state.carried["x0"], state.k)
        return state.step(model, self.key.fold("step"))

    def result(
        self,
        x: Tensor,
        reward: Tensor,
        root: Tensor,
        *,
        keep: int | None = None,
        seen: Sequence[Seen] = (),
        interrupted: bool = False,
    ) -> Result:
        """The Result of samples (B, n, *event): the `keep` best share the weight; None: all of them."""
        log_weight = (
            log_weights.normalise(torch.zeros_like(reward)) if keep is None else log_weights.of_best(reward, keep)
        )
        none = torch.full_like(reward[:, 0], torch.nan)
        seen = (*seen, Seen(self.process.steps, log_weights.ess(log_weight), reward))
        return Result(
            process=self.process, x=x, reward=reward, log_weight=log_weight, log_evidence=none, root=root,
            key=self.key, cost=self.meter.cost(), temperature=self.temperature, seen=seen, interrupted=interrupted,
        )  # fmt: skip


class Block(NamedTuple):
    """Levels first to last, at the last of which a choice is made, among `width` candidates per chain."""

    first: int
    last: int
    width: int


class Plan(NamedTuple):
    """N chains and the blocks they go through."""

    particles: int
    blocks: tuple[Block, ...]


def plan(
    process: ReverseProcess,
    value: Value,
    *,
    block: int,
    candidates: Widths,
    particles: int | None,
    budget: int | None,
    usual: int,
    default: int,
) -> Plan:
    """What a budget (network rows per problem) or the given numbers of chains and candidates pay for.

    block: draws between choices, the draw of the prior being the first; a last block that would be shorter joins the
    one before. Where no step of a block draws anything, one candidate is as good as many.
    candidates None: the budget decides, after `usual` of them have decided how many chains there are.
    default: chains where neither particles nor budget is given.
    """
    check_counts(block=block)
    ends = [k for k in range(block - 1, process.steps, block) if process.steps - k >= block] + [process.steps]
    spans = list(zip([0, *(end + 1 for end in ends)], ends, strict=False))
    drawing = [_draws(process, max(0, first - 1), last) for first, last in spans]
    drawing[0] = drawing[0] or scattered(process)
    costs = [_rows(process, value, first, last) for first, last in spans]
    fixed = 0 if value.predicts else len(spans) - 1  # kept states are predicted after the choice

    def widths(wanted: int | Callable[[int], int]) -> list[int]:
        each = [wanted(last) if callable(wanted) else wanted for _, last in spans]
        for width in each:
            check_counts(candidates=width)
        if max(each) > 1 and len(spans) > 1 and not any(drawing[1:]):
            raise NotStochasticError(
                "candidates of one chain differ by the noise of its steps, and this process's transitions add none; "
                "use a stochastic rule, for instance process.with_rule(steer.ddim(eta=1.0)), or search over starting "
                "noises with search.noise_search"
            )
        return [width if draws else 1 for width, draws in zip(each, drawing, strict=True)]

    def rows(each: Sequence[int]) -> int:
        return process.rows * (fixed + sum(width * cost for width, cost in zip(each, costs, strict=True)))

    if candidates is not None or budget is None:
        chosen = widths(usual if candidates is None else candidates)
        count = affordable(rows(chosen), particles=particles, budget=budget, default=default)
    else:
        chosen = widths(usual)
        count = affordable(rows(widths(1)), particles=particles, budget=budget)
        count = particles or max(1, min(count, budget // rows(chosen)))
        if any(cost and draws for cost, draws in zip(costs, drawing, strict=True)):
            chosen = _paid(budget // process.rows // count - fixed, costs, drawing)
    return Plan(count, tuple(Block(first, last, width) for (first, last), width in zip(spans, chosen, strict=True)))


def _rows(process: ReverseProcess, value: Value, first: int, last: int) -> int:
    """Predictions of one candidate from level first to level last, where it is valued."""
    valued = 1 + value.extra(process, last) if value.predicts and last < process.steps else 0
    return last - first + valued


def scattered(process: ReverseProcess) -> bool:
    """Whether the prior draws anything: masked states all begin the same."""
    first, second = process.prior(Key(0), process.problems or 1, 2).unbind(1)
    return not torch.equal(first, second)


def _draws(process: ReverseProcess, first: int, last: int) -> bool:
    """Whether any step from level first to level last is stochastic."""
    return any(process.stochastic(k) for k in range(first, last))


def _paid(calls: int, costs: Sequence[int], drawing: Sequence[bool]) -> list[int]:
    """Widths that `calls` predictions per chain pay for: equal, the first blocks one more while they can."""
    calls -= sum(cost for cost, draws in zip(costs, drawing, strict=True) if not draws)
    width, left = divmod(calls, sum(cost for cost, draws in zip(costs, drawing, strict=True) if draws))
    each = []
    for cost, draws in zip(costs, drawing, strict=True):
        more = draws and 0 < cost <= left
        left -= cost if more else 0
        each.append(width + more if draws else 1)
    return each


def descend(
    run: Run, path: Plan, value: Value, selection: Selection, on_step: OnStep | None, keep: int | None
) -> Result:
    """Population search: in every block, draw candidates of each chain, evaluate them, keep N."""
    seen: list[Seen] = []
    paid: Trajectory | None = None  # the last states with their predictions, for runs that end early
    process, count = run.process, path.particles
    state = run.begin(count * path.blocks[0].width)
    try:
        with torch.no_grad():
            for i, block in enumerate(path.blocks):
                if i > 0:
                    paid = state
                    state = _stepped(run, _copies(state, block.width), on_step)
                for _ in range(block.first, block.last):
                    paid = state = state.carry(x0=run.predict(state.x, state.k))
                    state = _stepped(run, state, on_step)
                later = path.blocks[min(i + 1, len(path.blocks) - 1)].last
                state = _chosen(run, state, paid, value, selection, count, later, seen)
    except (Stop, KeyboardInterrupt):
        if paid is None:
            raise
        x = process.complete(paid.x, paid.carried["x0"])
        with torch.no_grad():
            scores = paid.carried["score"] if "score" in paid.carried else run.score(x, "of the predictions")
        return run.result(x, scores, paid.root, keep=keep, seen=seen, interrupted=True)
    except SteerError as error:
        error.keep(paid)
        raise
    return run.result(state.x, state.memory["value"], state.root, keep=keep, seen=seen[:-1])


def _chosen(
    run: Run, state: Trajectory, before: Trajectory | None, value: Value, selection: Selection, count: int, later: int,
    seen: list[Seen],
) -> Trajectory:  # fmt: skip
    """The candidates that go on to the choice at level `later`, N per problem, with their predictions."""
    process, k = run.process, state.k
    if k == process.steps:
        scores = _final_scores(run, state, before)
    else:
        x0, scores = run.evaluate(state.x, k, value)
        carried = {} if x0 is None else {"x0": x0}
        state = state.carry(**carried, **({"score": scores} if isinstance(value, X0Hat) else {}))
    seen.append(Seen(k, torch.full_like(scores[:, 0], float(count)), scores))
    index = selection(
        Choice(
            scores, state.memory, count, run.temperature, k, process.steps, _draws(process, k, later), run.key,
        )
    )  # fmt: skip
    best = torch.maximum(state.memory["highest"], scores) if "highest" in state.memory else scores
    state = state.remember(value=scores, highest=best).select(index)
    if k < process.steps and "x0" not in state.carried:
        state = state.carry(x0=run.predict(state.x, k))
    return state


def _final_scores(run: Run, state: Trajectory, before: Trajectory | None) -> Tensor:
    """Rewards of finished samples; known already where the last step went to the prediction that was scored."""
    if before is not None and "score" in before.carried and before.x.shape == state.x.shape:
        clean = run.process.complete(before.x, before.carried["x0"])
        if not run.process.stochastic(before.k) and torch.equal(clean, state.x):
            return before.carried["score"]
    return run.score(state.x)


def _stepped(run: Run, state: Trajectory, on_step: OnStep | None) -> Trajectory:
    state = run.step(state)
    if on_step is not None:
        on_step(state)
    return state


def _copies(state: Trajectory, width: int) -> Trajectory:
    """Every chain `width` times, candidate by candidate."""
    if width == 1:
        return state
    index = torch.arange(state.x.shape[1], device=state.x.device).repeat(width)
    return state.select(index.expand(state.x.shape[0], -1))


def spread(total: int, count: int) -> list[int]:
    """`total` in `count` whole parts that differ by at most one, the larger first."""
    return [total // count + (i < total % count) for i in range(count)]
