"""Weights on disk and in the hub's cache: found, read without running anything in them, and frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steer.errors import RewardError

from ..hub import optional


def weights_file(source: str | os.PathLike[str] | None, repository: str, name: str, *, download: bool) -> Path:
    """The path of a weights file: `source` where that is given, else `name` of a hub repository.

    Looks in the Hugging Face cache and downloads only if asked. Raises RewardError naming file and cure.
    """
    if source is not None:
        if not Path(source).is_file():
            raise RewardError(f"there is no file of weights at {str(source)!r}")
        return Path(source)
    hub = optional("huggingface_hub", "clip")
    try:
        return Path(hub.hf_hub_download(repository, name, local_files_only=not download))
    except (OSError, ValueError) as error:
        cure = "" if download else "; pass download=True to fetch it from the Hugging Face hub, or the path of a copy"
        reason = str(error).strip().partition("\n")[0]
        raise RewardError(f"cannot find {name} of the hub repository {repository}{cure} ({reason})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of torch. Nothing but tensors is unpickled (weights_only)."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    factory = optional("open_clip.factory", "clip")
    try:
        return factory.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise RewardError(f"{path} holds no plain state dict ({type(error).__name__}: {error})") from error


def frozen(network: nn.Module) -> nn.Module:
    """The network itself, in evaluation mode, without gradients to its weights, in at least float32."""
    dtype = next(network.parameters()).dtype
    return network.eval().requires_grad_(False).to(torch.promote_types(dtype, torch.float32))


def load_into(network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    """Loads a state dict whole; RewardError where a name or a shape is not the network's."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise RewardError(f"these are no weights of {name}: {reason}") from error


def affine(layers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """A stack of linear layers without activations, "0.weight", "0.bias", "2.weight" ..., as one map w . x + b.

    Multiplied out in float64: (w (D,), b).
    """
    try:
        order = sorted({int(key.partition(".")[0]) for key in layers})
        stack = [(layers[f"{i}.weight"].double(), layers[f"{i}.bias"].double()) for i in order]
        matrix, offset = stack[0]
        for weight, bias in stack[1:]:
            matrix, offset = weight @ matrix, weight @ offset + bias
        return matrix.reshape(matrix.shape[1]), float(offset)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise RewardError(f"these are no weights of a stack of linear layers: {', '.join(layers)[:200]}") from error


def on_device(network: nn.Module, device: torch.device) -> Any:
    """The network on the device, moved if it is elsewhere, and the dtype it works in."""
    first = next(network.parameters())
    return (network if first.device == device else network.to(device)), first.dtype
