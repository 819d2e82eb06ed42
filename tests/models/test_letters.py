"""The embedded model of words: what it was trained on, what it makes, and samplers that steer it."""

import json
import math
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from exact import LIMIT, z

import steer
from steer import search
from steer.models.catalogue import embedded
from steer.models.letters import ALPHABET, LENGTH, MASK, to_text, to_tokens

TRAIN = Path(__file__).parents[2] / "examples" / "train"
WORDS = (TRAIN / "words.txt").read_text().split()
METRICS = json.loads((files("steer") / "assets" / "letters" / "metrics.json").read_text())
E, SPACE = ALPHABET.index("e"), ALPHABET.index(" ")


def count_of_e(x):
    return (x == E).double().sum(1)


def is_long(x):
    """Log-odds of 2 for words that fill all eight places."""
    return 2.0 * (x != SPACE).all(1).double()


@pytest.fixture(scope="module")
def process():
    return steer.load("letters")


@pytest.fixture(scope="module")
def samples(process):
    return steer.rollout(process, count_of_e, particles=4000, key=11, keep_states=False)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAIN))
    sys.modules.pop("letters", None)
    import letters

    return letters


# -- the list


def test_the_list_is_what_it_says():
    assert len(WORDS) == 7555
    assert sorted(set(WORDS)) == WORDS
    assert all(3 <= len(word) <= LENGTH and set(word) <= set(ALPHABET[:-1]) for word in WORDS)
    assert (TRAIN / "words.txt").stat().st_size < 100_000
    notice = (TRAIN / "words_license.txt").read_text()
    for said in ("Copyright 2000-2018 by Kevin Atkinson", "Permission to use, copy, modify, distribute and sell"):
        assert said in notice
    assert "Copyright 2000-2018 by Kevin Atkinson" in (files("steer") / "assets" / "letters" / "README.md").read_text()


def test_one_word_in_ten_is_held_out(recipe):
    words = recipe.read_words()
    assert not set(words.train) & set(words.held_out)
    assert sorted(words.train + words.held_out) == WORDS
    assert abs(len(words.held_out) / len(WORDS) - 0.1) < 0.01


def test_words_and_tokens_are_two_ways_to_write_the_same():
    tokens = to_tokens(WORDS)
    assert tokens.shape == (7555, LENGTH)
    assert to_text(tokens) == WORDS
    assert to_text(torch.tensor([[2, 0, 26, 19, MASK, 26, 26, 26]])) == ["ca_t?"]
    assert to_text(to_tokens(["c?t"])) == ["c?t"]


# -- the model


def test_the_file_is_small(process):
    folder = files("steer") / "assets" / "letters"
    assert len((folder / "model.safetensors").read_bytes()) < 300_000
    assert (process.steps, process.event, process.vocabulary, process.mask) == (8, (8,), 27, 27)


@pytest.mark.slow
def test_samples_are_words_as_often_as_the_card_says(samples):
    """The share in 4,000 fresh samples against the card's in 10,000, a two-sample z; chance is far below."""
    share = sum(word in set(WORDS) for word in samples.texts) / 4000
    said = METRICS["words"]
    assert abs(share - said) < LIMIT * math.sqrt(said * (1 - said) * (1 / 4000 + 1 / 10_000))
    assert share > 50 * METRICS["words_by_chance"]


def test_samples_have_the_lengths_of_the_list_and_few_gaps(samples, recipe):
    found = samples.texts
    distance = 0.5 * float((recipe.lengths(found) - recipe.lengths(WORDS)).abs().sum())
    assert distance < 0.06
    assert sum("_" in word for word in found) / len(found) < 0.02
    seeded = torch.Generator().manual_seed(0)  # letters in any order do not have them
    scrambled = to_text(to_tokens(WORDS).flatten()[torch.randperm(8 * len(WORDS), generator=seeded)].view(-1, 8))
    assert 0.5 * float((recipe.lengths(scrambled) - recipe.lengths(WORDS)).abs().sum()) > 0.2


def test_likelihood_of_held_out_words_is_the_cards_and_better_than_frequencies(process, recipe):
    words, generator = recipe.read_words(), torch.Generator().manual_seed(1)
    tokens = to_tokens(words.held_out).repeat(3, 1)
    hidden = recipe.masks(len(tokens), generator)
    log_prob = process.denoise(tokens.masked_fill(hidden, MASK)[None], 0)[0]
    each = -(log_prob.gather(2, tokens[..., None])[..., 0] * hidden).sum(1) / hidden.sum(1)
    assert abs(z(each.double() - METRICS["nll_per_letter"])) < LIMIT
    assert METRICS["nll_per_letter"] < METRICS["nll_per_letter_by_place"] - 0.3
    assert METRICS["nll_per_letter_by_place"] < METRICS["nll_per_letter_unigram"]
    assert METRICS["nll_per_letter_train"] < METRICS["nll_per_letter"]


@pytest.mark.slow
def test_more_letters_a_step_make_fewer_words(process, samples):
    quick = steer.rollout(process.with_times(2), count_of_e, particles=2000, keep_states=False)
    shares = [sum(word in set(WORDS) for word in run.texts) / len(run.texts) for run in (quick, samples)]
    assert shares[0] < 0.7 * shares[1]


def test_a_word_is_filled_in(process):
    """Infilling: a start with some letters given is a trajectory at a later level."""
    x = to_tokens(["q?iet"])[None].expand(1, 64, -1)
    state = steer.Trajectory.begin(process, x, k=7)
    result = steer.smc(process, count_of_e, start=state)
    assert result.texts.count("quiet") > 48


# -- steering


def test_steered_evidence_and_means_agree_with_unsteered_samples(process, samples):
    """SMC against 4,000 plain samples reweighted: two estimates of one evidence, a two-sample z."""
    for reward in (count_of_e, is_long):
        plain = reward(samples.x[0]).exp()
        steered = steer.smc(process, reward, batch=40, particles=16, key=12).log_evidence.exp()
        error = math.hypot(float(plain.std()) / math.sqrt(len(plain)), float(steered.std()) / math.sqrt(len(steered)))
        assert abs(float(plain.mean() - steered.mean())) < LIMIT * error
        assert error < 0.1 * float(plain.mean())


def test_smc_steers_and_best_of_n_searches(process, samples):
    steered = steer.smc(process, count_of_e, particles=200, temperature=0.5, key=3)
    best = search.best_of_n(process, count_of_e, particles=64, key=3)
    assert float(steered.mean_reward) > float(samples.mean_reward) + 0.5
    assert to_text(best.best)[0].count("e") == float(best.reward.max()) >= 2


# -- the catalogue and errors


def test_the_catalogue_lists_it():
    (card,) = [card for card in embedded() if card["name"] == "letters"]
    assert card["kind"] == "masked diffusion (transformer)"
    assert 100_000 < card["parameters"] < 200_000
    assert "SCOWL" in card["licence"]
    assert "words" in card["measured"]


def test_what_letters_has_not_is_refused():
    with pytest.raises(steer.ModelError, match="no classes"):
        steer.load("letters", labels=3)
    with pytest.raises(steer.ModelError, match="letters"):
        steer.load("words")
    with pytest.raises(steer.StateSpaceError, match=r"steer\.unmask"):
        steer.load("letters", transition=steer.ddim())
    with pytest.raises(steer.StateSpaceError, match="follows a gradient"):
        steer.smc(steer.load("letters"), count_of_e, particles=2, proposal=steer.guided())
