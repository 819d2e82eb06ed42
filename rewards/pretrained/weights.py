"""Files of network weights: found on disk or in the hub's cache, read as tensors only, and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import RewardError
from steer.torch_modes import lasting

from ..hub import optional_package


def weights_file(source: str | os.PathLike[str] | None, repository: str, name: str, *, download: bool) -> Path:
    """The path of a weights file, from disk or from the Hugging Face cache.

    Args:
        source: the path, if one was given.
        repository: the hub repository to look in otherwise.
        name: of the file in that repository.
        download: whether to fetch what is not in the cache.

    Returns:
        The path of a file that exists.

    Raises:
        RewardError: naming the file and the cure.
    """
    if source is not None:
        if not Path(source).is_file():
            raise RewardError(
                f"there is no file of weights at {str(source)!r}; check the path, or pass None to use the hub's cache"
            )
        return Path(source)
    hub = optional_package("huggingface_hub", "clip")
    try:
        return Path(hub.hf_hub_download(repository, name, local_files_only=not download))
    except (OSError, ValueError) as error:
        cure = (
            "check your connection"
            if download
            else "pass download=True to fetch it from the Hugging Face hub, or the path of a copy"
        )
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(f"cannot find {name} of the hub repository {repository}; {cure} ({reason})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of torch.

    Args:
        path: of the file.

    Returns:
        Tensors by name. Nothing but tensors is unpickled (weights_only).

    Raises:
        RewardError: for a file that holds anything else.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    factory = optional_package("open_clip.factory", "clip")
    try:
        return factory.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise RewardError(
            f"{path} holds no plain state dict ({type(error).__name__}: {error}); pass a file of tensors only, for "
            "instance in safetensors"
        ) from error


def freeze(network: nn.Module) -> nn.Module:
    """A network for evaluation, without gradients to its weights, in at least float32.

    Args:
        network: changed in place.

    Returns:
        The network itself.
    """
    dtype = next(network.parameters()).dtype
    return network.eval().requires_grad_(False).to(torch.promote_types(dtype, torch.float32))


def load_into(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Loads a whole state dict into a network.

    Args:
        network: changed in place.
        weights: tensors by name.
        name: of the network, for the message.

    Raises:
        RewardError: where a tensor's name or shape does not fit.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise RewardError(f"these are no weights of {name}: {reason}; pass the official file or a copy") from error


def linear_layers_as_one(layers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A stack of linear layers without activations as one map w . x + b, multiplied out in float64.

    Args:
        layers: "0.weight", "0.bias", "2.weight" and so on; the last layer has one output.

    Returns:
        w `[D]`, float64, and b.

    Raises:
        RewardError: where the names or shapes are not those of such a stack.
    """
    try:
        order = sorted({int(key.partition(".")[0]) for key in layers})
        stack = [(layers[f"{i}.weight"].double(), layers[f"{i}.bias"].double()) for i in order]
        matrix, offset = stack[0]
        for weight, bias in stack[1:]:
            matrix, offset = weight @ matrix, weight @ offset + bias
        return matrix.reshape(matrix.shape[1]), float(offset)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise RewardError(
            f"these are no weights of a stack of linear layers: {', '.join(layers)[:200]}; expected 0.weight, 0.bias "
            "and so on, with one output at the end"
        ) from error


def move_to(network: nn.Module, device: torch.device) -> Any:
    """A network on a device, moved only if it is elsewhere.

    Args:
        network: changed in place.
        device: where to run it.

    Returns:
        The network, and the dtype of its weights.
    """
    first = next(network.parameters())
    if first.device != device:
        with lasting():
            network.to(device)
    return network, first.dtype
