"""`method="auto"`: its budget, its choices, and that what it measures leaves the distribution alone."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import steer
from steer import rewards
from steer.cli import app
from steer.evaluation import auto
from steer.evaluation.choice import Setting, choose
from steer.testing.statistics import worst, z_scores
from steer.testing.targets import LINEAR, exact_chain

MEANS = [[1.0, 0.5, -1.0], [-1.0, 0.0, 1.0]]
STEPS = 8


def mixture(rule=None):
    process = steer.models.gaussian_mixture(MEANS, [0.3, 0.2], steps=STEPS)
    return process if rule is None else process.with_rule(rule)


REWARD = rewards.Linear(torch.tensor([1.0, -0.5, 0.3]))


def run(process=None, reward=REWARD, **options):
    return steer.sample(process or mixture(), reward, method="auto", **options)


@pytest.mark.parametrize("goal", ["best", "population", "rollouts"])
@pytest.mark.parametrize("price", [0, 1, 10, 100])
def test_the_budget_is_never_exceeded(goal, price):
    """In rows, the probe's included; and in rows plus scores at their price: that of plain chains, each scored once."""
    for budget in (STEPS, 3 * STEPS + 1, 32 * STEPS, 500):
        cost = run(goal=goal, reward_price=price, budget=budget, batch=2).cost
        assert 0 < cost.nfe <= 2 * budget
        assert cost.nfe + price * cost.rewards <= 2 * budget * (STEPS + price) / STEPS + 1e-6


def test_an_unknown_price_is_kept_to_as_well(monkeypatch):
    """A score that turns out to cost a thousand rows: the probe has been paid, and the rest goes into few scores."""
    monkeypatch.setattr(auto, "price_of", lambda timed: 1000.0)
    for goal in ("best", "population"):
        result = run(goal=goal, budget=400)
        assert result.method_choice.samples >= 4
        assert result.method_choice.price == 1000.0
        assert result.cost.nfe + 1000 * result.cost.rewards <= 400 * (STEPS + 1000) / STEPS


def test_the_probe_is_spent_and_counted_once():
    result = run(budget=64 * STEPS, reward_price=0)
    choice = result.method_choice
    assert (choice.samples, choice.rows) == (8, 8 * STEPS)
    assert choice.budget == 56 * STEPS
    assert result.cost.nfe == 64 * STEPS
    by_name = steer.sample(
        mixture(), REWARD, method="svdd", select="argmax", budget=choice.budget, key=steer.Key(0).shifted(slot=8)
    )
    assert torch.equal(result.x[:, 8:], by_name.x)
    assert torch.equal(result.root[:, 8:], by_name.root + 8)
    assert result.made_by.method == "auto"


def test_the_best_of_the_probe_is_kept():
    """A reward that no search can follow: its highest score is the probe's in some runs, and is returned in all."""
    result = run(reward=lambda x: torch.sin(1e4 * x.sum(1)), budget=40 * STEPS, batch=32, reward_price=0)
    count = result.method_choice.samples
    assert (result.reward.argmax(1) < count).any()
    assert torch.equal(result.log_weight.argmax(1), result.reward.argmax(1))
    assert torch.allclose(result.log_weight.exp().sum(1), torch.ones(32, dtype=torch.float64))


def test_a_sample_of_the_probe_can_be_made_again():
    """Its root names its starting noise, as that of every candidate."""
    process, seen = mixture(steer.ddim(0.0)), []
    result = run(process.with_rule(steer.ode()), budget=64 * STEPS, reward_price=0, key=5)
    for n in range(result.method_choice.samples):
        x = process.prior(steer.Key(5).fold("prior").shifted(slot=int(result.root[0, n])), 1, 1)
        for k in range(STEPS):
            x = process.transition(x, process.denoise(x, k, steer.Key(5)), k).mean
        seen.append(torch.allclose(x[0, 0], result.x[0, n]))
    assert all(seen)
    assert len(set(result.root[0, :8].tolist())) == 8


