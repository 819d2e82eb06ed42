"""Rewards by name, for the command line and for configuration files."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from steer.errors import RemoteError, RewardError

from .digit_probability import DigitLogProb
from .file_size import JPEGSize, PNGSize
from .pixel_statistics import Ink, Saturation, Sharpness, Symmetry
from .pretrained.aesthetic import Aesthetic
from .pretrained.clip_emoji import clip_emoji
from .pretrained.clip_score import CLIPScore
from .pretrained.hps import HPS
from .pretrained.image_reward import ImageReward
from .pretrained.pick_score import PickScore
from .remote.client import Remote
from .scoring import Scorer
from .text import LetterCount, Matches, ToText
from .weighted_sum import weighted
from .wrappers import per_frame


def from_spec(spec: str, text: ToText | None = None) -> Scorer:
    """The reward that a text "name" or "name:argument" stands for.

    Args:
        spec: one of

            digit:3  digit:1,7  digit:even  digit:odd   log-probability of the digit, or of any of them, in nats
            ink  ink:-1                                 mean brightness times the argument (1)
            symmetry  symmetry:vertical                 horizontal (the default): left and right; vertical: top, bottom
            sharpness  saturation                       variance of the Laplacian; mean saturation
            jpeg  jpeg:-  jpeg:+                        small files ("-", the default) or large ones, in kB
            png  png:-  png:+                           the same for lossless files
            clip  hps  pickscore  imagereward           fit to the process's own prompts, by pretrained networks
            aesthetic                                   rating of an image, about 1 to 10
            clip-emoji                                  the same by the small network for the model emoji
            clip:download  clip:FILE                    for these five: fetch what is not in the hub's cache; weights
                                                        from a file
            frames:jpeg  frames:clip:FILE               of a video: the mean over its frames of a reward of images
            letters:e  letters:aeiou                    how often these letters occur, for models of text
            matches:.*ing                               1 for texts that a regular expression matches, else 0
            remote:http://127.0.0.1:8000                of `steer serve-reward`; its token from STEER_REWARD_TOKEN
            remote:http://127.0.0.1:8000/NAME           the same, where it serves several

        text: decodes samples to strings, for `letters` and `matches` (pass `process.text`).

    Returns:
        The reward.

    Raises:
        RewardError: for an unknown name, listing the choices; for a bad argument, with the forms it may have; and for
            a reward of text where `text` is None.
        RemoteError: where a remote reward cannot be reached.
    """
    if not isinstance(spec, str):
        raise RewardError(
            f'from_spec takes a text such as "digit:3", got {spec!r}; give other rewards to samplers as they are'
        )
    name, _, argument = spec.strip().partition(":")
    if name not in _BUILDERS:
        raise RewardError(_unknown(spec, name))
    build, form = _BUILDERS[name]
    if name in ("letters", "matches"):
        if text is None:
            raise RewardError(
                f"the reward {spec!r} reads text, and this model's samples are none; use a model of text "
                "(--model letters), or pass text=..., a function from samples to strings"
            )
        build = partial(build, text=text)
    try:
        return build(argument.strip())
    except RemoteError:  # nothing is wrong with the text
        raise
    except (KeyError, ValueError) as error:  # RewardError is a ValueError: its text says what was wrong
        detail = f" ({error})" if isinstance(error, RewardError) else f", got {argument.strip()!r} as its argument"
        raise RewardError(f"the reward {spec!r} must have the form {form}{detail}") from error


def from_specs(specs: Sequence[str | Scorer], text: ToText | None = None) -> Scorer:
    """The sum of several rewards, each as a reward or as "name", "0.5*name", or "0.02 nat/kB*name" where units differ.

    Args:
        specs: rewards and specifications of `from_spec`, with a weight before a star; or "package.module:name", a
            reward of your own, or a class or function without arguments that makes one.
        text: as `from_spec`.

    Returns:
        The reward itself where there is one of weight 1; else their `weighted` sum.

    Raises:
        RewardError: as `from_spec` and `weighted`; and for a weight that is no number, and a name that cannot be
            imported.
    """
    terms = [_weighted_term(spec, text) for spec in specs]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 and len(terms[0]) == 2 else weighted(*terms)


def _weighted_term(spec: str | Scorer, text: ToText | None) -> tuple[float, Scorer] | tuple[float, Scorer, str]:
    if not isinstance(spec, str):
        return 1.0, spec
    found = re.fullmatch(r"\s*(?P<weight>[-+0-9.eE]+)\s*(?P<rate>[^*\s]*)\s*\*(?P<name>.*)", spec)
    name = (found["name"] if found else spec).strip()
    module, _, attribute = name.partition(":")
    own = module not in _BUILDERS and attribute.isidentifier() and ("." in module or find_spec(module) is not None)
    reward = _imported(module, attribute) if own else from_spec(name, text)
    if not found:
        return 1.0, reward
    try:
        weight = float(found["weight"])
    except ValueError as error:
        raise RewardError(
            f"the weight of {spec!r} must be a number, as in 0.5*clip; got {found['weight']!r}"
        ) from error
    return (weight, reward, found["rate"]) if found["rate"] else (weight, reward)


def _imported(module: str, attribute: str) -> Scorer:
    """A reward of the user's own, or what their class or function of no arguments makes."""
    try:
        found: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"no reward {module}:{attribute} can be imported ({error}); is its folder on PYTHONPATH?"
        ) from error
    try:
        makes = inspect.isclass(found) or not inspect.signature(found).parameters
    except (TypeError, ValueError):
        makes = False
    return cast(Scorer, found() if makes else found)


