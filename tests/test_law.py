"""Sampled laws against closed form: every resampler, threshold, potential and proposal, on every path.

Chains here are exact (`steer.models.ExactStep`), so the only error is Monte Carlo's, and every statistic is exactly
unbiased (see `exact.z_scores`): |z| < 4 over 256 independent problems. A run beyond 4 (chance, in seven thousand
statistics, or a column too skewed for a normal limit at 256) is judged by 8192 problems under another key instead.
The mutants at the end are what released code of this field does; the same test has to reject each of them.
"""

import dataclasses
import math

import pytest
import torch
from exact import LIMIT, PATHS, Linear, Quadratic, exact_chain, mixture_2d, mixture_16d, worst, z_scores

import steer
from steer.core import trajectory
from steer.particles import potentials
from steer.particles.proposals import Guided
from steer.particles.selection import Resample
from steer.samplers import smc as smc_module

BATCH, PARTICLES, STEPS = 256, 12, 6
MIXTURES = {2: mixture_2d(), 16: mixture_16d()}
REWARDS = {
    (2, "linear"): Linear([0.7, -0.5]),
    (2, "quadratic"): Quadratic([1.0, 0.5], 0.6),
    (16, "linear"): Linear(torch.full((16,), 0.12)),
    (16, "quadratic"): Quadratic(torch.full((16,), 0.3), 0.08),
}
RESAMPLERS = (
    steer.systematic, steer.stratified, steer.multinomial, steer.residual, steer.ssp, steer.killing,
)  # fmt: skip
WEIGHTS = {
    "difference": steer.difference(),
    "maximum": steer.maximum(),
    # Sums of running sums grow so fast that weights at every level have no usable variance: two levels, as FK uses it.
    "total": steer.total(at=[1, 3]),
    "final": steer.final_only(),
}
SELECTIONS = [steer.resample(threshold=0.0)] + [
    steer.resample(resampler, threshold) for resampler in RESAMPLERS for threshold in (0.5, 1.0)
]
PROPOSALS = {"bootstrap": steer.bootstrap, "guided": steer.guided(0.4)}


def check(size, path, reward, temperature=1.0, sampler=steer.smc, *, key, **options):
    """Worst |z| of a run against the closed form."""
    mixture, tilt = MIXTURES[size], REWARDS[size, reward]
    process, target = exact_chain(mixture, path, STEPS), mixture.exact(tilt, temperature=temperature)
    for batch in (BATCH, 32 * BATCH):
        key = steer.key.as_key(key).fold(batch)
        result = sampler(process, tilt, batch=batch, particles=PARTICLES, temperature=temperature, key=key, **options)
        score, name = worst(z_scores(result, target, mixture))
        if score < LIMIT:
            break
    return score, name


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_law_in_the_plane(path, reward, weight, proposal):
    """Every resampler and threshold, each under a key of its own.

    A third of them here: every one meets every weight under every proposal, for either reward on one of the paths.
    """
    turn = list(PATHS).index(path) + list(WEIGHTS).index(weight) + (reward == "linear")
    for i, selection in list(enumerate(SELECTIONS))[turn % 3 :: 3]:
        key = steer.Key(1).fold(path, reward, weight, proposal, i)
        score, name = check(
            2, path, reward, key=key, weight=WEIGHTS[weight], selection=selection, proposal=PROPOSALS[proposal]
        )
        assert score < LIMIT, (selection, name, score)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_law_in_sixteen_dimensions(path, reward, proposal):
    """Every resampler with difference potentials, and every potential with systematic resampling: half of them here."""
    pairs = [("difference", s) for s in SELECTIONS[::2]] + [(w, steer.resample()) for w in WEIGHTS]
    turn = list(PATHS).index(path) + list(PROPOSALS).index(proposal) + (reward == "linear")
    for i, (weight, selection) in list(enumerate(pairs))[turn % 2 :: 2]:
        key = steer.Key(2).fold(path, reward, proposal, i)
        score, name = check(
            16, path, reward, key=key, weight=WEIGHTS[weight], selection=selection, proposal=PROPOSALS[proposal]
        )
        assert score < LIMIT, (weight, selection, name, score)


@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_importance_sampling(size, path, reward):
    key = steer.Key(3).fold(path, reward)
    score, name = check(size, path, reward, sampler=steer.importance_sampling, key=key)
    assert score < LIMIT, (name, score)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize(
    "weight",
    [
        steer.difference(at=[1, 3]),
        steer.difference(tempering=steer.geometric_tempering(0.2)),
        steer.difference(tempering=steer.adaptive_tempering(0.7)),
        steer.maximum(at=range(0, 6, 2)),
        steer.total(tempering=steer.geometric_tempering(0.05)),
    ],
    ids=["scheduled", "geometric", "adaptive", "max-scheduled", "total-tempered"],
)
def test_law_with_schedules_and_tempering(weight, temperature):
    for proposal in PROPOSALS.values():
        score, name = check(2, "vp", "linear", temperature, weight=weight, proposal=proposal, key=4)
        assert score < LIMIT, (name, score)


