"""The methods by name, and one call for all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..core.temperature import Temperature
from ..errors import SteerError
from ..execution.journal import CHECKPOINT, resumable
from ..execution.progress_bar import progress as progress_bar
from ..execution.progress_bar import rows_of
from ..key import Key, as_key
from ..results.result import Result
from ..types import ReverseProcess, Reward

Method = Callable[..., Result]

BUILT_IN = {
    "auto": "steer.evaluation.auto:auto",
    "rollout": "steer.samplers.rollout:rollout",
    "importance_sampling": "steer.samplers.importance_sampling:importance_sampling",
    "smc": "steer.samplers.smc:smc",
    "fkc": "steer.samplers.fkc:fkc",
    "driftlite": "steer.samplers.driftlite:driftlite",
    "psi": "steer.samplers.psi:psi",
    "fk_steering": "steer.samplers.fk_steering:fk_steering",
    "tds": "steer.samplers.tds:tds",
    "das": "steer.samplers.das:das",
    "particle_gibbs": "steer.samplers.particle_gibbs:particle_gibbs",
    "waste_free": "steer.samplers.waste_free:waste_free",
    "best_of_n": "steer.search.population.best_of_n:best_of_n",
    "svdd": "steer.search.population.svdd:svdd",
    "dts": "steer.search.trees.dts:dts",
    "dts_star": "steer.search.trees.dts_star:dts_star",
    "beam": "steer.search.population.beam:beam",
    "depth_first": "steer.search.chains.depth_first:depth_first",
    "rbf": "steer.search.chains.rbf:rbf",
    "noise_search": "steer.search.noise.noise_search:noise_search",
}
"""Name of each built-in method, and where it lives. Imported when called, so that `import steer` stays light."""


def methods() -> dict[str, str]:
    """Names that `sample` understands, each with "module:function".

    The built-in methods, and after them what installed distributions declare in the entry-point group
    "steer.methods"; a built-in name cannot be taken over.
    """
    others = {point.name: point.value for point in entry_points(group="steer.methods")}
    return dict(sorted({**others, **BUILT_IN}.items()))


def resolve(method: str | Method) -> Method:
    """The sampler of a name; a function is itself."""
    if callable(method):
        return method
    known = methods()
    if method not in known:
        raise SteerError(
            f"no method is called {method!r}; there are {', '.join(known)}, and any function "
            "f(process, reward, *, budget, batch, temperature, key) -> Result is one"
        )
    module, _, name = known[method].partition(":")
    return getattr(import_module(module), name)


def sample(
    process: ReverseProcess,
    reward: Reward,
    *,
    method: str | Method = "smc",
    budget: int | None = None,
    temperature: Temperature = 1.0,
    batch: int = 1,
    key: Key | int = 0,
    seed: int | None = None,
    journal: str | Path | None = None,
    checkpoint: float | None = CHECKPOINT,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Samples that follow the reward, by any method.

    Args:
        process: the model as a reverse process.
        reward: samples [M, ...] to scores [M]. Higher is better.
        method: a name (see `steer.methods()`) or a sampler itself.
        budget: network rows (NFE x batch rows) per problem, never exceeded; without it the method's own default number
            of particles.
        temperature: divides rewards; where a method samples a distribution, that is p(x) exp(r(x) / temperature), and
            "auto", or ess= or kl= among the options, choose it before the run (docs/temperature.md).
        batch: independent problems; a conditioned process fixes it.
        key: names all noise of the run, an integer or a `Key`.
        seed: the same as `key`; give one of them.
        journal: directory of a journal (`steer.resumable`): killed anywhere, the same call goes on where it ended.
        checkpoint: seconds between two snapshots in the journal, by which it stays small; None: never.
        progress: whether to show a bar: network rows, best score, time left (`steer.progress`).
        **options: the method's own, by keyword.

    Returns:
        The method's Result.

    Raises:
        SteerError: no method of that name, or both `key` and `seed`.
        Others: those of the method.
    """
    options |= {"budget": budget, "temperature": temperature, "batch": batch, "key": as_key(key, seed)}
    with ExitStack() as around:
        if progress:
            around.enter_context(progress_bar(rows_of(process, options), name=name_of(method)))
        if journal is not None:
            around.enter_context(resumable(journal, checkpoint=checkpoint))
        return resolve(method)(process, reward, **options)


def name_of(method: str | Method) -> str:
    """The name of a method, given by its name or itself."""
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
