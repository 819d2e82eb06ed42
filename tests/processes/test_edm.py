"""Networks D(x, sigma): the grid, the path, and the law that comes out, against a mixture in closed form."""

import math

import pytest
import torch

import steer
from steer.models.mixture import GaussianMixture

MIXTURE = GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], [0.09, 0.25], [0.3, 0.7])


def exact(x, sigma):
    """D of the mixture: rows (M, 2) and one sigma per row."""
    assert x.ndim == 2
    assert sigma.shape == (len(x),)
    return MIXTURE.denoise(x, 1.0, float(sigma[0]))


def opened(sigmas=60, **options):
    return steer.from_edm(exact, sigmas, event=(2,), sigma_max=20.0, dtype=torch.float64, **options)


def test_the_grid_is_karras():
    sigmas = steer.karras_sigmas(18)
    assert len(sigmas) == 18
    assert sigmas[0] == pytest.approx(80.0)
    assert sigmas[-1] == pytest.approx(0.002)
    assert sigmas[9] == pytest.approx((80 ** (1 / 7) + 9 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    process = steer.from_edm(exact, 18, event=(2,))
    assert [level.sigma for level in process.levels] == pytest.approx([*sigmas, 0.0])
    assert {level.alpha for level in process.levels} == {1.0}
    assert [level.sigma for level in steer.from_edm(exact, [5.0, 1.0, 0.0], event=(2,)).levels] == [5.0, 1.0, 0.0]


def test_the_network_gets_rows_and_their_sigmas():
    seen = []

    def network(x, sigma):
        seen.append((tuple(x.shape), sigma.tolist()))
        return x / (1.0 + sigma.view(-1, 1) ** 2)

    process = steer.from_edm(network, [4.0, 2.0], event=(3,), chunk=4)
    x = process.prior(steer.Key(0), 2, 3)
    out = process.denoise(x, 1)
    assert seen == [((4, 3), [2.0] * 4), ((2, 3), [2.0] * 2)]
    torch.testing.assert_close(out, x / 5.0)
    y = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(process.denoise(y, 1).sum(), y)[0], torch.full_like(y, 0.2))


def test_the_prior_has_the_first_sigma():
    x = opened().prior(steer.Key(0), 1, 20_000)
    assert abs(float(x.std()) / 20.0 - 1.0) < 4 / math.sqrt(2 * x.numel())


@pytest.mark.slow
@pytest.mark.parametrize("transition", [steer.ddim(1.0), steer.ode(), steer.churn(0.2)], ids=str)
def test_samples_follow_the_mixture(transition):
    count = 4000
    x = steer.rollout(opened(300, transition=transition), lambda x: x[:, 0], particles=count, keep_states=False).x[0]
    share = float((x[:, 0] > 0).double().mean())
    assert abs(share - 0.7) < 4 * math.sqrt(0.21 / count)
    for mode, (mean, variance) in enumerate(((-2.0, 0.09), (2.0, 0.25))):
        own = x[(x[:, 0] > 0) == bool(mode)]
        assert abs(float(own[:, 0].mean()) - mean) < 4 * math.sqrt(variance / len(own)) + 0.01
        assert float(own[:, 1].var()) == pytest.approx(variance, rel=0.2)


def test_the_ode_is_the_exact_flow_map():
    """For one Gaussian, the probability flow scales by sqrt((1 + sigma'^2) / (1 + sigma^2)), to first order."""
    flow = []
    for steps in (50, 100, 200):
        process = steer.from_edm(lambda x, s: x / (1.0 + s.view(-1, 1) ** 2), steps, event=(1,), sigma_max=10.0,
                                 transition=steer.ode(), dtype=torch.float64)  # fmt: skip
        x = torch.ones(1, 1, 1, dtype=torch.float64)
        for k in range(process.steps):
            x = process.transition(x, process.denoise(x, k), k).mean
        flow.append(abs(float(x) - 1.0 / math.sqrt(101.0)))
    assert flow[1] == pytest.approx(flow[0] / 2, rel=0.15)
    assert flow[2] == pytest.approx(flow[1] / 2, rel=0.15)


def test_a_tilt_is_the_closed_form():
    """Reward 1.5 x_1 with exact D, by SMC: mean and evidence of the tilted mixture."""
    count = 2000
    result = steer.smc(opened(40), lambda x: 0.5 * x[:, 0], particles=count, key=1)
    weights = torch.tensor([0.3, 0.7]).double() * torch.tensor([-1.0 + 0.09 / 8, 1.0 + 0.25 / 8]).double().exp()
    means = torch.tensor([-2.0 + 0.045, 2.0 + 0.125]).double()
    weights, evidence = weights / weights.sum(), float(weights.sum().log())
    assert float(result.log_evidence) == pytest.approx(evidence, abs=0.1)
    assert float(result.mean(lambda x: x[:, 0])) == pytest.approx(float(weights @ means), abs=0.15)


def test_several_conditionings_and_one_of_them():
    class Towards:
        def __init__(self, centres):
            self.centres = torch.tensor(centres)

        def __call__(self, x, sigma):
            return self.centres.repeat_interleave(len(x) // len(self.centres))[:, None].expand_as(x)

        def only(self, problem):
            return Towards([self.centres[problem].item()])

    process = steer.from_edm(Towards([1.0, 5.0]), 4, event=(2,), problems=2)
    x = process.prior(steer.Key(0), 2, 3)
    assert process.denoise(x, 0)[:, :, 0].tolist() == [[1.0] * 3, [5.0] * 3]
    assert process.only(1).denoise(x[1:], 0)[0, 0, 0] == 5.0


@pytest.mark.parametrize("sigmas", [[], [1.0, 2.0], [1.0, -1.0], 0])
def test_grids_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(steer.ModelError, match="sigma"):
        steer.from_edm(exact, sigmas, event=(2,))


def test_a_network_of_another_shape_is_named():
    process = steer.from_edm(lambda x, sigma: x * sigma, [4.0, 2.0], event=(3,))
    with pytest.raises((steer.ShapeError, RuntimeError)):
        process.denoise(process.prior(steer.Key(0), 1, 4), 0)
    process = steer.from_edm(lambda x, sigma: x[:, :2], [4.0, 2.0], event=(3,))
    with pytest.raises(steer.ShapeError, match=r"\(4, 3\).*got \(4, 2\)"):
        process.denoise(process.prior(steer.Key(0), 1, 4), 0)
