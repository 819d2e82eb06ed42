"""A temperature that is chosen: the run is that of the number, the pilot is paid for, the ESS is what was asked for."""

import dataclasses
import functools
import math

import pytest
import torch
from exact import Linear
from test_contract import mixture_process

import steer
from steer import search
from steer.core.tilt import Tilt
from steer.errors import BudgetError, SteerError

REWARD = Linear([0.7, -0.5])
ROWS = 5  # of a chain
SAMPLERS = {
    name: getattr(steer, name)
    for name in ("smc", "fk_steering", "tds", "das", "fkc", "waste_free", "importance_sampling", "particle_gibbs")
}
SAMPLERS |= {"psi": functools.partial(steer.psi, start=steer.pcnl(chains=2))}
SAMPLERS |= {"driftlite": functools.partial(steer.driftlite, look_ahead=steer.at_state())}
SAMPLERS |= {"driftlite_passes": functools.partial(steer.driftlite, look_ahead=steer.at_state(), passes=2)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_run_is_that_of_the_number(name):
    """To the last bit, by every sampler of a distribution; the pilot comes on top, in events too."""
    events = []
    run = SAMPLERS[name](mixture_process(), REWARD, ess=0.5, particles=6, key=3, on_step=events.append)
    choice = run.temperature_choice
    given = SAMPLERS[name](mixture_process(), REWARD, temperature=run.temperature, particles=6, key=3)
    assert torch.equal(run.x, given.x)
    assert torch.equal(run.log_weight, given.log_weight)
    assert torch.equal(run.log_evidence, given.log_evidence) or run.log_evidence.isnan().all()
    assert run.made_by == given.made_by
    assert (choice.temperature, choice.asked, choice.samples) == (run.temperature, "ess=0.5", 96)
    assert choice.rows == run.cost.nfe - given.cost.nfe == 96 * ROWS
    assert run.cost.rewards - given.cost.rewards == 96
    assert events[0].cost.nfe > choice.rows
    assert events[-1].cost.nfe <= run.cost.nfe
    assert given.temperature_choice is None
    assert f"temperature {run.temperature:.3g} for ess=0.5" in repr(run)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pilot_and_run_keep_the_budget(name):
    run = SAMPLERS[name](mixture_process(), REWARD, kl=0.5, budget=400, key=1)
    assert run.cost.nfe <= 400
    assert run.temperature_choice.rows == 100  # a quarter of it: 20 samples in place of 66
    assert run.temperature_choice.kl == pytest.approx(0.5, rel=0.02)


def test_auto_is_half():
    auto, half = (steer.smc(mixture_process(), REWARD, key=2, **ask) for ask in ({"temperature": "auto"}, {"ess": 0.5}))
    assert torch.equal(auto.x, half.x)
    assert auto.temperature_choice == half.temperature_choice
    again = steer.sample(mixture_process(), REWARD, method="smc", temperature="auto", key=2)
    assert torch.equal(auto.x, again.x)
    assert steer.smc(mixture_process(), REWARD, temperature="auto", ess=0.8).temperature > auto.temperature


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ess": 0.5, "kl": 1.0}, "give one of the three"),
        ({"ess": 0.5, "temperature": 0.1}, "give one of the three"),
        ({"ess": 1.0}, r"share of the samples, in \(0, 1\), got 1"),
        ({"ess": 20}, r"share of the samples, in \(0, 1\), got 20"),
        ({"kl": 0.0}, "in nats and positive"),
        ({"kl": math.inf}, "in nats and positive"),
        ({"temperature": "cold"}, "must be positive .* got 'cold'"),
        ({"temperature": "auto", "reward": lambda x: 0.0 * x[:, 0]}, "all 96 unsteered samples score 0"),
        ({"temperature": "auto", "reward": lambda x: x[:, 0] - math.inf}, "forbids .-inf. all 96"),
    ],
)
def test_what_cannot_be_asked(options, message):
    options = {"reward": REWARD} | options
    with pytest.raises(SteerError, match=message):
        steer.smc(mixture_process(), **options)


def test_a_budget_that_pays_for_no_pilot():
    with pytest.raises(BudgetError, match=r"budget of 60 .* pays for 3 samples .* raise the budget to 80"):
        steer.smc(mixture_process(), REWARD, ess=0.5, budget=60)
    assert steer.smc(mixture_process(), REWARD, ess=0.5, budget=80).temperature_choice.samples == 4


