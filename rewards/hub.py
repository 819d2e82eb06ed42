"""Packages that only some rewards need, and weights from the hub, which nobody downloads by accident."""

from __future__ import annotations

import importlib
from typing import Any

from steer.errors import RewardError


def optional(module: str, extra: str) -> Any:
    """The module, imported; RewardError with the one line that installs it where it is missing.

    module: dotted name. extra: the extra of steer that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(
            f"this reward needs the package {module.partition('.')[0]}, which cannot be imported ({error}); "
            f"install it with: pip install 'steer-diffusion[{extra}]'"
        ) from error


def from_hub(loader: Any, name: str, *, download: bool = False, **options: Any) -> Any:
    """`loader.from_pretrained(name)`: of a folder, of what is already in the hub's cache, or downloaded if asked.

    loader: a class of transformers. name: a hub id or a folder. options: for from_pretrained. Weights are read from
    safetensors files only, which hold no code. Raises RewardError naming the id and the cure.
    """
    try:
        return loader.from_pretrained(name, local_files_only=not download, **options)
    except (OSError, ValueError) as error:
        cure = (
            "look at the id, the network and the licence that its page may ask to accept"
            if download
            else "pass download=True to fetch it from the Hugging Face hub, or a folder that holds it"
        )
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(f"{loader.__name__} cannot load {name!r}: {reason}; {cure}") from error
