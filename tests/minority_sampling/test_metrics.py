"""Metrics against scikit-learn, closed forms and populations whose faults are known."""

import math

import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors

import steer
from steer.minority_sampling import minority_metrics
from steer.minority_sampling.metrics import in_balls, knn_distance, local_outlier_factor, rarity
from steer.models import GaussianMixture
from steer.rewards.nearest_neighbours import NeighbourDistance, OnManifold


def points(count, size, seed):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_neighbours_and_outliers_are_scikit_learns():
    real, x = points(300, 4, 0), torch.cat([points(150, 4, 1), 6.0 + points(10, 4, 2)])
    distance, _ = NearestNeighbors(n_neighbors=5).fit(real).kneighbors(x)
    assert torch.allclose(knn_distance(x, real, 5), torch.from_numpy(distance).mean(1))
    for k in (5, 20):
        reference = LocalOutlierFactor(n_neighbors=k, novelty=True).fit(real.numpy())
        assert torch.allclose(local_outlier_factor(x, real, k), -torch.from_numpy(reference.score_samples(x.numpy())))


def test_copies_in_the_data_do_not_divide_by_zero():
    real = torch.cat([torch.zeros(30, 2, dtype=torch.float64), points(30, 2, 0)])
    reference = LocalOutlierFactor(n_neighbors=20, novelty=True).fit(real.numpy())
    x = points(5, 2, 3)
    found = local_outlier_factor(x, real, 20)
    assert found.isfinite().all()
    assert torch.allclose(found, -torch.from_numpy(reference.score_samples(x.numpy())))


def test_rarity_is_the_smallest_ball_and_nothing_off_the_manifold():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii to the nearest neighbour: 1, 1, 2, 7
    x = torch.tensor([[0.5], [1.5], [3.4], [4.5], [16.5], [17.5], [-1.5]])
    found, on = rarity(x.double(), real.double(), k=1)
    assert on.tolist() == [True, True, True, True, True, False, False]
    assert found[on].tolist() == [1.0, 1.0, 2.0, 2.0, 7.0]
    assert found[~on].isnan().all()
    assert in_balls(x.double(), real.double(), 1).equal(on)


def test_distance_rises_with_garbage_and_precision_tells():
    """The mutant population: half of it noise. Every distance calls it rarer; precision halves."""
    real, good = points(1000, 6, 0), points(400, 6, 1)
    bad = torch.cat([good[:200], 5.0 * points(200, 6, 2)])
    law = GaussianMixture(torch.zeros(1, 6), torch.ones(1), [1.0])
    first, second = (minority_metrics(x, real, law=law) for x in (good, bad))
    assert second.distance > first.distance + 1.0
    assert second.outlier > first.outlier + 0.5
    assert first.precision > 0.9 > 0.6 > second.precision
    assert first.log_density is not None
    assert second.log_density is not None
    assert second.log_density < first.log_density - 10.0
    entropy = -3.0 * math.log(2.0 * math.pi * math.e)
    assert abs(first.log_density - entropy) < 4.0 * first.errors["log_density"]
    assert "precision" in str(first)
    assert second.recall < first.recall + 0.05


def test_occupancy_has_binomial_errors():
    law = GaussianMixture([[-4.0], [4.0]], torch.ones(2), [0.97, 0.03])
    x = torch.cat([points(970, 1, 0) - 4.0, points(30, 1, 1) + 4.0])
    found = minority_metrics(x, x, law=law)
    assert found.occupancy == pytest.approx((0.97, 0.03))
    assert found.errors["occupancy"][1] == pytest.approx(math.sqrt(0.03 * 0.97 / 1000), rel=1e-3)
    assert minority_metrics(x, x).occupancy is None


def test_too_few_points_and_other_sizes_are_errors():
    with pytest.raises(steer.ShapeError, match="need at least 21 real points"):
        minority_metrics(points(10, 2, 0), points(20, 2, 1))
    with pytest.raises(steer.ShapeError, match="one size"):
        minority_metrics(points(10, 2, 0), points(30, 3, 1))


# The rewards


def test_tent_rises_to_the_rarest_points_and_falls_beyond():
    reference = points(500, 4, 0)
    reward = NeighbourDistance(reference)
    ray = torch.arange(0.0, 8.0, 0.1, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 0, 0, 0]]).double()
    score = reward(ray)
    top = int(score.argmax())
    assert 0 < top < len(ray) - 1
    assert score[top] > 0.9
    assert (score[top + 5 :].diff() < 0).all()
    assert score[-1] < -3.0
    own = torch.cdist(reference, reference).fill_diagonal_(math.inf).topk(5, largest=False).values.mean(1)
    assert reward.scale == pytest.approx((own.quantile(0.5).item(), own.quantile(0.95).item()))


def test_tent_is_two_lines_that_meet_at_the_ceiling():
    reward = NeighbourDistance(points(200, 3, 0), ceiling=0.9, fall=1.5)
    x = points(300, 3, 5) * torch.linspace(0.1, 3.0, 300, dtype=torch.float64)[:, None]
    distance, (median, top) = knn_distance(x, points(200, 3, 0), 5), reward.scale
    height = (distance - median) / (top - median)
    assert 50 < int((height > 1.0).sum()) < 250
    torch.testing.assert_close(reward(x), torch.minimum(height, 1.0 - 1.5 * (height - 1.0)))


def test_tent_has_its_gradient():
    reward = NeighbourDistance(points(100, 3, 0))
    x = points(4, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(reward, (x,))
    with pytest.raises(steer.RewardError, match="more than k"):
        NeighbourDistance(points(5, 2, 0))
    with pytest.raises(steer.RewardError, match="no spread"):
        NeighbourDistance(torch.zeros(9, 2)).scale  # noqa: B018


def test_gate_is_precision_and_conditions_exactly():
    """Importance weights by it are the law on the manifold: Gaussian data cut to balls, share within four errors."""
    reference = points(60, 2, 0)
    gate = OnManifold(reference, k=3)
    x = points(2000, 2, 1)
    assert (gate(x) == 0.0).equal(in_balls(x, reference, 3))
    process = steer.models.gaussian(torch.zeros(2), 1.0, steps=60, dtype=torch.float64)
    result = steer.importance_sampling(process, gate, particles=4000)
    share, many = result.log_evidence.exp().item(), in_balls(points(100_000, 2, 2), reference, 3).double().mean().item()
    assert abs(share - many) < 4.0 * math.sqrt(share * (1.0 - share) / 4000) + 0.01  # and the bias of 60 steps
    assert in_balls(result.draw(500).x[0], reference, 3).all()
