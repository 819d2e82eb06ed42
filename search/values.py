"""What a noisy state is worth to a search: estimates of the reward that its sample will have.

A value is a small frozen callable. A search evaluates it once per state, together with the prediction of that state,
which the state then takes along to its next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from steer.core.objective import Objective, at_level, from_column, num_problems
from steer.core.run import Run
from steer.errors import ShapeError, SteerError
from steer.key import Key, as_key
from steer.processes.gaussian import need_levels
from steer.processes.second_order import noisy
from steer.samplers.rollout import rollout
from steer.types import ReverseProcess, Reward
from steer.weighted_sde.look_ahead import ode_steps, stops


class Value(Protocol):
    """An estimate, from a noisy state, of the reward that its sample will have."""

    @property
    def predicts(self) -> bool:
        """Whether it reads the prediction x0 of the state. If not, searches predict only the states they keep."""
        ...

    def extra(self, process: ReverseProcess, k: int) -> int:
        """Predictions (NFE) it makes per state at level k, beyond x0."""
        ...

    def __call__(self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None) -> Tensor:
        """Values of states, higher is better.

        Args:
            objective: the run's reward on its process: clean states [B, N, *event] to scores [B, N].
            x: states, [B, N, *event].
            k: their level, 0 = noise, less than K = `objective.process.steps`.
            x0: their predictions, [B, N, ...]; None where `predicts` is false.
            key: names whatever is drawn on the way, at the slots of these states.

        Returns:
            Values, [B, N] float64, in units of the reward.
        """
        ...


@dataclass(frozen=True)
class X0Hat:
    """r(x0_hat): the reward of the prediction. Built by `x0_hat`."""

    predicts: bool = True

    def extra(self, process: ReverseProcess, k: int) -> int:
        """None."""
        return 0

    def __call__(self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None) -> Tensor:
        assert x0 is not None
        return objective(objective.process.complete(x, x0), at_level(objective.process, k))


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
        return objective(ode_steps(self.count + 1).predict(process, x, x0, k, key), at_level(process, k))


@dataclass(frozen=True)
class Learned:
    """A function of the noisy state. Built by `learned`."""

    function: Callable[[Tensor, int], Tensor]
    predicts: bool = False

    def extra(self, process: ReverseProcess, k: int) -> int:
        """None: the function is not the model, and its evaluations are not counted in the cost."""
        return 0

    def __call__(self, objective: Objective, x: Tensor, k: int, x0: Tensor | None, key: Key | None = None) -> Tensor:
        x = noisy(objective.process, x)
        values = self.function(x.flatten(0, 1), k)
        if values.shape != (x.shape[0] * x.shape[1],):
            raise ShapeError(
                f"a learned value must return one number per state, shape ({x.shape[0] * x.shape[1]},), for states of "
                f"shape {tuple(x.flatten(0, 1).shape)}, got {tuple(values.shape)}"
            )
        return values.to(torch.float64).view(x.shape[:2])


def evaluate(run: Run, x: Tensor, k: int, value: Value) -> tuple[Tensor | None, Tensor]:
    """Predictions and values of states, in chunks of `run.chunk`, one prediction per state.

    Args:
        run: the run.
        x: states, [B, n, *event].
        k: their level.
        value: what they are judged by.

    Returns:
        Predictions [B, n, ...], None where the value reads none, and values [B, n].

    Raises:
        NonFiniteError: where a value is NaN or +inf.
    """
    predictions, values = [], []
    for part, key in run.parts(x):
        x0 = run.process.denoise(part, k, key) if value.predicts else None
        predictions += [] if x0 is None else [x0]
        objective = run.objective.of(from_column(key.slot - run.key.slot))
        scores = value(objective, part, k, x0, key)
        objective.look_at(scores, at_level(run.process, k), who="the value")
        values.append(scores)
    return torch.cat(predictions, 1) if predictions else None, torch.cat(values, 1)


def x0_hat() -> X0Hat:
    """r(x0_hat), the reward of the prediction (the posterior-mean value): the default of `svdd` and `beam`.

    Returns:
        A value for `svdd(value=)` and `beam(value=)`.

    Cost: one reward per state, no prediction beyond x0.
    """
    return X0Hat()


def look_ahead(count: int) -> RewardAhead:
    """The reward of the prediction after `count` deterministic (DDIM) steps over what is left of the path.

    Args:
        count: steps, at least 1; each makes one prediction more. Near the data there are fewer.

    Returns:
        A value for `svdd(value=)` and `beam(value=)`, for processes on a Gaussian path; others raise StateSpaceError.

    Raises:
        SteerError: where `count` is less than 1.

    Cost: `count` predictions per state beyond x0, and one reward.
    Source: Oshima et al. 2025 (DLBS, 2501.19252), whose look-ahead is 6.
    Differs: the steps end on a prediction, so that `count` = 0 would be `x0_hat`.
    """
    if count < 1:
        raise SteerError(f"a look-ahead makes at least one prediction, got {count}; use values.x0_hat() for none")
    return RewardAhead(count)


def learned(function: Callable[[Tensor, int], Tensor]) -> Learned:
    """A value computed from the noisy state alone, by a function of yours.

    Args:
        function: (x, k) -> values [M] of states x [M, *event] at level k; higher is better, in units of the reward.
            `fit` trains one.

    Returns:
        A value for `svdd(value=)` and `beam(value=)`. A function that returns another shape raises ShapeError.

    Cost: a search predicts only the states it keeps, K network rows per chain instead of M K; what the function
        itself costs is not counted.
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
    """A learned value: `network`, trained in place on the rewards that rollouts of the model end with.

    Args:
        process: the model.
        reward: samples [M, ...] to scores [M].
        network: module (x [M, *event], k) -> values [M]; x in the process's dtype, k a tensor [M] of levels.
        particles: rollouts per problem.
        temperature: None regresses the mean reward E[r | x], as the released code does. A number T, in units of the
            reward, regresses the soft value T log E[exp(r / T) | x] by least squares on exp(r / T), as the paper writes
            it, which at small T is dominated by the best rollouts.
        epochs: passes over all states of the rollouts.
        rate: learning rate of Adam.
        size: states per minibatch, of mixed levels.
        batch: B, independent problems; a process conditioned on prompts has its own number.
        key: names the noise of the rollouts and the order of the minibatches; the initial weights are the caller's.
        seed: the same as `key`, by its usual name; give one of them.

    Returns:
        The value, which calls `network` in evaluation mode.

    Raises:
        NonFiniteError, RewardError, ShapeError: as `steer.rollout`.

    Cost: K network rows and one reward per rollout, K = process.steps; training is not counted.
    Source: Li et al. 2024 (SVDD, 2408.08252), Monte Carlo regression; its code has rate 1e-3, 10 epochs, minibatches
        of 16.
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
