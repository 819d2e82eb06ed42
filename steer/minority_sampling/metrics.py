"""What a minority sampler is judged by, always together: distance alone rewards garbage.

A sample far from the data is a rare one or a broken one. Distances and outlier factors cannot tell which; precision
can, and where the distribution is known its density does. So there is one function, and it reports all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from ..models.mixture import GaussianMixture


@dataclass(frozen=True)
class Minority:
    """Every number of one population, means over samples with standard errors in `errors` under the same names.

    distance:    mean distance to the k nearest real points (AvgkNN). Rises with rarity and with garbage.
    outlier:     local outlier factor against the real points; 1 is typical. Rises with rarity and with garbage.
    rarity:      mean over samples on the manifold of the smallest real ball around them; NaN if none is.
    precision:   share of samples in some real point's ball: for rarity, the on-manifold share.
    recall:      share of real points in some sample's ball. Grows with the number of samples.
    log_density: mean exact log-density; None where the distribution is unknown.
    occupancy:   mode masses, [K] numbers; None where the distribution is unknown.
    """

    samples: int
    distance: float
    outlier: float
    rarity: float
    precision: float
    recall: float
    log_density: float | None
    occupancy: tuple[float, ...] | None
    errors: dict[str, float | tuple[float, ...]]

    def __str__(self) -> str:
        names = ("distance", "outlier", "rarity", "precision", "recall", "log_density")
        cells = [f"{name} {getattr(self, name):.3f} ± {self.errors[name]:.3f}" for name in names if name in self.errors]
        return f"{self.samples} samples: " + ", ".join(cells)


def minority_metrics(
    samples: Tensor,
    real: Tensor,
    *,
    k: int = 5,
    outlier_k: int = 20,
    ball_k: int = 3,
    law: GaussianMixture | None = None,
) -> Minority:
    """All metrics of samples [M, ...] against real points [R, ...]: features, or states of a known distribution.

    Rarity, precision and recall are by balls (Kynkäänniemi et al. 2019; Han et al. 2023).

    Args:
        samples: [M, ...]: features, or states of a known distribution.
        real: real points [R, ...] in the same space.
        k: neighbours of the distance.
        outlier_k: neighbours of the local outlier factor.
        ball_k: a point's ball reaches its ball_k-th neighbour, for rarity, precision and recall.
        law: a mixture whose density and modes are reported of `samples` too.

    Raises:
        ShapeError: where there are too few points for the neighbours asked for.
    """
    samples, real = samples.flatten(1).double(), real.flatten(1).double()
    if samples.shape[1] != real.shape[1]:
        raise ShapeError(f"samples and real points must be of one size, got {samples.shape[1]} and {real.shape[1]}")
    least = max(k, outlier_k, ball_k) + 1
    if len(real) < least or len(samples) <= ball_k:
        raise ShapeError(
            f"neighbours k={k}, outlier_k={outlier_k}, ball_k={ball_k} need at least {least} real points and "
            f"{ball_k + 1} samples, got {len(real)} and {len(samples)}"
        )
    rare, on = rarity(samples, real, ball_k)
    columns = {
        "distance": knn_distance(samples, real, k),
        "outlier": local_outlier_factor(samples, real, outlier_k),
        "rarity": rare[on],
        "precision": on.double(),
        "recall": in_balls(real, samples, ball_k).double(),
    }
    occupancy = None
    if law is not None:
        columns["log_density"] = law.log_prob(samples)
        occupancy = torch.nn.functional.one_hot(law.responsibilities(samples).argmax(1), len(law.weights)).double()
    errors: dict[str, float | tuple[float, ...]] = {name: _error(column) for name, column in columns.items()}
    means = {name: column.mean().item() for name, column in columns.items()}  # of nothing: NaN
    if occupancy is not None:
        errors["occupancy"] = tuple(map(_error, occupancy.T))
    return Minority(
        samples=len(samples),
        log_density=means.pop("log_density", None),
        occupancy=None if occupancy is None else tuple(occupancy.mean(0).tolist()),
        errors=errors,
        **means,
    )


def knn_distance(x: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """Mean distance to the k nearest real points, [M] (AvgkNN)."""
    return _nearest(x, real, k)[0].mean(1)


def local_outlier_factor(x: Tensor, real: Tensor, k: int = 20) -> Tensor:
    """Local outlier factor of new points against real ones, [M] (Breunig et al. 2000; 1 is typical).

    Neighbours are real points only, as in scikit-learn's LocalOutlierFactor(novelty=True), whose -score_samples it is.
    """
    own, own_index = _nearest(real, real, k, itself=True)
    reach = own[:, -1]

    def local_density(distance: Tensor, index: Tensor) -> Tensor:
        return 1.0 / (torch.maximum(distance, reach[index]).mean(1) + 1e-10)  # their constant: copies have density

    density = local_density(own, own_index)
    distance, index = _nearest(x, real, k)
    return density[index].mean(1) / local_density(distance, index)


def rarity(x: Tensor, real: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Radius of the smallest real k-NN ball around each x, [M], and whether there is one (Han et al. 2023).

    Undefined off the manifold: NaN there.
    """
    radius = _nearest(real, real, k, itself=True)[0][:, -1]
    inside = torch.cat([torch.where(d <= radius, radius, torch.inf).amin(1) for d in _distances(x, real)])
    on = inside.isfinite()
    return torch.where(on, inside, torch.nan), on


def in_balls(x: Tensor, points: Tensor, k: int = 3) -> Tensor:
    """Whether x [M, D] lies in the k-NN ball of some point, [M]: precision is its mean for samples x among real
    points, recall the other way round (Kynkäänniemi et al. 2019)."""
    return rarity(x, points, k)[1]


def _nearest(x: Tensor, points: Tensor, k: int, *, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest points, rising, and their indices, [M, k] each; itself: x are the points."""
    distances, indices, first = [], [], 0
    for block in _distances(x, points):
        if itself:  # by place, not by rank: a copy of a point is a neighbour
            rows = torch.arange(len(block), device=x.device)
            block[rows, first + rows] = torch.inf
            first += len(block)
        near = block.topk(k, dim=1, largest=False)
        distances.append(near.values)
        indices.append(near.indices)
    return torch.cat(distances), torch.cat(indices)


def _distances(x: Tensor, points: Tensor, rows: int = 2048):
    """Distances to all points, by blocks of x: differences are squared, since |a|^2 + |b|^2 - 2ab loses close pairs."""
    for block in x.split(rows):
        yield torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist")


def _error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
