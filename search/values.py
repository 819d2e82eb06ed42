"""What a noisy state is worth to a search: estimates of the reward that its sample will have.

A value is a small frozen callable. Searches carry each state's prediction along with the state, so a value is asked
once per state and never twice for the same prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from steer.core.objective import Objective, check_finite, num_problems
from steer.core.run import Run
from steer.errors import ShapeError, SteerError
from steer.key import Key, as_key
from steer.processes.gaussian import need_levels
from steer.samplers.rollout import rollout
from steer.types import ReverseProcess, Reward
from steer.weighted_sde.look_ahead import ode_steps, stops


class Value(Protocol):
    """An estimate of the final reward of states (B, N, *event) at level k: scores (B, N), float64."""

    @property
    def predicts(self) -> bool:
        """Whether it reads the prediction x0 of the state. If not, searches predict only the states they keep."""
        ...

    def extra(self, process: ReverseProcess, k: int) -> int:
        """Predictions it makes per state at level k, beyond x0."""
        ...

    def __call__(
        self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class X0Hat:
    """r(x0_hat): the reward of the prediction. Built by `x0_hat`."""

    predicts: bool = True

    def extra(self, process: ReverseProcess, k: int) -> int:
        """None."""
        return 0

    def __call__(self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None) -> Tensor:
        assert x0 is not None
        return objective(objective.process.complete(x, x0))


@dataclass(frozen=True)
class RewardAhead:
    """The reward of the prediction after some deterministic steps. Built by `look_ahead`."""

    count: int
    predicts: bool = True

    def extra(self, process: ReverseProcess, k: int) -> int:
        """As many as there are steps, fewer near the data."""
        return len(stops(process.steps, k, self.count + 1))

    def __call__(self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None) -> Tensor:
        assert x0 is not None
        process = need_levels(objective.process, "a look-ahead by the ODE", cure="use value=values.x0_hat()")
        return objective(ode_steps(self.count + 1).predict(process, x, x0, k, key))


@dataclass(frozen=True)
class Learned:
    """A function of the noisy state. Built by `learned`."""

    function: Callable[[Tensor, int], Tensor]
    predicts: bool = False

    def extra(self, process: ReverseProcess, k: int) -> int:
        """None: what the function costs is not the model's, and the ledger does not count it."""
        return 0

    def __call__(self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None) -> Tensor:
        values = self.function(x.flatten(0, 1), k)
        if values.shape != (x.shape[0] * x.shape[1],):
            raise ShapeError(
                f"a learned value gives one number per state, shape ({x.shape[0] * x.shape[1]},), for states of shape "
                f"{tuple(x.flatten(0, 1).shape)}; got {tuple(values.shape)}"
            )
        return values.to(torch.float64).view(x.shape[:2])


def evaluate(run: Run, x: Tensor, k: int, value: Value) -> tuple[Tensor | None, Tensor]:
    """Predictions, where the value reads them, and values [B, n] of states at level k: one network call per state."""
    predictions, values = [], []
    for part, key in run.parts(x):
        x0 = run.process.denoise(part, k, key) if value.predicts else None
        predictions += [] if x0 is None else [x0]
        values.append(value(run.objective, part, k, x0, key))
    scores = torch.cat(values, 1)
    check_finite(scores, f"at level {k} of {run.process.steps}")
    return torch.cat(predictions, 1) if predictions else None, scores


def x0_hat() -> X0Hat:
    """r(x0_hat), the posterior-mean value: the default. One reward per state, no prediction beyond x0."""
    return X0Hat()


def look_ahead(count: int) -> RewardAhead:
    """The reward of the prediction after `count` deterministic (DDIM) steps over what is left of the path.

    Costs `count` predictions per state and one reward. On Gaussian paths only, StateSpaceError elsewhere.
    Source: Oshima et al. 2025 (DLBS, 2501.19252), whose look-ahead is 6. Differs: the steps end on a prediction, so
    that `count` = 0 would be `x0_hat`.
    """
    if count < 1:
        raise SteerError(f"a look-ahead makes at least one prediction, got {count}; none is values.x0_hat()")
    return RewardAhead(count)


def learned(function: Callable[[Tensor, int], Tensor]) -> Learned:
    """A value of one's own: function(x, k) -> (M,) for states x (M, *event) at level k, higher is better.

    A search then predicts only the states it keeps: T network rows instead of M T. `fit` trains one.
    """
    return Learned(function)


def fit(
    process: ReverseProcess,
    reward: Reward,
    network: nn.Module,
    *,
    particles: int,
    temperature: float | None = None,
    epochs: int = 10,
    rate: float = 1e-3,
    size: int = 256,
    batch: int = 1,
    key: Key | int = 0,
    seed: int | None = None,
) -> Learned:
    """A learned value: `network` regressed on the rewards that rollouts of the model ended with. Trains in place.

    network:     module (x (M, *event), k) -> (M,); x in the process's dtype, k a tensor (M,) of levels.
    particles:   rollouts per problem; K particles network rows and `particles` rewards are spent.
    temperature: None regresses the mean reward E[r | x], as the released code does; a number T regresses the soft
                 value T log E[exp(r / T) | x] by least squares on exp(r / T), as the paper writes it, which at small T
                 hears only the best rollouts.
    epochs, rate, size: Adam on minibatches of `size` states of mixed levels. The order is drawn from `key`; the
                 network's initial weights are the caller's.

    Source: Li et al. 2024 (SVDD, 2408.08252), Monte Carlo regression; code: rate 1e-3, 10 epochs, minibatches of 16.
    """
    key = as_key(key, seed)
    runs = rollout(process, reward, batch=num_problems(process, batch), particles=particles, key=key)
    assert runs.trajectory is not None
    states = runs.trajectory.states()[:, :, : process.steps].flatten(0, 1)  # (M, K, *event)
    count, levels = states.shape[:2]
    shift = runs.reward.max()

    def target(values: Tensor) -> Tensor:
        return values if temperature is None else ((values - shift) / temperature).exp()

    goal = target(runs.reward).flatten().repeat_interleave(levels).to(states.dtype)
    level = torch.arange(levels, device=states.device).repeat(count)
    states = states.flatten(0, 1)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    network.train()
    for epoch in range(epochs):
        order = key.fold("epoch", epoch).uniform((1, len(states)), device=states.device)[0].argsort()
        for rows in order.split(size):
            with torch.enable_grad():
                loss = (target(network(states[rows], level[rows])) - goal[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    return learned(lambda x, k: network(x, torch.full((len(x),), k, device=x.device)))