@pytest.mark.parametrize("method", [search.best_of_n, search.dts_star, search.dts, steer.rollout])
def test_methods_that_sample_no_such_distribution_say_so(method):
    with pytest.raises(SteerError, match=r"temperature divides rewards .* positive .* got 'auto'; samplers of"):
        method(mixture_process(), REWARD, budget=80, temperature="auto")


def test_without_a_reward_there_is_nothing_to_divide():
    with pytest.raises(SteerError, match="there is none"):
        steer.fkc(mixture_process(), exponent=2.0, ess=0.5)


def test_repetitions_share_the_pilot_and_prompts_do_not():
    """Of one problem, all samples are pooled; of several, the ESS is a mean over them."""
    shared = steer.smc(mixture_process(), REWARD, ess=0.5, batch=6, particles=4).temperature_choice
    assert (shared.samples, shared.rows) == (96, 16 * ROWS)
    two = dataclasses.replace(mixture_process(), problems=2, prompts=("mild", "wild"))

    def score(x, prompts):
        return x[:, 0] * torch.tensor([1.0 if prompt == "mild" else 5.0 for prompt in prompts])

    prompts = steer.smc(two, score, ess=0.7, particles=3).temperature_choice
    assert (prompts.samples, prompts.rows) == (49, 49 * ROWS)
    pilot = steer.rollout(two, score, particles=49, key=steer.Key(0).fold("pilot")).reward
    assert prompts.temperature == Tilt.of(pilot).temperature(ess=0.7)
    assert prompts.temperature != Tilt.of(pilot, pooled=True).temperature(ess=0.7)


def test_a_composite_is_asked_as_itself(monkeypatch):
    """q^2 of a standard normal is N(0, 1/2), where x^2 has mean 1/2: by a pilot of 400 samples, within four of its
    standard errors. Mutant: a pilot of plain chains, by which the mean is 1."""
    monkeypatch.setattr("steer.core.temperature._SAMPLES", (400, 400))
    gaussian = steer.models.gaussian([0.0], 1.0, steps=25)

    def z(method, **options):
        found = method(gaussian, lambda x: x[:, 0] ** 2, kl=0.1, particles=8, **options).temperature_choice
        assert found.samples == 400
        return (found.unsteered - 0.5) / found.unsteered_error

    assert abs(z(steer.fkc, exponent=2.0)) < 4.0
    assert abs(z(steer.smc)) > 4.0


@pytest.mark.parametrize("ess", [0.8, 0.5, 0.25])
def test_the_ess_is_the_one_asked_for(ess):
    """Within a factor 1.5 for each of 12 keys, and without a bias that four standard errors show, by 4,096 samples
    (whose own error is 2 %). Mutant: half the temperature."""
    process = mixture_process()
    truth = Tilt.of(steer.rollout(process, REWARD, particles=4096, key=99).reward)
    chosen = [steer.smc(process, REWARD, ess=ess, particles=8, key=key).temperature for key in range(12)]
    off = torch.tensor([math.log(truth.ess(temperature) / ess) for temperature in chosen])
    assert off.abs().max() < math.log(1.5)
    assert abs(float(off.mean())) < 4.0 * float(off.std()) / math.sqrt(12)
    mutant = torch.tensor([math.log(truth.ess(0.5 * temperature) / ess) for temperature in chosen])
    assert abs(float(mutant.mean())) > 4.0 * float(mutant.std()) / math.sqrt(12)


def test_large_pilots_go_in_chunks_of_the_same_samples(monkeypatch):
    whole = steer.smc(mixture_process(), REWARD, ess=0.5, particles=2).temperature_choice
    monkeypatch.setattr("steer.core.temperature._CHUNK", 7)
    parts = steer.smc(mixture_process(), REWARD, ess=0.5, particles=2).temperature_choice
    assert parts.unsteered == pytest.approx(whole.unsteered, rel=1e-5)
    assert parts.rows == whole.rows


