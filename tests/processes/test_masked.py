"""The masked process: exact laws of its steps, its forward kernel, the contract on tokens, and what it refuses."""

import functools
import inspect
import itertools
import math
from dataclasses import replace

import pytest
import test_contract as contract
import torch
from exact import LIMIT, Linear, z

import steer
from steer import search
from steer.models.markov import enumerate_strings
from steer.processes.unmasking import (
    Ancestral,
    BernoulliPositions,
    FixedCountUnmasking,
    FixedPositions,
    MaskLevel,
    UniformSubset,
)

VOCABULARY, LENGTH = 3, 3
STATES = enumerate_strings(VOCABULARY + 1, LENGTH)
TABLE = steer.Key(5).fold("logits").normal((1, len(STATES), LENGTH, VOCABULARY))[0]


def network(x, t):
    """An arbitrary network: logits of every state looked up in a table of normals, scaled by the time."""
    base = (VOCABULARY + 1) ** torch.arange(LENGTH - 1, -1, -1)
    return TABLE[(x * base).sum(-1)] * (1.0 + t)


def backwards(x, log_prob):
    return torch.arange(x.shape[2]).expand(x.shape).double()


ORDERS = {"independent": None, "random": "random", "confidence": "confidence", "own": backwards}


def process(order=None, times=2, **options):
    return steer.from_logits(
        network, times, length=LENGTH, vocabulary=VOCABULARY, transition=steer.unmask(order), **options
    )


def step_from(proc, states, k):
    x = states[None]
    return proc.transition(x, proc.denoise(x, k), k)


def mapped(law, f):
    """The law with f applied to all its tensors, (B, N, ...) each."""
    positions = replace(law.positions, **{n: f(v) for n, v in vars(law.positions).items() if torch.is_tensor(v)})
    return replace(law, x=f(law.x), log_token=f(law.log_token), positions=positions)


def totals(step, states):
    """Probability of every state after a step from each of the given ones."""
    wide = mapped(step, lambda tensor: tensor[0][:, None].expand(-1, len(STATES), *tensor.shape[2:]))
    return wide.log_prob(STATES.expand(len(states), -1, -1)).exp()


# -- exact laws of a step


@pytest.mark.parametrize("times", [2, 3, (1.0, 0.9, 0.3, 0.0)])
@pytest.mark.parametrize("order", ORDERS)
def test_probabilities_of_all_successors_sum_to_one(order, times):
    proc = process(ORDERS[order], times)
    for k in range(proc.steps):
        step = step_from(proc, STATES, k)
        if not step.stochastic:
            continue
        probability = totals(step, STATES)
        torch.testing.assert_close(probability.sum(1), torch.ones(len(STATES)).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_states_that_cannot_follow_have_probability_zero(order):
    proc = process(ORDERS[order])
    probability = totals(step_from(proc, STATES, 0), STATES)
    masked = STATES == VOCABULARY
    changed = ((STATES[:, None] != STATES[None]) & ~masked[:, None]).any(2)
    assert bool((probability[changed] == 0).all())
    if order != "independent":  # level 1 of 2 has count 2 of 3 masks: a step from all masks reveals one
        revealed = (masked[-1] & ~masked).sum(1)
        assert bool((probability[-1][revealed != 1] == 0).all())
        assert bool((probability[-1] > 0).any())


def frequencies(law, draws, key):
    """z of the number of times each successor was drawn, over successors expected at least 20 times."""
    x = law.sample(steer.Key(key))
    base = (VOCABULARY + 1) ** torch.arange(LENGTH - 1, -1, -1)
    counts = torch.bincount((x * base).sum(-1).flatten(), minlength=len(STATES)).double()
    every = mapped(law, lambda tensor: tensor[:, : len(STATES)])
    expected = every.log_prob(STATES[None]).exp()[0] * draws
    enough = expected >= 20
    assert enough.sum() >= 2
    assert counts[expected == 0].sum() == 0
    return ((counts - expected) / (expected * (1 - expected / draws)).sqrt().clamp(min=1e-9))[enough]


def many(proc, state, k, draws):
    x = torch.tensor(state).expand(1, draws, -1)
    return proc.transition(x, proc.denoise(x, k), k)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("state", "k"), [((3, 3, 3), 0), ((3, 1, 3), 1)])
