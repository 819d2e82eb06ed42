"""Tokens that are given: no chain, no search and no forward process touches them; and tokens that are rarely drawn."""

import math
from dataclasses import replace

import pytest
import torch
from exact import LIMIT, z

import steer
from steer import search
from steer.models import markov_language, masked_chain_law
from steer.processes.unmasking import FixedPositions

V, LENGTH, MASK = 3, 5, 3
PROMPT = torch.tensor([MASK, 1, MASK, MASK, 2])
GIVEN = PROMPT != MASK
RULES = {"independent": None, "random": "random", "confidence": "confidence"}
MATRIX = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]


def process(order=None, steps=3, prompt=PROMPT, length=LENGTH):
    model = markov_language([0.5, 0.3, 0.2], MATRIX, length, steps=steps, transition=steer.unmask(order))
    return model if prompt is None else model.with_prompt(prompt)


def reward(x):
    return (x == 0).double().sum(1)


def kept(x):
    return bool((x[..., GIVEN] == PROMPT[GIVEN]).all())


# -- the chain writes what is left, with the conditional's distribution


@pytest.mark.parametrize("order", RULES)
def test_masks_fall_from_all_that_is_open_to_none(order):
    proc = process(RULES[order])
    states = steer.rollout(proc, reward, particles=50, keep_states=True).trajectory.states()
    assert kept(states)
    masks = (states == MASK).sum(3)
    assert bool((masks[..., 0] == 3).all())
    assert bool((masks[..., -1] == 0).all())
    if order != "independent":
        assert bool((masks == torch.tensor([3, 2, 1, 0])).all())  # one of the three open positions a step


def test_smc_estimates_the_evidence_given_the_prompt():
    """One token a step, so the chain has the language's own conditionals: their table is exact."""
    exact = process("random").exact(reward)
    result = steer.smc(process("random"), reward, batch=4000, particles=8)
    ratio = (result.log_evidence - exact.log_evidence).exp()
    assert ratio.std() / 4000**0.5 < 0.007
    assert abs(z(ratio - 1.0)) < LIMIT
    everything = process("random", prompt=None).exact(reward)  # mutant: the evidence without the prompt
    assert abs(z(ratio - math.exp(everything.log_evidence - exact.log_evidence))) > 10 * LIMIT


def test_the_tables_of_small_chains_know_the_prompt():
    small = torch.tensor([1, MASK, MASK])
    proc = process("random", steps=2, prompt=small, length=3)
    law = masked_chain_law(proc)
    conditional = proc.exact(lambda x: torch.zeros(len(x)))
    torch.testing.assert_close(law.mass, conditional.mass, rtol=0, atol=1e-12)
    assert bool((law.mass[law.strings[:, 0] != 1] == 0).all())
    with pytest.raises(steer.ModelError, match="no string"):
        markov_language([0.0, 0.5, 0.5], torch.tensor(MATRIX), 3).with_prompt(torch.tensor([0, 3, 3])).exact(reward)


# -- whatever goes back to earlier levels


@pytest.mark.parametrize("order", RULES)
def test_noise_masks_what_was_written_and_no_more(order):
    proc, key = process(RULES[order]), steer.Key(3)
    x = torch.where(GIVEN, PROMPT, 0).expand(1, 6000, -1)
    assert torch.equal(proc.noise(x, 3, 0, key), proc.prior(key, 1, 6000))
    back = proc.noise(x, 3, 1, key)
    assert kept(back)
    masked = (back == MASK).double()
    if order != "independent":
        assert bool((masked.sum(2) == 2).all())
    for i in (~GIVEN).nonzero()[:, 0]:
        assert abs(z(masked[0, :, i] - 2 / 3)) < LIMIT  # standard error .006
    # In two stages as in one: masks of the first count, those of the prompt there are none.
    staged = proc.noise(proc.noise(x, 3, 2, key.fold("a")), 2, 1, key.fold("b"))
    assert kept(staged)
    if order == "independent":
        assert abs(z((staged == MASK).double().sum(2)[0] - 2.0)) < LIMIT
    else:
        assert bool(((staged == MASK).sum(2) == 2).all())


