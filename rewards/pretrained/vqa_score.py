"""VQAScore: the probability that a vision-language model answers "Yes" when asked whether an image shows its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steer.errors import RewardError
from steer.torch_modes import scores_in_full
from steer.types import RewardSpec

from ..hub import model_and_processor
from ..image_checks import check_images, check_range
from ..pil_images import to_pictures
from ..scoring import check_prompts, name_of

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""As t2v_metrics asks CLIP-FlanT5."""


@dataclass(frozen=True, eq=False)
class VQAScore:
    """P(answer | image, question) of a vision-language model.

    Called with images `[M, 3, H, W]` in [0, 1] and M prompts. Samples of one prompt share forward passes, so nothing is
    padded and scores do not depend on the batch.

    Args:
        model: any image-text-to-text model of transformers, LLaVA, Qwen-VL, SmolVLM and their like, encoder-decoders
            included; or a hub id or folder. The model has its own licence.
        processor: the model's processor; None with an id.
        question: its "{prompt}" is replaced by the sample's prompt.
        answer: one token of the model, where the template continues with it: the token by which the question with this
            answer differs from the question alone. The blank that a chat template puts before an answer belongs to it
            (" Yes"), and so does one after a `template` that ends without; an answer that begins with one keeps it.
        template: how question and image are put to a model without a chat template, for instance
            "USER: <image>\\n{question} ASSISTANT:".
        square: whether images are first padded to squares with the processor's mean color, as the authors do for
            CLIP-FlanT5 and LLaVA, so that a processor that crops does not cut what the prompt may be about.
        rows: images per forward pass.
        download: whether to fetch a model given by id that is not in the hub's cache.
        device: for a model given by id.
        dtype: for a model given by id; half precision makes ties of close scores.

    Returns:
        Scores `[M]` in [0, 1], float32. spec.gradient is "exact" where the processor works on tensors and keeps their
        gradient (determined once, on a small image, without a forward pass of the model); else it is "none", and images
        are rounded to 8 bits as files are.

    Raises:
        RewardError: for values outside [0, 1], a missing package (pip install 'steer-diffusion[vlm]') or weights, a
            model without a processor or template, an answer that is not one further token, and a wrong number of
            prompts.
        ShapeError: for samples of another shape.

    Cost: one forward pass per sample.
    Source: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv 2404.01291);
        github.com/linzhiqiu/t2v_metrics, Apache-2.0.
    Differs: its CLIP-FlanT5 class is not one of transformers'; that one gives exp(-mean cross-entropy of "Yes" and the
        end token), about the square root of P("Yes").
    """

    model: Any = field(repr=False)
    processor: Any = field(default=None, repr=False)
    question: str = QUESTION
    answer: str = "Yes"
    template: str | None = None
    square: bool = True
    rows: int = 8
    download: bool = False
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    spec: RewardSpec = field(init=False)
    answer_token: int = field(init=False)

    def __post_init__(self) -> None:
        model, processor = model_and_processor(
            "VQAScore",
            self.model,
            self.processor,
            model_class=lambda transformers: transformers.AutoModelForImageTextToText,
            processor_class=lambda transformers: transformers.AutoProcessor,
            download=self.download,
            device=self.device,
            dtype=self.dtype,
        )
        if "{prompt}" not in self.question or self.rows < 1:
            raise RewardError(
                f"VQAScore needs {{prompt}} in its question and rows >= 1, got {self.question!r} and rows={self.rows}"
            )
        if self.template is None and not getattr(processor, "chat_template", None):
            raise RewardError(
                "VQAScore needs a chat template, and this model's processor has no chat template; pass template=..., "
                'for instance "USER: <image>\\n{question} ASSISTANT:"'
            )
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "processor", processor)
        object.__setattr__(self, "answer_token", self._answer_token())
        version = f"{getattr(model.config, '_name_or_path', '') or name_of(model)} {self.question} {self.answer}"
        gradient = "exact" if _keeps_gradient(processor) else "none"
        object.__setattr__(self, "spec", RewardSpec("1", (0.0, 1.0), gradient, prompts=True, version=version))

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        images = check_images(samples, "VQAScore", channels=(3,))
        check_range(images, "VQAScore", nan_passes=False)
        check_prompts(prompts, len(images), "VQAScore")
        scores: list[Tensor] = [torch.empty(0)] * len(images)
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, text in enumerate(prompts) if text == prompt]
            for start in range(0, len(rows), self.rows):
                chosen = rows[start : start + self.rows]
                for row, score in zip(chosen, self._score(images[chosen], prompt), strict=True):
                    scores[row] = score
        return torch.stack(scores).to(samples.device) if scores else images.new_zeros(0, dtype=torch.float32)

    def _score(self, images: Tensor, prompt: str) -> Tensor:
        """Probabilities [M] of images that share a prompt."""
        if self.square:
            images = to_square(images, getattr(self.processor.image_processor, "image_mean", None))
        inputs = self._inputs(images, self._text(prompt)).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        if self.model.config.is_encoder_decoder:
            config = self.model.config.get_text_config()
            start = self.model.generation_config.decoder_start_token_id or config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((len(images), 1), start, device=self.model.device)
        logits = self.model(**inputs).logits[:, -1].float()
        return logits.softmax(1)[:, self.answer_token]

    def _inputs(self, images: Tensor, text: str) -> Any:
        """The processor's output for images that share a text."""
        texts = [text] * len(images)
        if self.spec.gradient == "exact":
            return self.processor(text=texts, images=list(images), do_rescale=False, return_tensors="pt")
        return self.processor(text=texts, images=to_pictures(images, "VQAScore"), return_tensors="pt")

    def _text(self, prompt: str) -> str:
        """The question about a prompt, in the model's template."""
        question = self.question.replace("{prompt}", prompt)
        if self.template is not None:
            return self.template.replace("{question}", question)
        return self.processor.apply_chat_template([_asked(question)], add_generation_prompt=True, tokenize=False)

    def _answer_token(self) -> int:
        """The token by which the question with its answer differs from the question alone."""
        tokenizer, text = self.processor.tokenizer, ""
        if not self.model.config.is_encoder_decoder:  # those begin a text of their own
            text = self._text("it")
        before = tokenizer.encode(text, add_special_tokens=False) if text else []
        whole = tokenizer.encode(text + (self._blank(text) if text else "") + self.answer, add_special_tokens=False)
        if len(whole) != len(before) + 1 or whole[:-1] != before:
            raise RewardError(
                f"VQAScore needs an answer of one token, and {self.answer!r} has {len(whole) - len(before)} in this "
                f"model's vocabulary, or joins with what is before it, {text[-20:]!r}; choose a shorter one, such as "
                '"Yes", or a template that ends without a blank'
            )
        return whole[-1]

    def _blank(self, text: str) -> str:
        """What stands between the question in the model's template and the answer."""
        if self.answer[:1].isspace() or text[-1:].isspace():
            return ""
        if self.template is not None:
            return " "
        answered = [
            _asked(self.question.replace("{prompt}", "it")),
            {"role": "assistant", "content": [{"type": "text", "text": self.answer}]},
        ]
        try:
            whole = self.processor.apply_chat_template(answered, add_generation_prompt=False, tokenize=False)
        except Exception:  # whatever a template raises that has no answers
            whole = ""
        between = whole.removeprefix(text).partition(self.answer)[0] if whole.startswith(text) else "?"
        if between.strip():
            raise RewardError(
                f"VQAScore cannot tell how this model's chat template joins {text[-20:]!r} with an answer; begin the "
                "answer with the blank, as in answer=' Yes', or pass a template=..."
            )
        return between


def to_square(images: Tensor, mean: Sequence[float] | None) -> Tensor:
    """Images in the middle of squares of one color.

    Args:
        images: `[M, 3, H, W]` in [0, 1].
        mean: the color, three numbers in [0, 1], rounded down to 8 bits; None for black.

    Returns:
        `[M, 3, S, S]`, S = max(H, W), differentiable.
    """
    height, width = images.shape[2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    color = images.new_tensor([int(level * 255) / 255 for level in mean or (0.0, 0.0, 0.0)]).view(3, 1, 1)
    return pad(images - color, (left, side - width - left, top, side - height - top)) + color


def _asked(question: str) -> dict[str, Any]:
    """The message of a chat that shows an image and asks a question."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def _keeps_gradient(processor: Any) -> bool:
    """Whether a processor takes float tensors in [0, 1] and keeps their gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        image = torch.full((3, 32, 32), 0.5, requires_grad=True)
        try:
            out = processor.image_processor([image], do_rescale=False, return_tensors="pt")
        except (TypeError, ValueError, RuntimeError):  # a processor of arrays refuses a tensor with a gradient
            return False
    return bool(out["pixel_values"].requires_grad)
