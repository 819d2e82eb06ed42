"""Equivalences of the particle loop, its bookkeeping, and its errors."""

import math

import pytest
import torch
from exact import Linear, exact_chain, mixture_2d

import steer
from steer import search
from steer.core.resampling import systematic
from steer.particles.proposals import TemperedGuided, twisted

REWARD = Linear([0.7, -0.5])
MIXTURE = mixture_2d()


def process(steps=6, dtype=torch.float32, **options):
    return steer.models.gaussian_mixture(
        MIXTURE.means, MIXTURE.covs, MIXTURE.weights, steps=steps, dtype=dtype, **options
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("proposal", [steer.bootstrap, steer.guided(1.0)])
def test_infinite_temperature_is_the_rollout_bitwise(batch, proposal):
    plain = steer.rollout(process(), REWARD, batch=batch, particles=5, key=1)
    steered = steer.smc(
        process(), REWARD, batch=batch, particles=5, key=1, temperature=math.inf, proposal=proposal,
        selection=steer.resample(threshold=1.0),
    )  # fmt: skip
    assert torch.equal(steered.x, plain.x)
    assert torch.equal(steered.log_weight, plain.log_weight)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weight", [steer.difference(), steer.maximum(), steer.total()])
def test_one_particle_is_the_rollout_bitwise(batch, weight):
    plain = steer.rollout(process(), REWARD, batch=batch, particles=1, key=1)
    assert torch.equal(steer.smc(process(), REWARD, batch=batch, particles=1, key=1, weight=weight).x, plain.x)


def test_deciding_per_problem_equals_deciding_by_branch():
    """A lone problem is resampled by branch, several by torch.where: the same law, the same particles."""
    options = {"particles": 16, "key": 1, "temperature": 0.3}
    alone = steer.smc(process(dtype=torch.float64), REWARD, **options)
    among = steer.smc(process(dtype=torch.float64), REWARD, batch=2, **options)
    assert int(alone.trajectory.resamplings()[0]) > 0
    torch.testing.assert_close(among.x[:1], alone.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(among.log_weight[:1], alone.log_weight, rtol=1e-9, atol=1e-9)
    assert int(among.trajectory.resamplings()[0]) == int(alone.trajectory.resamplings()[0])


def test_smc_written_out_by_hand():
    """The loop against twenty lines of textbook: difference potentials, resampling at every level, one problem."""
    model, particles, key = exact_chain(MIXTURE, "vp", 4), 6, steer.Key(2)
    x = model.prior(key.fold("prior"), 1, particles)
    log_weight = spent = torch.zeros(1, particles, dtype=torch.float64)
    evidence = 0.0
    for k in range(4):
        x0 = model.denoise(x, k)
        if k < 3:
            value = REWARD(x0[0])[None]
            log_weight = log_weight + value - spent
            ancestors = systematic(log_weight, key.fold("resample").at(k), particles)
            evidence = evidence + log_weight.exp().mean().log()
            x, x0, spent = x[:, ancestors[0]], x0[:, ancestors[0]], value[:, ancestors[0]]
            log_weight = torch.zeros_like(log_weight)
        x = model.transition(x, x0, k).sample(key.fold("step").at(k))
    log_weight = REWARD(x[0])[None] - spent
    result = steer.smc(model, REWARD, particles=particles, key=key, selection=steer.resample(threshold=1.0))
    torch.testing.assert_close(result.x, x)
    torch.testing.assert_close(result.log_weight, log_weight - log_weight.logsumexp(1))
    torch.testing.assert_close(result.log_evidence, (evidence + log_weight.exp().mean().log())[None])


def test_a_run_can_go_on_from_where_it_stood():
    """Stopped after three steps and continued from the trajectory: the same samples, bitwise."""
    events = []
    whole = steer.smc(process(), REWARD, particles=8, key=3, on_step=events.append)
    resumed = steer.smc(process(), REWARD, key=3, start=events[2].state)
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.log_weight, whole.log_weight)
    assert torch.equal(resumed.log_evidence, whole.log_evidence)
    assert resumed.cost.nfe == 8 * 3


def test_the_evidence_variance_estimate_is_returned():
    result = steer.smc(process(), REWARD, particles=64, key=1, batch=64)
    spread = (result.log_evidence - result.log_evidence.mean()).square().mean()
    estimate = result.log_evidence_variance.mean()
    assert 0.3 < estimate / spread < 3.0


def test_states_and_densities_along_lineages():
    result = steer.smc(process(), REWARD, particles=8, key=1, keep_states=True, selection=steer.resample(threshold=1.0))
    states, steps = result.trajectory.states(), result.trajectory.transitions()
    assert states.shape == (1, 8, 7, 2)
    assert torch.equal(states[:, :, -1], result.x)
    assert [k for k, *_ in steps] == list(range(6))
    for i, (k, before, after, log_prob, log_behaviour) in enumerate(steps):
        assert torch.equal(before, states[:, :, i])
        assert torch.equal(after, states[:, :, i + 1])
        if k == 5:
            assert log_prob is None  # the last step adds no noise
            continue
        law = process().transition(before, process().denoise(before, k), k)
        torch.testing.assert_close(log_prob, law.log_prob(after))
        assert torch.equal(log_prob, log_behaviour)


def test_guided_steps_remember_both_densities():
    result = steer.smc(process(), REWARD, particles=4, key=1, keep_states=True, proposal=steer.guided(1.0))
    for k, _, _, log_prob, log_behaviour in result.trajectory.transitions()[:-1]:
        assert not torch.equal(log_prob, log_behaviour), k


def test_a_deterministic_process_is_refused_with_the_cure():
    with pytest.raises(steer.NotStochasticError, match=r"steer.ddim\(eta=1.0\)"):
        steer.smc(process(transition=steer.ode()), REWARD, particles=4)
    unweighted = steer.smc(process(transition=steer.ode()), REWARD, particles=4, selection=steer.resample(threshold=0))
    assert bool(unweighted.log_weight.isfinite().all())


def test_guidance_without_a_gradient_is_refused():
    for reward in (lambda x: REWARD(x.detach()), lambda x: REWARD(x).tolist()):
        with pytest.raises(steer.NotDifferentiableError, match="default proposal, and its default start"):
            steer.smc(process(), reward, particles=4, proposal=steer.guided())


def test_a_problem_without_allowed_samples_collapses_by_name():
    def forbid_second(x):
        scores = REWARD(x)
        return torch.where(torch.arange(len(x)) >= 4, -torch.inf, scores)

    with pytest.raises(steer.CollapsedWeightsError, match="problem 1") as caught:
        steer.smc(process(), forbid_second, particles=4, batch=2)
    assert caught.value.partial.x.shape == (2, 4, 2)
    with pytest.raises(steer.CollapsedWeightsError, match="problem 0"):
        steer.smc(process(), lambda x: torch.full((len(x),), -torch.inf), particles=4)


def test_errors_keep_what_was_paid_for():
    calls = []

    def breaks_later(x):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("server gone")
        return REWARD(x)

    with pytest.raises(steer.RewardError, match="server gone") as caught:
        steer.smc(process(), breaks_later, particles=4)
    partial = caught.value.partial
    assert partial.k == 3
    resumed, whole = steer.smc(process(), REWARD, start=partial), steer.smc(process(), REWARD, particles=4)
    assert torch.equal(resumed.x, whole.x)
    assert torch.equal(resumed.log_evidence, whole.log_evidence)


def test_an_interrupt_from_the_keyboard_is_a_result():
    def reward(x):
        reward.calls += 1
        if reward.calls == 3:
            raise KeyboardInterrupt
        return REWARD(x)

    reward.calls = 0
    result = steer.smc(process(), reward, particles=4)
    assert result.interrupted
    assert result.x.shape == (1, 4, 2)


def test_large_rewards_do_not_tie_or_overflow():
    """Rewards of thousands of nats: the best survives, nothing is clamped."""
    result = steer.smc(process(), lambda x: 1e4 * REWARD(x), particles=16, key=1)
    assert bool(result.log_evidence.isfinite().all())
    assert result.log_weight.argmax() == result.reward.argmax()


def test_prompts_reach_rewards_that_ask():
    import dataclasses

    seen = []

    def reward(x, prompts):
        seen.append(list(prompts))
        return REWARD(x)

    conditioned = dataclasses.replace(process(), problems=2, prompts=("a cat", "a dog"))
    result = steer.smc(conditioned, reward, particles=2)
    assert result.x.shape == (2, 2, 2)
    assert seen[0] == ["a cat", "a cat", "a dog", "a dog"]
    with pytest.raises(steer.RewardError, match="asks for prompts"):
        steer.smc(process(), reward, particles=2)
    steer.smc(process(), lambda x, *, prompts=None: REWARD(x), particles=2)  # may, and need not, have them
    with pytest.raises(steer.ShapeError, match="conditioned on 2"):
        steer.smc(conditioned, reward, particles=2, batch=3)


@pytest.mark.parametrize("method", [steer.smc, steer.rollout, search.best_of_n, steer.importance_sampling])
def test_a_start_that_spends_rows_is_paid_from_the_budget(method):
    start = steer.pcnl(chains=2, burn_in=3, kept=4, x0_predictor=lambda x: 0.8 * x)
    result = method(process(), REWARD, budget=100, start=start, key=1)
    assert result.cost.nfe <= 100
    assert result.x.shape[1] == (100 - 2 * (1 + 3 + 4)) // 6


def test_every_level_of_a_run_can_be_gone_on_from_but_its_end_cannot():
    at, chain = {}, process()
    whole = steer.smc(chain, REWARD, particles=8, on_step=lambda event: at.__setitem__(event.level, event.state))
    for k, state in at.items():
        if k < chain.steps:
            assert torch.equal(steer.smc(chain, REWARD, start=state).log_weight, whole.log_weight), k

    def stop(event):
        if event.level == 3:
            raise steer.Stop

    for ended in (whole, steer.smc(chain, REWARD, particles=8, on_step=stop), steer.fkc(chain, REWARD, particles=8)):
        for sampler in (steer.smc, steer.fkc):
            with pytest.raises(steer.SteerError, match="a run's end"):
                sampler(chain, REWARD, start=ended.trajectory)


@pytest.mark.parametrize("sampler", [steer.smc, steer.fkc])
def test_a_trajectory_has_its_own_numbers_and_a_price(sampler):
    chain = process()
    begun = steer.Trajectory.begin(chain, chain.prior(steer.Key(1), 1, 50), k=2)
    price = sampler(chain, REWARD, start=begun).cost.nfe
    assert sampler(chain, REWARD, start=begun, budget=price).cost.nfe == price == 50 * 4
    with pytest.raises(steer.BudgetError, match=f"takes {price} network rows"):
        sampler(chain, REWARD, start=begun, budget=price - 1)
    for options in ({"particles": 3}, {"batch": 3}):
        with pytest.raises(steer.SteerError, match="its own numbers"):
            sampler(chain, REWARD, start=begun, **options)
    three = steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), 6, event=(2,), problems=3)
    with pytest.raises(steer.ShapeError, match="3 problem"):
        sampler(three, REWARD, start=steer.Trajectory.begin(three, torch.zeros(2, 4, 2)))


