"""One unit for noise levels on every Gaussian path: the share of signal, alpha^2 / (alpha^2 + sigma^2).

On variance-preserving paths it is alpha-bar. Papers on minority generation name levels by an index of their own
schedule, which means another noise on another schedule; shares carry over to flows and to variance-exploding paths.
"""

from __future__ import annotations

import math

from ..errors import SteerError
from ..types import Level, NoiseLevels


def share(level: Level) -> float:
    """Share of signal of a level: 1 at the data, 0 at pure noise."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def size(level: Level) -> float:
    """sqrt(alpha^2 + sigma^2): dividing a state by it makes its path variance preserving."""
    return math.hypot(level.alpha, level.sigma)


def log_snr(level: Level) -> float:
    """log(alpha^2 / sigma^2), by which a noisy classifier is told its noise level on any path."""
    return 2.0 * math.log(level.alpha / level.sigma)


def level_near(process: NoiseLevels, signal: float) -> int:
    """The level of the grid, ahead of the data, whose share of signal is nearest in log-odds to `signal`."""
    if not 0.0 < signal < 1.0:
        raise SteerError(f"signal is a share alpha^2 / (alpha^2 + sigma^2) strictly between 0 and 1, got {signal}")
    wanted = math.log(signal / (1.0 - signal))
    noisy = [k for k, at in enumerate(process.levels) if at.alpha > 0.0 and at.sigma > 0.0]
    return min(noisy, key=lambda k: abs(log_snr(process.levels[k]) - wanted))
