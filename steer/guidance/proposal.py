"""Hooks as the proposal of sequential Monte Carlo: whatever they do, weights by p / q make the run exact."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.objective import Objective
from ..core.population import per_particle
from ..core.trajectory import Trajectory
from ..errors import SteerError
from ..key import Key, as_key
from ..processes.gaussian import need_gaussian
from ..processes.second_order import model_of, noisy
from ..types import GaussianPath, GaussianTransition, ReverseProcess
from .hooks import Hooks, Log, coefficient, look, norms

_CURE = "use proposal=steer.bootstrap, or guide the models of a composition; a masked process is steered by its reward"


@dataclass(frozen=True)
class Follow:
    """Proposes the model's step moved by what hooks displace it by. Built by `follow`.

    The step is the model's transition shifted, at its own noise, by c (x0' - x0) + (mean' - mean); particles gain
    log p(x') - log q(x'). Steps without noise have no density and stay the model's own.

    limit: largest displacement in units of the step's noise; longer ones are cut to it (a proposal may be anything, and
           displacement^2 / 2 is what a step costs in nats of weight).
    """

    hooks: Hooks
    limit: float | None = None
    key: Key | None = None
    log: Log = field(default_factory=Log)

    @property
    def needs_gradient(self) -> bool:
        return False

    def check(self, process: ReverseProcess) -> GaussianPath:
        """The process, as one on a Gaussian path; StateSpaceError where it is none."""
        return need_gaussian(process, "a proposal by hooks", cure=_CURE)

    def evaluate(
        self, state: Trajectory, objective: Objective, weighted: bool, key: Key
    ) -> tuple[Trajectory, Tensor | None]:
        """The state caching the model's prediction and the displacement, and its scores where it is weighted."""
        process, k = self.check(state.process), state.k
        looked = look(model_of(process), self.hooks, noisy(process, state.x), k, self.key or key, self.log)
        here, there = process.levels[k : k + 2]
        std = process.rule.std(here, there)
        move = looked.displacement(coefficient(here, there, std))
        if self.limit is not None:
            size = norms(move) / std
            move = move * per_particle(self.limit / size.clamp(min=self.limit), move)
            self.log.add("limited", k, (size > self.limit).double())
        with torch.no_grad():
            scores = objective(process.complete(state.x, looked.raw)) if weighted else None
        return state.with_step_cache(x0=looked.raw, score=scores, displacement=move), scores

    def __call__(self, state: Trajectory, model: GaussianTransition) -> GaussianTransition:
        if state.cache.displacement is None:
            raise SteerError(
                "this state caches no displacement: a proposal by hooks moves states that it has evaluated; grow a "
                "tree with the proposal that it was begun with"
            )
        return model.shift(state.cache.displacement)


def follow(hooks: Hooks, *, limit: float | None = None, key: Key | int | None = None) -> Follow:
    """A proposal for `steer.smc` (and what is made of it) and `search.dts` that moves by hooks.

    Args:
        hooks: score, x0 and mean hooks. Start hooks and after hooks have no density to correct by: SteerError.
        key: names what hooks draw; None: the run's key does.
        limit: see `Follow`; None for no limit. What was done is in `proposal.log`, over all runs of this proposal.

    Raises:
        SteerError: for start and after hooks, and a limit that is not positive.
        StateSpaceError: in a run on a process without a Gaussian path and a transition rule.

    Cost: of the hooks. Steps without noise are the model's own.
    """
    if hooks.after or hooks.start:
        raise SteerError(
            "a proposal consists of score, x0 and mean hooks, got start or after hooks, which have no density; put "
            "those into the process (steer.guidance.guide), whose distribution is then theirs"
        )
    if limit is not None and not limit > 0.0:
        raise SteerError(f"limit is a displacement in units of the step's noise and must be positive, got {limit}")
    return Follow(hooks, limit, None if key is None else as_key(key))
