"""Linear, Quadratic and LogDensity against brute force, finite differences and exact tilted laws."""

from __future__ import annotations

import math

import pytest
import torch

from steer.errors import ShapeError
from steer.models.mixture import GaussianMixture
from steer.rewards import Linear, LogDensity, Quadratic


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CENTER, MATRIX = normal(4, seed=1), normal(4, 4, seed=2)
REWARDS = {
    "linear": Linear(normal(4, seed=3), offset=0.7),
    "scalar": Quadratic(CENTER, 2.5),
    "diagonal": Quadratic(CENTER, [1.0, 2.0, 0.0, -0.5]),
    "matrix": Quadratic(CENTER, MATRIX),
}


def brute_force(name: str, x: torch.Tensor) -> float:
    """The definitions, coordinate by coordinate."""
    if name == "linear":
        weight = normal(4, seed=3)
        return sum(float(weight[i] * x[i]) for i in range(4)) + 0.7
    full = {
        "scalar": [[2.5 * (i == j) for j in range(4)] for i in range(4)],
        "diagonal": [[[1.0, 2.0, 0.0, -0.5][i] * (i == j) for j in range(4)] for i in range(4)],
        "matrix": MATRIX.tolist(),
    }[name]
    away = (x - CENTER).tolist()
    return -0.5 * sum(away[i] * full[i][j] * away[j] for i in range(4) for j in range(4))


@pytest.mark.parametrize("name", REWARDS)
def test_scores_equal_the_definition_on_flattened_events(name: str):
    x = normal(5, 2, 2)
    expected = torch.tensor([brute_force(name, row.flatten()) for row in x], dtype=torch.float64)
    torch.testing.assert_close(REWARDS[name](x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REWARDS)
def test_quadratic_form_agrees_with_the_call(name: str):
    x = normal(20, 4)
    matrix, vector, constant = REWARDS[name].quadratic_form(4)
    assert matrix.dtype == vector.dtype == torch.float64
    assert torch.equal(matrix, matrix.T)
    expected = -0.5 * torch.einsum("mi,ij,mj->m", x, matrix, x) + x @ vector + constant
    torch.testing.assert_close(REWARDS[name](x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REWARDS)
def test_gradient_is_that_of_finite_differences(name: str):
    assert torch.autograd.gradcheck(REWARDS[name], normal(3, 4).requires_grad_())


@pytest.mark.parametrize("name", REWARDS)
def test_scores_do_not_depend_on_batch_or_order(name: str):
    x, order = normal(7, 4), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    whole = REWARDS[name](x)
    torch.testing.assert_close(torch.cat([REWARDS[name](row[None]) for row in x]), whole)
    torch.testing.assert_close(REWARDS[name](x[order]), whole[order])


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize(
    ("given", "out"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_have_at_least_full_precision(name: str, given: torch.dtype, out: torch.dtype):
    x = normal(3, 4).to(given)
    scores = REWARDS[name](x)
    assert scores.dtype == out
    torch.testing.assert_close(scores, REWARDS[name](x.double()).to(out), rtol=1e-5, atol=1e-5)


def test_sizes_that_differ_are_named():
    with pytest.raises(ShapeError, match=r"Linear\(weight\) was given 4 numbers, and events have 3"):
        REWARDS["linear"](normal(2, 3))
    with pytest.raises(ShapeError, match=r"Quadratic\(center\) was given 4 numbers, and events have 6; give it one"):
        REWARDS["scalar"].quadratic_form(6)
    with pytest.raises(ShapeError, match=r"a matrix \(4, 4\), as center has 4 numbers, got shape \(2, 2\)"):
        Quadratic(CENTER, torch.eye(2))


def test_a_precision_shaped_as_the_event_is_a_diagonal():
    precision = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    x = normal(3, 2, 2)
    expected = -0.5 * (precision * (x - CENTER.view(2, 2)).square()).sum((1, 2))
    torch.testing.assert_close(Quadratic(CENTER.view(2, 2), precision)(x), expected)


def test_quadratic_tilts_a_gaussian_exactly():
    """N(0, 1) tilted by -P (x - c)^2 / 2 is N(Pc / (1 + P), 1 / (1 + P)), by completing the square by hand."""
    exact = GaussianMixture([[0.0]], [1.0]).exact(Quadratic([2.0], 3.0))
    torch.testing.assert_close(exact.mean, torch.tensor([1.5], dtype=torch.float64))
    torch.testing.assert_close(exact.cov, torch.tensor([[0.25]], dtype=torch.float64))
    assert exact.log_evidence == pytest.approx(-0.5 * math.log(4.0) - 0.5 * 3.0 * 4.0 / 4.0)


def test_log_density_is_the_ratio_to_its_reference():
    p, q = GaussianMixture([[0.0, 0.0]], [2.0]), GaussianMixture([[1.0, 0.0], [-1.0, 3.0]], [0.5, 1.0])
    x = normal(6, 2)
    torch.testing.assert_close(LogDensity(q.log_prob)(x), q.log_prob(x))
    torch.testing.assert_close(LogDensity(q.log_prob, p.log_prob)(x), q.log_prob(x) - p.log_prob(x))
    assert torch.autograd.gradcheck(LogDensity(q.log_prob, p.log_prob), x.requires_grad_())


def test_log_density_refuses_densities_by_coordinate():
    per_coordinate = torch.distributions.Normal(0.0, 1.0).log_prob
    with pytest.raises(ShapeError, match=r"LogDensity\(log_prob\) .* shape \(6,\), .* got \(6, 2\); sum it"):
        LogDensity(per_coordinate)(normal(6, 2))
    with pytest.raises(ShapeError, match=r"LogDensity\(reference\)"):
        LogDensity(GaussianMixture([[0.0, 0.0]], [1.0]).log_prob, per_coordinate)(normal(6, 2))


def test_log_density_never_works_in_half_precision():
    seen = []

    def log_prob(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return -x.square().sum(1)

    assert LogDensity(log_prob)(normal(2, 3).bfloat16()).dtype == torch.float32
    assert LogDensity(log_prob)(normal(2, 3)).dtype == torch.float64
    assert seen == [torch.float32, torch.float64]