def test_a_trajectory_goes_back_without_its_prompt_being_lost():
    end = steer.rollout(process("random"), reward, particles=20).trajectory
    assert kept(end.renoise(1, steer.Key(0)).x)


SEARCHES = {
    "svdd": search.svdd, "beam": search.beam, "rbf": search.rbf, "depth_first": search.depth_first, "dts": search.dts,
    "paths": lambda *a, **k: search.noise_search(*a, strategy=search.paths(), **k), "best_of_n": search.best_of_n,
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("order", ["independent", "random"])
def test_searches_keep_the_prompt(name, order):
    result = SEARCHES[name](process(RULES[order]), reward, budget=60, batch=2)
    assert kept(result.x)
    assert int(result.x.max()) < V


def test_every_problem_has_its_own_prompt():
    def logits(x, t):
        return torch.zeros(*x.shape, V)

    logits.only = lambda problem: logits
    prompts = torch.tensor([[0, MASK, MASK, 1], [MASK, 2, 2, MASK]])
    proc = steer.from_logits(logits, 2, length=4, vocabulary=V, prompt=prompts, problems=2)
    for run in (search.rbf, search.svdd, steer.smc):
        x = run(proc, reward, batch=2, budget=24).x
        for b in range(2):
            given = prompts[b] != MASK
            assert bool((x[b][:, given] == prompts[b][given]).all())
    alone, full = proc.only(1), torch.tensor([[2, 2, 2, 2]]).expand(1, 4, -1)
    assert bool((alone.noise(full, 2, 0, steer.Key(0)) == prompts[1]).all())


def test_prompts_that_cannot_be_kept_are_refused():
    with pytest.raises(steer.ShapeError, match="row per problem"):
        process(prompt=PROMPT[:3])
    with pytest.raises(steer.ShapeError, match="row per problem"):
        process(prompt=PROMPT.expand(2, -1))
    with pytest.raises(steer.SteerError, match="tokens below V = 3"):
        process(prompt=PROMPT + 1)
    with pytest.raises(steer.SteerError, match="int64"):
        process(prompt=PROMPT.double())
    with pytest.raises(steer.SteerError, match=r"got \[0\]"):
        process(prompt=torch.zeros(LENGTH, dtype=torch.int64))
    two = replace(process(prompt=None), problems=2)
    with pytest.raises(steer.SteerError, match=r"got \[3, 5\]"):
        two.with_prompt(torch.stack([PROMPT, torch.full_like(PROMPT, MASK)]))
    start = steer.from_latents(PROMPT.expand(4, -1))
    with pytest.raises(steer.StateSpaceError, match="with_prompt"):
        steer.smc(process(prompt=None), reward, particles=4, start=start)
    assert kept(steer.smc(process(), reward, particles=4, start=start).x)


# -- tokens of small probability


class At:
    """A key whose fine uniform is a number."""

    def __init__(self, number):
        self.number = number

    def fold(self, name):
        return self

    def fine_uniform(self, shape, *, device):
        return self.number.expand(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_token_of_a_large_vocabulary_can_be_drawn(dtype):
    """The middle of a token's own interval of uniforms leads to it. In sums of float32 the unlikeliest had no interval,
    5,203 of these 32,000, and with 32 bits no uniform falls into it."""
    size = 32_000
    logits = 3.0 * steer.Key(0).normal((1, 1, size))[0, 0]
    log_token = torch.log_softmax(logits.to(dtype), 0)
    share = torch.softmax(log_token.double(), 0)
    middle = share.cumsum(0) - 0.5 * share
    tokens = torch.cat([share.argsort()[:40], torch.arange(0, size, size // 20)])
    assert bool((share[tokens[:40]] < 2.0**-32).all())
    x = torch.full((1, 1, len(tokens)), size)
    law = steer.Unmasking(x, size, log_token.expand(1, 1, len(tokens), size), FixedPositions(x == size))
    assert torch.equal(law.sample(At(middle[tokens]))[0, 0], tokens)  # pyright: ignore
    assert bool(law.log_prob(tokens[None, None]).isfinite().all())
