"""The sentence on a run, in each of the cases that it tells apart."""

import math

import pytest
import torch

import steer
from steer import search
from steer.core.tilt import Tilt
from steer.report.run_report import summary
from steer.report.verdict import _base, verdict


def first(x):
    return x[:, 0]


def gaussian():
    return steer.models.gaussian([0.0, 0.0], 1.0, steps=8)


@pytest.fixture(scope="module")
def half():
    """The temperature at which 4,096 unsteered samples have an ESS of half of them."""
    return Tilt.of(steer.rollout(gaussian(), first, particles=4096, key=7).reward).temperature(ess=0.5)


@pytest.fixture(scope="module")
def reference():
    return steer.rollout(gaussian(), first, particles=200, key=9)


def importance(temperature, particles=64, **options):
    return steer.importance_sampling(gaussian(), first, particles=particles, temperature=temperature, **options)


def test_hardly_steered_names_a_temperature_that_steers(half):
    """Read off 256 samples: within a fifth of the truth. It would be so for any temperature that steers too little."""
    for temperature in (20.0, math.inf):
        said = verdict(importance(temperature, 256))
        assert said.startswith("hardly steered: ESS 25")
        advised = float(said.rpartition(" ")[2])
        assert advised == pytest.approx(half, rel=0.2)
        better = importance(advised, 256)
        assert float(better.ess) / 256 == pytest.approx(0.5, abs=0.1)
        assert verdict(better).startswith("steered: ESS ")


def test_the_model_is_what_is_left_without_the_tilt():
    """What the advice is read off: of importance sampling, the unsteered samples, all of equal weight."""
    base = _base(importance(0.5))
    assert torch.allclose(base.log_weight, torch.full_like(base.log_weight, -math.log(64)))


def test_one_seed_survives():
    with pytest.warns(UserWarning, match="one starting noise"):
        run = steer.smc(gaussian(), first, particles=16, temperature=0.01)
    assert verdict(run) == "one seed survives of 16: raise the temperature or add particles"
    assert verdict(run) in repr(run)


def test_in_some_of_the_problems():
    run = importance(1.0, 8, batch=3)
    weight = run.log_weight.clone()
    weight[1] = -torch.inf
    weight[1, 3] = 0.0
    some = steer.Result(**{**vars(run), "log_weight": weight})
    assert verdict(some).startswith("one seed survives of 8 in 1 of 3 problems")


def test_one_sample_has_nearly_all_of_the_weight():
    run = importance(0.2, 16, key=3)
    assert 1.0 < float(run.ess) < 2.0
    assert verdict(run).startswith(f"ESS {float(run.ess):.3g} of 16, so that one sample has nearly all of the weight")


def test_it_worked(reference):
    run = steer.smc(gaussian(), first, particles=128, temperature=0.7)
    assert verdict(run).startswith("steered: ESS ")
    assert "of 128 seeds" in verdict(run)
    said = verdict(run, reference)
    assert said.startswith("steered: mean reward 0.7")
    assert "unsteered" in said
    assert summary(run, reference)["verdict"] == said


def test_within_two_standard_errors_of_the_unsteered_mean():
    """40 particles: the mean rises by a third, with a standard error of a ninth, and a sixth for the 20 unsteered."""
    said = verdict(importance(1.5, 40), steer.rollout(gaussian(), first, particles=20, key=5))
    assert said.startswith("the reward is within 2 standard errors of the unsteered mean (mean reward")
    assert "; lower the temperature to about " in said


def test_it_fell(reference):
    worse = steer.Result(**{**vars(importance(2.0)), "reward": importance(2.0).reward - 3.0})
    assert verdict(worse, reference).startswith("the reward fell (mean reward −2")


def test_the_choice_of_a_temperature_is_a_reference():
    run = steer.smc(gaussian(), first, particles=64, ess=0.5)
    assert f"unsteered {run.temperature_choice.unsteered:.3f}".replace("-", "−") in verdict(run)


def test_a_steered_population_of_equal_rewards_is_not_called_unsteered():
    """All samples have the rare reward in the end: their weights are equal, as those of a run that does nothing."""
    run = steer.smc(gaussian(), lambda x: (x[:, 0] > 0.5).double(), particles=64, temperature=0.1, key=1)
    finished = steer.Result(**{**vars(run), "reward": torch.ones_like(run.reward)})
    assert verdict(finished).startswith("steered: ESS ")
    idle = steer.smc(gaussian(), lambda x: (x[:, 0] > 9.0).double(), particles=64, temperature=0.1, key=1)
    assert verdict(idle).startswith("hardly steered: ESS 64 of 64; its samples' rewards hardly differ")


def test_runs_that_estimate_nothing():
    assert verdict(steer.rollout(gaussian(), first, particles=4)).startswith("unsteered")
    assert verdict(importance(1.0, 1)).startswith("one particle")
    assert verdict(search.best_of_n(gaussian(), first, particles=5)).startswith("best reward ")
    assert verdict(importance(1.0).draw(5)).startswith(("steered", "hardly"))


def test_forbidden_samples_do_not_disturb_it(reference):
    run = steer.importance_sampling(
        gaussian(), lambda x: torch.where(x[:, 0] > 0.0, x[:, 0], -torch.inf), particles=64, temperature=1.0
    )
    assert verdict(run, reference).startswith("steered: mean reward")
    assert verdict(run).startswith("hardly steered") or verdict(run).startswith("steered")


@pytest.mark.slow
def test_a_report_does_not_celebrate_a_null_result(tmp_path, reference):
    page = importance(50.0, 40).report(tmp_path, reference=reference).read_text()
    lead = page.partition('class="lead"')[2].partition("</p>")[0]
    assert "Hardly steered: ESS 40 of 40; lower the temperature to about 0." in " ".join(lead.split())
    assert "rose" not in lead
    chosen = steer.smc(gaussian(), first, particles=64, ess=0.5)
    page = chosen.report(tmp_path).read_text()
    assert "chosen for ess=0.5 from 96 unsteered samples" in page
