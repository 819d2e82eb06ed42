"""Sampled laws under every transition rule and after conversion, against the exact law of the discretised chain.

With Gaussian data every chain is affine, so `steer.models.chain_law` gives what the chain samples at its finite number
of steps: no limit of small steps is taken, and |z| < 4 over 512 problems.
"""

import pytest
import torch
from exact import LIMIT, PATHS, Linear, Quadratic, exact_chain, mixture_2d, times, worst, z_scores

import steer

RULES = {
    "ddim(1)": steer.ddim(1.0),
    "ddim(.5)": steer.ddim(0.5),
    "cps(.7)": steer.cps(0.7),
    "churn(.4)": steer.churn(0.4),
    "euler_maruyama": steer.euler_maruyama(),
    "euler_maruyama(g)": steer.euler_maruyama(lambda level: 0.5 * (level.sigma / level.alpha) ** 0.5),
    "flow_sde(.7)": steer.flow_sde(0.7),
}
REWARDS = {"linear": Linear([0.5, -0.3]), "quadratic": Quadratic([0.5, 0.5], 0.3)}


def gaussian(path, rule, grid=None):
    return steer.models.gaussian(
        [0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=PATHS[path], times=grid or times(path, 8), transition=rule,
        dtype=torch.float64,
    )  # fmt: skip


def check(process, reward, **options):
    result = steer.smc(process, reward, batch=512, particles=12, **options)
    return worst(z_scores(result, steer.models.chain_law(process).exact(reward)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("proposal", [steer.bootstrap, steer.guided(0.2)], ids=["bootstrap", "guided"])
def test_law_under_every_rule(path, rule, proposal):
    # Eight Euler steps from almost pure noise overshoot so far that exp(r) has no usable variance: start lower.
    grid = steer.uniform_times(PATHS[path], 8, start=0.8) if path == "flow" and "(1)" not in rule else None
    for name, reward in REWARDS.items():
        process = gaussian(path, RULES[rule], grid)
        score, column = check(process, reward, key=steer.Key(1).fold(path, rule), proposal=proposal)
        assert score < LIMIT, (name, column, score)


@pytest.mark.parametrize(("source", "target"), [("flow", "vp"), ("vp", "flow"), ("ve", "flow"), ("flow", "ve")])
def test_law_after_conversion(source, target):
    """The converted chain's own exact law, and with exact steps the data's."""
    grid = steer.uniform_times(PATHS[target], 8, start=0.98)
    if target == "ve":
        grid = steer.sigma_times(PATHS["ve"], 8, sigma_min=0.05, sigma_max=50.0)
    converted = steer.convert(gaussian(source, steer.ddim(1.0)), PATHS[target], grid)
    for reward in REWARDS.values():
        score, column = check(converted, reward, key=2)
        assert score < LIMIT, (column, score)
    mixture = mixture_2d()
    process = steer.convert(exact_chain(mixture, source, 6), PATHS[target], grid)
    result = steer.smc(process, REWARDS["linear"], batch=512, particles=12, key=3, proposal=steer.guided(0.4))
    score, column = worst(z_scores(result, mixture.exact(REWARDS["linear"]), mixture))
    assert score < LIMIT, (column, score)


@pytest.mark.slow
def test_mixtures_under_ancestral_steps_converge_as_one_over_steps():
    """Halving the step halves the error of the evidence: discretisation, which the exact chains above are free of."""
    mixture, reward = mixture_2d(), REWARDS["linear"]
    target = mixture.exact(reward)
    errors = []
    for steps in (10, 20, 40):
        process = steer.models.gaussian_mixture(
            mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64
        )
        result = steer.smc(process, reward, batch=256, particles=256, key=4)
        errors.append(float((result.log_evidence - target.log_evidence).exp().mean() - 1.0))
    # standard error .002; the errors are about -.10, -.05, -.03
    assert errors[0] < errors[1] < errors[2] < 0.0
    assert 1.5 < errors[0] / errors[1] < 2.7
    assert 1.5 < errors[1] / errors[2] < 2.7


def test_mutant_density_of_a_wrong_std_is_rejected():
    """Guided steps whose density is evaluated with another std than they were drawn with."""

    class Wrong:
        def __init__(self, rule):
            self.rule, self.std = rule, rule.std

        def __call__(self, *args):
            law = self.rule(*args)
            return _Misjudged(law.mean, law.std)

    class _Misjudged(steer.Normal):
        def log_prob(self, x):
            return steer.Normal(self.mean, 1.1 * self.std).log_prob(x)

        def shift(self, delta):
            return _Misjudged(self.mean + delta, self.std)

    process = gaussian("vp", steer.ddim(1.0))
    result = steer.smc(
        process.with_rule(Wrong(process.rule)), REWARDS["linear"], batch=2048, particles=12, key=5,
        proposal=steer.guided(1.0),
    )  # fmt: skip
    assert worst(z_scores(result, steer.models.chain_law(process).exact(REWARDS["linear"])))[0] > LIMIT
