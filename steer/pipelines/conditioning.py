"""A pipeline's own call arguments: checked once, then selected for the problems in a batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .argument_division import Division, divided, possible_divisions
from .families import (
    BATCHED_ARGUMENTS,
    COUNTED_ARGUMENTS,
    PER_PROBLEM_ARGUMENTS,
    PROMPT_ARGUMENTS,
    SHARED_ARGUMENTS,
)

_OWNED_BY_SAMPLERS = {
    "num_inference_steps": "give steps= instead",
    "return_dict": "a sampler returns a Result",
    "callback_on_step_end": "give the sampler on_step=",
    "callback": "give the sampler on_step=",
    "callback_steps": "give the sampler on_step=",
    "batch_size": "give the sampler batch= and particles=",
}


class Conditioning:
    """The arguments of a pipeline's call, checked against its signature.

    Args:
        pipe: The pipeline.
        call: The user's arguments by name.
        steps: Number of inference steps.

    Attributes:
        problems: Number of prompts, or of other inputs given per prompt; None where the pipeline takes none.
        prompts: Their texts, or None.
        given: The user's arguments, as they were given.
        steps: Number of inference steps.
        latents: Latents given to start from, one row per problem, in the pipeline's own form; or None.
        division: How each argument is divided among problems, by name; those that are not in it are shared.
        undecided: Arguments that may be shared or hold an entry per problem, which their names do not tell: in how many
            ways each may be divided. `several_problems.divide_arguments` settles them.

    Raises:
        ModelError: For arguments that the pipeline does not take, or that belong to the sampler.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], steps: int):
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        _check(type(pipe).__name__, self.parameters, call)
        self.given, self.steps = dict(call), steps
        self._call = {name: value for name, value in call.items() if name not in ("generator", "latents")}
        if "num_inference_steps" in self.parameters:
            self._call["num_inference_steps"] = steps
        if "output_type" in self.parameters:
            self._call["output_type"] = "latent" if call.get("output_type") == "latent" else "pt"
        self._repeat = _repeat_argument(pipe, self.parameters)
        prompt = _prompt(call)
        self.prompts = None if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
        self.problems = _count(call)
        self.latents = _checked_latents(call.get("latents"), self.problems or 1)
        self.division: dict[str, Division] = {}
        self.undecided: dict[str, list[Division]] = {}
        for name, value in self._call.items():
            self._place(type(pipe).__name__, name, value, call)

    @property
    def accepts_rows(self) -> bool:
        """Whether one call can hold several rows; else every row is a call of its own."""
        listed = any(self._call.get(name) is not None for name in BATCHED_ARGUMENTS)
        return self._repeat is not None or "batch_size" in self.parameters or listed

    @property
    def wants_latents(self) -> bool:
        """Whether the user asked for output_type="latent", so that nothing is decoded."""
        return self._call.get("output_type") == "latent"

    def arguments(self, problems: tuple[int, ...], rows_each: int) -> dict[str, Any]:
        """The arguments of one call of the pipeline.

        Args:
            problems: Which problems the batch holds, in order.
            rows_each: Rows per problem.

        Returns:
            Arguments by name, for len(problems) * rows_each rows.
        """
        repeat = 1 if self._repeat else rows_each
        chosen = [b for b in problems for _ in range(repeat)]
        arguments = {name: self._select(name, value, chosen) for name, value in self._call.items()}
        if self._repeat:
            arguments[self._repeat] = rows_each
        elif "batch_size" in self.parameters:
            arguments["batch_size"] = rows_each
        return arguments

    def undivided(self) -> dict[str, Any]:
        """The arguments of the user's own call, with all problems and one row of each."""
        return {**self._call, self._repeat: 1} if self._repeat else dict(self._call)

    def _place(self, kind: str, name: str, value: Any, call: Mapping[str, Any]) -> None:
        """Note how an argument is divided, or that its name does not tell."""
        problems = self.problems or 1
        listed = isinstance(value, list)
        found = possible_divisions(value, problems)
        named = name.startswith(PER_PROBLEM_ARGUMENTS) or name == _counted(call)
        if named and _entries(value) not in (None, 1, problems):
            raise ModelError(
                f"{kind} got {problems} prompt(s) and {_entries(value)} entries of {name}; give one entry per "
                "prompt, or one for all"
            )
        if named and "entries" in found:
            self.division[name] = "entries"
        elif problems == 1 and listed and len(value) == 1 and (named or (not self._repeat and "image" in name)):
            self.division[name] = "entries"  # repeated for every row of a call
        elif name not in SHARED_ARGUMENTS and found:
            self.undecided[name] = found

    def _select(self, name: str, value: Any, chosen: list[int]) -> Any:
        """The entries of an argument for the chosen problems; the whole argument where it has none per problem."""
        if isinstance(value, str) and not self._repeat and name.startswith(PER_PROBLEM_ARGUMENTS) and "prompt" in name:
            return [value] * len(chosen) if self.problems else value
        return divided(value, self.division.get(name, "whole"), chosen, self.problems or 1)


