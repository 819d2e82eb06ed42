"""Chains that switch models: the parts bit for bit, the law in closed form, rows by level, methods, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from exact import LIMIT

import steer
from steer import search
from steer.processes.switched import Switched

STEPS = 20


def part(variance, schedule=None, steps=STEPS):
    """The exact model of N(0, variance) in the plane."""
    return steer.models.gaussian(
        torch.zeros(2), variance, schedule=schedule or steer.VP(), steps=steps, dtype=torch.float64
    )


def variance_of(parts):
    """Of a coordinate of x0, by the recursion of x' = m x + std z through whichever part is in force."""
    process = parts[0]
    variance = process.levels[0].sigma ** 2
    for k in range(process.steps):
        now = parts[max(level for level in parts if level <= k)]
        x = torch.ones(1, 1, 2, dtype=torch.float64)
        step = now.transition(x, now.denoise(x, k), k)
        variance = float(step.mean[0, 0, 0]) ** 2 * variance + step.std**2
    return variance


def z_of_variance(parts, key):
    """Of 80,000 coordinates of x0, against the closed form."""
    x = steer.rollout(steer.switched(parts), lambda x: x[:, 0], particles=40_000, key=key).x
    return (float(x.square().mean()) / variance_of(parts) - 1.0) / math.sqrt(2.0 / x.numel())


@pytest.mark.parametrize("at", [1, 7, 10, 15, 19])
def test_the_law_is_that_of_the_parts_in_turn(at):
    assert abs(z_of_variance({0: part(0.2), at: part(0.9)}, at)) < LIMIT


def test_mutant_switch_a_level_late_is_rejected(monkeypatch):
    own = Switched.at
    monkeypatch.setattr(Switched, "at", lambda self, t: own(self, t + 1.0 / STEPS if t < 1.0 else t))
    assert abs(z_of_variance({0: part(0.2), 15: part(0.9)}, 15)) > LIMIT


def test_one_part_and_equal_parts_are_the_part_to_the_bit():
    alone = steer.smc(part(0.2), lambda x: x[:, 0], particles=16, key=1)
    for parts in ({0: part(0.2)}, {0: part(0.2), 9: part(0.2)}):
        result = steer.smc(steer.switched(parts), lambda x: x[:, 0], particles=16, key=1)
        assert torch.equal(result.x, alone.x)
        assert torch.equal(result.log_evidence, alone.log_evidence)


def test_rows_are_those_of_each_level_and_within_the_budget():
    guided, plain = (steer.load("digits", labels=3, steps=10, guidance_scale=w) for w in (4.0, 1.0))
    process = steer.switched({0: guided, 4: plain})
    assert (guided.rows, plain.rows, process.rows) == (2, 1, 2)
    assert [process.rows_at(k) for k in range(10)] == [2] * 4 + [1] * 6
    reward = steer.rewards.DigitLogProb(3)
    assert steer.rollout(process, reward, particles=5).cost.nfe == 5 * 14
    result = steer.smc(process, reward, budget=100)
    assert result.x.shape[1] == 7  # 14 rows each
    assert result.cost.nfe == 98


def test_steps_before_the_switch_are_the_first_parts_and_after_it_the_seconds():
    asked = []

    def model(name):
        def denoiser(x, t):
            asked.append(name)
            return 0.5 * x

        return steer.from_denoiser(denoiser, steer.VP(), 6, event=(2,))

    steer.rollout(steer.switched({0: model("a"), 2: model("b"), 5: model("c")}), lambda x: x[:, 0], particles=2)
    assert asked == ["a", "a", "b", "b", "b", "c"]


@pytest.mark.parametrize("method", ["smc", "svdd", "dts", "rbf", "best_of_n"])
def test_methods_run_on_it_for_several_problems(method):
    guided, plain = (steer.load("digits", labels=[3, 8], steps=6, guidance_scale=w) for w in (3.0, 1.0))
    process = steer.switched({0: guided, 3: plain})
    result = steer.sample(process, steer.rewards.Ink(), method=method, budget=90, key=1)
    assert result.x.shape[0] == 2
    assert result.cost.nfe <= 2 * 90


def test_a_guided_switch_and_a_tree_are_reproducible():
    process = steer.switched({0: part(0.2), 9: part(0.9)})
    one, two = (search.dts(process, lambda x: x[:, 0], particles=8, key=3) for _ in range(2))
    assert torch.equal(one.x, two.x)
    guided = steer.smc(process, lambda x: x[:, 0], particles=8, proposal=steer.guided(), key=3)
    assert guided.cost.grads > 0


def test_the_second_order_rule_remembers_nothing_across_the_switch():
    process = steer.switched({0: part(0.2), 9: part(0.9)}).with_rule(steer.second_order())
    own = part(0.2).with_rule(steer.second_order())
    assert [k for k in range(STEPS) if process._factors[k] == 0.0 != own._factors[k]] == [9]
    x = process.prior(steer.Key(0), 1, 4)
    for k in range(10):
        step = process.transition(x, process.denoise(x, k), k)
        if k == 9:
            fresh = process.begun(process.noisy(x))
            again = process.transition(fresh, process.denoise(fresh, k), k)
            torch.testing.assert_close(step.mean, again.mean, rtol=0.0, atol=0.0)
        x = step.sample(steer.Key(0).fold("step").at(k))


def test_it_can_be_put_on_another_grid():
    process = steer.switched({0: part(0.2), 10: part(0.9)})
    coarse = process.with_times(process.times[::2])
    assert [coarse.denoiser.at(t) is process.denoiser.parts[1] for t in coarse.times] == [k >= 5 for k in range(11)]


def test_parts_that_do_not_fit_are_refused():
    a, b = part(0.2), part(0.9)
    for levels in ({}, {1: a}, {0: a, STEPS: b}):
        with pytest.raises(steer.SteerError, match="by the level that they begin at"):
            steer.switched(levels)
    others = {
        "times": part(0.9, steps=10),
        "noise levels": part(0.9, schedule=steer.Cosine()),
        "events": steer.models.gaussian(torch.zeros(3), 0.9, steps=STEPS, dtype=torch.float64),
        "dtypes": replace(b, dtype=torch.float32),
    }
    for name, other in others.items():
        with pytest.raises(steer.SteerError, match=f"from level 9 has other .*{name}"):
            steer.switched({0: a, 9: other})
    two, three = (steer.load("digits", labels=labels, steps=5) for labels in ([1, 2], [1, 2, 3]))
    with pytest.raises(steer.SteerError, match="numbers of problems"):
        steer.switched({0: two, 2: three})
    with pytest.raises(steer.StateSpaceError, match="switch first"):
        steer.switched({0: a, 2: b.with_rule(steer.second_order())})
