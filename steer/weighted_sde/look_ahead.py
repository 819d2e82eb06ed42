"""What of the data a noisy state is valued by: rho(x, t) = ramp(t) r(look_ahead(x, t)) / temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import SteerError
from ..types import Level
from .composite import Composite

Ramp = Callable[[Level], float]


@dataclass(frozen=True)
class LookAhead:
    """Maps a state and its prediction to what the reward is asked about. Any choice leaves the target as it is.

    predict:     (composite, x, x0, k) -> states (B, N, *event); differentiable where a transport follows the reward.
    ramp:        strength of the value at a level; whatever it is, the last step ends on r(x_0) / temperature.
    evaluations: network predictions it costs beyond x0, at most.
    local:       whether it needs no prediction at all.
    """

    predict: Callable[[Composite, Tensor, Tensor, int], Tensor]
    ramp: Ramp = lambda level: 1.0
    evaluations: int = 0
    local: bool = False


def x0_hat(ramp: Ramp | None = None) -> LookAhead:
    """The reward of the prediction E[x_0 | x]: the default."""
    return LookAhead(lambda target, x, x0, k: x0, ramp or (lambda level: 1.0))


def at_state(ramp: Ramp | None = None) -> LookAhead:
    """The reward of the noisy state itself, by default times alpha^2 / (alpha^2 + sigma^2), which is 0 in the noise."""
    own = ramp or (lambda level: level.alpha**2 / (level.alpha**2 + level.sigma**2))
    return LookAhead(lambda target, x, x0, k: x, own, local=True)


def ode_steps(count: int, ramp: Ramp | None = None) -> LookAhead:
    """The reward of where `count` deterministic steps lead, count - 1 predictions more than x0_hat, which is one."""
    if count < 1:
        raise SteerError(f"a look-ahead takes at least one step, got {count}")

    def predict(target: Composite, x: Tensor, x0: Tensor, k: int) -> Tensor:
        stops = sorted({k + (target.steps - k) * i // count for i in range(1, count)} - {k})
        for stop in stops:
            here, there = target.levels[k], target.levels[stop]
            x = there.alpha * x0 + (x - here.alpha * x0) * (there.sigma / here.sigma)
            k, x0 = stop, target.denoise(x, stop)
        return x0

    return LookAhead(predict, ramp or (lambda level: 1.0), evaluations=count - 1)


def flow_map(function: Callable[[Tensor, float], Tensor], ramp: Ramp | None = None) -> LookAhead:
    """The reward of function(x, t), a distilled map from states to data; its evaluations are not in the ledger.

    With a ramp from 0 to 1, an exact flow map and `half_transport`, weights are (ramp' - ramp) r alone: nothing else
    changes along the flow (the look-ahead of FMTT, 2511.22688).
    """
    return LookAhead(lambda target, x, x0, k: function(x, target.levels[k].t), ramp or (lambda level: 1.0), local=True)
