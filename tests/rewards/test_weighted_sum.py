"""Weighted sums: their arithmetic, their units, what they forward and what they refuse."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from steer.errors import NotDifferentiableError, RewardError, ShapeError
from steer.rewards import DigitLogProb, Ink, JPEGSize, Linear, Quadratic, Symmetry, Weighted, weighted


def rows(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(samples: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1).sum(1)


def lengths(samples: torch.Tensor, *, prompts: list[str]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def test_sum_and_parts_are_those_of_the_terms():
    images = rows(4, 1, 8, 8)
    digit, jpeg = DigitLogProb(3), JPEGSize(size=16)
    total = weighted((1.5, digit), (0.5, jpeg, "nat/kB"), (-2, Ink(), "nat/1"))
    expected = 1.5 * digit(images) + 0.5 * jpeg(images) - 2 * Ink()(images)
    torch.testing.assert_close(total(images), expected)
    parts = total.parts(images)
    assert list(parts) == ["DigitLogProb(3)", "JPEGSize", "Ink"]
    for scores, reward in zip(parts.values(), (digit, jpeg, Ink()), strict=True):
        assert torch.equal(scores, reward(images))
    assert total.spec.unit == "nat"
    assert total.__name__ == "1.5*DigitLogProb(3) + 0.5*JPEGSize + -2*Ink"


def test_equal_units_add_without_a_rate_and_sums_nest():
    total = weighted((1.0, Ink()), (2.0, Symmetry()), (1.0, weighted((3.0, Ink()), (1.0, Ink()))))
    images = rows(2, 1, 4, 4)
    torch.testing.assert_close(total(images), 5 * Ink()(images) + 2 * Symmetry()(images))
    assert total.spec.unit == "1"
    assert list(weighted((3.0, Ink()), (1.0, Ink())).parts(images)) == ["Ink", "Ink 2"]


def test_plain_functions_declare_nothing_and_add_among_themselves():
    total = weighted((2.0, plain), (1.0, lambda samples: samples.flatten(1).amax(1).tolist()))
    x = rows(3, 2)
    torch.testing.assert_close(total(x), 2 * x.sum(1) + x.amax(1))
    assert total.spec.unit is None


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            [(1.0, DigitLogProb(3)), (0.5, JPEGSize())],
            r'cannot add JPEGSize \(in kB\) to DigitLogProb\(3\) \(in nat\); .* \(0.5, JPEGSize, "nat/kB"\)',
        ),
        (
            [(1.0, Linear([1.0])), (2.0, plain)],
            r'cannot add plain \(in no declared unit\) to Linear \(in nat\); .* \(2, plain, "nat"\)',
        ),
        (
            [(2.0, plain), (1.0, JPEGSize())],
            r'cannot add JPEGSize \(in kB\) to plain \(in no declared unit\); .* \(2, plain, "kB"\)',
        ),
        (
            [(1.0, JPEGSize(), "nat/kB"), (1.0, Ink(), "bit/1")],
            r'cannot add Ink \(in bit\) to JPEGSize \(in nat\); .* \(1, Ink, "nat/1"\)',
        ),
    ],
)
def test_terms_of_different_units_are_refused_with_a_cure_that_works(terms, message):
    with pytest.raises(RewardError, match=message) as caught:
        weighted(*terms)
    # Follow the advice: the error's last quoted rate, given to the term it names.
    name, rate = str(caught.value).rsplit(", ", 2)[1:]
    cured = [
        (weight, reward, rate.strip('")')) if name in (getattr(reward, "__name__", ""), type(reward).__name__) else term
        for term in terms
        for weight, reward in [term[:2]]
    ]
    assert cured != terms
    assert weighted(*cured).spec.unit == rate.strip('")').split("/")[0]


@pytest.mark.parametrize("rate", ["nat/MB", "nat", "nat/", "/kB", ""])
def test_a_rate_must_match_the_declared_unit(rate: str):
    with pytest.raises(RewardError, match=rf'JPEGSize must be given as "nat/kB", as JPEGSize is in kB, got {rate!r}'):
        weighted((1.0, DigitLogProb(3)), (1.0, JPEGSize(), rate))


def test_a_rate_for_a_plain_function_may_name_what_it_counts():
    assert weighted((1.0, plain, "nat/grey level")).spec.unit == weighted((1.0, plain, "nat")).spec.unit == "nat"
    with pytest.raises(RewardError, match=r'plain must be given as "nat", as plain is in no declared unit, got .nat/.'):
        weighted((1.0, plain, "nat/"))


@pytest.mark.parametrize(
    "term",
    [(math.nan, plain), (math.inf, plain), ("1", plain), (1.0, "ink"), (1.0,), plain, (1.0, plain, 2.0)],
)
def test_malformed_terms_are_shown(term):
    with pytest.raises(RewardError, match=r'a term is \(finite weight, reward\) or \(.*, "out/in"\), got'):
        weighted((1.0, plain), term)
    with pytest.raises(RewardError, match="at least one term"):
        weighted()


def test_prompts_reach_the_parts_that_take_them():
    x, prompts = rows(2, 3), ["a", "a dog"]
    total = weighted((1.0, plain), (10.0, lengths))
    torch.testing.assert_close(total(x, prompts=prompts), x.sum(1) + torch.tensor([10.0, 50.0]))
    assert total.parts(x, prompts=prompts)["lengths"].tolist() == [1.0, 5.0]
    assert "prompts" in inspect.signature(total).parameters
    # A sum none of whose parts wants prompts must not ask samplers for them.
    assert list(inspect.signature(weighted((1.0, plain))).parameters) == ["samples"]


def test_what_a_part_forbids_is_forbidden_even_at_weight_zero():
    def odd_ones_out(samples: torch.Tensor) -> torch.Tensor:
        return torch.where(samples[:, 0] > 0.5, -torch.inf, 1.0)

    x = torch.tensor([[0.1], [0.9]])
    for weight in (0.0, 0.5):
        assert weighted((1.0, plain), (weight, odd_ones_out))(x).tolist() == pytest.approx([0.1 + weight, -math.inf])


def test_gradient_is_that_of_finite_differences():
    total = weighted((1.5, DigitLogProb(3)), (-0.5, Ink(), "nat/1"))
    assert torch.autograd.gradcheck(total, rows(2, 1, 8, 8).requires_grad_(), fast_mode=True)


def test_half_a_gradient_is_refused():
    images = rows(2, 1, 8, 8).requires_grad_()
    total = weighted((1.0, DigitLogProb(3)), (0.5, JPEGSize(size=8), "nat/kB"))
    with pytest.raises(NotDifferentiableError, match=r"would leave out JPEGSize, .*proposal=steer\.bootstrap"):
        total(images)
    with torch.no_grad():
        assert total(images).shape == (2,)
    silenced = weighted((1.0, DigitLogProb(3)), (0.0, JPEGSize(size=8), "nat/kB"))
    assert silenced(images).requires_grad  # no gradient is lost where the weight is zero


def test_analytic_parts_make_an_analytic_sum():
    x = rows(10, 2)
    total = weighted((2.0, Linear([1.0, -1.0], offset=0.5)), (0.5, Quadratic([1.0, 2.0], [[2.0, 1.0], [1.0, 3.0]])))
    matrix, vector, constant = total.quadratic_form(2)
    torch.testing.assert_close(total(x), -0.5 * torch.einsum("mi,ij,mj->m", x, matrix, x) + x @ vector + constant)
    with pytest.raises(RewardError, match=r"every part .* quadratic_form.*; plain has none"):
        weighted((1.0, Linear([1.0, 1.0]), "nat/nat"), (1.0, plain, "nat")).quadratic_form(2)


def test_a_failing_part_is_named():
    def broken(samples: torch.Tensor) -> torch.Tensor:
        raise KeyError("weights.bin")

    def scalar(samples: torch.Tensor) -> torch.Tensor:
        return samples.mean()

    with pytest.raises(RewardError, match=r"the reward broken raised KeyError: 'weights.bin' on .* \(2, 3\)"):
        weighted((1.0, plain), (1.0, broken))(rows(2, 3))
    with pytest.raises(ShapeError, match=r"the reward scalar must return shape \(2,\), .* got \(\)"):
        weighted((1.0, plain), (1.0, scalar))(rows(2, 3))
    with pytest.raises(RewardError, match="one number per sample, got dict"):
        weighted((1.0, plain), (1.0, lambda samples: {}))(rows(2, 3))


def test_built_by_weighted_only_in_the_unit_it_says():
    total = weighted((1.0, JPEGSize(), "nat/kB"), (1.0, plain, "nat"))
    assert isinstance(total, Weighted)
    assert [term.unit for term in total.terms] == ["nat", "nat"]
    assert total.spec.unit == "nat"


def test_what_a_part_forbids_stays_forbidden_beside_a_part_of_negative_weight():
    def forbids(x):
        return torch.where(x[:, 0] > 0.5, -math.inf, x[:, 0])

    samples = torch.tensor([[0.2], [0.9]], dtype=torch.float64)
    assert weighted((-1.0, forbids), (2.0, forbids))(samples).tolist() == [pytest.approx(0.2), -math.inf]