@pytest.mark.parametrize(
    "tempering",
    [None, steer.geometric_tempering(0.2), steer.adaptive_tempering(0.7)],
    ids=["none", "geometric", "adaptive"],
)
def test_law_where_a_sample_may_be_forbidden(tempering):
    """Rewards of -inf on a half-plane: the evidence is the probability of the other half times its tilt."""
    mixture = MIXTURES[2]
    tilt = REWARDS[2, "linear"]

    def reward(x):
        return torch.where(x[:, 0] > 0, tilt(x), -torch.inf)

    result = steer.smc(
        exact_chain(mixture, "vp", STEPS),
        reward,
        batch=1024,
        particles=32,
        key=5,
        weight=steer.difference(tempering=tempering),
    )
    assert bool((result.log_weight[result.x[..., 0] <= 0] == -torch.inf).all())
    target = mixture.exact(tilt)
    tilted = torch.distributions.Normal(target.means[:, 0], target.covs[:, 0, 0].sqrt())
    allowed = float((target.weights * (1 - tilted.cdf(torch.zeros(())))).sum())
    relative = (result.log_evidence - target.log_evidence).exp() / allowed - 1.0
    assert abs(relative.mean() / (relative.std() / math.sqrt(1024))) < LIMIT


@pytest.mark.parametrize(
    "tempering", [steer.geometric_tempering(0.2), steer.adaptive_tempering(0.7)], ids=["geometric", "adaptive"]
)
def test_predictions_forbidden_at_exponent_zero(tempering):
    """0 times -inf: where nothing of the reward counts yet, a forbidden prediction must not either."""
    process, tilt = steer.models.gaussian([0.0, 0.0], torch.eye(2), steps=6, dtype=torch.float64), REWARDS[2, "linear"]
    target = steer.models.chain_law(process).exact(tilt)
    allowed = 0.5 * (1.0 + math.erf(float(target.mean[0] / (2.0 * target.cov[0, 0]).sqrt())))

    def reward(x):
        return torch.where(x[:, 0] > 0.0, tilt(x), -torch.inf)

    weight = steer.difference(tempering=tempering)
    result = steer.smc(process, reward, batch=1024, particles=32, key=6, weight=weight)
    relative = (result.log_evidence - target.log_evidence).exp() / allowed - 1.0
    assert abs(relative.mean() / (relative.std() / math.sqrt(1024))) < LIMIT


def test_a_forbidden_prediction_does_not_hold_adaptive_tempering_back():
    process = steer.models.gaussian([0.0, 0.0], torch.eye(2), steps=6, dtype=torch.float64)
    state = steer.Trajectory.begin(process, torch.zeros(1, 4, 2, dtype=torch.float64))
    state = state.with_path_state(log_potential=torch.zeros_like(state.log_weight))
    value = torch.tensor([[0.0, 0.1, 0.2, -torch.inf]], dtype=torch.float64)
    assert steer.adaptive_tempering(0.5)(state, value).tolist() == [1.0]  # nearly equal values need no tempering


# Mutants: what released code does. Each must fail the test that the library passes.


class _Averaged:
    """A law that reports log-densities averaged over coordinates instead of summed, as GRPO code does."""

    def __init__(self, law):
        self.law, self.std, self.stochastic = law, law.std, law.stochastic

    def sample(self, key):
        return self.law.sample(key)

    def log_prob(self, x):
        return self.law.log_prob(x) / x.shape[2]

    def shift(self, delta):
        return _Averaged(self.law.shift(delta))


class AveragedRule:
    """A rule whose transitions report coordinate means."""

    def __init__(self, rule):
        self.rule, self.std = rule, rule.std

    def __call__(self, *args):
        return _Averaged(self.rule(*args))


class WiderRule:
    """A rule that draws with a standard deviation 10 % too large, and knows nothing of it."""

    def __init__(self, rule):
        self.rule, self.std = rule, rule.std

    def __call__(self, *args):
        law = self.rule(*args)
        return dataclasses.replace(law, factors=1.1 * law.factors)


def mutated_process(rule):
    process = exact_chain(MIXTURES[2], "vp", STEPS)
    return process.with_rule(rule(process.rule))


def worst_of(process, reward=REWARDS[2, "linear"], temperature=1.0, **options):
    """Worst |z| over 2048 problems: mutants get the power that the library's own runs do not need."""
    result = steer.smc(process, reward, batch=2048, particles=PARTICLES, temperature=temperature, key=6, **options)
    return worst(z_scores(result, MIXTURES[2].exact(reward, temperature=temperature), MIXTURES[2]))[0]


