"""`steer.load`: the small pretrained models that ship with steer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import Any, cast

import torch

from ..errors import ModelError
from ..files import check_digests
from ..pipelines.from_pipeline import from_pipeline
from ..processes.gaussian import GaussianProcess
from ..processes.masked import MaskedProcess
from ..processes.transitions import DDIM
from ..processes.unmasking import UnmaskRule
from ..torch_modes import lasting
from ..types import Rule
from .letters import LettersNet, letters_process

_DIGITS = ("digits", "digits-flow")
NAMES = ("emoji", *_DIGITS, "letters")


def load(
    name: str,
    *,
    steps: int | None = None,
    transition: Rule | UnmaskRule | None = None,
    labels: int | Sequence[int] | None = None,
    guidance_scale: float | None = None,
    prompt: str | Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load an embedded pretrained model as a process.

    Args:
        name: "emoji", a StableDiffusionPipeline of 64x64 emoji; "digits", a class-conditional DDPM of 8x8 scanned
            digits; "digits-flow", its rectified-flow twin; or "letters", a masked model of English words of 3 to 8
            letters.
        steps: Number of steps; 20 by default for emoji, 50 for digits, and 8 for letters, one letter a step.
        transition: A rule of the model's kind: `steer.ddim(...)` and others for digits, `steer.unmask(...)` for
            letters, by default in a random order.
        labels: Digit to draw, one for all problems or one per problem (axis 0); None for any digit.
        guidance_scale: As `steer.from_pipeline`; 3 by default for emoji, and 1, which is none, for digits.
        prompt: What emoji is asked for: a text, or one for each problem.
        device: Where the network goes.

    Returns:
        A GaussianProcess, which decodes to images [M, 3, 64, 64] (emoji) or [M, 1, 8, 8] in [0, 1]; or for "letters" a
        MaskedProcess of tokens [M, 8], 0 to 25 for a to z and 26 after the end of the word, which `Result.texts` shows
        as words.

    Raises:
        ModelError: For other names, for arguments that a model does not take, and where a file of the model is not the
            one that was packed.
    """
    if name == "emoji":
        if labels is not None or prompt is None:
            raise ModelError('emoji takes a prompt and no labels, as in load("emoji", prompt="a red heart")')
        return from_pipeline(
            emoji_pipeline(device),
            steps=20 if steps is None else steps,
            transition=cast("Rule | None", transition) or DDIM(),
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            guidance_scale=3.0 if guidance_scale is None else guidance_scale,
        )
    if prompt is not None:
        raise ModelError(f"{name} takes no prompt; of the embedded models, emoji does")
    if name == "letters":
        if labels is not None or guidance_scale not in (None, 1.0):
            raise ModelError("letters has no classes; leave out labels and guidance_scale, which are for the digits")
        return _letters(8 if steps is None else steps, cast("UnmaskRule | None", transition), device)
    if name not in _DIGITS:
        raise ModelError(f"no embedded model is called {name!r}; use one of {', '.join(NAMES)}, or steer.from_hub(...)")
    return _digits(
        name,
        device,
        steps=50 if steps is None else steps,
        transition=cast("Rule | None", transition) or DDIM(),
        class_labels=labels,
        guidance_scale=1.0 if guidance_scale is None else guidance_scale,
    )


@lasting()
def emoji_pipeline(device: torch.device | str = "cpu") -> Any:
    """The StableDiffusionPipeline that ships with steer, to be opened for one prompt after another."""
    from ..pipelines.hub import load_pipeline

    with as_file(files("steer") / "assets" / "emoji") as folder, _without_progress_bar():
        check_digests(folder)
        return load_pipeline(folder, device=device, local_files_only=True)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Loads without diffusers' progress bar, which is for large files."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@lasting()
def _digits(name: str, device: torch.device | str, **options: Any) -> GaussianProcess:
    """A digits model through `steer.from_pipeline`."""
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    with as_file(files("steer") / "assets" / name) as folder, _without_progress_bar():
        check_digests(folder)
        pipe = DDPMPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    pipe.unet.requires_grad_(False)
    return from_pipeline(pipe.to(device), **options)


@lasting()
def _letters(steps: int, transition: UnmaskRule | None, device: torch.device | str) -> MaskedProcess:
    """The letters model from its own files."""
    from safetensors.torch import load as from_safetensors

    folder = files("steer") / "assets" / "letters"
    check_digests(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    network = LettersNet(**{name: config[name] for name in ("width", "heads", "hidden", "layers")})
    weights = from_safetensors((folder / "model.safetensors").read_bytes())
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})  # stored in float16
    return letters_process(network.to(device).eval().requires_grad_(False), steps, transition, device)
