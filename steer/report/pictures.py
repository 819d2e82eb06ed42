"""Samples that can be looked at, still or moving: what files and pages show of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .images import enlarged, grid, is_images, to_images, to_png

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES_PER_SECOND = 16
QUALITY = 90  # of WebP: frames are to look at, and the states are saved to the last bit


@dataclass(frozen=True)
class Video:
    """A sample that moves: its frames, of one size."""

    frames: tuple[Image, ...]

    @property
    def width(self) -> int:
        """In pixels."""
        return self.frames[0].width

    @property
    def height(self) -> int:
        """In pixels."""
        return self.frames[0].height

    def each(self, change: Callable[[Image], Image]) -> Video:
        """The video with every frame changed."""
        return Video(tuple(map(change, self.frames)))


def is_videos(decoded: Tensor) -> bool:
    """Whether decoded samples are videos: floats [M, F, C, H, W] with 1, 3 or 4 channels."""
    return decoded.ndim == 5 and is_images(decoded[:, 0])


def is_pictures(decoded: Tensor) -> bool:
    """Whether decoded samples are images or videos."""
    return is_images(decoded) or is_videos(decoded)


def to_pictures(decoded: Tensor) -> list[Image] | list[Video]:
    """Samples as PIL images, or as videos of them.

    Args:
        decoded: [M, C, H, W] or [M, F, C, H, W], in [0, 1].

    Raises:
        ShapeError: The samples are neither.
    """
    return [Video(tuple(to_images(frames))) for frames in decoded] if is_videos(decoded) else to_images(decoded)


def to_file(picture: Image | Video) -> tuple[str, bytes]:
    """A picture as a file: its suffix and its bytes. Images are PNG, videos animated WebP."""
    return (".webp", to_webp(picture)) if isinstance(picture, Video) else (".png", to_png(picture))


def to_webp(video: Video) -> bytes:
    """The video as an animated WebP file, 16 frames a second, over and over; equal frames in a row are one, longer."""
    buffer = io.BytesIO()
    first, *rest = video.frames
    first.save(
        buffer, format="WEBP", save_all=True, append_images=rest, loop=0, quality=QUALITY,
        duration=round(1000 / FRAMES_PER_SECOND),
    )  # fmt: skip
    return buffer.getvalue()


def to_array(picture: Image | Video) -> Any:
    """A picture as uint8 numbers, [H, W, C], or [H, W] where it is grey; a video as [F, H, W, C] or [F, H, W]."""
    import numpy

    if isinstance(picture, Video):
        return numpy.stack([numpy.asarray(frame) for frame in picture.frames])
    return numpy.asarray(picture)


def thumbnail(picture: Image | Video, most: int = 256) -> Image | Video:
    """The picture at a size for a page, which shows small ones with sharp pixels; WebP would blur those of videos."""
    if isinstance(picture, Video):
        return picture.each(lambda frame: enlarged(_shrunk(frame, most), 64))
    return _shrunk(picture, most)


def sheet(decoded: Tensor) -> Image | Video:
    """All samples in one picture, row by row; videos play side by side, and are small.

    Args:
        decoded: [M, C, H, W] or [M, F, C, H, W], in [0, 1].
    """
    if not is_videos(decoded):
        return grid(decoded, least=96)
    moments = ([_shrunk(image) for image in to_images(frames)] for frames in decoded.transpose(0, 1))
    return Video(tuple(grid(moment, least=96) for moment in moments))


def _shrunk(image: Image, most: int = 256) -> Image:
    image = image.copy()
    image.thumbnail((most, most))  # which never enlarges
    return image
