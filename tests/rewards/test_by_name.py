"""Rewards by name."""

from __future__ import annotations

import re

import pytest
import torch

from steer.errors import RewardError, ShapeError
from steer.rewards import (
    HPS,
    Aesthetic,
    CLIPScore,
    DigitLogProb,
    ImageReward,
    Ink,
    JPEGSize,
    PickScore,
    PNGSize,
    Saturation,
    Sharpness,
    Symmetry,
    from_spec,
    from_specs,
)


@pytest.mark.parametrize(
    ("spec", "reward"),
    [
        ("digit:3", DigitLogProb(3)),
        ("digit:1,7", DigitLogProb((1, 7))),
        ("digit:even", DigitLogProb((0, 2, 4, 6, 8))),
        ("digit:odd", DigitLogProb((1, 3, 5, 7, 9))),
        (" ink ", Ink()),
        ("symmetry", Symmetry("horizontal")),
        ("symmetry:horizontal", Symmetry("horizontal")),
        ("symmetry:vertical", Symmetry("vertical")),
        ("jpeg", JPEGSize(sign=-1)),
        ("jpeg:-", JPEGSize(sign=-1)),
        ("jpeg:+", JPEGSize(sign=1)),
        ("png", PNGSize(sign=-1)),
        ("png:+", PNGSize(sign=1)),
        ("sharpness", Sharpness()),
        ("saturation", Saturation()),
    ],
)
def test_specs_stand_for_rewards(spec: str, reward):
    assert from_spec(spec) == reward


def test_ink_takes_a_weight():
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_spec("ink:-1")(images), -images.mean((1, 2, 3)))
    torch.testing.assert_close(from_spec("ink:2.5")(images), 2.5 * images.mean((1, 2, 3)))


def test_several_specs_are_summed_by_their_weights():
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    digit, ink = DigitLogProb(3)(images), Ink()(images)
    assert from_specs(["ink"]) == Ink()
    torch.testing.assert_close(from_specs(["0.5*ink"])(images), 0.5 * ink)
    torch.testing.assert_close(from_specs(["digit:3", "-2e-1 nat/1 * ink"])(images), digit - 0.2 * ink)
    torch.testing.assert_close(from_specs([Ink(), " 3 * ink"])(images), 4.0 * ink)
    with pytest.raises(RewardError, match="nat"):  # whose unit is another
        from_specs(["digit:3", "0.2*ink"])


@pytest.mark.parametrize("spec", ["beauty", "", ":3", "Digit:3"])
def test_an_unknown_name_lists_what_exists(spec: str):
    with pytest.raises(RewardError, match=f"unknown reward {spec!r}") as caught:
        from_spec(spec)
    listed = str(caught.value).splitlines()[1:]
    assert "  digit:3 | digit:1,7 | digit:even | digit:odd" in listed
    assert "  matches:.*ing" in listed
    assert len(listed) == 17
    assert len(set(listed)) == 17


@pytest.mark.parametrize(
    ("spec", "suggested"),
    [
        ("digits:3", "digit"),
        ("Digit:3", "digit"),
        ("CLIPScore", "clip"),
        ("symetry", "symmetry"),
        ("JPEGSize", "jpeg"),
        ("lettercount:e", "letters"),
    ],
)
def test_a_typo_is_answered_with_the_name_it_is_close_to(spec: str, suggested: str):
    with pytest.raises(RewardError, match=f"unknown reward '{spec}'; did you mean {suggested}\\? Choose one of"):
        from_spec(spec)


def test_a_reward_instead_of_its_name_is_an_error_that_says_so():
    with pytest.raises(RewardError, match=r"takes a text such as .*, got Ink\(\)"):
        from_spec(Ink())  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["letters:e", "matches:.*ing"])
def test_rewards_of_text_need_a_decoder(spec: str):
    with pytest.raises(RewardError, match=rf"'{re.escape(spec)}' reads text.*pass text=\.\.\."):
        from_spec(spec)


def test_frames_of_a_video_are_scored_one_by_one():
    video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([from_spec("jpeg")(frames).mean() for frames in video])
    assert torch.equal(from_spec("frames:jpeg")(video), expected)
    with pytest.raises(ShapeError, match="on the command line frames:NAME"):
        from_spec("clip-emoji")(video, prompts=["a", "b"])


@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("frames", "frames:NAME .*unknown reward"),
        ("digit", r"digit:3 \| digit:1,7 \| digit:even \| digit:odd"),
        ("digit:12", r"digit:3 .* \(label must be a digit 0 to 9 .*, got \[12\]\)"),
        ("digit:prime", "digit:3"),
        ("ink:dark", r"ink \| ink:-1"),
        ("ink:nan", r"ink \| ink:-1"),
        ("symmetry:both", "symmetry:vertical"),
        ("png:9", r"png \| png:- \| png:\+"),
        ("sharpness:2", "sharpness"),
        ("clip:a photo of a cat", r"clip \| clip:download .*no file 'a photo of a cat', and prompts come from the pro"),
        ("jpeg:95", r"jpeg \| jpeg:- \| jpeg:\+"),
    ],
)
def test_a_bad_argument_is_answered_with_the_form(spec: str, form: str):
    with pytest.raises(RewardError, match=f"the reward '{spec}' must have the form .*{form}"):
        from_spec(spec)


@pytest.mark.parametrize(
    ("name", "kind", "weights"),
    [
        ("clip", CLIPScore, "weights"),
        ("hps", HPS, "weights"),
        ("imagereward", ImageReward, "weights"),
        ("pickscore", PickScore, "model"),
        ("aesthetic", Aesthetic, "head"),
    ],
)
def test_pretrained_rewards_read_nothing_until_they_are_called(name, kind, weights, tmp_path):
    reward, fetched = from_spec(name), from_spec(f"{name}:download")
    assert type(reward) is type(fetched) is kind
    assert (reward.download, fetched.download) == (False, True)
    path = tmp_path / "weights.safetensors"
    path.touch()
    assert getattr(from_spec(f"{name}:{path}"), weights) == str(path)
    assert reward.spec.version != from_spec(f"{name}:{path}").spec.version
    assert reward.spec.prompts == (name != "aesthetic")
