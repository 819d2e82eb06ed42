"""Small digit classifiers whose trained weights ship with the package.

Two networks are stored, built differently and trained on disjoint data, so that one can steer while the other checks
the outcome: "digits-classifier" (convolutional, trained on half A) is the one to use as a reward, and "digits-judge"
(fully connected, trained on half B) is held out, so that a sample which only fools the classifier is noticed.
"""

import json
from importlib import resources

import torch
from torch import nn

from steer.files import check_digests
from steer.torch_modes import lasting

NUM_CLASSES = 10


class DigitNet(nn.Module):
    """A classifier of 8x8 grey digit images with values in [0, 1] (0 is paper, 1 is ink).

    Args:
        architecture: "conv" (3x3 convolutions, SiLU, max pooling) or "mlp" (fully connected, GELU).
        width: channels of the first convolution, or units of each hidden layer.
        num_features: size of the penultimate layer.

    Raises:
        ValueError: for another architecture.
    """

    def __init__(self, architecture: str, width: int, num_features: int) -> None:
        super().__init__()
        bodies = {"conv": _conv_body, "mlp": _mlp_body}
        if architecture not in bodies:
            raise ValueError(f"unknown architecture {architecture!r}; choose one of {sorted(bodies)}")
        self.body = bodies[architecture](width, num_features)
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features before the last layer.

        Args:
            images: `[M, 1, 8, 8]` in [0, 1].

        Returns:
            `[M, num_features]`.
        """
        return self.body(2 * images - 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits.

        Args:
            images: `[M, 1, 8, 8]` in [0, 1].

        Returns:
            `[M, 10]`.
        """
        return self.head(self.features(images))


def _conv_body(width: int, num_features: int) -> nn.Sequential:
    """Three 3x3 convolutions, halving the 8x8 image to 4x4 on the way, then one dense layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 4, num_features),
        nn.SiLU(),
    )


def _mlp_body(width: int, num_features: int) -> nn.Sequential:
    """Two hidden layers on the flattened pixels, then the feature layer."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, num_features),
        nn.GELU(),
    )


@lasting()
def load_digit_net(name: str) -> DigitNet:
    """A stored network, frozen and in evaluation mode.

    Args:
        name: "digits-classifier" or "digits-judge".

    Returns:
        The network, float32, on the CPU.

    Raises:
        ValueError: if no network of that name is stored; the message lists the names.
        ModelError: if its files are not those that were packed.
    """
    from safetensors.torch import load

    folders = {folder.name: folder for folder in (resources.files("steer.rewards") / "assets").iterdir()}
    names = sorted(key for key, folder in folders.items() if (folder / "model.safetensors").is_file())
    if name not in names:
        raise ValueError(f"unknown digit network {name!r}; stored networks: {', '.join(names)}")
    check_digests(folders[name])
    net = DigitNet(**json.loads((folders[name] / "config.json").read_text()))
    net.load_state_dict(load((folders[name] / "model.safetensors").read_bytes()))
    return net.eval().requires_grad_(False)
