"""What preflight says, on processes and rewards where the answer is known."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import steer
from steer import rewards
from steer.cli import app


def digits(steps=12, **options):
    return steer.load("digits", steps=steps, **options)


def first(x):
    return x[..., 0]


def gaussian(steps=20, **options):
    return steer.models.gaussian([0.0, 0.0], 1.0, steps=steps, **options)


@pytest.mark.slow
def test_on_digits():
    found = steer.preflight(digits(30), rewards.DigitLogProb(3), samples=16)
    assert found.clearest is not None
    assert found.stochastic
    assert found.stochastic_steps == 29
    assert found.seeds_matter
    assert found.std > 0.5
    assert [sight.k for sight in found.sights] == sorted({sight.k for sight in found.sights})
    assert found.sights[0].k == 0
    assert found.sights[-1].k == 29
    assert found.sights[-1].rank_correlation == pytest.approx(1.0)  # the last prediction is the sample
    assert found.sights[-1].error < 1e-5
    assert found.sights[-1].rank_correlation > (found.sights[0].rank_correlation or 0.0)
    assert found.gradient.available
    assert found.gradient.norm > 0.0
    assert found.gradient.push > 0.0
    assert 0.0 < found.decode_seconds < found.network_seconds
    assert found.cost.nfe == 16 * 30 + 1
    assert found.cost.grads == 1
    assert found.cost.rewards == 16 * 9 + 1
    assert (found.method, found.options, found.budget) == ("svdd", {"select": "argmax"}, 16 * 30)
    text = str(found)
    for name in (
        "draw noise",
        "rank correlation",
        "gradient",
        "milliseconds",
        'method="svdd", select="argmax"',
    ):
        assert name in text
    assert max(map(len, text.splitlines())) < 200
    again = steer.preflight(digits(30), rewards.DigitLogProb(3), samples=16)
    assert (again.mean, again.sights, again.gradient) == (found.mean, found.sights, found.gradient)


def test_hooks_draw_by_the_key_of_the_call():
    """Noise of hooks, in the chain and in the gradient's prediction: another key, other noise; the same, the same."""

    def drawn(key):
        seen = []

        def drawing(at):
            seen.append(at.key.normal(at.x.shape))
            return at.x0

        steer.preflight(steer.guide(gaussian(6), steer.Hooks(x0=(drawing,))), first, samples=4, key=key)
        return seen

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert len(one) == len(other) == 7
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_recommendation_runs():
    process, reward = digits(6), rewards.DigitLogProb(3)
    for found_on in (process, process.with_rule(steer.ode())):
        found = steer.preflight(found_on, reward)
        result = steer.sample(found_on, reward, method=found.method, budget=found.budget, **found.options)
        assert result.cost.nfe <= found.budget


def test_an_ode_is_named_and_cured():
    process = digits(transition=steer.ode())
    found = steer.preflight(process, rewards.DigitLogProb(3))
    assert not found.stochastic
    assert found.noise_effect is None
    assert found.seed_effect is not None
    assert found.seeds_matter
    assert found.method == "best_of_n"
    assert "an ODE" in found.advice[0]
    assert any("with_rule(steer.ddim(eta=1.0))" in sentence for sentence in found.advice)
    assert "none draw noise" in str(found)
    assert math.isnan(found.gradient.push)  # no noise to measure it by
    cured = steer.preflight(process.with_rule(steer.ddim(eta=1.0)), rewards.DigitLogProb(3))
    assert cured.stochastic


def test_effects_of_seeds_and_of_noise_are_told_apart():
    """On N(0, 1): few-step ancestral sampling keeps little of its start; with little noise, nearly all."""
    forgets = steer.preflight(gaussian(40), first, samples=200)
    keeps = steer.preflight(gaussian(40, transition=steer.ddim(0.02)), first, samples=200)
    assert forgets.noise_effect == pytest.approx(1.0, abs=0.2)  # two chains from one start: independent
    assert keeps.noise_effect < 0.1 * keeps.seed_effect
    assert any("starting noise still decides" in sentence for sentence in keeps.advice)
    assert not any("starting noise still decides" in sentence for sentence in forgets.advice)


def test_rank_correlation_is_spearmans():
    """Against the closed form on one Gaussian, where prediction and sample are jointly normal."""
    from scipy.stats import spearmanr

    from steer.evaluation.preflight import _rank_correlation

    draw = torch.Generator().manual_seed(0)
    a = torch.randn(1, 50, generator=draw).round(decimals=1)  # with ties
    b = a + torch.randn(1, 50, generator=draw)
    assert _rank_correlation(a, b) == pytest.approx(spearmanr(a[0], b[0]).statistic)
    assert _rank_correlation(torch.ones(1, 5), torch.rand(1, 5)) is None
    process = gaussian(40, transition=steer.ode())
    found = steer.preflight(process, first, samples=64)
    assert all(sight.rank_correlation == pytest.approx(1.0) for sight in found.sights)  # the flow is monotone
    assert found.sights[0].error > found.sights[-1].error


def test_a_reward_without_a_gradient():
    found = steer.preflight(digits(), lambda x: x.detach().flatten(1).mean(1))
    assert not found.gradient.available
    assert "without one" in found.gradient.why
    assert "gradient           no:" in str(found)
    assert not any("guided" in sentence for sentence in found.advice)


