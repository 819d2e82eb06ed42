"""The methods by name, and one call for all of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from ..errors import SteerError
from ..key import Key, as_key
from ..results.result import Result
from ..types import ReverseProcess, Reward

Method = Callable[..., Result]


def methods() -> dict[str, str]:
    """Names that `sample` understands and where each lives, from the `steer.methods` entry points installed here."""
    return {point.name: point.value for point in sorted(entry_points(group="steer.methods"))}


def resolve(method: str | Method) -> Method:
    """The sampler of a name; a function is itself."""
    if callable(method):
        return method
    for point in entry_points(group="steer.methods"):
        if point.name == method:
            return point.load()
    raise SteerError(
        f"no method is called {method!r}; there are {', '.join(methods())}, and "
        "any function f(process, reward, *, budget, batch, temperature, key) -> Result is one"
    )


def sample(
    process: ReverseProcess,
    reward: Reward,
    *,
    method: str | Method = "smc",
    budget: int | None = None,
    temperature: float = 1.0,
    batch: int = 1,
    key: Key | int = 0,
    **options: Any,
) -> Result:
    """Samples that follow the reward, by any method.

    method:      a name (see `steer.methods()`) or a sampler itself.
    budget:      denoiser rows per problem, never exceeded; without it the method's own default number of particles.
    temperature: divides rewards; for samplers of a law the target is p(x) exp(r(x) / temperature).
    batch:       independent problems; a conditioned process fixes it.
    options:     the method's own, by keyword.
    """
    return resolve(method)(
        process, reward, budget=budget, temperature=temperature, batch=batch, key=as_key(key), **options
    )
