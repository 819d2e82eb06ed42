"""One-step laws of every kernel against the density that goes with them, and what noise is left at the end."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

import steer
from steer import grpo
from steer.grpo.kernels import CorrelatedSiblings
from steer.models import gaussian
from steer.processes.transitions import Normal

ROWS, STEPS, LEVELS = 20_000, 6, (0, 2, 4)
KERNELS = {
    "flow-sde": steer.flow_sde(0.7),
    "dance-sde": steer.dance_sde(0.3),
    "cps": steer.cps(0.7),
    "ddpo": steer.ddim(1.0),
    "ddim-half": steer.ddim(0.5),
}


def model(rule, times=STEPS):
    return steer.models.gaussian_mixture(
        [[1.5], [-1.0]], [[[0.3]], [[0.1]]], [0.6, 0.4], schedule=steer.RectifiedFlow(), steps=times, transition=rule
    )  # fmt: skip


def drawn(rule, level, key):
    """Many draws of one step from one state, as collected: x_next (ROWS,) and the batch."""
    batch = grpo.granular(model(rule), lambda x: x[:, 0], level=level, group_size=ROWS, strides=(1,), key=key)
    return batch.x_next[:, 0, 0].double(), batch


def fit(x, batch):
    """p-values that x is what its recorded density says: Kolmogorov-Smirnov, and a histogram against exp(logp_old)."""
    order = x.sort()
    density = batch.logp_old[:, 0].double().exp()[order.indices]
    mass = torch.trapezoid(density, order.values)  # the density integrates to one over its draws
    law = stats.norm(float(batch.mean_old[0, 0, 0]), float(batch.std[0, 0]))
    edges = torch.as_tensor(law.ppf([i / 20 for i in range(1, 20)]))
    counts = torch.bincount(torch.bucketize(x, edges), minlength=20).numpy()
    return min(stats.kstest(x.numpy(), law.cdf).pvalue, stats.chisquare(counts).pvalue), float(mass)


@pytest.mark.parametrize("rule", KERNELS.values(), ids=KERNELS)
def test_histograms_are_the_recorded_density(rule):
    for level in LEVELS:
        p, mass = fit(*drawn(rule, level, steer.Key(3).fold(level)))
        assert p > 1e-5, level
        assert mass == pytest.approx(1.0, abs=0.01)


def test_the_histogram_test_has_power(monkeypatch):
    """A std 5% too large in the draws alone is rejected."""
    sample = Normal.sample
    monkeypatch.setattr(Normal, "sample", lambda law, key: sample(Normal(law.mean, 1.05 * law.std), key))
    assert fit(*drawn(steer.cps(0.7), 2, steer.Key(3)))[0] < 1e-8


@pytest.mark.parametrize("spread", [None, 0.3, 1.0, 4.0])
def test_branch_noise_has_unit_variance(spread):
    """Children are draws of the kernel at every spread; siblings correlate by 1 / (1 + spread^2)."""
    process = model(steer.flow_sde())
    batch = grpo.branch(process, lambda x: x[:, 0], groups=4000, splits=(2,), ways=2, spread=spread, key=9)
    slot = batch.step_idx[0].tolist().index(2)
    z = ((batch.x_next - batch.mean_old)[:, slot, 0] / batch.std[:, slot]).double().view(-1, 2)
    assert stats.kstest(z[:, 0].numpy(), "norm").pvalue > 1e-5
    assert stats.kstest(z[:, 1].numpy(), "norm").pvalue > 1e-5
    expected = 0.0 if spread is None else 1.0 / (1.0 + spread**2)
    assert float((z[:, 0] * z[:, 1]).mean()) == pytest.approx(expected, abs=4 / math.sqrt(4000) * math.sqrt(2))
    released = (z[:, 0] - z[:, 1]) / math.sqrt(2) * 4.0 + z[:, 1]  # a mutant: branch noise added on top, four times
    assert stats.kstest(released.numpy(), "norm").pvalue < 1e-8


def shifted_times(steps, shift=3.0):
    return tuple(shift * s / (1.0 + (shift - 1.0) * s) for s in (1.0 - k / steps for k in range(steps + 1)))


@pytest.mark.parametrize(("steps", "last", "chain"), [(10, 0.218, 0.228), (20, 0.110, 0.114)])
def test_noise_left_at_the_end(steps, last, chain):
    """Collected x0 of a point mass: Flow-SDE leaves .228 (20 steps: .114), of which the last step alone .218 (.110).

    CPS and DDIM leave none, and nor does Flow-SDE in a window that ends before the data.
    """
    process = gaussian([0.3], 0.0, schedule=steer.RectifiedFlow(), times=shifted_times(steps))

    def spread(rule, window=None):
        batch = grpo.collect(
            process.with_rule(rule), lambda x: x[:, 0], group_size=ROWS, window=window, means=False, key=4
        )
        return float(batch.x0.std()), batch

    left, batch = spread(steer.flow_sde(0.7))
    assert left == pytest.approx(chain, rel=4 / math.sqrt(2 * ROWS))
    # The last step alone, from states with the right marginal.
    here, k = process.levels[-2], steps - 1
    x = (here.alpha * 0.3 + here.sigma * steer.Key(5).normal((1, ROWS, 1), dtype=torch.float64)).to(process.dtype)
    law = process.with_rule(steer.flow_sde(0.7)).transition(x, process.denoise(x, k), k)
    assert law.std == pytest.approx(float(batch.std[0, -1]))
    assert float(law.sample(steer.Key(6)).std()) == pytest.approx(last, rel=4 / math.sqrt(2 * ROWS), abs=5e-4)
    for rule in (steer.cps(0.7), steer.ddim(1.0)):
        assert spread(rule)[0] < 1e-6
    assert spread(steer.flow_sde(0.7), grpo.every(0.5))[0] < 1e-6


def test_dance_sde_has_a_constant_coefficient():
    process = model(steer.dance_sde(0.3))
    twin = process.with_rule(steer.euler_maruyama(lambda at: 0.3))
    x = steer.Key(0).normal((2, 3, 1))
    for k in range(STEPS):
        one, two = (p.transition(x, p.denoise(x, k), k) for p in (process, twin))
        assert (one.mean == two.mean).all()
        assert one.std == two.std == process.rule.std(process.levels[k], process.levels[k + 1])
    with pytest.raises(steer.SteerError, match="eta must be in"):
        steer.dance_sde(-1.0)


def test_mean_reduced_log_probs_are_not_densities():
    """exp of a mean is a D-th-root weight: the sum is what importance weights take."""
    batch = grpo.collect(model(steer.ddim(1.0)), lambda x: x[:, 0])
    moved = replace(batch, logp_behavior=batch.logp_old - 0.5)
    assert moved.step_weights()[batch.mask] == pytest.approx(math.exp(0.5))
    assert replace(batch, logp_behavior=batch.logp_old - 5.0).step_weights().max() == 2.0


def test_siblings_are_neighbours():
    """With little noise of their own, the rows of a family are alike and those of two families are not."""
    base = Normal(torch.zeros(2, 6, 3, dtype=torch.float64), 1.0)
    family = CorrelatedSiblings(base=base, ways=3, spread=1e-9, storage=torch.float64).sample(steer.Key(0))
    family = family.view(2, 2, 3, 3)
    torch.testing.assert_close(family, family[:, :, :1].expand_as(family), rtol=0, atol=1e-6)
    assert (family[:, 0, 0] - family[:, 1, 0]).abs().min() > 0.01