def test_draws_have_the_frequencies_that_log_prob_says(order, state, k):
    scores = frequencies(many(process(ORDERS[order]), state, k, 40_000), 40_000, key=1)
    assert scores.abs().max() < LIMIT


# -- mutants of the step's law, each rejected by one of the two checks above


class NoCoin(BernoulliPositions):
    """Leaves the probability of what was revealed out."""

    def log_prob(self, chosen):
        return torch.zeros(chosen.shape[:2], dtype=torch.float64)


class NoChoice(UniformSubset):
    """Leaves out that the set was one of many."""

    def log_prob(self, chosen):
        return torch.where(super().log_prob(chosen) > -math.inf, 0.0, -math.inf).double()


class Likeliest(steer.Unmasking):
    """Writes the likeliest token and claims the probability of a drawn one."""

    def sample(self, key):
        return torch.where(self.positions.sample(key.fold("positions")), self.log_token.argmax(3), self.x)


@pytest.mark.parametrize("mutant", [NoCoin, NoChoice])
def test_log_prob_without_the_choice_of_positions_is_rejected(mutant):
    step = step_from(process(None if mutant is NoCoin else "random"), STATES, 0)
    broken = replace(step, positions=mutant(**vars(step.positions)))
    probability = totals(broken, STATES)
    assert (probability.sum(1) - 1).abs().max() > 0.5


@pytest.mark.parametrize("order", ["independent", "random"])
def test_writing_the_likeliest_token_is_rejected(order):
    step = many(process(ORDERS[order]), (3, 3, 3), 0, 40_000)
    assert frequencies(Likeliest(**vars(step)), 40_000, key=1).abs().max() > 10 * LIMIT


# -- the step's edges


def test_a_token_of_probability_zero_is_never_drawn():
    """Also at both ends of the uniform's range, where rounding could step over."""
    logits = torch.full((1, 1, 4, 6), -math.inf)
    logits[..., 2:4] = torch.tensor([0.3, 1.0])
    x = torch.full((1, 1, 4), 6)

    class Edge:
        def __init__(self, value):
            self.value = value

        def fold(self, name):
            return self

        def fine_uniform(self, shape, *, device):
            return torch.full(shape, self.value, dtype=torch.float64)

    law = steer.Unmasking(x, 6, torch.log_softmax(logits, 3), FixedPositions(x == 6))
    for value, token in ((2.0**-33, 2), (1.0 - 2.0**-33, 3)):
        assert law.sample(Edge(value)).flatten().tolist() == [token] * 4  # pyright: ignore
    drawn = law.sample(steer.Key(0))
    assert set(drawn.flatten().tolist()) <= {2, 3}


@pytest.mark.parametrize("order", ORDERS)
def test_stochastic_says_whether_anything_is_drawn(order):
    """Eight steps for three tokens: with a fixed number a step, five of them reveal nothing."""
    proc = process(ORDERS[order], 8)
    said = [proc.stochastic(k) for k in range(8)]
    assert sum(said) == (8 if order == "independent" else 3)
    state = steer.Trajectory.begin(proc, proc.prior(steer.Key(0), 1, 200))
    for k in range(8):
        step = proc.transition(state.x, proc.denoise(state.x, k), k)
        assert step.stochastic == said[k]
        following = state.step(step, steer.Key(1))
        assert (not torch.equal(following.x, state.x)) == said[k]
        if not said[k]:
            with pytest.raises(steer.NotStochasticError):
                step.log_prob(state.x)
        state = following
    assert not bool((state.x == VOCABULARY).any())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_no_mask_is_left_at_the_end(order, steps):
    result = steer.rollout(process(ORDERS[order], steps), Linear([1.0, 0.0, 0.0]), particles=50)
    assert result.x.dtype == torch.int64
    assert bool(((result.x >= 0) & (result.x < VOCABULARY)).all())


def test_a_mask_inside_the_vocabulary_is_never_written():
    proc = steer.from_logits(lambda x, t: torch.zeros(*x.shape, 4), 2, length=5, vocabulary=4, mask=1)
    result = steer.rollout(proc, Linear([1.0] * 5), particles=200)
    assert set(result.x.flatten().tolist()) == {0, 2, 3}
    logs = result.trajectory.transitions()[-1][3]
    assert bool(logs.isfinite().all())


