"""Particle Gibbs: repeated SMC with one path pinned, which leaves the distribution of that path as it is, at any N.

    path ~ plain SMC, unless one is given
    for every further sweep:
        run SMC with particle 0 on the path; multinomial resampling keeps particle 0's ancestor
        path ~ the paths of that run, by its final weights

One run of SMC with few particles has a bias that falls like 1 / N. A run in which particle 0 is forced along a given
path, and from which a new path is then drawn, is a Markov kernel that leaves p(path) exp(r(x_0) / T) as it is at every
N >= 2 (Andrieu, Doucet & Holenstein 2010). Repeating it repairs what one run got wrong, and new particles come from the
prior each time, which repairs diversity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from ..core.event import OnStep, of_pass
from ..core.loop import keeping
from ..core.objective import Objective, num_problems
from ..core.resampling import Resampler, multinomial
from ..core.start import Start, prior
from ..core.temperature import Temperature, settle
from ..core.trajectory import Trajectory
from ..cost import affordable, check_counts, rows_between
from ..errors import ShapeError, StateSpaceError
from ..key import Key, as_key
from ..particles.potentials import Potential, default_weight
from ..particles.proposals import Proposal, ProposalFunction, bootstrap
from ..particles.selection import resample
from ..processes.gaussian import need_gaussian
from ..processes.second_order import SecondOrderProcess
from ..processes.transitions import TransformedTransition
from ..results.result import Result
from ..types import GaussianPath, GaussianTransition, Level, ReverseProcess, Reward, Rule
from .smc import check_smc, smc

_WHAT = "particle Gibbs, which pins steps,"


@dataclass(frozen=True, eq=False)
class PinnedRule:
    """A transition rule under which particle 0 goes along a path [B, K + 1, *event]."""

    rule: Rule
    path: Tensor
    levels: tuple[Level, ...]

    def __call__(self, x: Tensor, x0: Tensor, here: Level, there: Level) -> GaussianTransition:
        state = self.path[:, self.levels.index(here) + 1]
        return TransformedTransition(self.rule(x, x0, here, there), lambda drawn: pinned(drawn, state))

    def std(self, here: Level, there: Level) -> float:
        return self.rule.std(here, there)


class UndrawnKey(Key):
    """The key that the process's hooks get, by which nothing may be drawn.

    A path is its states. Where a hook draws, what it drew is part of how the states came about: drawn anew for a pinned
    path it is from another distribution than theirs, and sweeps do not leave the distribution of the path as it is.
    (Hooks of a proposal may draw: the model's own step, which the weight asks for, does not depend on it.)
    """

    def _draw(self, *_: Any, **__: Any) -> NoReturn:
        raise StateSpaceError(
            "particle Gibbs pins a path by its states, and a hook of this process draws noise that they depend on (a "
            "smoothed gradient, a noise of its own), which is not in them; leave the noise out (sigma=0, noise=0), put "
            "the hooks into the proposal (steer.follow), or use steer.smc"
        )


@dataclass(frozen=True, eq=False)
class PinnedPrior:
    """A start of prior draws but for particle 0, which begins a path."""

    path: Tensor

    def __call__(
        self, process: ReverseProcess, objective: Objective, key: Key, batch: int, particles: int
    ) -> Trajectory:
        state = prior(process, objective, key, batch, particles)
        # Pinned runs overestimate the normalizing constant.
        unknown = torch.full_like(state.log_evidence, torch.nan)
        return replace(state, x=pinned(state.x, self.path[:, 0]), log_evidence=unknown)


def pinned(x: Tensor, state: Tensor) -> Tensor:
    """Particles [B, N, *event] with the given state [B, *event] as particle 0."""
    return torch.cat([state[:, None], x[:, 1:]], 1)


def conditional_multinomial(log_weight: Tensor, key: Key, count: int) -> Tensor:
    """Multinomial resampling given that particle 0 descends from particle 0; the others are drawn as ever."""
    ancestors = multinomial(log_weight, key, count)
    return torch.cat([torch.zeros_like(ancestors[:, :1]), ancestors[:, 1:]], 1)


def draw_path(trajectory: Trajectory, key: Key | int) -> Tensor:
    """One path per problem, drawn by the weights of a trajectory that kept its states.

    Args:
        trajectory: of a run with keep_states=True.
        key: names the draw.

    Returns:
        States [B, K + 1, *event], noise first: what `particle_gibbs(path=...)` begins from.

    Raises:
        SteerError: where the trajectory kept no states.
    """
    index = multinomial(trajectory.log_weight, as_key(key).fold("path"), 1)
    return trajectory.select(index).states()[:, 0]


def particle_gibbs(
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
    sweeps: int = 4,
    path: Tensor | None = None,
    proposal: Proposal | ProposalFunction = bootstrap,
    weight: Potential | None = None,
    threshold: float = 0.5,
    keep_states: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Weighted samples of p(x) exp(r(x) / temperature) from the last of several runs of SMC tied to one another.

    Args:
        particles: N >= 2 per problem and run, 16 by default.
        budget: network rows per problem of all runs together, never exceeded.
        sweeps: number of runs. Without a path the first is plain SMC.
        path: states [B, K + 1, *event] to begin from, such as `draw_path` gives of a trajectory with kept states.
        threshold: resample where the ESS falls below this share of N.
        Others: as `steer.smc`. Events of sweep i are called "particle_gibbs, sweep i".

    Returns:
        Result with the weighted population of the last run, whose particle 0 is the path it was given. Once the path
        follows the target, E[weighted mean of f] = E f at every N. log_evidence and its variance are those of the
        first, plain run, and NaN where a path was given: pinned runs overestimate the normalizing constant.
        `result.trajectory.diagnostics["renewed"]` is the share of pinned runs from which a path with another beginning
        was drawn, [B]; near 0, the runs are too small for the reward and the result is still where it began.

    Raises:
        ShapeError: for a path of another shape.
        StateSpaceError: where there is no transition rule to pin, as on processes that restart or are corrected between
            steps; where a hook of the process draws noise, which states alone do not pin.
        Others: as `steer.smc`. After the first sweep, `.partial` is the Result of the last whole one: its trajectory
            gives `draw_path` a path to go on from.

    Cost: per problem sweeps N K network rows (K = process.steps), and rewards and gradients as that many runs of `smc`.

    Source: Andrieu, Doucet & Holenstein 2010, Secs. 2.4.3 and 4.3 (conditional SMC, multinomial).
    Differs: resampling by ESS, under which particle 0 keeps its ancestor as every particle does; the last population
    and not only one path. Ancestor sampling is left out: its weights are densities of one pinned state given every
    particle, and in the dimensions of an image they always choose the particle it came from.
    """
    key, free = as_key(key, seed), need_gaussian(process, _WHAT, cure="use steer.smc")
    if len(set(free.levels)) < len(free.levels) or (free.hooks is not None and free.hooks.after):
        raise StateSpaceError(
            f"particle Gibbs pins the one step that leads to a level, and this {type(process).__name__} comes "
            "back to levels (restart, recur) or works on what a step has drawn (a corrector); leave those out, "
            "or use steer.smc"
        )
    check_counts(sweeps=sweeps)
    pins = path is not None or sweeps > 1
    guarded = _with_hook_key(free, UndrawnKey(0)) if pins else free
    batch = num_problems(process, batch)
    _check_path(path, (batch, process.steps + 1, *process.event))
    rows, parts = sweeps * rows_between(process, 0, process.steps), (proposal, weight or default_weight())

    def check(budget: int | None) -> None:
        count = affordable(rows, particles=particles, budget=budget)
        first: dict[str, Any] = {"particles": count, "start": prior, "keep_states": keep_states or sweeps > 1}
        chosen = (*parts, resample(multinomial, threshold))
        check_smc(guarded, reward, None, batch=batch, key=key, seed=None, parts=chosen, on_step=on_step, **first)

    asked = settle(
        process, reward, temperature=temperature, ess=ess, kl=kl, batch=batch, budget=budget, key=key, check=check
    )
    count = affordable(rows, particles=particles, budget=asked.budget)
    begins_pinned = path is not None
    first: Result | None = None
    result: Result | None = None  # of the last whole sweep
    cost, sweep, renewed = asked.spent, 0, list[Tensor]()
    while True:
        of_sweep = key.fold("sweep", sweep)
        tied, begin, resampler = _tied(guarded, path)
        with keeping(None if result is None else replace(result, interrupted=True)):
            result = smc(
                tied,
                reward,
                batch=batch,
                particles=count,
                temperature=asked.temperature,
                key=of_sweep,
                start=begin,
                proposal=parts[0],
                weight=parts[1],
                selection=resample(resampler, threshold),
                keep_states=keep_states or sweep < sweeps - 1,
                on_step=of_pass(on_step, f"particle_gibbs, sweep {sweep + 1}", cost),
            )
        cost, state = cost + result.cost, cast(Trajectory, result.trajectory)
        index = multinomial(result.log_weight, of_sweep.fold("path"), 1)
        if path is not None:
            renewed.append((state.root.gather(1, index)[:, 0] != 0).double())
        first = first or result
        sweep += 1
        if result.interrupted or sweep == sweeps:
            break
        path = state.select(index).states()[:, 0]
    nowhere = torch.full_like(result.log_evidence, torch.nan)
    share = torch.stack(renewed).mean(0) if renewed else nowhere
    # Pinned runs overestimate the normalizing constant: it is the first run's, with its variance, unless that was one.
    evidence = (nowhere, nowhere) if begins_pinned else (first.log_evidence, first.log_evidence_variance)
    process = _with_hook_key(_unpinned(result.process, free), getattr(free, "key", None))
    state = replace(state, process=process, diagnostics={**state.diagnostics, "renewed": share})
    return replace(
        result,
        process=process,
        log_evidence=evidence[0],
        log_evidence_variance=evidence[1],
        cost=cost,
        temperature_choice=asked.choice,
        trajectory=state,
    ).by("particle_gibbs")


def _tied(process: GaussianPath, path: Tensor | None) -> tuple[GaussianPath, Start, Resampler]:
    """Process, start and resampler of a run whose particle 0 goes along a path; of a free run without one."""
    if path is None:
        return process, prior, multinomial
    pinning = PinnedPrior(path), conditional_multinomial
    if isinstance(process, SecondOrderProcess):  # what is remembered of a pinned state follows from it
        return process.around(lambda base: _pinned(base, path)), *pinning
    return _pinned(process, path), *pinning


def _pinned(process: GaussianPath, path: Tensor) -> GaussianPath:
    """The process under its own rule, with particle 0 along a path."""
    return process.with_rule(PinnedRule(process.rule, path, process.levels))


def _unpinned(process: ReverseProcess, free: GaussianPath) -> GaussianPath:
    """What a pinned run has used, under the rule of the free process."""
    if isinstance(process, SecondOrderProcess) and isinstance(free, SecondOrderProcess):
        return process.around(lambda base: base.with_rule(free.base.rule))
    return need_gaussian(process, _WHAT).with_rule(free.rule)


def _with_hook_key(process: GaussianPath, key: Key | None) -> GaussianPath:
    """The process, its hooks drawing by that key; itself where it has none."""
    if isinstance(process, SecondOrderProcess):
        return process.around(lambda base: _with_hook_key(base, key))
    return process if process.hooks is None else replace(cast(Any, process), key=key)


def _check_path(path: Tensor | None, shape: tuple[int, ...]) -> None:
    if path is not None and tuple(path.shape) != shape:
        raise ShapeError(f"a path to begin from has shape (B, K + 1, *event) = {shape}, got {tuple(path.shape)}")
