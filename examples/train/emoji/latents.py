"""The latents of `emoji`: principal components of 8x8 patches, fixed before anything is trained.

    python examples/train/emoji/latents.py

The generator learns these latents while decoder and encoder learn to translate them to pictures and back. They are not
quite whitened (divided by the power 0.6 of their standard deviation), so that fine detail stays small. The few
kilobytes are kept beside the weights: whoever trains on needs the same ones.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from data import WORK, load
from lessons import Lessons
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

CHANNELS, PATCH = 16, 8


class Latents(NamedTuple):
    """An affine map of 8x8 patches to 16 channels, and back. matrix (16, 192), inverse (192, 16), mean (192,)."""

    matrix: Tensor
    inverse: Tensor
    mean: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1] to latents (B, 16, 8, 8)."""
        weight = self.matrix.reshape(CHANNELS, 3, PATCH, PATCH)
        return F.conv2d(pictures, weight, -self.matrix @ self.mean, stride=PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        """The linear decoder: blocky, and what the learnt one is compared with."""
        patches = torch.einsum("pc,bcn->bpn", self.inverse, latents.flatten(2)) + self.mean[:, None]
        return F.fold(patches, (latents.shape[2] * PATCH, latents.shape[3] * PATCH), PATCH, stride=PATCH)


def fit(pictures: Tensor) -> Latents:
    """Principal components, scaled; each has a positive sum, so that the sign does not depend on the machine."""
    patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    std, components = values[-CHANNELS:].flip(0).sqrt(), vectors[:, -CHANNELS:].flip(1)
    components = components * components.sum(0).sign()
    scale = std**-0.6
    scale = scale / (std * scale).square().mean().sqrt()
    matrix, inverse = (components * scale).T, components / scale
    return Latents(matrix.float().contiguous(), inverse.float().contiguous(), mean.float())


def psnr(first: Tensor, second: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures in [-1, 1], in dB."""
    return (-10 * ((first - second) / 2).square().mean((1, 2, 3)).log10()).mean().item()


def read(work: Path) -> Latents:
    """The latents as this script wrote them."""
    return Latents(**load_file(work / "latents.safetensors"))


def main() -> None:
    """Fit on 6,400 varied pictures and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    lessons = Lessons(*load(args.work), seed=1)
    latents = fit(torch.cat([lessons.batch(64, step).pictures for step in range(100)]))
    save_file(latents._asdict(), args.work / "latents.safetensors")
    pictures = lessons.batch(256, 100).pictures
    codes = latents.encode(pictures)
    print(f"PSNR {psnr(latents.decode(codes), pictures):.1f} dB, std {codes.std():.3f}, of each channel")
    print([round(each, 2) for each in codes.std((0, 2, 3)).tolist()])


if __name__ == "__main__":
    main()