def test_predictions_are_log_probs_of_at_least_float32():
    proc = process()
    x = proc.prior(steer.Key(0), 2, 3)
    torch.testing.assert_close(proc.denoise(x, 0).exp().sum(3), torch.ones(2, 3, 3).double())
    half = steer.from_logits(lambda x, t: torch.zeros(*x.shape, 3, dtype=torch.bfloat16), 2, length=3, vocabulary=3)
    assert half.denoise(x, 0).dtype == torch.float32


# -- the forward process


@pytest.mark.parametrize("order", ["independent", "random"])
def test_masking_again_gives_the_share_of_the_level_directly_and_in_two_stages(order):
    proc = process(ORDERS[order], (1.0, 0.7, 0.4, 0.0))
    x = torch.zeros(1, 20_000, LENGTH, dtype=torch.int64)
    key = steer.Key(3)
    direct = proc.noise(x, 3, 1, key.fold("direct"))
    staged = proc.noise(proc.noise(x, 3, 2, key.fold("first")), 2, 1, key.fold("second"))
    assert torch.equal(proc.noise(x, 2, 2, key), x)
    for masked in ((direct == VOCABULARY).double(), (staged == VOCABULARY).double()):
        if order == "random":
            assert bool((masked.sum(2) == 2).all())  # 0.7 * 3, rounded
        share = {"independent": 0.7, "random": 2 / 3}[order]
        for i in range(LENGTH):
            assert abs(z(masked[0, :, i] - share)) < LIMIT
        pair = masked[0, :, 0] * masked[0, :, 1]
        assert abs(z(pair - {"independent": 0.49, "random": 1 / 3}[order])) < LIMIT
    assert bool((proc.noise(x, 3, 0, key) == VOCABULARY).all())
    with pytest.raises(steer.SteerError, match="k_to <= k_from"):
        proc.noise(x, 1, 2, key)


def test_renoising_does_not_depend_on_the_batch():
    proc, key = process(None, 4), steer.Key(9)
    x = torch.zeros(3, 5, LENGTH, dtype=torch.int64)
    assert torch.equal(proc.noise(x, 4, 2, key)[:1, :2], proc.noise(x[:1, :2], 4, 2, key))


# -- samplers on tokens: the contract's own cases, on another state space

ON_TOKENS = [
    "rollout", "importance_sampling", "smc", "smc_max", "smc_tempered", "smc_top_k", "fk_steering", "best_of_n",
    "best_of_n_chunked",
]  # fmt: skip
OFF_TOKENS = ["smc_guided", "smc_pcnl", "psi", "tds", "das", "particle_gibbs", "particle_gibbs_pinned"]


def two_tokens(dtype=None, decoder=None):
    """The contract's process with tokens for coordinates: event (2,), 5 steps, twelve tokens."""

    def logits(x, t):
        seen = torch.where(x == 12, 0.0, x.double())
        return torch.sin(torch.arange(12.0).double() * (1.0 + 0.3 * seen.sum(2, keepdim=True)))[:, :, None].expand(
            -1, -1, 2, -1
        )

    return steer.from_logits(logits, contract.STEPS, length=2, vocabulary=12, decoder=decoder)


class Spy:
    """Counts what reaches the network, the decoder and the reward."""

    def __init__(self, proc, reward):
        self.rows = self.scored = self.decoded = self.grads = 0
        self.network, self.reward = proc.network, reward
        self.process = steer.from_logits(self.logits, proc.times, length=2, vocabulary=12, decoder=self.decode)

    def logits(self, x, t):
        self.rows += x.shape[0] * x.shape[1]
        return self.network(x, t)

    def decode(self, x):
        self.decoded += len(x)
        return x

    def score(self, x):
        self.scored += len(x)
        return self.reward(x)


