"""Train what minority generation of digits needs: a model that has hardly seen one digit, and noisy classifiers.

    python examples/train/minority_digits.py generator      about five minutes on one free core
    python examples/train/minority_digits.py classifiers    one minute

`generator` trains an unconditional DDPM on the training images with one digit thinned to 3 %, so that the share of that
digit among samples is known to be small and its images are there to be compared with. `classifiers` labels training
images with quantiles of the minority score of a model (Um et al. 2023, 2301.12334, Sec. 3.2) and learns those labels
from noisy images: for the shipped `digits`, quantiles within each class, for the thinned model, of all images.
Networks are told log(alpha^2 / sigma^2) and see x / sqrt(alpha^2 + sigma^2), so one serves every path. `feature_nets`
are trained where they are used: the spaces in which `steer.agreed_rarity` looks for rare samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import steer
from steer.minority_sampling.score import minority_score, quantile_labels
from steer.rewards.digits import DigitNet

sys.path.insert(0, str(Path(__file__).parent))
from digits_data import Digits, splits

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "minority"
GENERATOR = Path(__file__).resolve().parents[2] / "build" / "digits-thinned"  # 1.3 MB: not in the repository
THINNED, SHARE = 8, 0.03
BINS, WIDTH = 5, 160


class NoisyClassifier(nn.Module):
    """Logits (M, BINS) of the quantile of x (M, 1, 8, 8), variance preserving, at a log signal-to-noise ratio."""

    def __init__(self, width: int = WIDTH, bins: int = BINS):
        super().__init__()
        self.first = nn.Linear(64 + 3, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, bins)

    def forward(self, x: Tensor, log_snr: float | Tensor) -> Tensor:
        flat = x.flatten(1)
        level = torch.as_tensor(log_snr, dtype=flat.dtype, device=flat.device).expand(len(flat)) / 4.0
        told = torch.stack([level.clamp(-2.0, 2.0), level.sigmoid(), (-(level**2)).exp()], 1)
        hidden = F.silu(self.first(torch.cat([flat, told], 1)))
        return self.head(F.silu(self.second(hidden)))


def thinned(data: Digits, digit: int = THINNED, share: float = SHARE) -> Digits:
    """The data with only so many images of one digit that they are that share of what is left."""
    others, own = (data.labels != digit).nonzero()[:, 0], (data.labels == digit).nonzero()[:, 0]
    keep = torch.cat([others, own[: round(share / (1.0 - share) * len(others))]])
    return Digits(data.images[keep], data.labels[keep])


def noisy(images: Tensor, log_snr: Tensor) -> Tensor:
    """Variance-preserving noise at one ratio per image."""
    signal = log_snr.sigmoid().view(-1, 1, 1, 1)
    return signal.sqrt() * images + (1.0 - signal).sqrt() * torch.randn_like(images)


def fit(net: nn.Module, loss: Callable[[], Tensor], steps: int) -> None:
    """Minimises a stochastic loss of a network by AdamW on a cosine schedule, and freezes it."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)


def train(images: Tensor, labels: Tensor, steps: int) -> NoisyClassifier:
    """Cross-entropy at log-SNR uniform in [-6, 6]."""
    torch.manual_seed(0)
    net = NoisyClassifier()

    def loss() -> Tensor:
        batch = torch.randint(len(images), (256,))
        log_snr = 12.0 * torch.rand(256) - 6.0
        return F.cross_entropy(net(noisy(images[batch], log_snr), log_snr), labels[batch], label_smoothing=0.05)

    fit(net, loss, steps)
    return net


def feature_nets(data: Digits, count: int = 8, steps: int = 600) -> list[Callable[[Tensor], Tensor]]:
    """Features (M, 32) of images in [0, 1] by small classifiers, dense and convolutional in turn, a second each.

    Each has learnt another half of the data: what they agree on is not one network's mistake.
    """
    images, nets = data.images / 2 + 0.5, []
    for seed in range(count):
        torch.manual_seed(seed)
        net = DigitNet("conv", 16, 32) if seed % 2 else DigitNet("mlp", 96, 32)
        half = torch.randperm(len(images))[: len(images) // 2]

        def loss(net: DigitNet = net, half: Tensor = half) -> Tensor:
            batch = half[torch.randint(len(half), (128,))]
            shown = images[batch] + 0.1 * torch.randn_like(images[batch])
            return F.cross_entropy(net(shown), data.labels[batch], label_smoothing=0.05)

        fit(net, loss, steps)
        nets.append(net.features)
    return nets


def labels_of(process: steer.GaussianProcess, data: Digits, *, within_class: bool) -> Tensor:
    """Quantile labels of the data by a model's minority score, from 20 draws of noise."""
    score = minority_score(process, data.images[None], draws=20)[0]
    return quantile_labels(score, BINS, data.labels if within_class else None)


def classifiers(steps: int, out: Path, generator: Path) -> None:
    """Train, measure on held-out images and store the classifier of each model there is."""
    data = splits()
    models = {"digits": (steer.load("digits"), data.train, True)}
    if generator.exists():
        models["digits-thinned"] = (load_generator(generator), thinned(data.train), False)
    for name, (process, seen, within_class) in models.items():
        net = train(seen.images, labels_of(process, seen, within_class=within_class), steps)
        unseen = labels_of(process, data.held_out, within_class=within_class)
        for log_snr in (4.0, 0.0, -3.0):
            level = torch.full((len(unseen),), log_snr)
            right = (net(noisy(data.held_out.images, level), level).argmax(1) == unseen).double().mean()
            print(f"{name}: accuracy on held-out images at log-SNR {log_snr:+.0f}: {right:.3f} (chance {1 / BINS})")
        out.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half() for k, v in net.state_dict().items()}, out / f"{name}-classifier.safetensors")


def load_classifier(name: str, folder: Path = ASSETS) -> NoisyClassifier:
    """A stored classifier, "digits" or "digits-thinned"."""
    net = NoisyClassifier()
    net.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}-classifier.safetensors").items()})
    return net.eval().requires_grad_(False)


def train_generator(steps: int, folder: Path) -> None:
    """The unconditional model of thinned digits, as a diffusers pipeline: the recipe of `digits`, no labels shown."""
    import digits_generators as recipe
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    def unlabelled(digits: Digits) -> Digits:
        return Digits(digits.images, torch.full_like(digits.labels, recipe.NULL_CLASS))

    data = splits()
    unet = recipe.train(
        recipe.OBJECTIVES["digits"], unlabelled(thinned(data.train)), unlabelled(data.held_out), steps, seed=0
    )
    DDPMPipeline(unet, recipe.ddim_scheduler()).save_pretrained(folder, safe_serialization=True)


def load_generator(folder: Path = GENERATOR, steps: int = 50) -> steer.GaussianProcess:
    """The process of the thinned model, unconditional."""
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    pipe.unet.requires_grad_(False)
    return steer.from_pipeline(pipe, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("generator", "classifiers"))
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of each network")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the classifiers")
    parser.add_argument("--generator", type=Path, default=GENERATOR, help="folder of the thinned generator")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.time()
    if arguments.what == "generator":
        train_generator(arguments.steps, arguments.generator)
    else:
        classifiers(arguments.steps, arguments.out, arguments.generator)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
