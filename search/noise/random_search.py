"""Random search: fresh noise for every chain."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steer.core.loop import keeping
from steer.core.run import Run
from steer.types import ReverseProcess

from .strategy import StrategyResult, concat, sample_and_score


@dataclass(frozen=True)
class RandomSearch:
    """Independent noises. Built by `random_search`."""

    chains: int = 1

    def least(self, process: ReverseProcess) -> int:
        """One sample."""
        return process.steps

    def __call__(self, run: Run, particles: int, calls: int) -> StrategyResult:
        """As many samples as the calls pay for, in chunks."""
        count = particles * (calls // run.process.steps)
        parts: list[StrategyResult] = []
        for first in range(0, count, run.chunk):
            here = replace(run, key=run.key.shifted(slot=first))
            try:
                with keeping(lambda: concat(*parts) if parts else None):
                    found = sample_and_score(here, here.begin(min(run.chunk, count - first)).x, None)
            except KeyboardInterrupt:
                if not parts:
                    raise
                parts[-1] = parts[-1]._replace(interrupted=True)
                break
            parts.append(found._replace(root=found.root + first))
            if found.interrupted:
                break
        return concat(*parts)


def random_search() -> RandomSearch:
    """Independent noises: best-of-N as a strategy, with all samples returned.

    Returns:
        A strategy for `noise_search(strategy=)`.

    Cost: K network rows (K = process.steps) and one reward per sample; the smallest move is one sample.
    Source: Ma et al. 2025 (2501.09732), random search.
    """
    return RandomSearch()
