"""Policy gradients take rows of the policy, or rows whose weights turn them into such, and refuse all others."""

import dataclasses
import functools

import pytest
import torch
from exact import LIMIT, Linear, z

import steer
from steer import grpo, search

GROUPS, ROWS, TEMPERATURE = 100, 64, 1.5
REWARD = Linear([1.0])
# A Gaussian policy of mean 0 with little noise on the way, so that the initial noise decides most of the sample.
POLICY = steer.models.gaussian(
    [0.0], [[0.75]], schedule=steer.RectifiedFlow(), steps=6, transition=steer.ddim(0.3)
)  # fmt: skip
CHAINS = {"chains": 16, "burn_in": 20, "kept": 48, "x0_predictor": lambda x: 0.75**0.5 * x}
WEIGHTED = {
    "pcnl": steer.pcnl(step_size=0.5, **CHAINS),
    "mala": steer.mala(step_size=0.3, **CHAINS),
}
BIASED = {
    "ula": steer.ula(step_size=0.3, **CHAINS),
    "top_k_of_n": steer.top_k_of_n(3 * ROWS, x0_predictor=CHAINS["x0_predictor"]),
    "from_latents": steer.from_latents(1.0 + steer.Key(1).normal((4 * ROWS, 1), dtype=torch.float32)),
}


def collected(method, *, groups=4, **options):
    return grpo.collect(POLICY, REWARD, groups=groups, group_size=ROWS, method=method, **options)


def policy_mean(batch):
    """Mean of x0 by the weights back to the policy, of each group: 0 for the policy."""
    x, weight = batch.x0.double().view(-1, ROWS), batch.weights().double().view(-1, ROWS)
    return (weight * x).mean(1)


# --- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [*WEIGHTED, *BIASED])
def test_a_rollout_from_another_start_is_no_policy_gradient(start):
    method = functools.partial(steer.rollout, start=(WEIGHTED | BIASED)[start])
    with pytest.raises(steer.NotStochasticError, match=r"no weight corrects.*steer\.smc, start=steer\.pcnl") as caught:
        collected(method)
    assert caught.value.partial.law == "none"
    for options in ({"law": "none"}, {"objective": "tilted_sft"}):
        batch = collected(method, **options)
        assert batch.objective == "tilted_sft"
        assert batch.log_w_base.isnan().all()
        with pytest.raises(steer.NotStochasticError, match="SFT, DPO or reward-weighted"):
            grpo.advantages(batch)


@pytest.mark.parametrize("method", [steer.smc, steer.fk_steering, steer.importance_sampling], ids=lambda m: m.__name__)
@pytest.mark.parametrize("start", BIASED)
def test_no_weight_corrects_a_biased_start(method, start):
    with pytest.raises(steer.NotStochasticError, match="no weight corrects"):
        collected(functools.partial(method, start=BIASED[start]), temperature=TEMPERATURE)


def test_what_is_resumed_from_a_biased_start_stays_biased():
    states = []
    process = POLICY.with_rule(steer.ddim(0.9))
    run = functools.partial(steer.smc, process, REWARD, batch=2, particles=8)
    run(start=BIASED["top_k_of_n"], on_step=lambda event: states.append(event.state))
    assert steer.smc(process, REWARD, start=states[2]).law == "none"
    run(on_step=lambda event: states.append(event.state))
    assert steer.smc(process, REWARD, start=states[-3]).law == "target"


def test_a_tree_from_chosen_latents_is_refused():
    with pytest.raises(steer.NotStochasticError, match="no weight corrects"):
        collected(functools.partial(search.dts, start=BIASED["from_latents"]), temperature=4.0)


@pytest.mark.parametrize("start", WEIGHTED)
def test_weights_correct_for_an_exact_start(start):
    """The policy's mean, from particles that begin in the tilted prior: their log-potential is in the weights."""
    options = {"groups": GROUPS, "temperature": TEMPERATURE, "key": 3, "objective": "tilted_sft"}
    batch = collected(functools.partial(steer.smc, start=WEIGHTED[start]), **options)
    assert abs(z(policy_mean(batch))) < LIMIT
    assert float(policy_mean(batch).std()) / GROUPS**0.5 < 0.02  # the standard error that this is within
    assert float(batch.x0.mean()) > 0.3
    assert collected(functools.partial(steer.smc, start=WEIGHTED[start]), temperature=TEMPERATURE).objective == (
        "policy_gradient"
    )

    def forgetful(process, objective, key, batch, particles):
        """A mutant: the same particles, without what their start has multiplied into them."""
        ready, _ = WEIGHTED[start].prepare(process, TEMPERATURE)
        return ready(process, objective, key, batch, particles).with_path_state(log_potential=None)

    mutant = collected(functools.partial(steer.smc, start=forgetful), **options)
    assert (mutant.x0 - batch.x0).abs().mean() < 0.5  # the same particles, more or less
    assert z(policy_mean(mutant)) > 3 * LIMIT


# --- methods of your own ----------------------------------------------------------------------------------------------


