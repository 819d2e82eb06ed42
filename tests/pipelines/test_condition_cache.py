"""Conditions kept between calls: one row of what repeats, within a bound, prepared again where dropped."""

import pytest
import torch
from tiny_pipelines import build, states

import steer
from steer.pipelines import condition_cache
from steer.pipelines.condition_cache import recall, remember

A, B = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)


@pytest.mark.parametrize("rows", [[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0]])
def test_what_comes_back_is_what_was_kept(rows):
    kept, value = {}, {"mask": torch.stack([A, B])[rows], "other": [A, None, "text"]}
    remember(kept, "key", (value, B), 2, 3)
    found, other = recall(kept, "key")
    assert torch.equal(found["mask"], value["mask"])
    assert found["other"] == value["other"]
    assert other is B
    found["mask"].zero_()
    assert rows == [0, 1, 1, 1, 0, 0] or bool(recall(kept, "key")[0]["mask"].any())  # loops may write into theirs


def test_repeated_rows_are_kept_once():
    kept = {}
    remember(kept, "key", torch.randn(1, 100).repeat(16, 1), 1, 16)
    assert condition_cache._bytes(kept) == 400


def test_the_least_recently_used_is_dropped_beyond_the_bound(monkeypatch):
    monkeypatch.setattr(condition_cache, "LIMIT_BYTES", 1000)
    kept = {}
    for name in "ab":
        remember(kept, name, torch.zeros(100), 1, 1)
    assert recall(kept, "a") is not None
    remember(kept, "c", torch.zeros(100), 1, 1)
    assert list(kept) == ["a", "c"]
    assert recall(kept, "b") is None
    remember(kept, "d", torch.zeros(10000), 1, 1)
    assert list(kept) == ["d"]


def test_a_process_holds_what_its_prompts_take_whatever_the_number_of_particles():
    pipe, call = build("flux")
    call.pop("prompt")
    prompts = [f"prompt {i}" for i in range(4)]
    process = steer.from_pipeline(pipe, steps=3, prompt=prompts, **call)
    embeddings = pipe.encode_prompt(prompt=prompts, prompt_2=None, device="cpu", max_sequence_length=32)
    size = sum(part.numel() * part.element_size() for part in embeddings)
    process.denoise(states(process, 4, 16), 1)
    kept = process.denoiser.call.computed
    held = sum(condition_cache._bytes(kept[key][0]) for key in kept if key[0] == "encode_prompt" and key[3] == 16)
    assert 0 < held < 1.2 * size  # each prompt has its own position ids


def test_dropped_conditions_are_prepared_again_with_the_same_result(monkeypatch):
    pipe, call = build("sd15")
    call["prompt"] = ["a cat", "two dogs", "a bird"]
    process = steer.from_pipeline(pipe, steps=3, chunk=2, **call)
    x = states(process, 3, 2)
    expected = process.denoise(x, 1)
    monkeypatch.setattr(condition_cache, "LIMIT_BYTES", 1)
    bounded = steer.from_pipeline(pipe, steps=3, chunk=2, **call)
    for _ in range(2):
        assert torch.equal(bounded.denoise(x, 1), expected)
    assert len(bounded.denoiser.call.computed) == 1
