"""One call for every method, and comparisons at equal budget."""

import json
import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from exact import Linear, mixture_2d

import steer
from steer import rewards, search
from steer.report.remarks import student

REWARD = Linear([0.7, -0.5])


def process(steps=5):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps)


@pytest.mark.parametrize("name", steer.methods())
def test_a_name_is_its_function(name):
    by_name = steer.sample(process(), REWARD, method=name, budget=40, key=2)
    by_hand = steer.sample(process(), REWARD, method=steer.sample.__globals__["resolve"](name), budget=40, key=2)
    assert torch.equal(by_name.x, by_hand.x)
    assert 0 < by_name.cost.nfe <= 40


def test_options_reach_the_method():
    result = steer.sample(process(), REWARD, method="best_of_n", budget=40, keep=3)
    assert int((result.log_weight > -torch.inf).sum()) == 3
    with pytest.raises(TypeError, match="keep"):
        steer.sample(process(), REWARD, method="smc", keep=3)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(steer.SteerError, match=r"no method is called 'dps'.*best_of_n.*smc"):
        steer.sample(process(), REWARD, method="dps")


def test_a_comparison_is_at_equal_budget_with_both_baselines():
    table = steer.compare(
        process(), REWARD, methods=[steer.smc, search.best_of_n], budget=43, keys=4, key=1, batch=2,
        metrics={"first": lambda x: x[:, 0]}, options={"best_of_n": {"keep": 2}},
    )  # fmt: skip
    assert [row.method for row in table.rows] == ["rollout", "best_of_n", "smc"]
    assert {row.nfe for row in table.rows} == {2 * 8 * 5}
    smc = table.rows[2]
    runs = table.results["smc"]
    rewards = torch.stack([run.mean_reward.mean() for run in runs])
    assert smc.reward[0] == pytest.approx(float(rewards.mean()))
    assert smc.reward[1] == pytest.approx(float(rewards.std() / math.sqrt(4)))
    firsts = [float(run.mean(lambda x: x[:, 0]).mean()) for run in runs]
    assert smc.metrics["first"][0] == pytest.approx(sum(firsts) / 4)
    bests = [float(run.reward.amax(1).mean()) for run in runs]
    others = [float(run.reward.amax(1).mean()) for run in table.results["best_of_n"]]
    assert smc.share == 80 / 86
    gains = torch.tensor(bests, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
    assert smc.gain == pytest.approx((float(gains.mean()), float(gains.std() / 2)))
    of_best = [float(run.best[:, 0].mean()) for run in runs]
    assert smc.of_best["first"][0] == pytest.approx(sum(of_best) / 4)
    head = "method reward best over best_of_n first first of best ess nfe grads rewards seconds"
    assert str(table).splitlines()[0].split() == head.split()
    assert table.to_dict()["rows"][1]["method"] == "best_of_n"


def test_numbers_that_json_lacks_are_none():
    """A forbidden sample's reward makes a mean of -inf, and one seed has no standard error."""
    table = steer.compare(process(), lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), budget=40, keys=1)
    assert table.rows[0].reward[0] == -math.inf
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["rows"][0]["reward"] == [None, None]


def test_several_budgets_are_the_comparisons_at_each():
    curve = steer.compare(process(), REWARD, budget=[80, 20, 40], keys=2, key=3)
    alone = steer.compare(process(), REWARD, budget=40, keys=2, key=3)
    assert [stage.budget for stage in curve.at] == [20, 40, 80]
    assert curve.at[1].rows[2].reward == alone.rows[2].reward
    assert alone.at == (alone,)
    assert all({row.nfe for row in stage.rows} == {stage.budget} for stage in curve.at)
    assert curve.to_dict()["budgets"][1]["rows"][0]["reward"] == alone.to_dict()["rows"][0]["reward"]
    assert [line for line in str(curve).splitlines() if line.startswith("budget")] == [
        "budget 20", "budget 40", "budget 80",
    ]  # fmt: skip
    with pytest.raises(steer.SteerError, match="several"):
        steer.compare(process(), REWARD, budget=[])


