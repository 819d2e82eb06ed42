"""Optional packages, and models from the Hugging Face hub, of which nothing is downloaded unless asked."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer.errors import RewardError

if TYPE_CHECKING:
    import torch

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def optional_package(module: str, extra: str) -> Any:
    """A module of a package that only some rewards need.

    Args:
        module: dotted name.
        extra: the extra of steer-diffusion that installs it.

    Returns:
        The module, imported.

    Raises:
        RewardError: with the line that installs the package, where it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(
            f"this reward needs the package {module.partition('.')[0]}, which cannot be imported ({error}); "
            f"install it with: pip install 'steer-diffusion[{extra}]'"
        ) from error


def refuse_lfs_pointer(path: str | os.PathLike[str]) -> None:
    """Refuses the few lines that git leaves in place of a large file where git-lfs is not installed.

    Args:
        path: of a file; or of a folder, whose files are looked at.

    Raises:
        RewardError: naming the file and the cure.
    """
    whole = Path(path)
    for file in sorted(whole.iterdir()) if whole.is_dir() else [whole]:
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            begins = opened.read(len(_LFS_POINTER))
        if begins == _LFS_POINTER:
            raise RewardError(
                f"{file} is not the file but git-lfs's pointer to it; run `git lfs install` and `git lfs pull` in its "
                "repository, or download the file itself"
            )


def from_hub(loader: Any, name: str, *, download: bool = False, **options: Any) -> Any:
    """`loader.from_pretrained(name)`, from a folder, from the hub's cache, or downloaded if asked.

    Callers that load weights pass use_safetensors=True: such files hold no code.

    Args:
        loader: a class of transformers.
        name: a hub id or a folder.
        download: whether to fetch what is not in the cache.
        options: further arguments of from_pretrained.

    Returns:
        What the loader makes of it.

    Raises:
        RewardError: giving the id and the cure, and for a folder that holds pointers of git-lfs.
    """
    if Path(name).is_dir():
        refuse_lfs_pointer(name)
    try:
        return loader.from_pretrained(name, local_files_only=not download, **options)
    except (OSError, ValueError) as error:
        cure = (
            "check the id, your connection, and whether its page asks you to accept a licence"
            if download
            else "pass download=True to fetch it from the Hugging Face hub, or a folder that holds it"
        )
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(f"{loader.__name__} cannot load {name!r}: {reason}; {cure}") from error


def model_and_processor(
    reward: str,
    model: Any,
    processor: Any,
    *,
    model_class: Callable[[Any], Any],
    processor_class: Callable[[Any], Any],
    download: bool,
    device: torch.device | str,
    processor_name: str = "processor",
    **options: Any,
) -> tuple[Any, Any]:
    """A frozen model of transformers and its processor (or tokenizer): as given, or loaded by the model's id.

    Args:
        reward: name of the reward, for messages.
        model: a model, or a hub id or folder.
        processor: its processor; None to load it too.
        model_class: from the module transformers to the class that loads the model.
        processor_class: the same for the processor.
        download: as in `from_hub`.
        device: where to put a model that is loaded.
        processor_name: what messages call the processor.
        options: further arguments of the model's from_pretrained.

    Returns:
        The model, in evaluation mode and without gradients to its weights, and the processor.

    Raises:
        RewardError: for a missing package or weights, or a model given without its processor.
    """
    if isinstance(model, str):
        transformers = optional_package("transformers", "vlm")
        name = model
        processor = processor or from_hub(processor_class(transformers), name, download=download)
        loader = model_class(transformers)
        model = from_hub(loader, name, download=download, use_safetensors=True, **options).to(device)
    if processor is None:
        raise RewardError(
            f"{reward}(model) needs the model's {processor_name} too, got no {processor_name}; pass both, or a hub "
            "id as the model"
        )
    return model.eval().requires_grad_(False), processor