def test_it_is_saved_with_the_run(tmp_path):
    run = steer.smc(mixture_process(), REWARD, ess=0.5, particles=4)
    run.save(tmp_path)
    saved = steer.load_run(tmp_path)
    assert saved.result(mixture_process()).temperature_choice == run.temperature_choice
    given = steer.smc(mixture_process(), REWARD, temperature=2.0, particles=4)
    given.save(tmp_path)
    assert steer.load_run(tmp_path).result(mixture_process()).temperature_choice is None


def test_a_resumable_run_replays_its_pilot(tmp_path):
    first = steer.sample(mixture_process(), REWARD, ess=0.5, journal=tmp_path, key=4)
    again = steer.sample(mixture_process(), REWARD, ess=0.5, journal=tmp_path, key=4)
    assert again.temperature_choice == first.temperature_choice
    assert again.cost.nfe == first.cost.nfe


class Ranked:
    """A reward that scores a sample against the others."""

    spec = steer.types.RewardSpec(scope="groupwise")

    def __call__(self, x):
        return x[:, 0].double()


class WithoutGradient(Ranked):
    """A reward that says that it has no gradient."""

    spec = steer.types.RewardSpec(gradient="none")


def refusals(name):
    """Arguments by which a run must be refused: what is wrong -> (error, process, reward, options)."""
    process, other = mixture_process(), mixture_process().with_rule(steer.ddim(0.0))
    weighted = name.startswith(("fkc", "driftlite"))  # by the noise of the weighted SDE, not by that of the rule
    no_noise = (process, {"noise": 0.0}) if weighted else (other, {})
    gibbs = name == "particle_gibbs"
    found = {
        "groupwise": (steer.RewardError, process, Ranked(), {}),
        "nothing": (steer.RewardError, process, "clip", {}),
        "particles": (SteerError, process, REWARD, {"particles": 0}),
        "events": (TypeError, process, REWARD, {"on_step": 5}),
        "both keys": (SteerError, process, REWARD, {"key": 1, "seed": 2}),
        "batch": (SteerError, process, REWARD, {"batch": 0}),
        "budget": (BudgetError, process, REWARD, {"budget": 80, "particles": 16}),
        "two temperatures": (SteerError, process, REWARD, {"ess": 0.5, "kl": 1.0}),
    }
    if name not in ("importance_sampling", "waste_free"):  # which never resample, and whose copies are moved
        found["deterministic"] = (steer.NotStochasticError, no_noise[0], REWARD, no_noise[1])
    if name in ("tds", "das", "psi", "driftlite", "driftlite_passes"):
        found["no gradient"] = (steer.NotDifferentiableError, process, WithoutGradient(), {})
    if name not in ("psi", "driftlite", "driftlite_passes") and not gibbs:
        few = steer.top_k_of_n(2)
        found["start"] = (SteerError, process, REWARD, {"start": few, "particles": 6})
        found["start without gradient"] = (steer.NotDifferentiableError, process, WithoutGradient(), {"start": MCMC})
    if name == "smc":
        late = {"selection": steer.resample(moves=steer.path_moves([5])), "weight": steer.maximum()}
        found["moves"] = (SteerError, process, REWARD, late)
        found["moves, states kept"] = (SteerError, process, REWARD, {**late, "weight": None, "keep_states": True})
        ended = steer.smc(process, REWARD, particles=4).trajectory
        found["an ended trajectory"] = (SteerError, process, REWARD, {"start": ended})
    if name == "waste_free":
        found["levels"] = (SteerError, process, REWARD, {"levels": [4]})
    if name in ("smc", "particle_gibbs", "waste_free", "psi"):
        found["tokens"] = (steer.StateSpaceError, letters(), tokens, {"proposal": steer.guided()})
        hooks = steer.follow(steer.dps(REWARD, 0.1))
        found["tokens by hooks"] = (steer.StateSpaceError, letters(), tokens, {"proposal": hooks})
    return found


MCMC = steer.pcnl(chains=2, burn_in=1, kept=1)


def letters():
    chain = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    return steer.models.markov_language([0.5, 0.5], chain, 3)


def tokens(x):
    return x.double().sum(1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_arguments_tell_is_refused_before_the_pilot_is_paid(name):
    from killed_runs import Paid

    for what, (error, process, reward, options) in refusals(name).items():
        paid = Paid(process)
        with pytest.raises(error):
            SAMPLERS[name](paid.process, reward, **{"temperature": "auto", **options})
        assert paid.calls == 0, what