def test_an_interrupted_curve_keeps_the_budgets_it_finished():
    def stop_at_the_second_budget(state):
        stop_at_the_second_budget.left -= 1
        if stop_at_the_second_budget.left == 0:
            raise steer.Stop

    for after, keys in ((3, [2]), (7, [2, 1])):
        stop_at_the_second_budget.left = 2 * 5 + after
        curve = steer.compare(
            process(), REWARD, budget=[20, 40], keys=2, options={"smc": {"on_step": stop_at_the_second_budget}}
        )
        assert curve.interrupted
        assert [stage.keys for stage in curve.at] == keys
        assert curve.keys == keys[-1]


def test_keys_of_a_comparison_are_independent_and_reproducible():
    one, two = (steer.compare(process(), REWARD, budget=40, keys=2, key=3) for _ in range(2))
    assert one.rows[2].reward == two.rows[2].reward
    first, second = one.results["smc"]
    assert not torch.equal(first.x, second.x)
    # methods share the key, so that their difference is not the noise's
    assert torch.equal(one.results["rollout"][0].x, one.results["best_of_n"][0].x)


def test_an_interrupted_comparison_keeps_the_keys_that_all_methods_ran():
    def stop_in_the_third_key(state):
        stop_in_the_third_key.steps += 1
        if stop_in_the_third_key.steps == 2 * 5 + 3:
            raise steer.Stop

    stop_in_the_third_key.steps = 0
    table = steer.compare(
        process(), REWARD, budget=40, keys=5, options={"smc": {"on_step": stop_in_the_third_key}}
    )  # fmt: skip
    assert table.interrupted
    assert table.keys == 2
    assert all(len(runs) == 2 for runs in table.results.values())
    stop_in_the_third_key.steps = 2 * 5
    with pytest.raises(steer.Stop):
        steer.compare(process(), REWARD, budget=40, options={"smc": {"on_step": stop_in_the_third_key}})


def test_drawing_from_a_result_follows_its_weights():
    result = steer.importance_sampling(process(), REWARD, particles=64, key=1)
    drawn = result.draw(6400, key=2)
    counts = torch.bincount((drawn.x[0, :, None] == result.x[0]).all(2).nonzero()[:, 1], minlength=64)
    assert bool(((counts / 100 - 64 * result.log_weight.exp()[0]).abs() < 1.0).all())
    assert torch.equal(drawn.root[0].bincount(minlength=64), counts)
    assert drawn.ess.item() == pytest.approx(6400)


def test_a_result_shows_itself():
    result = steer.smc(process(), REWARD, particles=4)
    assert "1 x 4 samples" in repr(result)
    assert result._repr_png_() is None
    digits = steer.load("digits", steps=3)
    shown = steer.smc(digits, lambda x: x.mean((1, 2, 3)), particles=4)
    assert shown._repr_png_().startswith(b"\x89PNG")
    assert len(shown.images) == 4
    assert shown.images[0].size == (8, 8)


def test_methods_of_a_comparison_have_names_of_their_own():
    import functools

    tempered = functools.partial(steer.smc, weight=steer.maximum())
    table = steer.compare(process(), REWARD, methods=[tempered], budget=50, keys=2)
    assert [row.method for row in table.rows] == ["rollout", "best_of_n", "smc"]
    with pytest.raises(steer.SteerError, match="two of the methods are called smc"):
        steer.compare(process(), REWARD, methods=["smc", tempered], budget=50)
    with pytest.raises(steer.SteerError, match="options are for the methods compared"):
        steer.compare(process(), REWARD, methods=["smc"], budget=50, options={"smk": {}})
    with pytest.raises(steer.SteerError, match="keys must be at least 1"):
        steer.compare(process(), REWARD, methods=["smc"], budget=50, keys=0)


class Breaks:
    """A reward that fails at one of its calls, counted from 1."""

    def __init__(self, at=0, error=RuntimeError):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return REWARD(x)


