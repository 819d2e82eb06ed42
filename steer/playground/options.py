"""What a visitor asked for, and the same as Python and as a command line."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import dataclass
from typing import Any

from ..core.temperature import Temperature
from ..errors import SteerError
from ..evaluation.methods import resolve

KEEP = 16
"""Samples that a search keeps, and pictures that are shown: the same as `steer generate`."""


@dataclass(frozen=True)
class Options:
    """One run.

    Args:
        model: name of an embedded model, a folder, or "owner/name" of the hub.
        reward: specifications, which are summed.
        method: its name.
        budget: network rows, never exceeded.
        temperature: divides the reward; or "auto".
        seed: of all noise.
        prompt: what the model is asked for; None for models without prompts.
        label: class of a class-conditional model; None for any.
        device: where the model goes.
    """

    model: str = "digits"
    reward: tuple[str, ...] = ("digit:3",)
    method: str = "smc"
    budget: int = 4000
    temperature: Temperature = 1.0
    seed: int = 0
    prompt: str | None = None
    label: int | None = None
    device: str = "cpu"

    @classmethod
    def read(
        cls,
        model: str | None,
        prompt: str | None,
        label: Any,
        reward: str | None,
        method: str | None,
        budget: Any,
        temperature: Any,
        seed: Any,
        device: str = "cpu",
    ) -> Options:
        """Those of a form: texts, numbers, and None or "" for what was left empty.

        Raises:
            SteerError: a field that is empty, or holds no number where one is needed; it says which.
        """
        rewards = tuple(line.strip() for line in (reward or "").splitlines() if line.strip())
        for name, value in (("model", model), ("reward", rewards), ("method", method)):
            if not value:
                raise SteerError(f"the field {name} is empty; choose one")
        resolve(str(method))
        return cls(
            str(model).strip(),
            rewards,
            str(method),
            _whole("budget", budget, least=1),
            _temperature(temperature),
            _whole("seed", seed, least=0),
            (prompt or "").strip() or None,
            None if label in (None, "") else _whole("label", label, least=0),
            device,
        )

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the model's call, beside the prompt."""
        return {} if self.label is None else {"label": self.label}

    @property
    def own(self) -> dict[str, Any]:
        """Options of the method that `steer generate` sets too."""
        return {"keep": KEEP} if "keep" in inspect.signature(resolve(self.method)).parameters else {}

    def python(self) -> str:
        """A program whose `result` is that of the run, to the last bit on the same machine."""
        given = {"reward": self.reward[0] if len(self.reward) == 1 else list(self.reward), "method": self.method}
        given |= {"budget": self.budget, "temperature": self.temperature, "seed": self.seed, "device": self.device}
        given |= {"options": self.own} if self.own else {}
        lines = "".join(f"    {name}={value!r},\n" for name, value in given.items())
        row = ["0", *([] if self.prompt is None else [repr(self.prompt)])]
        row += [f"{name}={value!r}" for name, value in self.call.items()]
        return (
            f"import steer\n\ngenerator = steer.Generator(\n    {self.model!r},\n{lines})\n"
            f"result = generator.one({', '.join(row)})\nprint(result)\n"
        )

    def command(self) -> str:
        """The command line that makes the same samples, and files of them in runs/play."""
        words = ["steer", "generate", "--model", self.model]
        words += [] if self.prompt is None else [_flag("--prompt", self.prompt)]
        words += [] if self.label is None else ["--label", str(self.label)]
        words += [_flag("--reward", spec) for spec in self.reward]
        words += ["--method", self.method, "--budget", str(self.budget), "--temperature", str(self.temperature)]
        return shlex.join([*words, "--seed", str(self.seed), "--device", self.device, "--out", "runs/play"])


def _flag(name: str, value: str) -> str:
    """One word, so that a value that begins with a dash is none of the command's flags."""
    return f"{name}={value}"


def _whole(name: str, value: Any, least: int) -> int:
    """A whole number of a form."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if number != number or number % 1 or number < least:
        raise SteerError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(number)


def _temperature(value: Any) -> Temperature:
    """A temperature of a form: a positive number, or "auto"."""
    if str(value).strip() == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise SteerError(f'temperature must be a positive number or "auto", got {value!r}')
    return number
