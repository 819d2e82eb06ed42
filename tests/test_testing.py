"""The public checks accept the library's own parts and reject broken versions of them."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch

import steer
from steer import rewards, search, testing
from steer.processes.transitions import Normal
from steer.testing import CheckFailed
from steer.types import RewardSpec

GOOD = {
    "smc": (steer.smc, "target"),
    "guided": (functools.partial(steer.smc, proposal=steer.guided(0.4)), "target"),
    "rollout": (steer.rollout, "model"),
    "svdd": (search.svdd, "none"),
}


@pytest.mark.parametrize("name", GOOD)
def test_samplers_pass(name):
    method, law = GOOD[name]
    assert testing.check_sampler(method, law=law) < testing.LIMIT


def spoiled(change):
    """SMC, whose arguments or result are changed."""

    def method(process, reward, **options):
        return change(process, reward, options)

    return method


def equal_weights(process, reward, options):
    result = steer.smc(process, reward, **options)
    return replace(result, log_weight=torch.full_like(result.log_weight, -1.0).log_softmax(1))


def half_tempered(process, reward, options):
    result = steer.smc(process, reward, **{**options, "temperature": 2.0})
    return replace(result, temperature=1.0)


def global_draws(process, reward, options):
    torch.rand(1)
    return steer.smc(process, reward, **options)


def over_budget(process, reward, options):
    budget = options.pop("budget", None)
    return steer.smc(process, reward, **options, budget=None if budget is None else 2 * budget)


def uncounted(process, reward, options):
    process.denoise(process.prior(steer.Key(0), 1, 3), 0)
    return steer.smc(process, reward, **options)


def one_key(process, reward, options):
    return steer.smc(process, reward, **{**options, "key": 0})


def blind(process, reward, options):
    return steer.smc(process, lambda x: torch.nan_to_num(reward(x)), **options)


def shared(process, reward, options):
    result = steer.smc(process, reward, **options)
    return replace(result, x=result.x[:1].expand_as(result.x), reward=result.reward[:1].expand_as(result.reward))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (equal_weights, "standard errors"),
        (half_tempered, "standard errors"),
        (global_draws, "global generator"),
        (over_budget, "budget of 83"),
        (uncounted, "count every call"),
        (one_key, "another key"),
        (blind, "NaN"),
        (shared, "noise of their own"),
    ],
)
def test_broken_samplers_are_rejected(change, word):
    with pytest.raises(CheckFailed, match=word):
        testing.check_sampler(spoiled(change))


def test_a_wrong_law_is_rejected():
    with pytest.raises(CheckFailed, match=r"law must be 'target', got 'none'"):
        testing.check_sampler(search.svdd)


@pytest.mark.parametrize(
    ("rule", "converges"), [(steer.ddim(0.5), True), (steer.ode(), True), (steer.cps(0.7), False)], ids=str
)
def test_rules_pass(rule, converges):
    assert testing.check_rule(rule, converges=converges, runs=256) < testing.LIMIT


@dataclass(frozen=True)
class Changed:
    """A rule of which something is changed."""

    what: str
    rule: steer.Rule

    def __call__(self, x, x0, here, there):
        if self.what == "mixes":
            x0 = x0.mean(1, keepdim=True).expand_as(x0)
        step = self.rule(x, x0, here, there)
        if self.what in ("wide", "lies"):
            return Normal(step.mean, 1.1 * step.std)
        if self.what == "drifts":
            return Normal(1.002 * step.mean, step.std)
        if self.what == "averaged":
            return Averaged(step.mean, step.std)
        return step

    def std(self, here, there):
        return self.rule.std(here, there) * (1.1 if self.what == "wide" else 1.0)


class Averaged(Normal):
    """A density averaged over coordinates, as some released code has it."""

    def log_prob(self, x):
        return super().log_prob(x) / x[0, 0].numel()


@pytest.mark.parametrize(
    ("what", "word"),
    [("wide", "tend to the data"), ("drifts", "tend to the data"), ("lies", "rule.std says"), ("averaged", "log_prob"),
     ("mixes", "that particle alone")],
)  # fmt: skip
def test_broken_rules_are_rejected(what, word):
    with pytest.raises(CheckFailed, match=word):
        testing.check_rule(Changed(what, steer.ddim(1.0)))


@pytest.mark.parametrize("resampler", [steer.systematic, steer.multinomial, steer.ssp, steer.residual])
def test_resamplers_pass(resampler):
    assert testing.check_resampler(resampler) < testing.LIMIT


def greedy(log_weight, key, count):
    return log_weight.argsort(1, descending=True)[:, torch.arange(count) % log_weight.shape[1]]


def short(log_weight, key, count):
    return steer.systematic(log_weight, key, count)[:, : log_weight.shape[1] - 1]


@pytest.mark.parametrize(("resampler", "word"), [(greedy, "copies"), (short, "of shape")])
def test_broken_resamplers_are_rejected(resampler, word):
    with pytest.raises(CheckFailed, match=word):
        testing.check_resampler(resampler)


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "reward", [rewards.Ink(), rewards.Symmetry(), rewards.JPEGSize(), rewards.Sharpness()], ids=str
)
def test_rewards_pass(reward):
    testing.check_reward(reward, IMAGES)


def test_a_groupwise_reward_passes_by_its_word():
    testing.check_reward(rewards.group_zscore(rewards.Ink(), floor=1e-3), IMAGES)


class Spoiled:
    """The mean of an image, spoiled in one way."""

    def __init__(self, how, **spec):
        self.how, self.spec, self.buffer = how, RewardSpec(**spec), torch.zeros(0)

    def __call__(self, x):
        if self.how == "in place":
            x.mul_(0.5)
        mean = x.flatten(1).mean(1)
        if self.how == "batch":
            return mean - mean.mean()
        if self.how == "buffer":
            if len(self.buffer) != len(mean):
                self.buffer = torch.zeros(len(mean))
            return self.buffer.copy_(mean).add_(torch.rand(()))
        if self.how == "nan":
            return mean * torch.nan
        if self.how == "shape":
            return mean[:, None]
        if self.how == "detached":
            return mean.detach()
        if self.how == "wrong gradient":
            return mean.detach() + 2.0 * (mean - mean.detach())
        return mean


@pytest.mark.parametrize(
    ("how", "spec", "word"),
    [
        ("in place", {}, "wrote into"),
        ("batch", {}, "one by one"),
        ("buffer", {}, "second call changed"),
        ("nan", {}, "finite"),
        ("shape", {}, "shape"),
        ("", {"bounds": (0.0, 0.1)}, "bounds"),
        ("detached", {"gradient": "exact"}, "carry none"),
        ("", {"gradient": "none"}, "carry one"),
        ("wrong gradient", {"gradient": "exact"}, "finite differences"),
    ],
)
def test_broken_rewards_are_rejected(how, spec, word):
    with pytest.raises(CheckFailed, match=word):
        testing.check_reward(Spoiled(how, **spec), IMAGES.clone())


def test_a_right_reward_of_that_class_passes():
    testing.check_reward(Spoiled("", gradient="exact", bounds=(0.0, 1.0)), IMAGES)