CASES = [
    contract.test_ledger_equals_a_spys_count,
    functools.partial(contract.test_budget_is_never_exceeded_and_used_up_to_a_particle, more=6 * contract.STEPS + 3),
    contract.test_budget_too_small_says_what_is_needed,
    contract.test_same_key_same_result_other_key_other_result,
    contract.test_the_global_generator_is_left_alone,
    contract.test_other_problems_do_not_matter,
    contract.test_weights_sum_to_one_and_shapes_are_right,
    functools.partial(contract.test_a_bad_score_is_named, bad=math.nan, word="nan"),
    functools.partial(contract.test_a_bad_score_is_named, bad=math.inf, word="inf"),
    contract.test_a_reward_of_wrong_shape_is_named,
    contract.test_a_reward_that_raises_is_named,
    contract.test_a_reward_of_another_type_is_named,
    functools.partial(contract.test_temperature_must_be_positive, temperature=-1.0),
    contract.test_lists_and_arrays_are_rewards,
    contract.test_every_step_is_reported_and_stop_keeps_what_was_paid_for,
    contract.test_constant_reward_leaves_weights_equal_and_evidence_exact,
]


def title(case):
    return getattr(case, "func", case).__name__.removeprefix("test_")


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setattr(contract, "mixture_process", two_tokens)
    monkeypatch.setattr(contract, "Spy", Spy)


@pytest.mark.parametrize("name", ON_TOKENS)
@pytest.mark.parametrize("case", CASES, ids=title)
def test_the_contract_holds_on_tokens(tokens, case, name):
    if "constant" in title(case) and name not in contract.SAMPLERS:
        return
    wanted = set(inspect.signature(case).parameters) - set(getattr(case, "keywords", {}))
    case(**{word: {"method": contract.METHODS[name], "name": name}[word] for word in wanted})


@pytest.mark.parametrize(
    "case", [contract.test_half_a_best_of_n_is_a_result, contract.test_best_of_n_does_not_depend_on_chunks], ids=title
)
def test_the_contract_of_best_of_n_holds_on_tokens(tokens, case):
    case()


def test_the_contract_runs_on_tokens_here(tokens):
    """The fixture does what it says: without it the cases above would test Gaussian processes again."""
    assert isinstance(contract.mixture_process(), steer.MaskedProcess)


@pytest.mark.parametrize("order", ORDERS)
def test_bit_equal_in_any_batch_and_chunk(order):
    proc, reward = process(ORDERS[order], 3), Linear([0.7, -0.5, 0.4])
    alone, together = (steer.smc(proc, reward, particles=8, batch=batch, key=2) for batch in (1, 5))
    assert torch.equal(alone.x[0], together.x[0])
    whole, parts = (search.best_of_n(proc, reward, particles=9, chunk=chunk, key=2) for chunk in (9, 2))
    assert torch.equal(whole.x, parts.x)
    assert torch.equal(whole.best[0], whole.x[0, whole.reward[0].argmax()])


def test_a_trajectory_remembers_tokens_and_their_log_probs():
    proc = process("random", 3)
    result = steer.rollout(proc, Linear([1.0, 0.0, 0.0]), particles=6)
    assert result.trajectory.states().shape == (1, 6, 4, LENGTH)
    masks = (result.trajectory.states() == VOCABULARY).sum(3)
    assert bool((masks == torch.tensor([3, 2, 1, 0])).all())
    for k, before, after, log_prob, _ in result.trajectory.transitions():
        torch.testing.assert_close(proc.transition(before, proc.denoise(before, k), k).log_prob(after), log_prob)
    back = result.trajectory.renoise(1, steer.Key(4))
    assert bool(((back.x == VOCABULARY).sum(2) == 2).all())


def test_intermediate_values_are_of_completed_tokens():
    """Rewards never see a mask; a completion of one's own is used, and changes weights and not the law's support."""
    seen = []

    def reward(x):
        seen.append(x)
        return x.double().sum(1)

    steer.smc(process(None, 3), reward, particles=20)
    assert all(bool((x < VOCABULARY).all()) for x in seen)
    zeros = process(None, 3, completion=lambda x, log_prob: torch.zeros_like(x))
    x = torch.tensor([[[3, 2, 3]]])
    assert zeros.complete(x, zeros.denoise(x, 1)).tolist() == [[[0, 2, 0]]]
    likeliest = process(None, 3)
    prediction = likeliest.denoise(x, 1)
    assert likeliest.complete(x, prediction)[0, 0, 0] == prediction[0, 0, 0].argmax()
    assert likeliest.complete(x, prediction)[0, 0, 1] == 2


