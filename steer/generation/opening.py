"""Models by name, folder or object, as one function of a prompt and call arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import ModelError, SteerError
from ..models.embedded import NAMES, emoji_pipeline, load
from ..pipelines.from_pipeline import from_pipeline
from ..pipelines.hub import load_pipeline
from ..processes.transitions import DDIM, ClippedPrediction
from ..types import ReverseProcess, Rule
from .prompts import OWNED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Opener = Callable[..., ReverseProcess]
"""(prompt=, and arguments of the model's call) -> the process of that prompt."""


def opener(model: Any, *, steps: int | None, device: str | None, dtype: str, download: bool) -> Opener:
    """A model, loaded, as a function of prompt and call arguments; `steer.Generator` says what a model may be.

    Raises:
        ModelError: there is no such model, or the steps are not those of a process.
    """
    if dtype not in DTYPES:
        raise SteerError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if isinstance(model, str) and model in NAMES:
        return _embedded(model, steps, device or "cpu")
    chosen = {} if steps is None else {"steps": steps}
    if isinstance(model, str | Path):
        if not Path(model).is_dir() and str(model).count("/") != 1:
            raise ModelError(
                f"there is no folder {str(model)!r}, and no embedded model of that name; embedded are "
                f"{', '.join(NAMES)}, and a repository of the hub is owner/name"
            )
        pipe = load_pipeline(model, dtype=DTYPES[dtype], device=device, local_files_only=not download)
        return _Pipeline(pipe, chosen)
    if hasattr(model, "denoise"):
        if steps is not None and steps != model.steps:
            raise ModelError(f"the process has {model.steps} steps, and {steps} were asked for; leave steps out")
        return lambda: cast(ReverseProcess, model)
    if hasattr(model, "scheduler"):
        return _Pipeline(model, chosen)
    if callable(model):
        return cast(Opener, model)
    raise ModelError(
        f"a model is an embedded name, a folder, owner/name, a pipeline, a process or a function, got {model!r}"
    )


def accepted(opened: Opener) -> list[str]:
    """Names of the arguments that rows may give: those of the model's call, without what steer decides."""
    parameters = inspect.signature(opened).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.name != "self" and p.name not in OWNED]


def _embedded(name: str, steps: int | None, device: str) -> Opener:
    if name == "emoji":
        return _Pipeline(emoji_pipeline(device), {"steps": steps or 20, "transition": DDIM()}, guidance_scale=3.0)

    def labelled(label: int | None = None, guidance_scale: float = 1.0) -> ReverseProcess:
        return load(name, labels=label, guidance_scale=guidance_scale, device=device, steps=steps)

    def unlabelled() -> ReverseProcess:
        return load(name, device=device, steps=steps)

    return unlabelled if name == "letters" else labelled


class _Pipeline:
    """Opens a pipeline for a row. Its signature is the pipeline's."""

    def __init__(self, pipe: Any, options: dict[str, Any], **call: Any) -> None:
        self.pipe, self.options, self.call = pipe, options, call
        self.__signature__ = inspect.signature(type(pipe).__call__)
        self.rule: Rule | None = None

    def __call__(self, **call: Any) -> ReverseProcess:
        process = from_pipeline(self.pipe, **{"transition": self.rule, **self.options}, **{**self.call, **call})
        # Given back, so that what replaces the scheduler is said once, and not for every row.
        self.rule = process.rule.rule if isinstance(process.rule, ClippedPrediction) else process.rule
        return process
