"""Several workers on one machine, or a Ray cluster: `steer generate --workers N`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import SteerError
from .generator import Generator
from .run_directory import RunDirectory


class _Worker:
    """One process with the model loaded, that makes the rows it is given."""

    def __init__(self, generator: Generator, path: str) -> None:
        self.generator, self.directory = generator, RunDirectory(path)

    def make(self, index: int) -> tuple[int, str]:
        """A row, and what went wrong with it; "" if nothing did."""
        if self.directory.state(index) == "finished":
            return index, ""
        error = self.generator.make(self.directory, self.directory.rows[index])
        return index, "" if error is None else f"{type(error).__name__}: {error}"


def run(
    generator: Generator,
    directory: RunDirectory,
    indices: Sequence[int],
    *,
    workers: int,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
) -> Iterator[tuple[int, str]]:
    """Makes rows of a run directory by Ray actors, as results come.

    Args:
        generator: not yet used, so that each worker loads the model itself.
        directory: the run; workers write into it, so it lies where all of them see it.
        indices: rows to make.
        workers: processes; fewer where the cluster has no room for as many.
        gpus_per_worker: of each; fractions share one.
        address: of a Ray cluster; None starts one on this machine, and ends it.

    Yields:
        The index of each row and what went wrong with it, "" if nothing did. A worker that dies is started again, and
        its row goes on from its journal; a row that kills its worker four times is an error record.

    Raises:
        SteerError: ray is not installed, or the cluster has not what one worker needs.
    """
    try:
        import ray
    except ImportError as error:
        raise SteerError('--workers needs ray: pip install "steer-diffusion[ray]"; or use torchrun') from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    actors: list[Any] = []
    try:
        kind: Any = ray.remote(num_cpus=1, num_gpus=gpus_per_worker, max_restarts=-1, max_task_retries=3)(_Worker)
        count = min(workers, len(indices), _places(ray, gpus_per_worker))
        actors = [kind.remote(generator, str(directory.path.absolute())) for _ in range(count)]
        yield from _results(ray, actors, directory, list(indices))
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _places(ray: Any, gpus: float) -> int:
    """How many workers the cluster has room for. One that does not fit would wait for ever, with a row in its hands."""
    has = ray.cluster_resources()
    fit = int(min(has.get("CPU", 0.0), has.get("GPU", 0.0) / gpus if gpus else math.inf))
    if fit < 1:
        raise SteerError(
            f"a worker needs 1 CPU and {gpus:g} GPUs, and the cluster has {has.get('CPU', 0.0):g} and "
            f"{has.get('GPU', 0.0):g}; start it with more, or ask for less for each worker"
        )
    return fit


def _results(ray: Any, actors: list[Any], directory: RunDirectory, left: list[int]) -> Iterator[tuple[int, str]]:
    """Keeps every worker at one row, and hands on what is done."""
    left.reverse()
    under_way = {actor.make.remote(index): (actor, index) for actor in actors if left for index in [left.pop()]}
    while under_way:
        ready, _ = ray.wait(list(under_way))
        for one in ready:
            actor, index = under_way.pop(one)
            try:
                yield ray.get(one)
            except ray.exceptions.RayError as error:  # its worker died again and again, or CUDA is beyond use
                directory.failed(index, error)
                yield index, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if left:
                index = left.pop()
                under_way[actor.make.remote(index)] = actor, index
