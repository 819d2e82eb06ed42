"""Whether an image has the text on it that its prompt quotes, as an OCR model reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from .hub import from_hub, optional
from .pil_images import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class OCR:
    """1 - min(d, L) / L in [0, 1]: d edits from the text read to the L characters wanted, case and spaces aside.

    The text wanted is what the prompt has between its first two double quotes: A sign that says "Open". d is 0 where
    it occurs anywhere in what was read, so that other text in the image costs nothing once the wanted one is there.
    reader: any function of a picture (PIL, RGB) to the text in it. With PaddleOCR 2, as the source has it:
        lambda picture: "".join(text for _, (text, sure) in (ocr.ocr(np.array(picture), cls=False)[0] or []) if sure)
        `rewards.TransformersReader` is one for models of transformers.
    Images are (M, 1 or 3, H, W) in [0, 1]; scores float32; no gradient. Cost: one call of the reader per sample.
    Raises RewardError for a prompt without quoted text, and where the reader fails: a failure is no score.
    Source: the text-rendering reward of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470; github.com/yifan123/flow_grpo,
    MIT). Typographic quotes count as quotes here.
    """

    reader: Callable[[Image], str] = field(repr=False)
    spec: ClassVar[RewardSpec] = RewardSpec("1", (0.0, 1.0), "none", prompts=True)

    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        pictures, wanted = to_rgb(samples, "OCR"), [quoted(prompt) for prompt in prompts]
        if len(wanted) != len(pictures):
            raise RewardError(f"OCR needs {len(pictures)} prompts, one per sample, got {len(wanted)}")
        scores = [likeness(self._read(picture), text) for picture, text in zip(pictures, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _read(self, picture: Image) -> str:
        text = self.reader(picture)
        if not isinstance(text, str):
            raise RewardError(f"OCR's reader must return the text of a picture, got {type(text).__name__}")
        return text


@dataclass(frozen=True, eq=False)
class TransformersReader:
    """A reader from a model of transformers that writes what it sees: TrOCR and its like. Greedy, so it repeats itself.

    model, processor: a ready pair, or a hub id or folder ("microsoft/trocr-base-printed", MIT) and no processor. TrOCR
    reads one line: give it pictures of one line, or a reader that finds lines first. most: tokens to write.
    """

    model: Any = field(repr=False)
    processor: Any = field(default=None, repr=False)
    most: int = 64
    download: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        model, processor = self.model, self.processor
        if isinstance(model, str):
            transformers = optional("transformers", "vlm")
            processor = processor or from_hub(transformers.AutoProcessor, model, download=self.download)
            loader = transformers.AutoModelForImageTextToText
            model = from_hub(loader, model, download=self.download, use_safetensors=True).to(self.device)
        if processor is None:
            raise RewardError("TransformersReader(model) was given no processor; pass both, or a hub id")
        object.__setattr__(self, "model", model.eval().requires_grad_(False))
        object.__setattr__(self, "processor", processor)

    @torch.no_grad()
    def __call__(self, picture: Image) -> str:
        """The text of a picture."""
        pixel_values = self.processor(images=picture, return_tensors="pt")["pixel_values"].to(self.model.device)
        written = self.model.generate(pixel_values=pixel_values, max_new_tokens=self.most, do_sample=False, num_beams=1)
        return self.processor.batch_decode(written, skip_special_tokens=True)[0]


def quoted(prompt: str) -> str:
    """The text between the first two double quotes of a prompt; RewardError where it has none."""
    pieces = prompt.replace("\u201c", '"').replace("\u201d", '"').split('"')
    if len(pieces) < 3 or not _bare(pieces[1]):
        raise RewardError(f'OCR needs the wanted text in double quotes, as in: a sign that says "Open"; got {prompt!r}')
    return pieces[1]


def likeness(read: str, wanted: str) -> float:
    """1 - min(d, L) / L for the edits d between two texts without case and spaces, 0 where wanted occurs in read."""
    read, wanted = _bare(read), _bare(wanted)
    return 1.0 if wanted in read else 1.0 - min(edits(read, wanted), len(wanted)) / len(wanted)


def edits(a: str, b: str) -> int:
    """The Levenshtein distance: insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
    return row[-1]


def _bare(text: str) -> str:
    return "".join(text.lower().split())
