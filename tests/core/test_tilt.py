"""ESS, KL and mean of exponential tilts, against closed forms."""

import math

import pytest
import torch

from steer.core.tilt import Tilt
from steer.errors import SteerError


def two_points(hits, samples, temperature):
    """ESS share and KL of tilting rewards of 1 (`hits` of them) and 0, by hand."""
    p, a = hits / samples, math.exp(1.0 / temperature)
    mean = 1.0 + p * (a - 1.0)
    return mean**2 / (1.0 + p * (a * a - 1.0)), p * a / mean / temperature - math.log(mean), p * a / mean


@pytest.mark.parametrize("temperature", [5.0, 0.7, 0.1, 0.002, math.inf])
def test_of_two_points(temperature):
    reward = torch.zeros(1, 20, dtype=torch.float64)
    reward[0, :3] = 1.0
    tilt = Tilt.of(reward)
    if temperature < 0.01:  # where exp(r / temperature) overflows: all of the weight is on the hits
        ess, kl, mean = 3 / 20, math.log(20 / 3), 1.0
    else:
        ess, kl, mean = two_points(3, 20, temperature) if temperature < math.inf else (1.0, 0.0, 3 / 20)
    assert tilt.ess(temperature) == pytest.approx(ess)
    assert tilt.kl(temperature) == pytest.approx(kl, abs=1e-12)
    assert tilt.mean(temperature) == pytest.approx(mean)


def test_of_a_weighted_population():
    """Weights stand for copies: a sample of weight three counts as three."""
    reward = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    copies = Tilt.of(torch.tensor([[0.0, 1.0, 1.0, 1.0, 3.0]], dtype=torch.float64))
    tilt = Tilt.of(reward, torch.tensor([[0.0, math.log(3.0), 0.0]], dtype=torch.float64) + 7.0)
    for temperature in (0.5, 2.0):
        assert tilt.ess(temperature) == pytest.approx(copies.ess(temperature))
        assert tilt.kl(temperature) == pytest.approx(copies.kl(temperature))
        assert tilt.mean(temperature) == pytest.approx(copies.mean(temperature))
    assert tilt.spread == pytest.approx(copies.spread)


def test_forbidden_samples_count_as_weight_zero():
    reward = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    tilt, allowed = Tilt.of(reward), Tilt.of(reward[:, :2])
    assert tilt.ess(0.5) == pytest.approx(0.5 * allowed.ess(0.5))
    assert tilt.kl(0.5) == pytest.approx(math.log(2.0) + allowed.kl(0.5))
    assert tilt.mean() == 0.5
    assert tilt.spread == pytest.approx(0.5)
    assert tilt.error() == pytest.approx(0.5 / math.sqrt(2.0))


@pytest.mark.parametrize("asked", [{"ess": 0.9}, {"ess": 0.5}, {"ess": 0.1}, {"kl": 0.05}, {"kl": 2.0}])
def test_the_temperature_has_what_was_asked(asked):
    """Of several models it is the mean over them; rewards may be of any size, and in any place."""
    draw = torch.Generator().manual_seed(0)
    reward = torch.randn(3, 400, generator=draw, dtype=torch.float64) * torch.tensor([[1.0], [3.0], [0.2]])
    for scale, shift in ((1.0, 0.0), (1e-6, 50.0), (1e8, -1e9)):
        tilt = Tilt.of(reward * scale + shift)
        temperature = tilt.temperature(**asked)
        assert temperature == float(f"{temperature:.3g}")
        found = tilt.ess_of_model(temperature) if "ess" in asked else tilt.kl(temperature)
        assert found == pytest.approx(next(iter(asked.values())), rel=0.02)