def test_the_same_key_chooses_the_same():
    first, again = (run(budget=400, key=3) for _ in range(2))
    assert first.method_choice == again.method_choice
    assert torch.equal(first.x, again.x)


def groupwise(samples):
    return samples[:, 0] - samples[:, 0].mean()


groupwise.spec = steer.types.RewardSpec(scope="groupwise")
POINT = steer.from_denoiser(lambda x, t: torch.full_like(x, 0.3), steer.VP(), STEPS, event=(4,))
BRANCHES = {
    "candidates": (None, REWARD, {"budget": 400}, "svdd", "candidates of every step"),
    "few candidates": (None, REWARD, {"budget": 2 * STEPS}, "best_of_n", "2.0 candidates"),
    "dear": (None, REWARD, {"budget": 16 * STEPS, "reward_price": 100}, "best_of_n", "100 network rows a score"),
    "ODE": (steer.ode(), REWARD, {"budget": 400}, "best_of_n", "an ODE"),
    "groupwise": (None, groupwise, {"budget": 400}, "best_of_n", "the others of its group"),
    "forbidden": (None, lambda x: torch.full_like(x[:, 0], -torch.inf), {"budget": 400}, "best_of_n", "forbidden"),
    "constant": (None, lambda x: 0.0 * x[:, 0], {"budget": 400}, "best_of_n", "nothing can be gained"),
    "parity": (None, lambda x: (x[:, 0] * 1e4).round() % 2, {"budget": 2000}, "best_of_n", "by chance"),
    "seeds": (POINT, lambda x: x[:, 0], {"budget": 400}, "rollout", "every seed gives the same sample"),
    "population": (None, REWARD, {"budget": 400, "goal": "population"}, "fk_steering", "resampling"),
    "dear population": (
        None, REWARD, {"budget": 400, "goal": "population", "reward_price": 10}, "importance_sampling", "10 network",
    ),
    "population of an ODE": (steer.ode(), REWARD, {"goal": "population"}, "importance_sampling", "an ODE"),
    "trainer": (None, REWARD, {"goal": "rollouts"}, "rollout", "trainer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BRANCHES)
def test_every_branch_of_the_rule_is_reached(case):
    given, reward, options, method, why = BRANCHES[case]
    process = given if isinstance(given, steer.GaussianProcess) else mixture(given)
    result = run(process, reward, **{"reward_price": 0, **options})
    choice = result.method_choice
    assert choice.method == method
    assert why in choice.why
    assert str(choice) in repr(result)


def test_a_population_follows_its_distribution():
    """Evidence, means and variances over 600 problems, |z| < 4. A population that the probe is mixed into is not it."""
    process = exact_chain(steer.VP())
    result = run(process, LINEAR, goal="population", budget=40 * 5, batch=600, key=11)
    exact = process.exact(LINEAR)
    assert result.law == "target"
    assert result.method_choice.samples == 4
    assert worst(z_scores(result, exact))[0] < 4.0
    probe = steer.rollout(process, LINEAR, particles=4, batch=600, key=12)
    share = torch.tensor(4 / (4 + result.x.shape[1]), dtype=torch.float64)
    mixed = replace(
        result,
        x=torch.cat([probe.x, result.x], 1),
        reward=torch.cat([probe.reward, result.reward], 1),
        log_weight=torch.cat([probe.log_weight + share.log(), result.log_weight + (1.0 - share).log()], 1),
        root=torch.cat([probe.root, result.root], 1),
        trajectory=None,
    )
    assert worst(z_scores(mixed, exact))[0] > 4.0


def test_a_journal_remembers_the_price(tmp_path, monkeypatch):
    """The time of a score differs when the run goes on; what was chosen by it does not."""
    results = []
    for price in (100.0, 0.0):
        monkeypatch.setattr(auto, "price_of", lambda timed, price=price: price)
        results.append(run(budget=400, journal=tmp_path / "journal"))
    first, again = results
    assert first.method_choice == again.method_choice
    assert first.method_choice.price == 100.0
    assert torch.equal(first.x, again.x)
    assert run(budget=400).method_choice != first.method_choice


def test_ranks_agree_on_a_price(monkeypatch):
    """Each times its own part; all choose by the smallest, or they would run different methods."""

    class Ranks:
        def least(self, count):
            return min(count, 10)

    monkeypatch.setattr(auto, "price_of", lambda timed: 1000.0)
    monkeypatch.setattr(auto, "current", Ranks)
    assert run(budget=400).method_choice.price == 10.0


def test_timed_prices_are_powers_of_ten():
    from steer.evaluation.choice import price_of

    assert [price_of(t) for t in (0.0, 0.4, 2.9, 3.2, 11.0, 31.0, 40.0, 900.0)] == [0, 0, 0, 10, 10, 10, 100, 1000]


def test_preflight_says_the_same():
    for rule in (None, steer.ode()):
        for reward in (REWARD, lambda x: 0.0 * x[:, 0]):
            found = steer.preflight(mixture(rule), reward, samples=16)
            result = run(mixture(rule), reward, budget=160 * STEPS, reward_price=0)
            assert (found.method, found.options) == (
                result.method_choice.method,
                {"select": "argmax"} if result.method_choice.options else {},
            )


def test_the_choice_is_in_the_record(tmp_path):
    result = run(budget=400)
    assert json.loads((result.save(tmp_path) / "result.json").read_text())["method_choice"]["method"] == "svdd"
    assert steer.load_run(tmp_path).result(mixture()).method_choice == result.method_choice


@pytest.mark.slow
def test_the_choice_is_in_the_report(tmp_path):
    assert "auto chose" in run(budget=400).report(tmp_path).read_text()


def test_the_command_line(tmp_path):
    words = ["generate", "--model", "letters", "--reward", "letters:e", "--method", "auto", "--budget", "400", "--json"]
    words += ["--reference", "0", "--n", "3", "--out", str(tmp_path)]
    done = CliRunner().invoke(app.app, [*words, "--goal", "population"])
    assert done.exit_code == 0, done.output
    assert "auto chose" in json.loads(done.stdout)["method_choice"]
    assert steer.load_run(tmp_path).facts["method_choice"]["goal"] == "population"
    assert CliRunner().invoke(app.app, [*words, "--goal", "good"]).exit_code == 2


def test_prompts_are_problems_of_one_choice():
    process = steer.load("digits", steps=4, labels=[1, 2, 3])
    result = run(process, rewards.DigitLogProb(3), budget=4 * 33, reward_price=0)
    assert result.method_choice.samples == 4
    assert result.cost.nfe <= 3 * 4 * 33
    assert result.reward.shape[0] == 3


def test_a_generator_takes_it():
    generator = steer.Generator(
        "letters", reward="letters:e", method="auto", budget=400, options={"goal": "population"}
    )
    assert generator.one(0).method_choice.goal == "population"


def test_what_cannot_be_asked():
    with pytest.raises(steer.SteerError, match="goal must be one of best, population, rollouts"):
        run(goal="good")
    with pytest.raises(steer.SteerError, match='goal="best" follows none'):
        run(ess=0.5)
    with pytest.raises(steer.SteerError, match="reward_price"):
        run(reward_price=-1.0)
    with pytest.raises(steer.SteerError, match="temperature"):
        run(temperature="cold")
    with pytest.raises(steer.BudgetError):
        run(budget=STEPS - 1)


def test_a_temperature_can_be_asked_for():
    result = run(goal="population", ess=0.5, budget=4000)
    assert result.temperature_choice.asked == "ess=0.5"
    assert result.cost.nfe <= 4000


def test_prices_only_ever_lead_to_fewer_scores():
    """At the same budget, a dearer score never turns best-of-N into a search."""
    methods = []
    for price in (0, 1, 3, 10, 30, 100):
        setting = Setting("best", 16.0, 20, 19, 20, float(price), False)
        methods.append(choose(setting, None).method)
    assert methods == sorted(methods, reverse=True)
    assert set(methods) == {"svdd", "best_of_n"}
