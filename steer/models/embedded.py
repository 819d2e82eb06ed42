"""The small pretrained models that ship with steer, loaded the way a downloaded one is."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

import torch

from ..errors import ModelError
from ..process import GaussianProcess
from ..types import Rule
from .pipeline import from_pipeline

_NAMES = ("digits", "digits-flow")


def load(
    name: str,
    *,
    steps: int = 50,
    transition: Rule | None = None,
    labels: int | Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> GaussianProcess:
    """The process of an embedded pretrained model.

    name:   "digits", a class-conditional DDPM of 8x8 scanned digits, or "digits-flow", its rectified-flow twin.
    labels: digit to draw, one for all problems or one per problem; None for any digit.
    Other arguments as `steer.from_pipeline`, through which it is loaded. Images are (M, 1, 8, 8) in [0, 1].
    """
    if name not in _NAMES:
        raise ModelError(f"no embedded model is called {name!r}; there are {', '.join(_NAMES)}")
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # two small files need no bar
    try:
        with as_file(files("steer") / "assets" / name) as folder:
            pipe = DDPMPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    pipe.unet.requires_grad_(False)
    return from_pipeline(
        pipe.to(device), steps=steps, transition=transition, class_labels=labels, guidance_scale=guidance_scale
    )
