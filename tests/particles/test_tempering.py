"""Tempering by the signal's share: its exponents, and the evidence under it. Its law is in test_second_order.py."""

import torch

import steer
from steer.core.trajectory import Trajectory


def test_exponents_are_the_share_of_the_signal():
    for schedule in (steer.VP(), steer.RectifiedFlow()):
        process = steer.models.gaussian([0.0], 1.0, schedule=schedule, steps=5)
        for k, level in enumerate(process.levels):
            state = Trajectory.begin(process, torch.zeros(2, 3, 1), k=k)
            found = steer.snr_share(state, torch.ones(2, 3).double())
            expected = level.alpha**2 / (level.alpha**2 + level.sigma**2)
            torch.testing.assert_close(found, torch.full((2,), expected).double())
    assert float(found[0]) == 1.0  # of the data


def test_the_evidence_varies_less_and_stays_unbiased():
    """On Gaussian data and a reward that most samples miss, 200 runs: half the spread. The mutant tempers by noise."""
    process = steer.models.gaussian([0.0, 0.0], 0.75, steps=20)

    def reward(x):
        return 3.0 * (2.0 * x[:, 0]).sin() - 2.0 * (x[:, 1] - 0.5).square()

    def spread(tempering):
        weight = steer.difference(tempering=tempering)
        return float(steer.smc(process, reward, batch=200, particles=32, weight=weight, key=2).log_evidence.std())

    def by_noise(state, value):
        return 1.0 - steer.snr_share(state, value)

    plain, tempered = spread(None), spread(steer.snr_share)
    assert tempered < 0.7 * plain  # the standard error of a ratio of spreads is 7 %
    assert spread(by_noise) > 0.7 * plain