def _entries(value: Any) -> int | None:
    """Number of texts, embeddings or labels in a value; None where it is neither a list nor a tensor of them."""
    if torch.is_tensor(value):
        return len(value) if value.ndim > 1 else None
    texts = isinstance(value, list) and all(isinstance(entry, (str, int, Tensor)) for entry in value)
    return len(value) if texts else None


def _check(kind: str, parameters: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Raises ModelError for arguments that are not the pipeline's, or that the sampler sets."""
    unknown = sorted(set(call) - set(parameters))
    if unknown:
        accepted = [name for name in parameters if name != "self"]
        raise ModelError(f"{kind} takes no argument {', '.join(unknown)}; it takes {', '.join(accepted)}")
    for name in call:
        if _repeats(name):
            raise ModelError(f"{name} is not an argument of a process; give the sampler particles= instead")
        if name in _OWNED_BY_SAMPLERS:
            raise ModelError(f"{name} is not an argument of a process; {_OWNED_BY_SAMPLERS[name]}")
    if isinstance(call.get("generator"), list):
        raise ModelError(
            f"{kind} takes at most one generator here, for what it draws before its loop, got a list of "
            f"{len(call['generator'])}; the noise of every particle follows from the sampler's key="
        )


def _checked_latents(latents: Any, problems: int) -> Tensor | None:
    """The user's latents [B, ...]; raises ModelError unless there is one row per problem."""
    if latents is None or (torch.is_tensor(latents) and len(latents) == problems):
        return latents
    given = f"of shape {tuple(latents.shape)}" if torch.is_tensor(latents) else f"of type {type(latents).__name__}"
    raise ModelError(
        f"latents= takes one starting point per prompt, a tensor of {problems} row(s) shared by all particles of that "
        f"prompt; got latents {given}; to start each particle at latents of its own, open the pipeline without "
        "them and give the sampler start=steer.from_latents(latents)"
    )


def _repeat_argument(pipe: Any, parameters: Mapping[str, Any]) -> str | None:
    """The argument that asks for several rows per prompt; None where there is none and prompts are repeated instead.

    Some pipelines (CogVideoX, AnimateDiff) take the argument and overwrite it by 1, which only their source shows.
    """
    name = next((name for name in parameters if _repeats(name)), None)
    source = inspect.getsource(inspect.unwrap(type(pipe).__call__))
    return None if name is None or re.search(rf"^\s*{name} = 1$", source, re.MULTILINE) else name


def _repeats(name: str) -> bool:
    """Whether an argument is num_images_per_prompt or one like it."""
    return name.startswith("num_") and name.endswith("_per_prompt")


def _prompt(call: Mapping[str, Any]) -> Any:
    """The prompt or list of prompts in a call, or None."""
    return next((call[name] for name in PROMPT_ARGUMENTS if call.get(name) is not None), None)


def _counted(call: Mapping[str, Any]) -> str | None:
    """The argument whose length is the number of problems where there are no prompts, or None."""
    if _prompt(call) is not None:
        return None
    return next((name for name in (*COUNTED_ARGUMENTS, "image") if call.get(name) is not None), None)


def _count(call: Mapping[str, Any]) -> int | None:
    """Number of problems in a call: of its prompts, their embeddings or class labels, else of its images."""
    prompt, name = _prompt(call), _counted(call)
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    if name is None:
        return None
    several = isinstance(call[name], list) or name != "image" or getattr(call[name], "ndim", 0) == 4
    return len(call[name]) if several else 1