def test_what_ends_the_program_leaves_the_seeds_and_budgets_before_it():
    counted = Breaks()
    options = {"methods": ["smc"], "keys": 3, "metrics": {"first": lambda x: x[:, 0]}}
    whole = steer.compare(process(), counted, budget=50, **options)
    with pytest.raises(SystemExit) as found:
        steer.compare(process(), Breaks(counted.calls, SystemExit), budget=50, **options)
    partial = found.value.partial
    assert partial.interrupted
    assert partial.keys == 2
    for name, runs in partial.results.items():
        assert all(torch.equal(a.x, b.x) for a, b in zip(runs, whole.results[name], strict=False))
    at = counted.calls + counted.calls // 3 + 2
    with pytest.raises(SystemExit) as found:
        steer.compare(process(), Breaks(at, SystemExit), budget=[50, 60], **options)
    assert [stage.budget for stage in found.value.partial.at] == [50, 60]
    assert [stage.keys for stage in found.value.partial.at] == [3, 1]
    with pytest.raises(SystemExit) as found:
        steer.compare(process(), Breaks(2, SystemExit), budget=50, **options)  # best_of_n, on the first seed
    assert [row.method for row in found.value.partial.rows] == ["rollout"]


def test_a_method_that_fails_is_a_row_and_the_rest_goes_on():
    counted = Breaks()
    options = {"methods": ["smc", "svdd"], "keys": 3}
    whole = steer.compare(process(), counted, budget=50, **options)
    assert not whole.failures
    of_a_seed = counted.calls // 3
    of_svdd = of_a_seed - (2 + 5)  # one each of rollout and best_of_n, one a step of smc
    table = steer.compare(process(), Breaks(2 * of_a_seed - of_svdd), budget=50, **options)  # smc, on the second seed
    assert table.keys == 3
    assert not table.interrupted
    assert {name: list(of) for name, of in table.failures.items()} == {"smc": [1]}
    assert isinstance(table.failures["smc"][1], steer.RewardError)
    assert table.failures["smc"][1].partial is not None  # what it had paid for
    for name, runs in whole.results.items():
        kept = [run for seed, run in enumerate(runs) if name != "smc" or seed != 1]
        assert all(torch.equal(a.x, b.x) for a, b in zip(table.results[name], kept, strict=True))
    smc, best = (
        torch.tensor([float(run.reward.max()) for run in table.results[name]]) for name in ("smc", "best_of_n")
    )
    assert table.rows[2].gain[0] == pytest.approx(float((smc - best[[0, 2]]).mean()), abs=1e-6)  # seeds that both ran
    assert any(line.startswith("smc failed on 1 of 3 seeds: RewardError: ") for line in table.remarks)
    json.dumps(table.to_dict(), allow_nan=False)


def test_a_method_that_cannot_run_is_a_row_without_numbers(tmp_path):
    table = steer.compare(process(), REWARD, methods=["noise_search", "smc"], budget=12, keys=2)
    ode = steer.compare(process().with_rule(steer.ode()), REWARD, methods=["smc", "svdd"], budget=12, keys=2)
    assert not table.failures
    assert set(ode.failures) == {"smc", "svdd"}
    row = ode.rows[2]
    assert math.isnan(row.reward[0])
    assert not row.tied
    assert "smc failed on 2 of 2 seeds: NotStochasticError: " in str(ode)
    assert "NotStochasticError" in ode.report(tmp_path).read_text()
    json.dumps(ode.to_dict(), allow_nan=False)


def test_a_broken_reward_ends_the_comparison_at_the_unsteered_run():
    broken = Breaks(1)
    with pytest.raises(steer.RewardError):
        steer.compare(process(), broken, methods=["smc"], budget=50)
    assert broken.calls == 1


def noisy(spread, shift=0.0):
    """A method whose best reward is best-of-N's of that seed, plus a shift of its own mean and spread over seeds."""

    def method(process, reward, *, budget, batch, temperature, key):
        run = search.best_of_n(process, reward, budget=budget, batch=batch, temperature=temperature, key=key)
        moved = shift + spread * key.fold(method.__name__).normal((1, 1)).item()
        return replace(run, reward=run.reward + moved)

    method.__name__ = f"moved_{shift:g}".replace(".", "_")
    return method


