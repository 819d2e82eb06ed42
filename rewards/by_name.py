"""Rewards by name, for the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from steer.errors import RewardError

from .digit_probability import DigitLogProb
from .file_size import JPEGSize, PNGSize
from .pixel_statistics import Ink, Saturation, Sharpness, Symmetry
from .pretrained.aesthetic import Aesthetic
from .pretrained.clip_score import CLIPScore
from .pretrained.hps import HPS
from .pretrained.image_reward import ImageReward
from .pretrained.pick_score import PickScore
from .remote.client import Remote
from .scoring import Scorer
from .text import LetterCount, Matches, ToText
from .weighted_sum import weighted


def from_spec(spec: str, text: ToText | None = None) -> Scorer:
    """The reward that a spec "name" or "name:argument" stands for.

    digit:3  digit:1,7  digit:even  digit:odd   log-probability of the digit, or of any of the digits, in nats
    ink  ink:-1                                 mean brightness times the argument (1)
    symmetry  symmetry:vertical                 horizontal (the default): left-right mirror; vertical: top-bottom
    sharpness  saturation                       variance of the Laplacian; mean saturation
    jpeg  jpeg:-  jpeg:+                        small files ("-", the default) or large ones, in kB
    png  png:-  png:+                           the same of lossless files
    clip  hps  pickscore  imagereward           fit to the process's own prompts, by pretrained networks
    aesthetic                                   rating of an image, about 1 to 10
    clip:download  clip:FILE                    of these five: fetch what is not in the hub's cache; weights from a file
    letters:e  letters:aeiou                    how often these letters occur, for models of text
    matches:.*ing                               1 for texts that a regular expression matches, else 0
    remote:http://127.0.0.1:8000                of `steer serve-reward`; its token from STEER_REWARD_TOKEN, if set

    text: decodes samples to strings, for the two of text (`process.text`).
    Raises RewardError that lists the names for an unknown one, and what an argument may be for a bad one.
    """
    name, _, argument = spec.strip().partition(":")
    if name not in _BUILDERS:
        raise RewardError(f"unknown reward {spec!r}; there are {', '.join(form for _, form in _BUILDERS.values())}")
    build, form = _BUILDERS[name]
    if name in ("letters", "matches"):
        if text is None:
            raise RewardError(f"the reward {spec!r} reads text, and this model's samples are none; try --model letters")
        build = partial(build, text=text)
    try:
        return build(argument.strip())
    except (KeyError, ValueError) as error:  # RewardError is a ValueError: its text says what was wrong
        detail = f" ({error})" if isinstance(error, RewardError) else ""
        raise RewardError(f"the reward {spec!r} must have the form {form}{detail}") from error


def _digit(argument: str) -> Scorer:
    classes = {"even": range(0, 10, 2), "odd": range(1, 10, 2)}
    return DigitLogProb(classes[argument] if argument in classes else [int(digit) for digit in argument.split(",")])


def _ink(argument: str) -> Scorer:
    return weighted((float(argument), Ink())) if argument else Ink()


def _symmetry(argument: str) -> Scorer:
    return {"": Symmetry(), "horizontal": Symmetry("horizontal"), "vertical": Symmetry("vertical")}[argument]


def _jpeg(argument: str) -> Scorer:
    return JPEGSize(sign=_SIGNS[argument])


def _png(argument: str) -> Scorer:
    return PNGSize(sign=_SIGNS[argument])


def _pretrained(name: str, make: Callable[..., Scorer], weights: str) -> tuple[Callable[[str], Scorer], str]:
    """The builder and the form of a pretrained reward. weights: what its argument for a file (or a folder) is."""

    def build(argument: str) -> Scorer:
        if argument in ("", "download"):
            return make(download=argument == "download")
        if Path(argument).exists():
            return make(**{weights: argument})
        raise RewardError(f"there is no file {argument!r}, and prompts come from the process, not from the reward")

    return build, f"{name} | {name}:download | {name}:FILE"


def _letters(argument: str, text: ToText) -> Scorer:
    if not argument:
        raise RewardError("which letters?")
    return LetterCount(argument, text)


def _matches(argument: str, text: ToText) -> Scorer:
    return Matches(argument, text)


def _remote(argument: str) -> Scorer:
    return Remote(argument, token=os.environ.get("STEER_REWARD_TOKEN"))


_SIGNS = {"": -1, "-": -1, "+": 1}


_BUILDERS: dict[str, tuple[Callable[..., Scorer], str]] = {
    "digit": (_digit, "digit:3 | digit:1,7 | digit:even | digit:odd"),
    "ink": (_ink, "ink | ink:-1"),
    "symmetry": (_symmetry, "symmetry | symmetry:horizontal | symmetry:vertical"),
    "sharpness": (lambda argument: {"": Sharpness()}[argument], "sharpness"),
    "saturation": (lambda argument: {"": Saturation()}[argument], "saturation"),
    "jpeg": (_jpeg, "jpeg | jpeg:- | jpeg:+"),
    "png": (_png, "png | png:- | png:+"),
    "clip": _pretrained("clip", CLIPScore, "weights"),
    "hps": _pretrained("hps", HPS, "weights"),
    "pickscore": _pretrained("pickscore", PickScore, "model"),
    "imagereward": _pretrained("imagereward", ImageReward, "weights"),
    "aesthetic": _pretrained("aesthetic", Aesthetic, "head"),
    "letters": (_letters, "letters:e | letters:aeiou"),
    "matches": (_matches, "matches:.*ing"),
    "remote": (_remote, "remote:http://HOST:PORT"),
}