def _unknown(spec: str, name: str) -> str:
    """The message for an unknown name: close names, and all choices one a line."""
    close = [known for known in _BUILDERS if known in name.lower()] or get_close_matches(name.lower(), _BUILDERS, n=2)
    suggestion = f"; did you mean {' or '.join(close)}?" if close else "."
    choices = "\n".join(f"  {form}" for _, form in _BUILDERS.values())
    return f"unknown reward {spec!r}{suggestion} Choose one of\n{choices}"


def _digit(argument: str) -> Scorer:
    named = {"even": range(0, 10, 2), "odd": range(1, 10, 2)}
    return DigitLogProb(named[argument] if argument in named else [int(digit) for digit in argument.split(",")])


def _ink(argument: str) -> Scorer:
    return weighted((float(argument), Ink())) if argument else Ink()


def _symmetry(argument: str) -> Scorer:
    return {"": Symmetry(), "horizontal": Symmetry("horizontal"), "vertical": Symmetry("vertical")}[argument]


def _sharpness(argument: str) -> Scorer:
    return {"": Sharpness()}[argument]


def _saturation(argument: str) -> Scorer:
    return {"": Saturation()}[argument]


def _jpeg(argument: str) -> Scorer:
    return JPEGSize(sign=_SIGNS[argument])


def _png(argument: str) -> Scorer:
    return PNGSize(sign=_SIGNS[argument])


def _pretrained(name: str, make: Callable[..., Scorer], weights: str) -> tuple[Callable[[str], Scorer], str]:
    """The builder and the form of a pretrained reward. weights: the name of its argument for a file (or a folder)."""

    def build(argument: str) -> Scorer:
        if argument in ("", "download"):
            return make(download=argument == "download")
        if Path(argument).exists():
            return make(**{weights: argument})
        raise RewardError(f"there is no file {argument!r}, and prompts come from the process, not from the reward")

    return build, f"{name} | {name}:download | {name}:FILE"


def _clip_emoji(argument: str) -> Scorer:
    return {"": clip_emoji}[argument]()


def _frames(argument: str) -> Scorer:
    return per_frame(from_spec(argument))


def _letters(argument: str, text: ToText) -> Scorer:
    if not argument:
        raise RewardError("no letters were given")
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
    "sharpness": (_sharpness, "sharpness"),
    "saturation": (_saturation, "saturation"),
    "jpeg": (_jpeg, "jpeg | jpeg:- | jpeg:+"),
    "png": (_png, "png | png:- | png:+"),
    "clip-emoji": (_clip_emoji, "clip-emoji"),
    "clip": _pretrained("clip", CLIPScore, "weights"),
    "hps": _pretrained("hps", HPS, "weights"),
    "pickscore": _pretrained("pickscore", PickScore, "model"),
    "imagereward": _pretrained("imagereward", ImageReward, "weights"),
    "aesthetic": _pretrained("aesthetic", Aesthetic, "head"),
    "frames": (_frames, "frames:NAME"),
    "letters": (_letters, "letters:e | letters:aeiou"),
    "matches": (_matches, "matches:.*ing"),
    "remote": (_remote, "remote:http://HOST:PORT | remote:http://HOST:PORT/NAME"),
}
