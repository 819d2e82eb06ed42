"""Rewards by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from steer.errors import RewardError

from .calling import Scorer
from .classifier import DigitLogProb
from .compose import weighted
from .image import Ink, JPEGSize, Symmetry


def from_spec(spec: str) -> Scorer:
    """The reward that a spec "name" or "name:argument" stands for.

    digit:3  digit:1,7  digit:even  digit:odd   log-probability of the digit, or of any of the digits, in nats
    ink  ink:-1                                 mean brightness times the argument (1)
    symmetry  symmetry:vertical                 horizontal (the default): left-right mirror; vertical: top-bottom
    jpeg  jpeg:-  jpeg:+                        small files ("-", the default) or large ones, in kB

    Raises RewardError that lists the names for an unknown one, and what an argument may be for a bad one.
    """
    name, _, argument = spec.strip().partition(":")
    if name not in _BUILDERS:
        raise RewardError(f"unknown reward {spec!r}; there are {', '.join(form for _, form in _BUILDERS.values())}")
    build, form = _BUILDERS[name]
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
    return JPEGSize(sign={"": -1, "-": -1, "+": 1}[argument])


_BUILDERS: dict[str, tuple[Callable[[str], Scorer], str]] = {
    "digit": (_digit, "digit:3 | digit:1,7 | digit:even | digit:odd"),
    "ink": (_ink, "ink | ink:-1"),
    "symmetry": (_symmetry, "symmetry | symmetry:horizontal | symmetry:vertical"),
    "jpeg": (_jpeg, "jpeg | jpeg:- | jpeg:+"),
}
