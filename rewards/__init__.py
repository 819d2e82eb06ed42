"""Rewards: plain callables from samples (M, *event), or images (M, C, H, W) in [0, 1], to scores (M,).

Higher is better and -inf forbids a sample. A plain function of yours is as good as any of these; one that wants the
prompts of its samples names an argument `prompts`.

    Linear, Quadratic, LogDensity       in closed form; the first two make analytic models' answers exact
    Ink, Symmetry, JPEGSize             of an image alone
    DigitLogProb, DigitProb, judge      embedded digit classifiers: one to steer by, one held out to report with
    weighted, Weighted                  sums with units
    chunked, timeout, full_precision    around any reward
    from_spec                           rewards by name: "digit:3", "jpeg:+"

Built-in rewards declare their unit in an attribute `unit` and give scores of at least float32.
"""

from .analytic import Linear, LogDensity, Quadratic
from .classifier import DigitLogProb, DigitProb, judge
from .compose import Weighted, weighted
from .image import Ink, JPEGSize, Symmetry
from .parse import from_spec
from .wrap import chunked, full_precision, timeout

__all__ = [
    "DigitLogProb",
    "DigitProb",
    "Ink",
    "JPEGSize",
    "Linear",
    "LogDensity",
    "Quadratic",
    "Symmetry",
    "Weighted",
    "chunked",
    "from_spec",
    "full_precision",
    "judge",
    "timeout",
    "weighted",
]
