"""Rewards of texts, for models whose samples are tokens: words of a list, letters, patterns, a classifier's opinion.

Each is given `text`, the function that decodes its samples: from tokens `[M, L]` to M strings.
`steer.models.letters.to_text` is that of the embedded words, and
`lambda x: tokenizer.batch_decode(x, skip_special_tokens=True)` one of transformers. None has a gradient, since tokens
are discrete. Scores are float32, on the samples' device.
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
from steer.torch_modes import scores_in_full
from steer.types import RewardSpec

from .hub import model_and_processor
from .scoring import name_of

ToText = Callable[[Tensor], "list[str]"]
"""From tokens [M, L] to M strings."""


@dataclass(frozen=True, eq=False)
class InWords:
    """1 for texts that are in a list of words, else 0.

    Called with tokens `[M, L]`.

    Args:
        words: kept as a set.
        text: from tokens `[M, L]` to M strings.

    Returns:
        Scores `[M]`, 0 or 1, float32, without a gradient.

    Raises:
        RewardError: for no words, or a single string; when called, where `text` does not give M strings.
    """

    words: Collection[str] = field(repr=False)
    text: ToText = field(repr=False)
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none")

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not self.words:
            raise RewardError(f"InWords(words) takes a non-empty list of words, got {self.words!r}")
        object.__setattr__(self, "words", frozenset(self.words))

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        return score_tensor([float(text in self.words) for text in decode(self.text, samples)], samples)


@dataclass(frozen=True, eq=False)
class LetterCount:
    """How often any of some letters occurs in a text; with a target, minus the distance from it.

    Called with tokens `[M, L]`.

    Args:
        letters: "e", or "aeiou" for all vowels. Case counts.
        text: from tokens `[M, L]` to M strings.
        target: the wanted number; None for "the more the better".

    Returns:
        Scores `[M]` in letters, float32, without a gradient.

    Raises:
        RewardError: when called, where `text` does not give M strings.
    """

    letters: str
    text: ToText = field(repr=False)
    target: float | None = None

    @property
    def spec(self) -> RewardSpec:
        """Unit and bounds of the scores, which depend on whether there is a target."""
        return RewardSpec("letters", (0.0, inf) if self.target is None else (-inf, 0.0), "none")

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        counts = [sum(text.count(letter) for letter in set(self.letters)) for text in decode(self.text, samples)]
        if self.target is None:
            return score_tensor([float(count) for count in counts], samples)
        return score_tensor([-abs(count - self.target) for count in counts], samples)


@dataclass(frozen=True, eq=False)
class Matches:
    """1 for texts that a regular expression matches from end to end, else 0.

    Called with tokens `[M, L]`. A pattern with nested repetitions can take exponential time: use patterns you trust.

    Args:
        pattern: of Python's `re`; ".*ing" for texts that end in ing.
        text: from tokens `[M, L]` to M strings.

    Returns:
        Scores `[M]`, 0 or 1, float32, without a gradient.

    Raises:
        RewardError: for a pattern that is no regular expression; when called, where `text` does not give M strings.
    """

    pattern: str
    text: ToText = field(repr=False)
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none")

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RewardError(
                f"Matches(pattern) must be a regular expression, got {self.pattern!r}: {error}; escape special "
                "characters with a backslash"
            ) from error

    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        texts = decode(self.text, samples)
        return score_tensor([float(re.fullmatch(self.pattern, text) is not None) for text in texts], samples)


@dataclass(frozen=True, eq=False)
class TextLogProb:
    """log p(label | text) in nats, by a sequence classifier of transformers.

    Called with tokens `[M, L]`. A model with one output gives log sigmoid of it.

    Args:
        model: a model, or a hub id or folder ("textattack/roberta-base-CoLA" with label 1 for grammatical English).
            Each has its own licence.
        label: index of the class, or its name in the model's config.
        text: from tokens `[M, L]` to M strings.
        tokenizer: the model's tokenizer; None with an id.
        length: tokens after which texts are cut.
        rows: texts per forward pass.
        download: whether to fetch a model given by id that is not in the hub's cache.
        device: for a model given by id.

    Returns:
        Scores `[M]`, at most 0, float32, without a gradient.

    Raises:
        RewardError: for a missing package (pip install 'steer-diffusion[vlm]'), weights or label; when called, where
            `text` does not give M strings.

    Cost: one forward pass of the classifier per text.
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
        model, tokenizer = model_and_processor(
            "TextLogProb",
            self.model,
            self.tokenizer,
            model_class=lambda transformers: transformers.AutoModelForSequenceClassification,
            processor_class=lambda transformers: transformers.AutoTokenizer,
            download=self.download,
            device=self.device,
            processor_name="tokenizer",
        )
        names = model.config.id2label
        label = next((i for i, name in names.items() if name == self.label), self.label)
        if type(label) is not int or not 0 <= label < model.config.num_labels:
            raise RewardError(f"TextLogProb(label=...) is one of {dict(names)}, index or name, got {self.label!r}")
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "tokenizer", tokenizer)
        object.__setattr__(self, "label", label)

    @property
    def spec(self) -> RewardSpec:
        """Unit, bounds and version of the scores."""
        version = f"{getattr(self.model.config, '_name_or_path', '') or name_of(self.model)} {self.label}"
        return RewardSpec("nat", (-inf, 0.0), "none", version=version)

    @torch.no_grad()
    @scores_in_full
    def __call__(self, samples: Tensor) -> Tensor:
        texts, scores = decode(self.text, samples), [torch.zeros(0)]
        for start in range(0, len(texts), self.rows):
            chunk = texts[start : start + self.rows]
            inputs = self.tokenizer(chunk, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device)).logits.float()
            log_prob = logits.log_softmax(1) if logits.shape[1] > 1 else torch.nn.functional.logsigmoid(logits)
            scores.append(log_prob[:, int(self.label)].cpu())
        return torch.cat(scores).to(samples.device)


def decode(text: ToText, samples: Tensor) -> list[str]:
    """The texts of samples, checked.

    Args:
        text: from tokens `[M, L]` to M strings.
        samples: tokens `[M, L]`.

    Returns:
        M strings.

    Raises:
        RewardError: where `text` does not give a list of M strings.
    """
    texts = text(samples)
    if not isinstance(texts, list) or len(texts) != len(samples) or not all(isinstance(each, str) for each in texts):
        got = f"{len(texts)} items" if isinstance(texts, list) else type(texts).__name__
        raise RewardError(
            f"text must decode {len(samples)} samples to a list of as many strings, got {got}; decode the rows of the "
            "token tensor one by one, for instance with tokenizer.batch_decode"
        )
    return texts


def score_tensor(scores: list[float], samples: Tensor) -> Tensor:
    """Scores as a tensor.

    Args:
        scores: M numbers.
        samples: `[M, ...]`, for their device.

    Returns:
        `[M]`, float32, on the samples' device.
    """
    return torch.tensor(scores, dtype=torch.float32, device=samples.device)
