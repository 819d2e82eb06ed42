"""Train the two digit classifiers that ship in ``rewards/assets``.

``digits-classifier`` learns from half A of the training images and ``digits-judge`` from half B, with another
architecture, augmentation and seed. Both use label smoothing, weight decay and noisy, shifted and rotated
images, so that their probabilities stay moderate away from real digits. Both together take half a minute on
one CPU core:

    python examples/train/digit_classifiers.py
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from digits_data import Digits, splits
from safetensors.torch import save as to_safetensors
from torch.nn import functional as F

from steer.files import write_digests
from steer.rewards.digits import DigitNet

ASSETS = Path(__file__).resolve().parents[2] / "rewards" / "assets"


@dataclass(frozen=True)
class Augmentation:
    """How strongly training images are disturbed; every amount is drawn anew for each image.

    shift: largest shift along each axis, in pixels.
    degrees: largest rotation either way.
    scale: largest relative change of size.
    noise: largest standard deviation of Gaussian pixel noise, for values in [0, 1].
    """

    shift: float
    degrees: float
    scale: float
    noise: float


@dataclass(frozen=True)
class Recipe:
    """Everything that tells one network's training from the other's."""

    half: str
    config: dict[str, str | int]
    augmentation: Augmentation
    seed: int
    role: str


RECIPES = {
    "digits-classifier": Recipe(
        half="half_a",
        config={"architecture": "conv", "width": 24, "num_features": 64},
        augmentation=Augmentation(shift=0.7, degrees=8, scale=0.05, noise=0.1),
        seed=0,
        role="It is meant to be used as a reward: its log-probability of a class steers the generator.",
    ),
    "digits-judge": Recipe(
        half="half_b",
        config={"architecture": "mlp", "width": 144, "num_features": 64},
        augmentation=Augmentation(shift=0.4, degrees=12, scale=0.1, noise=0.2),
        seed=1,
        role="It is meant to be held out: never steer with it, use it to see whether steering only fooled\n"
        "`digits-classifier`. Its penultimate features also serve for Fréchet distances.",
    ),
}


def augment(images: torch.Tensor, how: Augmentation) -> torch.Tensor:
    """Shift, rotate, rescale and add noise to `images` (M, 1, 8, 8) in [0, 1]."""

    def uniform(largest: float, *shape: int) -> torch.Tensor:
        return largest * (2 * torch.rand(len(images), *shape) - 1)

    angle, scale = uniform(math.radians(how.degrees)), 1 + uniform(how.scale)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shift = uniform(2 * how.shift / images.shape[-1], 2, 1)  # the grid spans [-1, 1], hence the 2
    grid = F.affine_grid(torch.cat([rotation, shift], 2), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    noise = how.noise * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)
    return (moved + noise).clamp(0, 1)


def train(recipe: Recipe, data: Digits, steps: int) -> DigitNet:
    """Train one network with AdamW on a cosine schedule."""
    torch.manual_seed(recipe.seed)
    net = DigitNet(**recipe.config)
    images = (data.images + 1) / 2
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (128,))
        logits = net(augment(images[batch], recipe.augmentation))
        loss = F.cross_entropy(logits, data.labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> float:
    """Expected calibration error: |confidence - accuracy|, averaged over equal-width bins of confidence."""
    confidence, predicted = probabilities.max(1)
    gap = confidence - (predicted == labels).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    return torch.zeros(bins).index_add(0, which, gap).abs().sum().item() / len(labels)


def measure(net: DigitNet, held_out: Digits, other_half: Digits) -> dict[str, float]:
    """Accuracy, negative log-likelihood and calibration on images that the network never saw."""
    logits = net((held_out.images + 1) / 2)
    other = net((other_half.images + 1) / 2)
    noise = net(torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    return {
        "accuracy_held_out": (logits.argmax(1) == held_out.labels).float().mean().item(),
        "nll_held_out": F.cross_entropy(logits, held_out.labels).item(),
        "ece_held_out": calibration_error(logits.softmax(1), held_out.labels),
        "accuracy_other_half": (other.argmax(1) == other_half.labels).float().mean().item(),
        "confidence_on_uniform_noise": noise.softmax(1).amax(1).mean().item(),
    }


CARD = """---
license: cc-by-4.0
library_name: steer
pipeline_tag: image-classification
tags: [digits, reward-model]
---

# {name}

A {parameters:,}-parameter classifier ({architecture}) of 8x8 grey handwritten digits, for images in [0, 1]
of shape (M, 1, 8, 8).

{role}

    from steer.rewards.digits import load_digit_net
    net = load_digit_net("{name}")

## Data

`sklearn.datasets.load_digits`: 1,797 scans from *Optical Recognition of Handwritten Digits*, E. Alpaydin and
C. Kaynak (1998), UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0. Pixels 0..16
were scaled to [0, 1]. Trained on {images} images (`{half}` of `examples/train/digits_data.py`); the other
network has the other, disjoint half. 20% (360 images) are held out from every model.

## Training

`python examples/train/digit_classifiers.py`: AdamW (learning rate 3e-3, cosine, weight decay 0.05), batch
128, {steps:,} steps, label smoothing 0.05, seed {seed}. Augmentation: shift up to {shift} px, rotation up to
{degrees} degrees, size up to {scale:.0%}, Gaussian noise of standard deviation up to {noise}.

## Measured

| quantity | value |
|---|---|
| accuracy, held-out 20% (360 images) | {accuracy_held_out:.4f} |
| negative log-likelihood, held-out 20% | {nll_held_out:.4f} |
| expected calibration error (10 bins), held-out 20% | {ece_held_out:.4f} |
| accuracy on the half that the other network learned from | {accuracy_other_half:.4f} |
| mean top probability on uniform noise images | {confidence_on_uniform_noise:.3f} |

## Limits

A demonstration model for 8x8 digits of this one data set; it has no "not a digit" answer, and probabilities
on images that are no digits mean nothing. Label smoothing makes it slightly under-confident on real digits.
"""


def save(folder: Path, name: str, net: DigitNet, steps: int, images: int, metrics: dict[str, float]) -> None:
    """Write weights, configuration, numbers and model card of one network."""
    recipe = RECIPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(to_safetensors(net.state_dict()))
    (folder / "config.json").write_text(json.dumps(recipe.config, indent=2) + "\n")
    write_digests(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    card = CARD.format(
        name=name,
        architecture={"conv": "convolutional", "mlp": "fully connected"}[recipe.config["architecture"]],
        parameters=sum(p.numel() for p in net.parameters()),
        role=recipe.role,
        half=recipe.half,
        seed=recipe.seed,
        images=images,
        steps=steps,
        **asdict(recipe.augmentation),
        **metrics,
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    """Train, measure and save both networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps for each network")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets one folder per network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = splits()
    halves = {"half_a": data.half_a, "half_b": data.half_b}
    for name, recipe in RECIPES.items():
        own = halves[recipe.half]
        (other,) = (half for key, half in halves.items() if key != recipe.half)
        net = train(recipe, own, args.steps)
        metrics = measure(net, data.held_out, other)
        save(args.out / name, name, net, args.steps, len(own.labels), metrics)
        print(name, {key: round(value, 4) for key, value in metrics.items()}, flush=True)


if __name__ == "__main__":
    main()
