"""Rewards: callables from samples [M, *event], or images [M, C, H, W] in [0, 1], to scores [M].

Higher is better, and -inf forbids a sample. A plain function of yours works as well as any of these; one that needs the
prompts of its samples has an argument named `prompts`.

    Linear, Quadratic, LogDensity       in closed form; with the first two, analytic models have exact answers
    Ink, Symmetry, Sharpness, Saturation, JPEGSize, PNGSize     of an image alone
    DigitLogProb, DigitProb, judge      embedded digit classifiers: one to steer by, and a held-out one to report with
    CLIPScore, PickScore, HPS, ImageReward      pretrained networks: of an image and its prompt
    clip_emoji                          the same for the embedded pipeline `emoji`, and shipped
    Aesthetic                           a pretrained network: of an image alone
    VQAScore, VLMJudge                  a vision-language model's opinion: VQAScore runs it here, VLMJudge calls an API
    GenEval, Count, Layout              of the objects that a detector finds; TransformersDetector is a detector
    CLIPColors, Detection               colors of objects for GenEval; what a detector returns
    OCR                                 of the text in an image; TransformersReader reads it
    InWords, LetterCount, Matches, TextLogProb, QED     of texts and molecules that tokens are decoded to
    NeighbourDistance, OnManifold       how rare a sample is among data, and whether it is like them at all
    Remote, serve, asgi                 any reward in another process or on another machine
    weighted, Weighted                  sums with units
    zscore, clip, target, log, minimum, softmin, product, gate, Composed    functions of rewards, with units
    rank, group_zscore                  a sample compared with the others in its call: for search, not for tilting
    chunked, per_frame, timeout, full_precision     wrappers around any reward
    from_pil                            a function of PIL images, as a reward
    from_flow_grpo, from_trl            trainers' reward functions, as rewards here
    as_flow_grpo, as_flow_grpo_scores, as_trl, as_verl_omni     rewards from here, as trainers call them
    from_spec, from_specs               rewards by name: "digit:3", "jpeg:+"; several, with weights

Built-in rewards declare their unit, bounds and gradient in an attribute `spec`, and give scores of at least float32.

Where things are: detection/ holds what is made of a detector, pretrained/ the networks that rate an image, remote/ what
goes over HTTP. Rewards are called through `scoring`, which checks names, prompts, gradients and shapes for all of them.
"""

from .algebra import Composed, clip, gate, group_zscore, log, minimum, product, rank, softmin, target, zscore
from .analytic import Linear, LogDensity, Quadratic
from .by_name import from_spec, from_specs
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
from .pretrained.clip_emoji import clip_emoji
from .pretrained.clip_score import CLIPScore
from .pretrained.hps import HPS
from .pretrained.image_reward import ImageReward
from .pretrained.pick_score import PickScore
from .pretrained.vqa_score import VQAScore
from .remote.client import Remote
from .remote.server import asgi, serve
from .remote.vlm_judge import VLMJudge
from .text import InWords, LetterCount, Matches, TextLogProb
from .trainers import as_flow_grpo, as_flow_grpo_scores, as_trl, as_verl_omni, from_flow_grpo, from_trl
from .weighted_sum import Weighted, weighted
from .wrappers import chunked, from_pil, full_precision, per_frame, timeout

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
    "asgi",
    "chunked",
    "clip",
    "clip_emoji",
    "from_flow_grpo",
    "from_pil",
    "from_spec",
    "from_specs",
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