def test_ties_are_those_not_told_apart_on_the_same_seeds():
    """Best-of-2's own spread over seeds is common to all, so that a shift of .1 is told apart and .01 is not."""
    methods = [noisy(0.05, 1.1), noisy(0.05, 1.09), noisy(0.05, 1.0)]
    table = steer.compare(process(), REWARD, methods=methods, budget=10, keys=20)
    tied = {row.method: row.tied for row in table.rows}
    assert tied == {"rollout": False, "best_of_n": False, "moved_1_1": True, "moved_1_09": True, "moved_1": False}
    assert table.rows[0].best[1] > 0.05  # by its own error, over seeds, the third would be tied
    assert table.rows[2].gain[0] == pytest.approx(1.1, abs=4 * 0.05 / 20**0.5)
    assert table.rows[2].gain[1] == pytest.approx(0.05 / 20**0.5, rel=4 / 40**0.5)
    assert "not told apart from them at 95 % over 20 seeds are those of moved_1_09" in table.remarks[0]
    alone = steer.compare(process(), REWARD, methods=methods, budget=10, keys=1)
    assert "one seed tells no error" in alone.remarks[0]


def test_the_quantile_of_student():
    for freedom in (*range(1, 31), 100):
        assert student(freedom) == pytest.approx(float(scipy.stats.t.ppf(0.975, freedom)), rel=0.01)


def test_what_a_mean_reward_is_of_is_said():
    table = steer.compare(
        process(), REWARD, methods=["smc", "svdd"], budget=50, keys=2, options={"best_of_n": {"keep": 4}}
    )
    assert {row.method: row.mean_of for row in table.rows} == {
        "rollout": "unsteered samples", "best_of_n": "the best 4 found", "smc": "p(x) exp(r(x) / T)",
        "svdd": "the best one found",
    }  # fmt: skip
    assert any("mean rewards are of different things" in sentence for sentence in table.remarks)


def test_a_spend_below_the_budget_is_said():
    table = steer.compare(process(), REWARD, methods=["smc"], budget=54, keys=2)  # ten chains of five steps
    assert {row.share for row in table.rows} == {50 / 54}
    assert [line for line in table.remarks if "of the budget" in line] == [
        f"{name} spent 93% of the budget" for name in ("rollout", "best_of_n", "smc")
    ]
    assert not any("of the budget" in line for line in steer.compare(process(), REWARD, budget=50, keys=2).remarks)


def test_a_held_out_measure_that_falls_as_the_reward_rises_is_said():
    table = steer.compare(
        process(),
        REWARD,
        methods=[noisy(0.0), search.dts_star],
        budget=400,
        keys=4,
        metrics={"judge": lambda x: -REWARD(x)},
    )
    gain, change = table.rows[3].gain, table.rows[3].of_best_gain["judge"]
    assert change[0] == pytest.approx(-gain[0], abs=1e-5)
    said = [line for line in table.remarks if "exploited" in line]
    assert [line.partition("'s")[0] for line in said] == (["dts_star"])
    assert gain[0] > student(3) * gain[1]


def test_an_option_that_a_method_does_not_take_is_refused_before_anything_runs():
    counted = Breaks()
    with pytest.raises(steer.SteerError, match=r"smc takes no proposl; it takes .*proposal"):
        steer.compare(process(), counted, methods=["smc"], budget=50, options={"smc": {"proposl": None}})
    with pytest.raises(steer.SteerError, match="temperature of smc is that of the whole comparison"):
        steer.compare(process(), counted, methods=["smc"], budget=50, options={"smc": {"temperature": 0.5}})
    assert counted.calls == 0


def test_a_measure_that_fails_leaves_the_runs():
    def broken(x):
        raise RuntimeError("no such file")

    with pytest.raises(RuntimeError, match="no such file") as found:
        steer.compare(process(), REWARD, methods=["smc"], budget=50, keys=2, metrics={"broken": broken})
    assert found.value.partial.keys == 2
    assert [row.method for row in found.value.partial.rows] == ["rollout", "best_of_n", "smc"]


def test_a_reward_without_a_gradient_on_a_model_whose_weights_want_one():
    """As a pipeline's do when it is loaded; no method asks for a gradient here, and JPEGSize refuses to be asked."""
    mix = torch.nn.Conv2d(3, 3, 1)
    pictures = steer.from_denoiser(
        lambda x, t: 0.5 * x, steer.VP(), 3, event=(3, 8, 8), decoder=lambda x: mix(x).sigmoid()
    )
    found = steer.compare(pictures, rewards.JPEGSize(), methods=["smc", "importance_sampling"], budget=12, keys=1)
    assert len(found.rows) == 4
