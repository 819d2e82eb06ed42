"""How good are generated digits? Each measure is also taken on real digits that no model has seen.

All images are in [-1, 1], shape (M, 1, 8, 8), as the generative models make them.
"""

import torch
from digits_data import Digits, Splits

from steer.rewards.digits import load_digit_net

Metrics = dict[str, float | list[int]]


def measure(conditional: Digits, unconditional: torch.Tensor, real: Splits) -> Metrics:
    """Compare generated with real digits.

    Args:
        conditional: generated images with the class that was asked for.
        unconditional: images generated with the null class.
        real: the real digits; distances are taken to `real.train`.

    Returns:
        The numbers that the model card lists, by name.
    """
    counts = _logits("digits-judge", unconditional).argmax(1).bincount(minlength=10)
    return {
        "judge_accuracy": _accuracy("digits-judge", conditional),
        "judge_accuracy_held_out_real": _accuracy("digits-judge", real.held_out),
        "classifier_accuracy": _accuracy("digits-classifier", conditional),
        "classifier_accuracy_held_out_real": _accuracy("digits-classifier", real.held_out),
        "unconditional_class_counts": counts.tolist(),
        **_frechet_metrics(conditional.images, unconditional, real),
        **_nearest_metrics(conditional.images, real),
    }


def _unit_range(images: torch.Tensor) -> torch.Tensor:
    """Map [-1, 1] to the [0, 1] that the digit networks read, clipping what lies outside."""
    return ((images + 1) / 2).clamp(0, 1)


def _logits(name: str, images: torch.Tensor) -> torch.Tensor:
    """Logits of a stored digit network."""
    return load_digit_net(name)(_unit_range(images))


def _accuracy(name: str, digits: Digits) -> float:
    """Share of `digits` in which a stored network sees the labelled class."""
    return (_logits(name, digits.images).argmax(1) == digits.labels).double().mean().item()


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of feature vectors, shapes (M, D) and (N, D)."""
    first, second = first.double(), second.double()
    cov_first, cov_second = first.T.cov(), second.T.cov()
    root_trace = torch.linalg.eigvals(cov_first @ cov_second).real.clamp(min=0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return (shift + cov_first.trace() + cov_second.trace() - 2 * root_trace).item()


def _frechet_metrics(conditional: torch.Tensor, unconditional: torch.Tensor, real: Splits) -> Metrics:
    """Fréchet distances to the training images in the judge's features.

    The distance grows as a sample shrinks, so generated images are also measured in parts as large as the
    held-out split (mean over the parts), and so are parts of the training images themselves: class-balanced
    quarters, the yardstick for conditional samples, and random parts, the one for unconditional samples.
    """
    judge = load_digit_net("digits-judge")
    train = judge.features(_unit_range(real.train.images))
    size = len(real.held_out.images)
    by_class = real.train.images[real.train.labels.argsort(stable=True)]

    def distance(*parts: torch.Tensor) -> float:
        each = [frechet_distance(judge.features(_unit_range(part)), train) for part in parts]
        return sum(each) / len(each)

    def sized(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return images[: len(images) // size * size].split(size)

    return {
        "frechet_conditional": distance(conditional),
        "frechet_unconditional": distance(unconditional),
        "frechet_conditional_size_matched": distance(*sized(conditional)),
        "frechet_unconditional_size_matched": distance(*sized(unconditional)),
        "frechet_held_out_real": distance(real.held_out.images),
        "frechet_train_quarters": distance(*(by_class[start::4] for start in range(4))),
        "frechet_train_random_parts": distance(*sized(real.train.images)),
    }


def _nearest_metrics(images: torch.Tensor, real: Splits) -> Metrics:
    """Euclidean distance, in [0, 1] pixels, from an image to the nearest training image: is it a copy?"""
    train = _unit_range(real.train.images).flatten(1)
    generated = torch.cdist(_unit_range(images).flatten(1), train).amin(1)
    held_out = torch.cdist(_unit_range(real.held_out.images).flatten(1), train).amin(1)
    close = held_out.quantile(0.01)
    return {
        "nearest_train_median": generated.median().item(),
        "nearest_train_median_held_out_real": held_out.median().item(),
        "nearest_train_1st_percentile": generated.quantile(0.01).item(),
        "nearest_train_1st_percentile_held_out_real": close.item(),
        "share_closer_than_held_out_1st_percentile": (generated < close).double().mean().item(),
    }
