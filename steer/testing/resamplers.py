"""The check of resamplers."""

from __future__ import annotations

import torch

from ..core.resampling import Resampler
from ..key import Key, as_key
from .statistics import LIMIT, CheckFailed, described, z


def check_resampler(resampler: Resampler, *, runs: int = 4096, key: Key | int = 0) -> float:
    """Checks that a resampler makes, in expectation, N W_n copies of particle n, also where N changes.

    Args:
        resampler: `(log_weight [B, N], key, count) -> ancestors [B, count]`.
        runs: independent problems that counts are averaged over.
        key: names the draws.

    Returns:
        The largest |z| of mean numbers of copies.

    Raises:
        CheckFailed: where numbers of copies are biased, or ancestors have another shape or range.
    """
    weight = torch.tensor([0.05, 0.3, 0.0, 0.25, 0.1, 0.3], dtype=torch.float64)
    log_weight, worst_z = weight.log().expand(runs, -1), 0.0
    for count in (6, 4, 9):
        ancestors = resampler(log_weight.clone(), as_key(key).fold("resampler", count), count)
        if ancestors.shape != (runs, count) or ancestors.dtype != torch.int64:
            raise CheckFailed(f"ancestors must be int64 of shape {(runs, count)}, got {described(ancestors)}")
        if bool((ancestors < 0).any() | (ancestors >= 6).any()):
            raise CheckFailed(f"ancestors are indices in [0, 6), got {int(ancestors.min())} to {int(ancestors.max())}")
        copies = torch.nn.functional.one_hot(ancestors, 6).double().sum(1) - count * weight
        for n, column in enumerate(copies.T):
            score = abs(z(column))
            if not score < LIMIT:
                raise CheckFailed(
                    f"particle {n} of weight {weight[n]:.2f} must get {count * weight[n]:.2f} copies of {count} on "
                    f"average, got {float(column.mean() + count * weight[n]):.3f} over {runs} runs (z = {score:.1f})"
                )
            worst_z = max(worst_z, score)
    return worst_z