@pytest.mark.slow
def test_saved_and_reported(tmp_path):
    from steer import load_run

    proc = process(None, 3, text=lambda x: ["".join("ab<"[i] for i in row) for row in x.tolist()])
    reward = Linear([1.0, 0.5, 0.2])
    result, reference = steer.smc(proc, reward, particles=8), steer.rollout(proc, reward, particles=8)
    result.save(tmp_path)
    saved = load_run(tmp_path)
    assert saved.tensors["x"].dtype == torch.int64
    assert torch.equal(saved.tensors["x"], result.x)
    assert len(result.texts) == 8
    page = result.report(tmp_path, reference=reference).read_text()
    best = max(zip(result.reward.flatten().tolist(), result.texts, strict=True))[1]
    assert best.replace("<", "&lt;") in page
    assert "<svg" in page
    plain = steer.rollout(process(None, 3), reward, particles=8)
    plain.report(tmp_path)
    assert plain._repr_png_() is None
    with pytest.raises(steer.StateSpaceError, match="from_logits"):
        _ = plain.texts


# -- what it refuses


@pytest.mark.parametrize("name", OFF_TOKENS)
def test_methods_that_need_a_score_say_so(name):
    with pytest.raises(steer.StateSpaceError, match=r"use |does not have"):
        contract.METHODS[name](two_tokens(), contract.REWARD, particles=4)


def test_rules_and_paths_of_the_other_state_space_are_refused():
    with pytest.raises(steer.StateSpaceError, match=r"use steer\.unmask"):
        process().with_rule(steer.ddim())  # pyright: ignore
    with pytest.raises(steer.StateSpaceError, match=r"use steer\.ddim"):
        contract.mixture_process().with_rule(steer.unmask())  # pyright: ignore
    with pytest.raises(steer.StateSpaceError, match="with_times"):
        steer.convert(process(), steer.VP())  # pyright: ignore


def test_bad_arguments_say_what_is_wanted():
    with pytest.raises(steer.SteerError, match="fall strictly from 1 to 0"):
        process(None, (1.0, 0.5))
    with pytest.raises(steer.SteerError, match="fall strictly from 1 to 0"):
        process().with_times((0.9, 0.0))
    with pytest.raises(steer.SteerError, match="at least one step"):
        process(None, 0)
    with pytest.raises(steer.SteerError, match="'confidence'"):
        steer.unmask("sorted")
    with pytest.raises(steer.SteerError, match=r"in \[0, V\]"):
        process(None, 2, mask=9)
    wide = steer.from_logits(lambda x, t: torch.zeros(*x.shape, 4), 2, length=3, vocabulary=3)
    with pytest.raises(steer.ShapeError, match=r"vocabulary=4, mask=3"):
        steer.rollout(wide, contract.REWARD, particles=2)
    with pytest.raises(steer.ShapeError, match="one score per position"):
        steer.rollout(process(lambda x, log_prob: log_prob), Linear([1.0, 0.0, 0.0]), particles=2)
    with pytest.raises(steer.ModelError, match="has a network"):
        process().exact(contract.REWARD)
    with pytest.raises(steer.ShapeError, match="conditioned on 2"):
        steer.rollout(process(None, 2, problems=2), Linear([1.0, 0.0, 0.0]), particles=2, batch=3)


def test_counts_of_masks_fall_to_nothing():
    for length, steps in itertools.product((1, 5, 8), (1, 3, 8, 20)):
        proc = steer.from_logits(network, steps, length=length, vocabulary=3)
        counts = [proc.level(k).masks for k in range(steps + 1)]
        assert counts[0] == length
        assert counts[-1] == 0
        assert counts == sorted(counts, reverse=True)
        assert steps > length or len(set(counts)) == steps + 1


def test_rules_are_small_values():
    assert steer.unmask() == Ancestral()
    assert steer.unmask("random") == FixedCountUnmasking()
    assert MaskLevel(0.5, 3, 3).masks == 2
    assert "steps=2" in repr(process())
