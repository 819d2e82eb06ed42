"""Rewards of texts, for models whose samples are tokens: words of a list, letters, patterns, a classifier's opinion.

Each is given `text`, the function that decodes its samples: tokens (M, L) to M strings. `steer.models.letters.to_text`
is that of the embedded words, `lambda x: tokenizer.batch_decode(x, skip_special_tokens=True)` one of transformers.
None has a gradient: tokens are discrete. Scores are float32, on the samples' device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .hub import from_hub, optional
from .scoring import name_of

ToText = Callable[[Tensor], "list[str]"]


@dataclass(frozen=True, eq=False)
class InWords:
    """1 for texts that are in a list of words, else 0. words: kept as a set. text: decodes the samples."""

    words: Collection[str] = field(repr=False)
    text: ToText = field(repr=False)
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none")

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not self.words:
            raise RewardError(f"InWords(words) is a non-empty list of words, got {self.words!r}")
        object.__setattr__(self, "words", frozenset(self.words))

    def __call__(self, samples: Tensor) -> Tensor:
        return _scores([float(text in self.words) for text in decode(self.text, samples)], samples)


@dataclass(frozen=True, eq=False)
class LetterCount:
    """How often any of some letters occurs in a text; with a target, minus the distance from it.

    letters: "e", or "aeiou" for all vowels. text: decodes the samples. target: a number, or None for "the more the
    better". Case counts.
    """

    letters: str
    text: ToText = field(repr=False)
    target: float | None = None

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec("letters", (0.0, inf) if self.target is None else (-inf, 0.0), "none")

    def __call__(self, samples: Tensor) -> Tensor:
        counts = [sum(text.count(letter) for letter in set(self.letters)) for text in decode(self.text, samples)]
        return _scores([float(n) if self.target is None else -abs(n - self.target) for n in counts], samples)


@dataclass(frozen=True, eq=False)
class Matches:
    """1 for texts that a regular expression matches from end to end, else 0.

    pattern: of Python's `re`, ".*ing" for texts that end in ing. text: decodes the samples. Raises RewardError for a
    pattern that is none. A pattern with nested repetitions can take exponential time: it is yours, trust it.
    """

    pattern: str
    text: ToText = field(repr=False)
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none")

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RewardError(f"Matches(pattern) is a regular expression, got {self.pattern!r}: {error}") from error

    def __call__(self, samples: Tensor) -> Tensor:
        texts = decode(self.text, samples)
        return _scores([float(re.fullmatch(self.pattern, text) is not None) for text in texts], samples)


@dataclass(frozen=True, eq=False)
class TextLogProb:
    """log p(label | text) in nats, at most 0, by a sequence classifier of transformers.

    model, tokenizer: a ready pair, or a hub id or folder ("textattack/roberta-base-CoLA" with label 1 for grammatical
        English) and no tokenizer; each has its own licence. label: index of the class, or its name in the model's
        config. text: decodes the samples. length: tokens after which texts are cut. rows: texts per forward pass.
    download, device: for a model by id. Raises RewardError for a missing package (pip install
    'steer-diffusion[vlm]'), weights or label. A model with one output gives log sigmoid of it.
    Source: the classifier rewards of Singhal et al. 2025 (FK steering, arXiv 2501.06848).
    """

    model: Any = field(repr=False)
    label: int | str
    text: ToText = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    length: int = 512
    rows: int = 32
    download: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        model, tokenizer = self.model, self.tokenizer
        if isinstance(model, str):
            transformers = optional("transformers", "vlm")
            tokenizer = tokenizer or from_hub(transformers.AutoTokenizer, model, download=self.download)
            loader = transformers.AutoModelForSequenceClassification
            model = from_hub(loader, model, download=self.download, use_safetensors=True).to(self.device)
        if tokenizer is None:
            raise RewardError("TextLogProb(model) was given no tokenizer; pass both, or a hub id")
        names = model.config.id2label
        label = next((i for i, name in names.items() if name == self.label), self.label)
        if type(label) is not int or not 0 <= label < model.config.num_labels:
            raise RewardError(f"TextLogProb(label=...) is one of {dict(names)}, index or name, got {self.label!r}")
        object.__setattr__(self, "model", model.eval().requires_grad_(False))
        object.__setattr__(self, "tokenizer", tokenizer)
        object.__setattr__(self, "label", label)

    @property
    def spec(self) -> RewardSpec:
        version = f"{getattr(self.model.config, '_name_or_path', '') or name_of(self.model)} {self.label}"
        return RewardSpec("nat", (-inf, 0.0), "none", version=version)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        texts, scores = decode(self.text, samples), [torch.zeros(0)]
        for start in range(0, len(texts), self.rows):
            some = texts[start : start + self.rows]
            inputs = self.tokenizer(some, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device)).logits.float()
            log_prob = logits.log_softmax(1) if logits.shape[1] > 1 else torch.nn.functional.logsigmoid(logits)
            scores.append(log_prob[:, int(self.label)].cpu())
        return torch.cat(scores).to(samples.device)


def decode(text: ToText, samples: Tensor) -> list[str]:
    """The texts of samples (M, L); RewardError where `text` does not give M strings."""
    texts = text(samples)
    if not isinstance(texts, list) or len(texts) != len(samples) or not all(isinstance(each, str) for each in texts):
        got = f"{len(texts)} of them" if isinstance(texts, list) else type(texts).__name__
        raise RewardError(f"text must decode {len(samples)} samples to a list of as many strings, got {got}")
    return texts


def _scores(scores: list[float], samples: Tensor) -> Tensor:
    return torch.tensor(scores, dtype=torch.float32, device=samples.device)
