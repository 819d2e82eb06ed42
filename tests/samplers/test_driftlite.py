"""DriftLite: what controls do to weights, and that they leave the law."""

import contextlib
import functools
import math

import pytest
import torch
from exact import LIMIT, PATHS, Grid2D, Linear, Quadratic, extrapolated, mixture_2d

import steer
from steer.models import GaussianMixture
from steer.weighted_sde import transports
from steer.weighted_sde.engine import WeightedSDE
from steer.weighted_sde.transports import ControlBasis, _least_energy, _least_variance

MIXTURE = mixture_2d()
SIZE, GAMMA = 30, 2.0


def process(path, steps, mixture=MIXTURE):
    times = steer.log_snr_times(PATHS[path], steps, end=1e-4 if path == "ve" else 1e-3)
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, schedule=PATHS[path], times=times, dtype=torch.float64
    )


def mixture_30d():
    directions = steer.Key(30).fold("modes").normal((1, 4, SIZE))[0]
    means = 6.0 * directions / directions.norm(dim=1, keepdim=True)
    return GaussianMixture(means, torch.tensor([1.0, 1.02, 0.98, 1.01]) ** 2, [0.4, 0.3, 0.2, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize(("path", "beta"), [("vp", 2.0), ("ve", 2.0), ("flow", 2.0), ("vp", 0.5), ("vp", 3.0)])
def test_annealing(path, beta):
    law = Grid2D(lambda x: beta * MIXTURE.log_prob(x), edge=16.0 if beta < 1 else 9.0)

    def run(steps):
        return steer.driftlite(
            process(path, steps), exponent=beta, probes=None, batch=100, particles=40, key=steer.Key(1).fold(steps)
        )

    # Coefficients from 40 particles bias by O(1 / 40): evidence, the sharpest column, is tested at more below.
    found = {name: z for name, (z, _, _) in extrapolated(run, law, 40 if beta == 3.0 else 25).items()}
    assert max(abs(z) for name, z in found.items() if name != "evidence") < LIMIT, found


@pytest.mark.slow
def test_evidence_bias_falls_with_particles():
    law = Grid2D(lambda x: 2.0 * MIXTURE.log_prob(x))

    def bias(particles):
        def run(steps):
            batch = 3072 // particles
            return steer.driftlite(process("vp", steps), exponent=2.0, probes=None, batch=batch, particles=particles)

        return extrapolated(run, law, 40)["evidence"][1]

    few, many = bias(8), bias(256)
    assert abs(many) < 0.02 < abs(few)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["vcg", "ecg"])
def test_tilts_keep_their_law_and_equal_weights(control):
    reward = Quadratic([1.0, 0.5], 0.6)
    law = Grid2D(lambda x: MIXTURE.log_prob(x) + reward(x))

    @functools.cache
    def run(steps):
        return steer.driftlite(
            process("vp", steps), reward, control=control, probes=None, batch=100, particles=32,
            key=steer.Key(2).fold(steps),
        )  # fmt: skip

    found = {name: z for name, (z, _, _) in extrapolated(run, law, 25).items()}
    assert max(abs(z) for name, z in found.items() if name != "evidence") < LIMIT, found
    assert float(run(25).ess.mean()) / 32 > (0.95 if control == "vcg" else 0.7)


@contextlib.contextmanager
def recorded(found):
    """The variance over particles of what each step adds to the log-weight, per unit of log-SNR, into `found`."""
    own = WeightedSDE.weighted

    def weighted(self, state, gain):
        here, there = self.target.levels[state.k], self.target.levels[state.k + 1]
        if there.sigma > 0.0:
            weight = torch.softmax(state.log_weight, 1)
            spread = (weight * gain.square()).sum(1) - (weight * gain).sum(1).square()
            passed = 2.0 * math.log(there.alpha * here.sigma / (there.sigma * here.alpha))
            found.append(float(spread.mean()) / passed)
        return own(self, state, gain)

    WeightedSDE.weighted = weighted
    try:
        yield
    finally:
        WeightedSDE.weighted = own


@pytest.mark.slow
def test_thirty_dimensions_need_no_resampling():
    """The 30-d mixture at gamma = 2: potential variance at most 1/100 of guided SMC's, masses to .04."""
    model = mixture_30d()
    variances = model.variances[:, 0]
    log_mass = GAMMA * model.weights.log() + 0.5 * SIZE * (1.0 - GAMMA) * variances.log()
    target = GaussianMixture(model.means, variances / GAMMA, torch.softmax(log_mass, 0))
    log_z = float((log_mass + 0.5 * SIZE * ((1.0 - GAMMA) * math.log(2.0 * math.pi) - math.log(GAMMA))).logsumexp(0))
    chain = steer.models.gaussian_mixture(
        model.means, variances, model.weights, times=steer.log_snr_times(steer.VP(), 100), dtype=torch.float64
    )
    controlled, guided = [], []
    with recorded(controlled):
        result = steer.driftlite(chain, exponent=GAMMA, batch=4, particles=500)
    with recorded(guided):
        steer.fkc(
            chain, exponent=GAMMA, transport=steer.score_transport, weight=steer.FeynmanKac(), batch=4, particles=500
        )
    assert sum(controlled) < 0.01 * sum(guided), (sum(controlled), sum(guided))
    assert result.trajectory.resamplings().tolist() == [0, 0, 0, 0]
    masses = result.mean(lambda x: target.responsibilities(x.double())).mean(0)
    assert 0.5 * float((masses - target.weights).abs().sum()) < 0.04
    assert abs(float(result.log_evidence.mean()) - log_z) < 0.2


def test_refinement_improves_on_a_small_population():
    """Coefficients of two passes are those of more particles: no worse weights, and both passes are paid for."""
    model = process("vp", 30)
    once, twice = (
        steer.driftlite(model, exponent=3.0, probes=None, batch=100, particles=16, passes=passes) for passes in (1, 2)
    )
    assert (twice.cost.nfe, twice.cost.grads) == (2 * once.cost.nfe, 2 * once.cost.grads)
    assert float(twice.ess.mean()) > 0.95 * float(once.ess.mean())
    assert not torch.equal(once.x, twice.x)
    spent = steer.driftlite(model, exponent=3.0, budget=16 * 60 + 59, passes=2)
    assert spent.x.shape[1] == 16


def test_controls_solve_their_problems():
    """VCG: no other theta has a smaller weighted variance. ECG: exact where the potential is in the span."""
    key, size = steer.Key(5), 2000
    x = key.normal((3, size, 2))
    score = -x  # pi = N(0, I)
    bases = torch.stack([torch.ones_like(x), score, 0.3 * x + 1.0], 2)
    divergence = torch.tensor([0.0, -2.0, 0.6], dtype=torch.float64).expand(3, size, 3)
    cost = torch.einsum("bnjd,bnd->bnj", bases, score) + divergence
    rate = x[..., 0].sin() + 0.5 * x.square().sum(2)
    log_weight = 0.3 * key.fold("w").normal((3, size))
    fields = ControlBasis(bases, cost, rate, None)
    theta = _least_variance(fields, log_weight, torch.zeros(3, 3).double())
    weight = torch.softmax(log_weight, 1)

    def variance(theta):
        total = rate + (cost * theta[:, None]).sum(2)
        return (weight * total.square()).sum(1) - (weight * total).sum(1).square()

    for i in range(3):
        for sign in (1.0, -1.0):
            other = theta.clone()
            other[:, i] += 0.05 * sign
            assert bool((variance(other) >= variance(theta) - 1e-9).all())
    # rate = 2 - |x|^2 = -(b . S + div b) for b = -x = grad(-|x|^2 / 2): theta must be -1 on the potential |x|^2 / 2
    phi = torch.stack([0.0 * rate, 0.0 * rate, 0.5 * x.square().sum(2)], 2)
    gradients = torch.stack([0.0 * x, 0.0 * x, x], 2)
    exact = ControlBasis(gradients, torch.zeros_like(cost), 2.0 - x.square().sum(2), phi)
    solved = _least_energy(exact, torch.zeros(3, size).double(), torch.zeros(3, 3).double())
    torch.testing.assert_close(solved[:, 2], torch.full((3,), -1.0).double(), rtol=0, atol=0.1)
    assert float(solved[:, :2].abs().max()) == 0.0


def test_problems_are_controlled_on_their_own():
    options = {"exponent": 2.0, "particles": 8, "key": 1}
    alone = steer.driftlite(process("vp", 10), batch=1, **options)
    among = steer.driftlite(process("vp", 10), batch=3, **options)
    torch.testing.assert_close(among.x[:1], alone.x, rtol=1e-6, atol=1e-6)


def test_the_ledger_and_refusals():
    model = process("vp", 10)
    cost = steer.driftlite(model, Linear([0.7, -0.5]), particles=4).cost
    # per level but the last: a gradient and a probe of the value, a probe of the score; and the value one level on
    assert (cost.nfe, cost.grads) == (4 * 19, 4 * 9 * 3)
    assert cost.rewards == 4 * 20
    assert steer.driftlite(model, exponent=2.0, particles=1).x.shape == (1, 1, 2)
    with pytest.raises(steer.SteerError, match="vcg"):
        steer.driftlite(model, control="neural")
    with pytest.raises(steer.SteerError, match="passes"):
        steer.driftlite(model, passes=0)


@pytest.mark.parametrize("control", ["vcg", "ecg"])
def test_controls_bear_an_imperfect_denoiser(control, monkeypatch):
    """Exact for N(0, I) but for .001 sin 3x. Score and state are collinear in the noise: hardly a ridge, hardly ESS."""
    schedule = steer.VP()
    start = steer.schedules.time_at(schedule, math.atan(20.0))
    times = steer.log_snr_times(schedule, 60, start=start, end=2e-3)

    def denoise(x, t):
        return schedule(t).alpha * x + 0.001 * torch.sin(3.0 * x)

    def run():
        model = steer.from_denoiser(denoise, schedule, times, event=(6,))
        result = steer.driftlite(model, control=control, exponent=2.0, particles=300)
        return min(float(seen.ess.min()) for seen in result.seen) / 300

    assert run() > 0.9
    if control == "ecg":
        monkeypatch.setattr(transports, "ENERGY_RIDGE", 1e-8)
        assert run() < 0.5
