"""Rewards: plain callables from samples (M, *event), or images (M, C, H, W) in [0, 1], to scores (M,).

Higher is better and -inf forbids a sample. A plain function of yours is as good as any of these; one that wants the
prompts of its samples names an argument `prompts`.

    Linear, Quadratic, LogDensity       in closed form; the first two make analytic models' answers exact
    Ink, Symmetry, Sharpness, Saturation, JPEGSize, PNGSize     of an image alone
    DigitLogProb, DigitProb, judge      embedded digit classifiers: one to steer by, one held out to report with
    CLIPScore, PickScore, HPS, ImageReward, Aesthetic   pretrained: of an image and its prompt; of an image
    VQAScore, VLMJudge                  what a vision-language model thinks, run here or behind an API
    GenEval, Count, Layout              of objects that a detector finds; TransformersDetector is one
    OCR                                 of the text in an image; TransformersReader reads it
    InWords, LetterCount, Matches, TextLogProb, QED     of texts and molecules that tokens are decoded to
    NeighbourDistance, OnManifold       how rare a sample is among data, and whether it is like them at all
    Remote, serve                       any reward in another process or on another machine
    weighted, Weighted                  sums with units
    zscore, clip, target, log, minimum, softmin, product, gate  functions of rewards, with units
    rank, group_zscore                  a sample against the others of its problem: for search, not for tilting
    chunked, per_frame, timeout, full_precision     around any reward
    from_flow_grpo, from_trl            trainers' reward functions, as rewards here
    as_flow_grpo, as_flow_grpo_scores, as_trl, as_verl_omni     rewards from here, as trainers call them
    from_spec                           rewards by name: "digit:3", "jpeg:+"

Built-in rewards say their unit, bounds and gradient in an attribute `spec` and give scores of at least float32.
"""

from .algebra import Composed, clip, gate, group_zscore, log, minimum, product, rank, softmin, target, zscore
from .analytic import Linear, LogDensity, Quadratic
from .by_name import from_spec
from .detection.colors import CLIPColors
from .detection.count_and_layout import Count, Layout
from .detection.detector import Detection, TransformersDetector
from .detection.geneval import GenEval
from .digit_probability import DigitLogProb, DigitProb, judge
from .file_size import JPEGSize, PNGSize
from .molecule import QED
from .nearest_neighbours import NeighbourDistance, OnManifold
from .ocr import OCR, TransformersReader
from .pixel_statistics import Ink, Saturation, Sharpness, Symmetry
from .pretrained.aesthetic import Aesthetic
from .pretrained.clip_score import CLIPScore
from .pretrained.hps import HPS
from .pretrained.image_reward import ImageReward
from .pretrained.pick_score import PickScore
from .pretrained.vqa_score import VQAScore
from .remote.client import Remote
from .remote.server import serve
from .remote.vlm_judge import VLMJudge
from .text import InWords, LetterCount, Matches, TextLogProb
from .trainers import as_flow_grpo, as_flow_grpo_scores, as_trl, as_verl_omni, from_flow_grpo, from_trl
from .weighted_sum import Weighted, weighted
from .wrappers import chunked, full_precision, per_frame, timeout

__all__ = [
    "HPS",
    "OCR",
    "QED",
    "Aesthetic",
    "CLIPColors",
    "CLIPScore",
    "Composed",
    "Count",
    "Detection",
    "DigitLogProb",
    "DigitProb",
    "GenEval",
    "ImageReward",
    "InWords",
    "Ink",
    "JPEGSize",
    "Layout",
    "LetterCount",
    "Linear",
    "LogDensity",
    "Matches",
    "NeighbourDistance",
    "OnManifold",
    "PNGSize",
    "PickScore",
    "Quadratic",
    "Remote",
    "Saturation",
    "Sharpness",
    "Symmetry",
    "TextLogProb",
    "TransformersDetector",
    "TransformersReader",
    "VLMJudge",
    "VQAScore",
    "Weighted",
    "as_flow_grpo",
    "as_flow_grpo_scores",
    "as_trl",
    "as_verl_omni",
    "chunked",
    "clip",
    "from_flow_grpo",
    "from_spec",
    "from_trl",
    "full_precision",
    "gate",
    "group_zscore",
    "judge",
    "log",
    "minimum",
    "per_frame",
    "product",
    "rank",
    "serve",
    "softmin",
    "target",
    "timeout",
    "weighted",
    "zscore",
]