def test_a_constant_reward_has_nothing_to_give():
    found = steer.preflight(digits(), lambda x: 0.0 * x.flatten(1).sum(1) + 2.0)
    assert found.std == 0.0
    assert found.usable_from is None
    assert {sight.rank_correlation for sight in found.sights} == {None}
    assert found.gradient.why == "it is zero"
    assert found.method == "best_of_n"
    assert "all 4 samples score 2: nothing can be gained" in found.advice[0]
    assert len(found.advice) == 1


def test_a_model_whose_seeds_do_not_matter():
    """A network that always predicts one picture, as distilled models nearly do."""
    process = steer.from_denoiser(lambda x, t: torch.full_like(x, 0.3), steer.VP(), 5, event=(4,))
    found = steer.preflight(process, first)
    assert not found.seeds_matter
    assert found.method == "rollout"
    assert "every seed gives the same sample" in found.advice[0]


def test_a_reward_that_raises_costs_next_to_nothing():
    process, rows = gaussian(), []

    def broken(x):
        raise KeyError("no such label")

    counted = steer.from_denoiser(
        lambda x, t: rows.append(len(x[0])) or process.denoiser(x, t), process.schedule, 20, event=(2,)
    )
    with pytest.raises(steer.RewardError, match=r"broken raised KeyError.*no such label"):
        steer.preflight(counted, broken)
    assert rows == [4]


def test_bad_scores_are_not_passed_over():
    with pytest.raises(steer.NonFiniteError, match="step 0"):
        steer.preflight(gaussian(), lambda x: x[:, 0] * torch.nan)
    with pytest.raises(steer.BudgetError, match="at least 4"):
        steer.preflight(gaussian(), first, samples=2)


def test_forbidden_samples_are_counted():
    some = steer.preflight(gaussian(), lambda x: torch.where(x[:, 0] > 0, x[:, 1], -torch.inf), samples=32)
    assert 0 < some.forbidden < 32
    assert math.isfinite(some.mean)
    every = steer.preflight(gaussian(), lambda x: torch.full_like(x[:, 0], -torch.inf))
    assert every.forbidden == 4
    assert "forbidden" in every.advice[0]
    assert json.loads(json.dumps(every.to_dict()))["best"] is None


def test_an_expensive_reward_is_said_to_be():
    import time

    def slow(x):
        time.sleep(0.01 * len(x))
        return x[:, 0]

    found = steer.preflight(gaussian(transition=steer.ddim(0.3)), slow)
    assert found.reward_seconds > 0.01
    assert found.price > 3.0
    assert found.method == "best_of_n"
    assert "network rows a score" in found.advice[0]
    assert any("a score costs" in sentence for sentence in found.advice)


def test_a_reward_that_only_the_end_knows():
    """Noise that no prediction of the data can see: the parity of the last digits."""
    found = steer.preflight(gaussian(40), lambda x: (x[:, 0] * 1e4).round() % 2.0, samples=64)
    assert found.clearest is None
    assert found.method == "best_of_n"
    assert "by chance" in found.advice[0]


def test_what_it_says_does_not_contradict_itself():
    """Of four samples nothing is read off their ranking; of a gradient, whether its size can move a step."""
    few = " ".join(steer.preflight(gaussian(), first, samples=4).advice)
    many = " ".join(steer.preflight(gaussian(), first, samples=64).advice)
    assert "rank nothing reliably" in few
    assert "rank correlation" not in few
    assert "rank correlation" in many
    assert "a useful size" in many
    weak = " ".join(steer.preflight(gaussian(), first, samples=64, temperature=1e4).advice)
    assert "changes nothing at this temperature" in weak
    assert "useful" not in weak
    strong = " ".join(steer.preflight(gaussian(), first, samples=64, temperature=1e-4).advice)
    assert "small guidance scale" in strong
    for said in (few, many, weak, strong):
        assert "for one best sample svdd" in said
        assert "for a population fk_steering" in said
        assert "dts_star" not in said


def test_tokens_and_several_problems():
    found = steer.preflight(steer.load("letters"), lambda x: (x == 4).sum(1).double(), batch=2)
    assert found.problems == 2
    assert found.seed_effect is None  # masked states all begin the same
    assert 0.0 < found.noise_effect <= 1.0
    assert "no Gaussian path" in found.gradient.why
    labelled = steer.preflight(digits(4, labels=[1, 2, 3]), rewards.DigitLogProb(3))
    assert labelled.problems == 3
    assert labelled.cost.nfe == 3 * (4 * 4 + 1)


def test_the_command_line():
    words = ["preflight", "--model", "digits", "--reward", "digit:3", "--steps", "5"]
    done = CliRunner().invoke(app.app, words)
    assert done.exit_code == 0, done.output
    assert "recommended" in done.stdout
    done = CliRunner().invoke(app.app, [*words, "--json", "--seed", "1"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["about"]["reward"] == "digit:3"
    assert facts["stochastic_steps"] == 4
    assert {"method", "budget", "advice", "sights", "gradient", "cost", "usable_from"} <= set(facts)
    assert CliRunner().invoke(app.app, [*words[:-1], "0"]).exit_code == 2
    assert CliRunner().invoke(app.app, ["preflight", "--model", "digits", "--reward", "nothing"]).exit_code == 2


def test_an_error_leaves_the_states_it_came_at():
    def reward(x):
        scores = x[:, 0].clone()
        scores[1] = torch.nan
        return scores

    with pytest.raises(steer.NonFiniteError) as error:
        steer.preflight(steer.models.gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], steps=4), reward)
    assert isinstance(error.value.partial, steer.Trajectory)
    assert error.value.partial.x.shape == (1, 4, 2)
