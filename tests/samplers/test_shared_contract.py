"""What the samplers owe beside their distribution: `Result.law`, events, partial results, seeds, proposals asked."""

import functools
import itertools
import math

import pytest
import torch
from exact import LIMIT, Linear, exact_chain, mixture_2d, worst, z_scores

import steer
from steer.core.event import Event
from steer.core.trajectory import StepRecord, Trajectory
from steer.results.result import Result

MIXTURE, REWARD, STEPS = mixture_2d(), Linear([0.7, -0.5]), 5
START = steer.pcnl(chains=2, burn_in=1, kept=2)
WEIGHTED = {
    "importance_sampling": steer.importance_sampling,
    "smc": steer.smc,
    "smc_guided": functools.partial(steer.smc, proposal=steer.guided(0.5)),
    "smc_pcnl": functools.partial(steer.smc, start=START),
    "smc_top_k": functools.partial(steer.smc, start=steer.top_k_of_n(20)),
    "fk_steering": steer.fk_steering,
    "tds": steer.tds,
    "das": steer.das,
    "psi": functools.partial(steer.psi, start=steer.pcnl(chains=2)),
    "waste_free": steer.waste_free,
    "particle_gibbs": functools.partial(steer.particle_gibbs, sweeps=2),
    "fkc": steer.fkc,
    "fkc_feynman_kac": functools.partial(steer.fkc, weight=steer.FeynmanKac()),
    "driftlite": steer.driftlite,
    "driftlite_refined": functools.partial(steer.driftlite, passes=2),
}
SAMPLERS = {"rollout": steer.rollout, **WEIGHTED}


def process(**options):
    return steer.models.gaussian_mixture(
        MIXTURE.means, MIXTURE.covs, MIXTURE.weights, steps=STEPS, dtype=torch.float64, **options
    )


@pytest.fixture(params=SAMPLERS)
def name(request):
    return request.param


@pytest.fixture
def sampler(name):
    return SAMPLERS[name]


# --- what weighted means estimate -------------------------------------------------------------------------------------


def test_law_is_said_by_the_sampler(sampler, name):
    result = sampler(process(), REWARD, particles=6)
    laws = {"rollout": "model", "smc_top_k": "none"}  # no weight corrects for the best of many draws
    assert result.law == laws.get(name, "target")
    assert result.draw(3).law == result.law  # equal weights, of the same distribution
    assert result.take(torch.tensor([[0, 2]])).law == "none"


@pytest.mark.parametrize("start", [START, steer.mala(chains=2), steer.ula(chains=2), steer.top_k_of_n(9)])
def test_a_rollout_from_another_start_is_of_no_known_distribution(start):
    """Nothing in it corrects for the start: it is neither the model's nor the target's."""
    assert steer.rollout(process(), REWARD, particles=6, start=start).law == "none"


# --- proposals --------------------------------------------------------------------------------------------------------


class Refusing:
    """A proposal that wants no gradient and raises when it is asked."""

    needs_gradient = False

    def __call__(self, state, model):
        raise ZeroDivisionError("asked")


def refusing(state, model):
    raise ZeroDivisionError("asked")


@pytest.mark.parametrize("proposal", [Refusing(), refusing], ids=["object", "function"])
@pytest.mark.parametrize("sampler", [steer.smc, steer.psi, steer.particle_gibbs, steer.waste_free])
def test_a_proposal_is_asked_at_every_step(sampler, proposal):
    with pytest.raises(ZeroDivisionError, match="asked"):
        sampler(process(), REWARD, particles=6, proposal=proposal)


def test_a_proposal_is_asked_wherever_noise_is_drawn_and_nowhere_else():
    levels = []

    def proposal(state, model):
        levels.append(state.k)
        return model

    plain = steer.smc(process(), REWARD, particles=6)
    assert torch.equal(steer.smc(process(), REWARD, particles=6, proposal=proposal).x, plain.x)
    assert levels == list(range(STEPS - 1))  # ancestral sampling ends without noise


def shifted(state, model):
    """Everything moves a little to the right: a proposal that needs nothing but the step itself."""
    return model.shift(0.25 * model.std * torch.ones_like(state.x))


def uncorrected(state, model):
    """The same steps, said to be the model's own: the mutant."""

    class Disguised:
        stochastic = True

        def sample(self, key):
            return shifted(state, model).sample(key)

        def log_prob(self, x):
            return model.log_prob(x)

    return Disguised()


