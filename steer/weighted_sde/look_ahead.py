"""What of the data a noisy state is valued by: rho(x, t) = ramp(t) r(look_ahead(x, t)) / temperature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..calls import Answer
from ..errors import SteerError
from ..key import Key
from ..processes.gaussian import ddim_jump
from ..processes.second_order import noisy
from ..types import Level, NoiseLevels

Ramp = Callable[[Level], float]


@dataclass(frozen=True)
class LookAhead:
    """Maps a state and its prediction to what the reward is asked about. Any choice leaves the target as it is.

    predict:     (process, x, x0, k, key) -> states [B, N, *event]; differentiable where a transport follows the reward.
    ramp:        strength of the value at a level; whatever it is, the last step ends on r(x_0) / temperature.
    evaluations: network predictions it costs beyond x0, at most.
    rows:        network rows of networks of its own that it costs a state.
    local:       whether it needs no prediction at all.
    """

    predict: Callable[[NoiseLevels, Tensor, Tensor, int, Key | None], Tensor]
    ramp: Ramp = lambda level: 1.0
    evaluations: int = 0
    rows: int = 0
    local: bool = False


def x0_hat(ramp: Ramp | None = None) -> LookAhead:
    """The reward of the prediction E[x_0 | x]: the default.

    Args:
        ramp: strength of the value by Level; None for 1 throughout.

    Returns:
        What `steer.fkc(look_ahead=...)` takes.
    """
    return LookAhead(lambda process, x, x0, k, key: x0, ramp or (lambda level: 1.0))


def at_state(ramp: Ramp | None = None) -> LookAhead:
    """The reward of the noisy state itself; needs no prediction.

    Args:
        ramp: strength of the value by Level; None for alpha^2 / (alpha^2 + sigma^2), which is 0 in the noise.

    Returns:
        What `steer.fkc(look_ahead=...)` takes.
    """
    own = ramp or (lambda level: level.alpha**2 / (level.alpha**2 + level.sigma**2))
    return LookAhead(lambda process, x, x0, k, key: x, own, local=True)


def ode_steps(count: int, ramp: Ramp | None = None) -> LookAhead:
    """The reward of where `count` deterministic steps lead.

    Args:
        count: steps, >= 1.
        ramp: strength of the value by Level; None for 1 throughout.

    Returns:
        What `steer.fkc(look_ahead=...)` takes.

    Raises:
        SteerError: for count below 1.

    Cost: count - 1 predictions per state more than `x0_hat`, which is one step.
    """
    if count < 1:
        raise SteerError(f"a look-ahead takes at least one step, got {count}")

    def predict(process: NoiseLevels, x: Tensor, x0: Tensor, k: int, key: Key | None) -> Tensor:
        x = noisy(process, x)
        for stop in stops(process.steps, k, count):
            x = ddim_jump(x, process.complete(x, x0), process.levels[k], process.levels[stop])
            k, x0 = stop, process.denoise(x, stop, key)
        return process.complete(x, x0)

    return LookAhead(predict, ramp or (lambda level: 1.0), evaluations=count - 1)


def stops(steps: int, k: int, count: int) -> list[int]:
    """The levels after k at which a look-ahead of `count` steps predicts again: equally spaced, none the data."""
    return sorted({k + (steps - k) * i // count for i in range(1, count)} - {k})


def flow_map(function: Callable[[Tensor, float], Tensor], ramp: Ramp | None = None, *, rows: int = 1) -> LookAhead:
    """The reward of function(x, t), a distilled map from states to data.

    With a ramp from 0 to 1, an exact flow map and `half_transport`, weights are (ramp' - ramp) r alone: nothing else
    changes along the flow.

    Args:
        function: states [B, N, *event] and a time t to clean states of that shape.
        ramp: strength of the value by Level; None for 1 throughout.
        rows: network rows (NFE x batch rows) that `function` costs per state, for the cost and the budget; 0 for a
            formula.

    Returns:
        What `steer.fkc(look_ahead=...)` takes.

    Cost: `rows` network rows per state and level, twice that under path weights, which value states at two levels.
    Source: the look-ahead of FMTT (2511.22688).
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise SteerError(f"rows are the network rows that the function costs per state, 0 or more, got {rows!r}")

    def predict(process: NoiseLevels, x: Tensor, x0: Tensor, k: int, key: Key | None) -> Tensor:
        def paid(x: Tensor) -> Answer:
            with process.meter.network(x.shape[0] * x.shape[1] * rows):
                return {"x0": function(x, process.levels[k].t)}

        return process.meter.call("denoise", k, paid, x, named="flow_map")["x0"]

    return LookAhead(predict, ramp or (lambda level: 1.0), rows=rows, local=True)