@pytest.mark.parametrize(
    ("rewards", "asked", "message"),
    [
        ([2.0, 2.0, 2.0], {"ess": 0.5}, "all 3 unsteered samples score 2"),
        ([-math.inf, -math.inf], {"ess": 0.5}, "forbids .-inf. all 2 unsteered samples of problem 0"),
        ([0.0, 1.0, 1.0], {"ess": 0.5}, "an ESS of 0.5 of the samples.* down to 0.67"),  # two of three tie for the best
        ([0.0, 1.0, -math.inf, -math.inf], {"ess": 0.7}, "from 0.5 down to 0.25"),  # half are forbidden at any
        ([0.0] * 15 + [1.0], {"kl": 3.0}, "a KL of 3 nats.* 2.8 nats"),  # 16 samples show no more than log 16 nats
    ],
)
def test_what_no_temperature_has_is_refused(rewards, asked, message):
    with pytest.raises(SteerError, match=f"no temperature can be chosen.*{message}"):
        Tilt.of(torch.tensor([rewards], dtype=torch.float64)).temperature(**asked)


def test_the_table_leaves_out_what_samples_cannot_tell():
    reward = torch.arange(16.0, dtype=torch.float64)[None]
    rows = Tilt.of(reward).table(1.0)
    shares = [row.ess for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert len(rows) == 5  # 90, 75, 50 and 25 %, and temperature 1; a tenth of 16 samples is fewer than two
    assert any(row.temperature == 1.0 for row in rows)
    assert [row.temperature for row in Tilt.of(torch.ones(1, 16, dtype=torch.float64)).table(1.0)] == [1.0]


def test_each_sample_is_left_out_in_turn():
    """The jackknife's sums against those of the samples themselves, with weights, ties and a sample that is all."""
    draw = torch.Generator().manual_seed(3)
    reward = torch.randn(1, 9, generator=draw, dtype=torch.float64)
    reward[0, 4], reward[0, 5] = reward[0, 3], -torch.inf
    weight = torch.randn(1, 9, generator=draw, dtype=torch.float64)
    for temperature in (0.3, 2.0):
        tilt = Tilt.of(reward, weight)
        whole, without = tilt._log_ess(temperature)
        assert whole.exp() == pytest.approx(tilt.ess(temperature))
        keep = [torch.arange(9) != i for i in range(9)]
        direct = [math.log(Tilt.of(reward[:, others], weight[:, others]).ess(temperature)) for others in keep]
        assert without[0].tolist() == pytest.approx(direct)
    alone = Tilt.of(reward).ess_of_model(1e-4)  # one sample has all of the weight
    assert 0.0 < alone < 1.0 / 9.0


def test_the_jackknife_takes_off_the_bias():
    """Uniform rewards, whose tilt has a closed form, by 4,000 pilots of 16 samples: the mean over pilots is within
    four standard errors of it. Mutant: the samples' own share."""
    draw = torch.Generator().manual_seed(5)
    pilots = [Tilt.of(torch.rand(200, 16, generator=draw, dtype=torch.float64)) for _ in range(20)]
    moments = [math.expm1(beta) / beta for beta in (1 / 0.4, 2 / 0.4)]
    truth = moments[0] ** 2 / moments[1]
    corrected, plain = (
        torch.tensor([[pilot.ess_of_model(0.4), pilot.ess(0.4)] for pilot in pilots], dtype=torch.float64) - truth
    ).unbind(1)
    assert abs(float(corrected.mean())) < 4.0 * float(corrected.std()) / math.sqrt(20)
    assert abs(float(plain.mean())) > 4.0 * float(plain.std()) / math.sqrt(20)


def test_the_factor_is_the_spread_over_pilots():
    """Standard deviation of log ESS over 600 pilots of 100 samples, against what the pilots say of it. Its own standard
    error is 3 %. Mutant: that of the second moment of the weights alone."""
    draw = torch.Generator().manual_seed(1)
    pilots = [Tilt.of(torch.rand(1, 100, generator=draw, dtype=torch.float64)) for _ in range(600)]
    spread = torch.tensor([math.log(pilot.ess(0.4)) for pilot in pilots]).std()
    said = torch.tensor([math.log(pilot.ess_factor(0.4)) for pilot in pilots]).mean()
    assert said / spread == pytest.approx(1.0, abs=0.12)
    weights = torch.stack([(pilot.reward / 0.4).exp()[0] for pilot in pilots])
    second = (weights.square().std(1) / weights.square().mean(1) / math.sqrt(100)).mean()
    assert abs(second / spread - 1.0) > 0.4
