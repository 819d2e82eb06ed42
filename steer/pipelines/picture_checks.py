"""What pipelines do to pictures after decoding them: a safety checker blackens some, a watermark is written into all.

Both leave torch on the way, so gradients cannot pass through them. What they return is what the pipeline's user sees,
and stays what rewards see; gradients pass as if the picture had not been changed, and are zero where it was blackened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("steer")


class PictureChecks:
    """Wraps the safety checker and the watermark of a pipeline's copy, where it has them.

    Args:
        pipe: steer's copy of the pipeline.

    Attributes:
        seen: Pictures that the safety checker has seen.
        blackened: Those that it replaced by black ones.
    """

    def __init__(self, pipe: Any):
        self.seen = self.blackened = 0
        self._name = type(pipe).__name__
        if getattr(pipe, "safety_checker", None) is not None and hasattr(pipe, "run_safety_checker"):
            vars(pipe)["run_safety_checker"] = self._checked(pipe.run_safety_checker)
        for name in ("watermark", "watermarker"):
            if hasattr(getattr(pipe, name, None), "apply_watermark"):
                vars(pipe)[name] = _Watermark(getattr(pipe, name))

    def _checked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline's `run_safety_checker`, which passes gradients of pictures that it leaves as they are."""

        def checked(image: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_tensor(image):
                return run(image, *args, **kwargs)
            returned, flags, *rest = run(image.detach().clone(), *args, **kwargs)
            self._report(flags)
            if image.requires_grad:
                safe = torch.tensor([not flag for flag in flags], device=image.device)
                returned = _PassGradient.apply(image, returned, safe.view(-1, *[1] * (image.ndim - 1)))
            return returned, flags, *rest

        return checked

    def _report(self, flags: Any) -> None:
        """Count the pictures that were blackened, and say so whenever there are twice as many as when last said."""
        before = self.blackened
        self.seen, self.blackened = self.seen + len(flags or ()), before + sum(map(bool, flags or ()))
        if self.blackened.bit_length() > before.bit_length():
            log.warning(
                "the safety checker of %s replaced %d of the %d pictures decoded so far by black ones, and rewards "
                "score those; to steer by the pictures themselves, open the pipeline with safety_checker=None",
                self._name,
                self.blackened,
                self.seen,
            )


class _Watermark:
    """A pipeline's watermark, which passes gradients."""

    def __init__(self, watermark: Any):
        self._watermark = watermark

    def apply_watermark(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """The images with the watermark in them."""
        if not torch.is_tensor(images) or not images.requires_grad:
            return self._watermark.apply_watermark(images, *args, **kwargs)
        marked = self._watermark.apply_watermark(images.detach().clone(), *args, **kwargs)
        # Outside [-1, 1] pixels are cut off with the watermark or without it, and those it rounds to the edge also.
        return _PassGradient.apply(images, marked.to(images), images.detach().abs() <= 1.0)


class _PassGradient(torch.autograd.Function):
    """The value of one tensor with the gradient of another, where a mask allows it."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, value: Tensor, mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(mask)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * ctx.saved_tensors[0], None, None