def without_a_law(process, reward, *, batch, particles, temperature, key, keep_states):
    """A sampler that does not say what it samples."""
    result = steer.smc(
        process, reward, batch=batch, particles=particles, temperature=temperature, key=key, keep_states=keep_states
    )
    names = [f.name for f in dataclasses.fields(steer.Result) if f.name != "law"]
    return steer.Result(**{name: getattr(result, name) for name in names})


def test_a_method_must_say_what_it_samples():
    with pytest.raises(steer.NotStochasticError, match=r'declare it by law="target" or law="model"'):
        collected(without_a_law, temperature=2.0)
    declared = collected(without_a_law, temperature=2.0, law="target")
    known = collected(steer.smc, temperature=2.0)
    assert declared.objective == "policy_gradient"
    assert (declared.log_w_base == known.log_w_base).all()


def test_what_is_declared_is_not_questioned():
    method = functools.partial(steer.rollout, start=WEIGHTED["pcnl"])
    batch = collected(method, law="model", temperature=TEMPERATURE, groups=GROUPS)
    assert batch.objective == "policy_gradient"
    assert (batch.weights() == 1.0).all()
    assert z(policy_mean(batch)) > 5 * LIMIT  # which is why it is refused where nobody vouches for it
    assert collected(steer.smc, law="none", temperature=2.0).log_w_base.isnan().all()
    with pytest.raises(steer.SteerError, match="law is one of None, 'target', 'model', 'none', got 'base'"):
        collected(steer.smc, law="base")
    with pytest.raises(steer.SteerError, match="objective is one of 'policy_gradient', 'tilted_sft'"):
        collected(steer.smc, objective="sft")


def test_a_partial_of_psi_is_weighted():
    method = functools.partial(steer.psi, start=WEIGHTED["pcnl"], proposal=steer.bootstrap)
    assert collected(method, temperature=2.0).objective == "policy_gradient"


@pytest.mark.parametrize("base", [steer.smc, search.dts], ids=lambda m: m.__name__)
def test_samples_that_were_picked_from_a_result_have_no_weight(base):
    """Not even steps: a tree's belong to its leaves, in their order."""

    def best_first(*args, keep_states, **options):
        result = base(*args, keep_states=keep_states, **options)
        return result.take(result.ranked())

    batch = collected(best_first, temperature=2.0)
    assert batch.objective == "tilted_sft"
    assert batch.mask.shape == (4 * ROWS, 0)
    for use in (grpo.advantages, grpo.RolloutBatch.weights, grpo.RolloutBatch.step_weights):
        with pytest.raises(steer.NotStochasticError, match="no weight corrects"):
            use(batch)
    with pytest.raises(steer.SteerError, match="stored not all"):
        collected(best_first, temperature=2.0, law="target")


@pytest.mark.parametrize("base", [steer.smc, search.dts], ids=lambda m: m.__name__)
def test_samples_that_were_drawn_from_a_result_have_weights_and_no_steps(base):
    def drawn(*args, keep_states, **options):
        return base(*args, keep_states=keep_states, **options).draw(ROWS)

    with pytest.raises(steer.SteerError, match="stored not all"):
        collected(drawn, temperature=2.0)
    batch = collected(drawn, temperature=TEMPERATURE, objective="tilted_sft", groups=GROUPS)
    assert not batch.mask.any()
    assert abs(z((batch.log_w_base.double().exp() * batch.x0[:, 0].double()).view(GROUPS, ROWS).mean(1))) < LIMIT


def test_rows_of_another_process_are_no_rows_of_the_policy():
    """Another start, network or grid under the same rule: the densities would be of other steps."""

    def elsewhere(change):
        def method(process, reward, *, keep_states, **options):
            return steer.smc(change(process), reward, keep_states=keep_states, **options)

        return method

    others = {
        "start": steer.boost_and_skip(gamma=2.0, skip=0),
        "network": lambda process: dataclasses.replace(process, denoiser=lambda x, t: 0.5 * process.denoiser(x, t)),
        "grid": lambda process: process.with_times([*process.times[:2], *process.times[3:]]),
    }
    for change in others.values():
        with pytest.raises(steer.SteerError, match="by transitions of its own"):
            collected(elsewhere(change), temperature=4.0)
    assert collected(elsewhere(lambda process: process), temperature=4.0).objective == "policy_gradient"


# --- seeds ------------------------------------------------------------------------------------------------------------

COLLECTORS = {
    "collect": functools.partial(grpo.collect, groups=2, group_size=4),
    "collect from smc": functools.partial(grpo.collect, groups=2, group_size=16, method=steer.smc, temperature=4.0),
    "branch": functools.partial(grpo.branch, groups=2, splits=(0, 2)),
    "granular": functools.partial(grpo.granular, groups=2, group_size=4, level=2),
}


@pytest.mark.parametrize("name", COLLECTORS)
def test_seed_is_another_name_for_key(name):
    collect = functools.partial(COLLECTORS[name], POLICY, REWARD)
    one, two, other = collect(key=5), collect(seed=5), collect(seed=6)
    for field in dataclasses.fields(grpo.RolloutBatch):
        value = getattr(one, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(two, field.name)), field.name
    assert (one.seed == 5).all()
    assert one.key == two.key
    assert not torch.equal(one.x0, other.x0)
    with pytest.raises(steer.SteerError, match="give one of them"):
        collect(key=5, seed=5)
