"""What a command is about: a model, opened for a prompt, and rewards. A saved run says it, so that it opens again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

from .inputs import metrics_of, open_model, open_reward


@dataclass(frozen=True)
class Subject:
    """A model and rewards as they were given on the command line."""

    model: str
    reward: tuple[str, ...]
    prompt: str | None
    call: tuple[str, ...]
    steps: int | None
    label: int | None
    dtype: str

    @classmethod
    def given(
        cls,
        model: str,
        reward: Sequence[str],
        prompts: Sequence[str] | None,
        call: Sequence[str] | None,
        steps: int | None,
        label: int | None,
        dtype: str,
    ) -> Subject:
        """That of a command that takes one prompt."""
        if len(prompts or ()) > 1:
            raise typer.BadParameter("one prompt at a time here; several make a run directory", param_hint="--prompt")
        return cls(model, tuple(reward), prompts[0] if prompts else None, tuple(call or ()), steps, label, dtype)

    @classmethod
    def saved(cls, facts: Mapping[str, Any], steps: int) -> Subject:
        """That of a saved run, from its facts."""
        reward, call = facts["reward"], tuple(facts.get("call") or ())
        rewards = (reward,) if isinstance(reward, str) else tuple(reward)
        return cls(
            facts["model"], rewards, facts.get("prompt"), call, steps, facts.get("label"), facts.get("dtype") or "fp32"
        )

    @property
    def title(self) -> str:
        """In words, for a page."""
        return f"{' + '.join(self.reward)} on {self.model}"

    def facts(self) -> dict[str, Any]:
        """For the files of a run; None is what was not given."""
        reward: Any = self.reward[0] if len(self.reward) == 1 else list(self.reward)
        asked = {"model": self.model, "reward": reward, "prompt": self.prompt, "call": list(self.call) or None}
        return asked | {"label": self.label, "dtype": None if self.dtype == "fp32" else self.dtype}

    def open(self, device: str, *, download: bool = False) -> tuple[Any, Callable[..., Any]]:
        """The process and the reward."""
        given: dict[str, Any] = {"prompt": self.prompt, "call": self.call, "dtype": self.dtype, "download": download}
        process = open_model(self.model, self.steps, self.label, device, **given)
        return process, open_reward(self.reward, process)

    def metrics(self, reward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Measures beside the reward."""
        return metrics_of(self.reward[0], reward)
