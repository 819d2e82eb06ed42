"""Rewards of texts: by hand on the embedded alphabet, and a tiny classifier of transformers against its own logits."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from tiny_vlm import word_tokenizer

import steer
from steer.errors import RewardError
from steer.models.letters import to_text, to_tokens
from steer.rewards.text import InWords, LetterCount, Matches, TextLogProb

WORDS = to_tokens(["bee", "see", "being", "xyzzy", "tree"])


def test_words_letters_and_patterns_by_hand():
    assert InWords(["bee", "tree", "cat"], to_text)(WORDS).tolist() == [1, 0, 0, 0, 1]
    assert LetterCount("e", to_text)(WORDS).tolist() == [2, 2, 1, 0, 2]
    assert LetterCount("ei", to_text)(WORDS).tolist() == [2, 2, 2, 0, 2]
    assert LetterCount("ee", to_text)(WORDS).tolist() == [2, 2, 1, 0, 2]
    assert LetterCount("e", to_text, target=1)(WORDS).tolist() == [-1, -1, 0, -1, -1]
    assert Matches(".*ing|x.*", to_text)(WORDS).tolist() == [0, 0, 1, 1, 0]
    assert Matches("b", to_text)(WORDS).sum() == 0  # from end to end


def test_samplers_follow_them():
    process = steer.load("letters")
    plain = steer.rollout(process, LetterCount("e", to_text), particles=64, key=0, keep_states=False)
    steered = steer.smc(process, LetterCount("e", to_text), particles=64, temperature=0.5, key=0)
    assert float(steered.mean_reward) > float(plain.mean_reward) + 0.3


@pytest.fixture(scope="module")
def classifier():
    tokenizer = word_tokenizer("bee see being xyzzy tree")
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        id2label={0: "bad", 1: "good", 2: "fine"},
        label2id={"bad": 0, "good": 1, "fine": 2},
        pad_token_id=0,
        max_position_embeddings=20,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.RobertaForSequenceClassification(config).eval(), tokenizer


def test_a_classifier_gives_the_log_softmax_at_its_label(classifier):
    model, tokenizer = classifier
    reward = TextLogProb(model, "good", to_text, tokenizer)
    logits = model(**tokenizer(to_text(WORDS), return_tensors="pt", padding=True)).logits
    expected = [math.log(math.exp(row[1]) / sum(map(math.exp, row))) for row in logits.tolist()]
    assert reward(WORDS).tolist() == pytest.approx(expected, rel=1e-5)
    assert reward.label == 1
    total = sum(TextLogProb(model, label, to_text, tokenizer, rows=2)(WORDS).exp() for label in range(3))
    torch.testing.assert_close(total, torch.ones(5))
    torch.testing.assert_close(reward(WORDS.flip(0)), reward(WORDS).flip(0))
    assert reward(WORDS[:0]).shape == (0,)


def test_what_is_wrong_is_named(classifier):
    model, tokenizer = classifier
    for label in (3, -1, "great", True):
        with pytest.raises(RewardError, match=r"is one of .*good"):
            TextLogProb(model, label, to_text, tokenizer)
    with pytest.raises(RewardError, match="no tokenizer"):
        TextLogProb(model, 0, to_text)
    with pytest.raises(RewardError, match=r"'no-such/model'.*download=True"):
        TextLogProb("no-such/model", 0, to_text)
    with pytest.raises(RewardError, match="non-empty list of words, got 'bee'"):
        InWords("bee", to_text)
    with pytest.raises(RewardError, match="must be a regular expression, got '\\(': "):
        Matches("(", to_text)
    with pytest.raises(RewardError, match="must decode 5 samples to a list of as many strings, got 1"):
        Matches("a", lambda x: ["a"])(WORDS)