def test_mutant_averaged_log_density_is_rejected():
    assert worst_of(mutated_process(AveragedRule), proposal=steer.guided(0.4)) > LIMIT


def test_mutant_wider_steps_are_rejected():
    assert worst_of(mutated_process(WiderRule)) > LIMIT


def test_mutant_weights_dropped_without_resampling_are_rejected(monkeypatch):
    """FK-steering's adaptive mode: weights of levels that do not resample are forgotten."""
    select = smc_module.select

    def forgetful(state, *args):
        after = select(state, *args)
        return dataclasses.replace(after, log_weight=torch.zeros_like(after.log_weight))

    monkeypatch.setattr(smc_module, "select", forgetful)
    assert worst_of(exact_chain(MIXTURES[2], "vp", STEPS)) > LIMIT


def _resampling_moves(fields):
    """Trajectory._take as released DAS has it: particles move, the named fields stay."""
    take = trajectory.Trajectory._take

    def stale(self, *args):
        moved = take(self, *args)
        cache = moved.cache.replace(**{n: t for n, t in self.cache.tensors().items() if n in fields})
        path = moved.path.replace(**{n: t for n, t in self.path.tensors().items() if n in fields})
        return dataclasses.replace(moved, cache=cache, path=path)

    return stale


def test_mutant_stale_twist_is_rejected(monkeypatch):
    """DAS: the twist is not permuted with its particle."""
    monkeypatch.setattr(trajectory.Trajectory, "_take", _resampling_moves({"log_potential"}))
    assert worst_of(exact_chain(MIXTURES[2], "vp", STEPS), selection=steer.resample(threshold=1.0)) > LIMIT


def test_mutant_gradient_not_permuted_is_rejected(monkeypatch):
    """DAS: after resampling a particle is pushed by another's gradient, and weighted as if by its own."""
    own = trajectory.Trajectory._take
    monkeypatch.setattr(trajectory.Trajectory, "_take", _resampling_moves({"stale"}))

    class StalePush(Guided):
        def __call__(self, state, model):
            law = super().__call__(state, model)
            pushed = super().__call__(state.with_step_cache(gradient=state.cache.extra["stale"]), model)
            return _PushedBy(law, pushed)

    evaluate = smc_module.predict_and_score

    def evaluate_twice(*args):
        state, scores = evaluate(*args)
        gradient = state.cache.gradient
        return state if gradient is None else state.with_step_cache(stale=gradient), scores

    monkeypatch.setattr(smc_module, "predict_and_score", evaluate_twice)
    options = {"selection": steer.resample(threshold=1.0)}
    process = exact_chain(MIXTURES[2], "vp", STEPS)
    assert worst_of(process, proposal=StalePush(1.0), **options) > LIMIT
    monkeypatch.setattr(trajectory.Trajectory, "_take", own)
    assert worst_of(process, proposal=StalePush(1.0), **options) < LIMIT  # the same code, permuted


class _PushedBy:
    """Drawn from one law, weighted as another."""

    def __init__(self, law, drawn):
        self.law, self.drawn, self.stochastic = law, drawn, law.stochastic

    def sample(self, key):
        return self.drawn.sample(key)

    def log_prob(self, x):
        return self.law.log_prob(x)


@pytest.mark.parametrize("weight", ["maximum", "total"])
def test_mutant_potential_that_does_not_close_is_rejected(weight):
    """FK-steering's max and sum: the product of potentials ends on the statistic, not on r(x0)."""

    class Open(potentials.Potential):
        def close(self, state, value):
            return self.apply(state, value)

    mutant = Open(WEIGHTS[weight].combine)
    assert worst_of(exact_chain(MIXTURES[2], "vp", STEPS), weight=mutant) > LIMIT


def test_mutant_clamped_weights_are_rejected():
    """FK-steering's clamp of exp(r / T) at 1e10, on rewards whose level is above it."""

    class Clamped(potentials.Potential):
        def apply(self, state, value):
            return super().apply(state, value.clamp(max=math.log(1e10)))

        def close(self, state, value):
            return super().close(state, value.clamp(max=math.log(1e10)))

    reward = Linear([0.7, -0.5], offset=25.0)
    process = exact_chain(MIXTURES[2], "vp", STEPS)
    assert worst_of(process, reward) < LIMIT
    assert worst_of(process, reward, weight=Clamped(WEIGHTS["difference"].combine)) > LIMIT


def test_mutant_resampler_is_rejected():
    """Copies of one particle drawn in proportion to its weight: unbiased counts, and yet no law but the average's."""

    def argmax(log_weight, key, count):
        return log_weight.argmax(1, keepdim=True).expand(-1, count)

    assert worst_of(exact_chain(MIXTURES[2], "vp", STEPS), selection=Resample(argmax, 1.0)) > LIMIT
