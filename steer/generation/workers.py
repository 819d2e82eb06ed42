"""Several workers on one machine, or a Ray cluster: `steer generate --workers N`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import SteerError
from .generator import Generator
from .run_directory import RunDirectory

WAIT = 60.0  # seconds without a worker before it is said that none has come up


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
        workers: processes.
        gpus_per_worker: of each; fractions share one.
        address: of a Ray cluster; None starts one on this machine, and ends it.

    Yields:
        The index of each row and what went wrong with it, "" if nothing did. A worker that dies is started again, and
        its row goes on from its journal; a row that kills its worker four times is an error record.

    Raises:
        SteerError: ray is not installed, or no worker comes up because the cluster has not what one needs.
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
        actors = [kind.remote(generator, str(directory.path.absolute())) for _ in range(min(workers, len(indices)))]
        yield from _results(ray, actors, directory, list(indices), gpus_per_worker)
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _results(
    ray: Any, actors: list[Any], directory: RunDirectory, left: list[int], gpus: float
) -> Iterator[tuple[int, str]]:
    """Keeps every worker at one row, and hands on what is done."""
    left.reverse()
    under_way = {actor.make.remote(index): (actor, index) for actor in actors if left for index in [left.pop()]}
    began, done = time.monotonic(), 0
    while under_way:
        ready, _ = ray.wait(list(under_way), timeout=5.0)
        if not ready and not done and time.monotonic() - began > WAIT:
            free = ray.available_resources()
            if free.get("GPU", 0.0) < gpus or not free.get("CPU", 0.0):
                raise SteerError(
                    f"no worker has come up in {WAIT:.0f} s: each needs 1 CPU and {gpus:g} GPUs, and the cluster has "
                    f"{ray.cluster_resources()}; ask for fewer workers, or less for each"
                )
        for one in ready:
            actor, index = under_way.pop(one)
            try:
                made = ray.get(one)
            except ray.exceptions.RayError as error:  # its worker died again and again, or CUDA is beyond use
                directory.failed(index, error)
                made = index, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            done += 1
            yield made
            if left:
                index = left.pop()
                under_way[actor.make.remote(index)] = actor, index
