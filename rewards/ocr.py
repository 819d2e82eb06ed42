"""Whether an image has the text on it that its prompt quotes, as an OCR model reads it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.torch_modes import scores_in_full
from steer.types import RewardSpec

from .hub import model_and_processor
from .pil_images import to_rgb
from .scoring import check_prompts

if TYPE_CHECKING:
    from PIL.Image import Image


_CLOSING = {'"': '"', "“": '”"', "„": "“”", "«": "»"}
"""What opens a quotation, and what closes it, the likeliest first."""

_STRAIGHT = str.maketrans({**dict.fromkeys("‘’‚‛′`´", "'"), **dict.fromkeys("“”„‟″«»", '"'), "−": "-"})


@dataclass(frozen=True, eq=False)
class OCR:
    """1 - min(d, L) / L: d edits from the text read to the L characters wanted, ignoring case, spaces and typography.

    Called with images `[M, 1 or 3, H, W]` in [0, 1] and M prompts. The text wanted is what the prompt has in its first
    pair of double quotes: A sign that says "Open". d is 0 where it occurs anywhere in what was read, so that other
    text in the image costs nothing once the wanted one is there. Typography is what `plain` makes alike: composed and
    decomposed accents, full-width letters, ligatures, kinds of quotes and of dashes.

    Args:
        reader: from a picture (PIL, RGB) to the text in it. `rewards.TransformersReader` is one for models of
            transformers. With PaddleOCR 2, as the source has it:

            lambda picture: "".join(
                text for _, (text, sure) in (ocr.ocr(np.array(picture), cls=False)[0] or []) if sure
            )

    Returns:
        Scores `[M]` in [0, 1], float32, without a gradient.

    Raises:
        RewardError: for a prompt without quoted text or with a quote that does not close, and where the reader fails: a
            failure is not scored 0.
        ShapeError: for samples of another shape.

    Cost: one call of the reader per sample.
    Source: the text-rendering reward of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470; github.com/yifan123/flow_grpo,
        MIT).
    Differs: the source takes what follows the first straight quote, inch signs included, and compares letters as they
        are encoded, but for case and blanks.
    """

    reader: Callable[[Image], str] = field(repr=False)
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none", prompts=True)

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        pictures = to_rgb(samples, "OCR")
        check_prompts(prompts, len(pictures), "OCR")
        wanted = [quoted(prompt) for prompt in prompts]
        scores = [likeness(self._read(picture), text) for picture, text in zip(pictures, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _read(self, picture: Image) -> str:
        text = self.reader(picture)
        if not isinstance(text, str):
            raise RewardError(
                f"OCR's reader must return the text of a picture, got {type(text).__name__}; return one string, empty "
                "where there is no text"
            )
        return text


@dataclass(frozen=True, eq=False)
class TransformersReader:
    """A reader for `OCR` from a model of transformers that writes what it sees, such as TrOCR.

    Called with one PIL picture. TrOCR reads one line: give it pictures of one line, or a reader that finds lines
    first. Decoding is greedy, so the same picture gives the same text.

    Args:
        model: a model, or a hub id or folder ("microsoft/trocr-base-printed", MIT).
        processor: the model's processor; None with an id.
        most: tokens to write at most.
        download: whether to fetch a model given by id that is not in the hub's cache.
        device: for a model given by id.

    Returns:
        The text of the picture.

    Raises:
        RewardError: for missing packages (pip install 'steer-diffusion[vlm]') or weights.
    """

    model: Any = field(repr=False)
    processor: Any = field(default=None, repr=False)
    most: int = 64
    download: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        model, processor = model_and_processor(
            "TransformersReader",
            self.model,
            self.processor,
            model_class=lambda transformers: transformers.AutoModelForImageTextToText,
            processor_class=lambda transformers: transformers.AutoProcessor,
            download=self.download,
            device=self.device,
        )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "processor", processor)

    @torch.no_grad()
    def __call__(self, picture: Image) -> str:
        pixel_values = self.processor(images=picture, return_tensors="pt")["pixel_values"].to(self.model.device)
        tokens = self.model.generate(pixel_values=pixel_values, max_new_tokens=self.most, do_sample=False, num_beams=1)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0]


def quoted(prompt: str) -> str:
    """The text in the first pair of double quotes of a prompt.

    A straight quote after a digit, outside of quotes, is an inch sign: a 24" monitor that shows "Hello".

    Args:
        prompt: with straight quotes, or typographic ones: “Open”, „Open“, «Open».

    Returns:
        The text, as it is written.

    Raises:
        RewardError: where the prompt quotes no text, or quotes do not pair.
    """
    found, at = [], 0
    while at < len(prompt):
        mark = prompt[at]
        if mark not in _CLOSING or (mark == '"' and prompt[at - 1 : at].isdigit()):
            if mark in "”»":
                raise RewardError(
                    f"OCR found {mark} before a quote that it closes in {prompt!r}; quote the text in pairs"
                )
            at += 1
            continue
        ends = [end for closing in _CLOSING[mark] if (end := prompt.find(closing, at + 1)) >= 0]
        if not ends:
            raise RewardError(f"OCR found a quote that does not close in {prompt!r}; quote the wanted text in a pair")
        found.append(prompt[at + 1 : ends[0]])
        at = ends[0] + 1
    if not found or not plain(found[0]):
        raise RewardError(f'OCR needs the wanted text in double quotes, as in: a sign that says "Open"; got {prompt!r}')
    return found[0]


def likeness(read: str, wanted: str) -> float:
    """1 - min(d, L) / L for d edits between two texts, made alike by `plain` first.

    Args:
        read: the text that was read.
        wanted: the text of L characters that should be there.

    Returns:
        A number in [0, 1]; 1 where wanted occurs anywhere in read.
    """
    read, wanted = plain(read), plain(wanted)
    return 1.0 if wanted in read else 1.0 - min(edits(read, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """A text without what two correct readings of the same letters may differ in.

    Args:
        text: any.

    Returns:
        The text in Unicode's form NFKC, case-folded, with straight quotes and hyphens for all kinds of quotes and
        dashes, without spaces.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    letters = ("-" if unicodedata.category(letter) == "Pd" else letter for letter in folded.translate(_STRAIGHT))
    return "".join("".join(letters).split()).replace("''", '"')


def edits(a: str, b: str) -> int:
    """The Levenshtein distance between two texts.

    Args:
        a: a text.
        b: another.

    Returns:
        The least number of insertions, deletions and replacements from a to b.
    """
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
