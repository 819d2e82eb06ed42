"""Files of network weights: found on disk or in the hub's cache, read as tensors only, and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from steer.errors import RewardError
from steer.torch_modes import lasting

from ..hub import optional_package, refuse_lfs_pointer


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
        RewardError: for a file that holds anything else, and a pointer of git-lfs.
    """
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        factory = optional_package("open_clip.factory", "clip")
        return factory.load_state_dict(str(path), weights_only=True)
    except RewardError:
        raise
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


_DROPOUT, _RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)
"""Places of the five linear layers in the heads of improved-aesthetic-predictor and ImageReward, among layers without
weights: with dropout between the first four, or with ReLU (and dropout) after each but the last."""


@dataclass(frozen=True, eq=False)
class RatingHead:
    """A rating of embeddings: affine maps with ReLU between them, the last to one number.

    Args:
        layers: weight `[O, I]` and bias `[O]` of each map, float64.
    """

    layers: list[tuple[Tensor, Tensor]]

    def __call__(self, embedding: Tensor, name: str) -> Tensor:
        """Ratings of embeddings, differentiable.

        Args:
            embedding: `[M, D]`.
            name: of the reward, for messages.

        Returns:
            `[M]`.

        Raises:
            RewardError: for a head of another width.
        """
        width = self.layers[0][0].shape[1]
        if embedding.shape[1] != width and len(embedding):
            raise RewardError(
                f"{name}'s head rates embeddings of {width} numbers, and its network makes {embedding.shape[1]}; pass "
                "the head that was trained on this network, or the network of this head"
            )
        for weight, bias in self.layers[:-1]:
            embedding = linear(embedding, weight.to(embedding), bias.to(embedding)).relu()
        weight, bias = self.layers[-1]
        return (embedding * weight[0].to(embedding)).sum(1) + float(bias)


def rating_head(layers: Mapping[str, Tensor]) -> RatingHead:
    """The head in a state dict. Linear layers without an activation between them are multiplied out, in float64.

    Whether there is an activation is not in the file; the numbers of its linear layers tell.

    Args:
        layers: "0.weight", "0.bias" and so on, numbered as in the head that was trained.

    Returns:
        The head: of one map where nothing or dropout is between the layers, else of five.

    Raises:
        RewardError: where names, numbers or shapes are not those of such a head, or values are not finite.
    """
    try:
        order = tuple(sorted({int(key.partition(".")[0]) for key in layers}))
        stack = [(layers[f"{i}.weight"].double(), layers[f"{i}.bias"].double()) for i in order]
        if order not in (_DROPOUT, _RELU) or any(
            below[0].shape[0] != above[0].shape[1] for below, above in pairwise(stack)
        ):
            raise ValueError
        if order == _DROPOUT:
            matrix, offset = stack[0]
            for weight, bias in stack[1:]:
                matrix, offset = weight @ matrix, weight @ offset + bias
            stack = [(matrix, offset)]
        if stack[-1][0].shape[0] != 1 or stack[-1][1].shape != (1,):
            raise ValueError
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise RewardError(
            f"these are no weights of a stack of linear layers: {', '.join(layers)[:200]}; expected N.weight and "
            f"N.bias for N in {_DROPOUT} (dropout between) or {_RELU} (ReLU between), with one output at the end"
        ) from error
    if not all(part.isfinite().all() for layer in stack for part in layer):
        raise RewardError("the weights of the head have NaN or infinite numbers in them; fetch the file again")
    return RatingHead(stack)


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
