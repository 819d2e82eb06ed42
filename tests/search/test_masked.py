"""Searches that need draws and values only, on tokens: same calls, same ledger, same budgets."""

import functools

import pytest
import torch

import steer
from steer import search
from steer.search import selection

LENGTH, WORDS = 6, 4
WEIGHT = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)

SEARCHES = {
    "best_of_n": search.best_of_n,
    "svdd": search.svdd,
    "svdd_argmax": functools.partial(search.svdd, select="argmax", replace=0.5, particles=2),
    "beam": search.beam,
    "beam_top": functools.partial(search.beam, particles=2, candidates=None, select=selection.top()),
    "beam_blocks": functools.partial(search.beam, particles=2, candidates=None, block=2, select=selection.argmax()),
    "rbf": search.rbf,
    "rbf_integrated": functools.partial(search.rbf, finish="integration"),
    "depth_first": search.depth_first,
    "random": functools.partial(search.noise_search, strategy=search.random_search()),
    "paths": functools.partial(search.noise_search, strategy=search.paths()),
}


def process(**options):
    """Tokens that like to repeat the one on their left."""

    def logits(x, t):
        left = torch.roll(x, 1, dims=2)
        known = (left < WORDS) & (torch.arange(LENGTH) > 0)
        return 2.0 * torch.nn.functional.one_hot(left.clamp(max=WORDS - 1), WORDS).double() * known[..., None]

    return steer.from_logits(
        logits, LENGTH, length=LENGTH, vocabulary=WORDS, transition=steer.unmask("random"), **options
    )


def reward(tokens):
    return WEIGHT[tokens].mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_tokens_are_searched_within_the_budget(name):
    result = SEARCHES[name](process(), reward, budget=150, batch=3, key=2)
    assert 2 * 130 < result.cost.nfe * 2 / 3 <= 2 * 150
    assert result.x.dtype == torch.int64
    assert int(result.x.max()) < WORDS  # no mask is left
    torch.testing.assert_close(result.reward, reward(result.x.flatten(0, 1)).view(result.reward.shape))
    again = SEARCHES[name](process(), reward, budget=150, batch=1, key=2)
    assert torch.equal(again.x[0], result.x[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SEARCHES if name not in ("best_of_n", "random")])
def test_searching_beats_a_rollout(name):
    found = SEARCHES[name](process(), reward, budget=120, batch=20, temperature=0.1)
    plain = steer.rollout(process(), reward, particles=1, batch=20)
    assert found.reward.amax(1).mean() > plain.reward.mean() + 0.8


def test_masks_that_are_all_alike_are_predicted_once():
    """The prior draws nothing: candidates at level 0 would be the same state."""
    result = search.svdd(process(), reward, particles=2, candidates=5)
    assert [seen.score.shape[1] for seen in result.seen] == [2, 10, 10, 10, 10, 10, 2]
    rollover = search.rbf(process(), reward, budget=101, particles=2)
    assert rollover.cost.nfe == 101


def test_gaussian_searches_say_so():
    for strategy in (search.zero_order(), search.epsilon_greedy()):
        with pytest.raises(steer.StateSpaceError, match="MaskedProcess"):
            search.noise_search(process(), reward, strategy=strategy)
    with pytest.raises(steer.StateSpaceError, match="MaskedProcess"):
        search.svdd(process(), reward, value=search.values.look_ahead(2))