@pytest.mark.parametrize(("proposal", "rejected"), [(shifted, False), (uncorrected, True)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_plain_function_is_a_proposal_and_weights_correct_for_it(proposal, rejected, temperature):
    """Against closed form, as in test_law: |z| < 4 over 1024 problems of 12 particles."""
    chain = exact_chain(MIXTURE, "vp", STEPS)
    result = steer.smc(chain, REWARD, batch=1024, particles=12, temperature=temperature, proposal=proposal, key=3)
    found, column = worst(z_scores(result, MIXTURE.exact(REWARD, temperature=temperature), MIXTURE))
    assert (found > LIMIT) == rejected, (column, found)


@pytest.mark.parametrize("sampler", [steer.smc, steer.psi, steer.particle_gibbs, steer.waste_free])
def test_guidance_of_scale_zero_is_bootstrap(sampler):
    own = sampler(process(), REWARD, particles=6, proposal=steer.bootstrap)
    for proposal in (steer.guided(0.0), steer.twisted(0.0)):
        zero = sampler(process(), REWARD, particles=6, proposal=proposal)
        for field in ("x", "log_weight", "log_evidence", "reward"):
            torch.testing.assert_close(getattr(zero, field), getattr(own, field), rtol=0, atol=0, equal_nan=True)
        assert zero.cost.grads == own.cost.grads


def test_guidance_of_scale_zero_needs_no_gradient():
    result = steer.smc(process(), lambda x: REWARD(x).tolist(), particles=6, proposal=steer.guided(0.0))
    assert result.cost.grads == 0


def test_a_proposal_that_forgot_to_say_that_it_needs_a_gradient_is_told():
    class Forgetful(steer.particles.proposals.Guided):
        needs_gradient = False

    with pytest.raises(steer.SteerError, match="needs_gradient that is True"):
        steer.smc(process(), REWARD, particles=6, proposal=Forgetful())


# --- particle Gibbs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_evidence_and_its_variance_are_of_the_same_sweep(sweeps):
    plain = steer.particle_gibbs(process(), REWARD, batch=3, particles=8, sweeps=1)
    tied = steer.particle_gibbs(process(), REWARD, batch=3, particles=8, sweeps=sweeps)
    assert torch.equal(tied.log_evidence, plain.log_evidence)
    assert torch.equal(tied.log_evidence_variance, plain.log_evidence_variance)
    assert bool(tied.log_evidence_variance.isfinite().all())


def test_evidence_and_its_variance_are_nan_together():
    first = steer.smc(process(), REWARD, batch=3, particles=8, keep_states=True)
    path = steer.draw_path(first.trajectory, 1)
    for sweeps in (1, 3):
        result = steer.particle_gibbs(process(), REWARD, batch=3, particles=8, sweeps=sweeps, path=path)
        assert bool(result.log_evidence.isnan().all())
        assert bool(result.log_evidence_variance.isnan().all())
    unknown = steer.smc(process(), REWARD, batch=3, particles=8, start=START)
    assert bool(unknown.log_evidence.isnan().all())
    assert bool(unknown.log_evidence_variance.isnan().all())


# --- errors -----------------------------------------------------------------------------------------------------------


class Breaking:
    """A reward that is NaN from its n-th call on."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, x):
        self.calls -= 1
        return REWARD(x) if self.calls > 0 else REWARD(x) * math.nan


def test_every_error_leaves_what_was_paid_for(sampler):
    """Whichever call gives NaN: in the start, at some step, at the end."""
    counted = Breaking(10**6)
    sampler(process(), counted, particles=6)
    total = 10**6 - counted.calls
    for call in sorted({1, 2, (total + 1) // 2, total - 1, total} & set(range(1, total + 1))):
        with pytest.raises(steer.NonFiniteError) as caught:
            sampler(process(), Breaking(call), particles=6)
        assert isinstance(caught.value.partial, Result | Trajectory), (call, total, caught.value)
        assert caught.value.partial.x.shape[2:] == (2,)


def test_a_reward_that_raises_leaves_what_was_paid_for(sampler):
    def reward(x):
        raise RuntimeError("server gone")

    with pytest.raises(steer.RewardError, match="server gone") as caught:
        sampler(process(), reward, particles=6)
    assert isinstance(caught.value.partial, Result | Trajectory)


# --- events -----------------------------------------------------------------------------------------------------------


def events_of(sampler, **options):
    events = []
    result = sampler(process(), REWARD, particles=12, batch=2, on_step=events.append, **options)
    return events, result


def test_events_have_the_same_fields_from_every_sampler(sampler, name):
    events, result = events_of(sampler)
    passes = {event.run: [e for e in events if e.run == event.run] for event in events}
    assert len(passes) == {"particle_gibbs": 2, "driftlite_refined": 2}.get(name, 1)
    for run, steps in passes.items():
        assert type(run) is str
        assert [event.level for event in steps] == list(range(1, STEPS + 1)), run  # levels start again in each
    for event in events:
        assert type(event) is Event
        assert type(event.state) is Trajectory
        assert event.state.x.shape == (2, result.x.shape[1], 2)
        assert event.level == event.state.k
        assert list(event.problems) == [0, 1]
        assert event.chunk == 0
        assert event.ess.shape == (2,)
        assert event.x0 is not None
        assert event.x0.shape == event.state.x.shape
        assert event.scores is None or event.scores.shape == event.state.log_weight.shape
    assert (name == "rollout") == all(event.scores is None for event in events) or name == "importance_sampling"


def test_event_costs_count_up(sampler, name):
    events, result = events_of(sampler)
    for field in ("nfe", "rewards", "grads"):
        spent = [getattr(event.cost, field) for event in events]
        assert spent == sorted(spent)
        assert 0 <= spent[0] <= spent[-1] <= getattr(result.cost, field)
    network = [event.cost.nfe for event in events]
    for before, after in itertools.pairwise(events):
        # Feynman-Kac weights count the reward up to the state reached, whose prediction is thus made at once: the last
        # step, which needs no more than that, is the one without a call.
        ahead = after.level == STEPS and name in ("fkc_feynman_kac", "driftlite", "driftlite_refined")
        assert (before.cost.nfe == after.cost.nfe) if ahead else (before.cost.nfe < after.cost.nfe)
    if name != "waste_free":  # its moves of finished samples come after the last step
        assert network[-1] == result.cost.nfe


SHARP = {"temperature": 0.2, "selection": steer.resample(threshold=1.0)}
RESAMPLING = {
    "smc": functools.partial(steer.smc, **SHARP),
    "smc_guided": functools.partial(steer.smc, proposal=steer.guided(0.5), **SHARP),
    "das": functools.partial(steer.das, **SHARP),
    "fkc": functools.partial(steer.fkc, **SHARP),
    "fkc_birth_death": functools.partial(steer.fkc, selection=steer.birth_death(), transport=steer.base_transport),
    "driftlite": functools.partial(steer.driftlite, **SHARP),
    "particle_gibbs": functools.partial(steer.particle_gibbs, sweeps=2, threshold=1.0, temperature=0.2),
}


@pytest.mark.parametrize("method", RESAMPLING)
def test_predictions_and_scores_of_events_belong_to_their_particles(method):
    """x0 is the prediction of the state that was stepped from, after its resampling, and scores are its rewards."""
    events, _ = events_of(RESAMPLING[method], keep_states=True)
    moved = 0
    for event in events:
        last = event.state.past[-1]
        assert isinstance(last, StepRecord)
        x0 = event.state.process.denoise(last.x, last.k)
        torch.testing.assert_close(event.x0, x0, rtol=1e-9, atol=1e-9)
        if event.scores is not None:
            again = REWARD(event.x0.flatten(0, 1)).view(event.scores.shape)
            torch.testing.assert_close(event.scores, again, rtol=1e-9, atol=1e-9)
        moved += int((event.state.root != torch.arange(12)).sum())
    assert moved > 0


def test_scores_of_events_are_those_of_moved_paths():
    events, _ = events_of(functools.partial(steer.waste_free, levels=[1, 3]))
    for event in events[:-1]:
        again = REWARD(event.x0.flatten(0, 1)).view(event.scores.shape)
        torch.testing.assert_close(event.scores, again, rtol=1e-9, atol=1e-9)


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_seed_is_another_name_for_key(sampler):
    by_key, by_seed = sampler(process(), REWARD, particles=6, key=7), sampler(process(), REWARD, particles=6, seed=7)
    for field in ("x", "reward", "log_weight", "root"):
        assert torch.equal(getattr(by_key, field), getattr(by_seed, field)), field
    assert not torch.equal(by_key.x, sampler(process(), REWARD, particles=6).x)
    with pytest.raises(steer.SteerError, match="give one of them"):
        sampler(process(), REWARD, particles=6, key=7, seed=8)
