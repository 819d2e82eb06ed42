"""The handwritten-digit data behind every small embedded model, and the one split they all share.

The images are the 1,797 scans that scikit-learn ships as ``load_digits``: 8x8 pixels with grey values 0..16,
from "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0). Nothing is downloaded.
"""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLIT_SEED = 0


class Digits(NamedTuple):
    """Labelled digit images.

    images: float32, shape (M, 1, 8, 8), in [-1, 1] (-1 is paper, 1 is ink).
    labels: int64, shape (M,), 0..9.
    """

    images: torch.Tensor
    labels: torch.Tensor


class Splits(NamedTuple):
    """The fixed split of the data.

    train: 80% of the images; the generative models learn from it.
    half_a, half_b: two disjoint halves of `train`; the classifier learns from A, the judge from B.
    held_out: the other 20%, which no model sees in training.
    """

    train: Digits
    half_a: Digits
    half_b: Digits
    held_out: Digits


def splits() -> Splits:
    """Load the digits and split them, stratified by class and the same way on every call."""
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    digits = Digits(images, torch.from_numpy(targets).long())
    train, held_out = _stratified_split(digits, second_fraction=0.2)
    half_a, half_b = _stratified_split(train, second_fraction=0.5)
    return Splits(train, half_a, half_b, held_out)


def _stratified_split(digits: Digits, second_fraction: float) -> tuple[Digits, Digits]:
    """Cut `digits` in two parts with the same class proportions; the second gets `second_fraction`."""
    first, second = train_test_split(
        torch.arange(len(digits.labels)).numpy(),
        test_size=second_fraction,
        random_state=SPLIT_SEED,
        stratify=digits.labels.numpy(),
    )
    return (
        Digits(digits.images[first], digits.labels[first]),
        Digits(digits.images[second], digits.labels[second]),
    )