def test_a_rollout_whose_start_finds_only_what_is_forbidden_says_so():
    with pytest.raises(steer.CollapsedWeightsError):
        steer.rollout(
            process(), lambda x: torch.where(x[:, 0] > 50.0, x[:, 0], -torch.inf), particles=4,
            start=steer.pcnl(chains=2, burn_in=1, kept=1),
        )  # fmt: skip


def test_feynman_kac_weights_name_what_they_cannot_take():
    with pytest.raises(steer.NonFiniteError, match=r"forbids \(-inf\) a prediction"):
        steer.driftlite(process(), lambda x: torch.where(x[:, 0] > 0.5, x[:, 0], -torch.inf), particles=64)


PROPOSALS = {
    "guided": (steer.guided(0.5), steer.guided(0.5)),
    "twisted": (twisted(0.5), twisted(0.5)),
    "guided as the next level judges": (
        TemperedGuided(steer.geometric_tempering(1e-12, lowest=0.5), 0.5),
        steer.guided(0.5),
    ),
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_a_constant_exponent_is_a_smaller_reward(name):
    """On the way, a value tempered by a half is half the value, in the proposal as in the weights: to rounding."""

    def states(reward, **tempering):
        seen = []
        steer.smc(
            process(dtype=torch.float64), reward, batch=2, particles=5, selection=steer.resample(threshold=0.0),
            on_step=lambda event: seen.append(event.state), **tempering,
        )  # fmt: skip
        return seen[:5]

    half = steer.difference(tempering=lambda state, value: torch.full_like(value[:, 0], 0.5))
    tempered, smaller = PROPOSALS[name]
    pairs = zip(
        states(REWARD, weight=half, proposal=tempered), states(lambda x: 0.5 * REWARD(x), proposal=smaller), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.x, theirs.x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.log_weight, theirs.log_weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight", [steer.maximum(), steer.total()], ids=["maximum", "total"])
def test_potentials_are_of_the_highest_value_or_the_sum_so_far(weight):
    seen = []
    steer.smc(
        process(steps=9), REWARD, particles=40, temperature=0.5, weight=weight, on_step=seen.append,
        selection=steer.resample(threshold=0.0),
    )  # fmt: skip
    values = torch.stack([event.scores[0] / 0.5 for event in seen[:8]])
    assert bool((values[1:] < values[:-1]).any())  # the latest value is not always the highest
    potential = values.cumsum(0) if weight.combine.__qualname__.startswith("total") else values.cummax(0).values
    found = torch.stack([event.state.path.log_potential[0] for event in seen[:8]])
    torch.testing.assert_close(found, potential.cumsum(0))
