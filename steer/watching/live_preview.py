"""A live picture of what a run has found: its best prediction of the clean sample, while it runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.event import Event
from ..core.population import gather
from ..cost import Meter, check_counts
from ..errors import ShapeError, SteerError
from ..files import write_atomically
from ..report.images import grid, to_images

if TYPE_CHECKING:
    from PIL.Image import Image


def preview(
    to: str | Path | Callable[[Image], Any], *, every: int = 10, decoder: Any = None
) -> Callable[[Event], None]:
    """Shows the best prediction of x0 while a run goes on: `on_step=steer.preview("live.png", every=5)`.

    The picture is of the particle of highest reward of each problem, one beside the other; of highest weight at steps
    where nothing was scored. The run is the same to the last bit with and without.

    Args:
        to: a .png file, replaced in one step each time, or a function of a PIL image: in a notebook,
            `IPython.display.display(display_id=True).update`.
        every: of how many steps.
        decoder: what decodes instead of the model's own decoder, which may be slow: an `AutoencoderTiny` of diffusers
            for latents of this model (TAESD), or a function of states [M, *event] to images [M, C, H, W] in [0, 1].

    Returns:
        A function of an Event, for `on_step=`.

    Raises:
        SteerError: a file of another kind. By the function: ShapeError where samples are no images, or the decoder is
            of other latents; it ends the run, with what it had in `.partial`.

    Cost: one decode per problem each time. It is outside the run's ledger, and inside its seconds.
    """
    check_counts(every=every)
    if not callable(to) and Path(to).suffix.lower() != ".png":
        raise SteerError(f"a preview is written as PNG, got the file {str(to)!r}; name it .png")
    steps = count(1)

    def shown(event: Event) -> None:
        if next(steps) % every or event.live_x0 is None:
            return
        picture = _picture(event, decoder)
        if callable(to):
            to(picture)
        else:
            write_atomically(Path(to), _png(picture))

    return shown


def _picture(event: Event, decoder: Any) -> Image:
    """The best prediction of every problem of an event."""
    clean = event.clean
    assert clean is not None
    value = event.live_state.log_weight if event.live_scores is None else event.live_scores
    best = gather(clean, value.argmax(1, keepdim=True).to(clean.device))
    with torch.no_grad():
        if decoder is None:
            decoded = event.process.metered(Meter()).decode(best)
        else:
            decoded = _decoded(decoder, best.flatten(0, 1))
    images = to_images(decoded)
    return images[0] if len(images) == 1 else grid(images)


def _decoded(decoder: Any, latents: Tensor) -> Tensor:
    """States [M, *event] as images in [0, 1], by an autoencoder of diffusers or a function."""
    if not hasattr(decoder, "decode"):
        return decoder(latents)
    channels, kind = decoder.config.latent_channels, type(decoder).__name__
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ShapeError(
            f"this {kind} decodes latents (M, {channels}, h, w), and the states of this process are "
            f"{tuple(latents.shape)}; give decoder= one made for this model, or a function that arranges them for it"
        )
    weight = next(decoder.parameters())
    image = decoder.decode(latents.to(weight.device, weight.dtype)).sample
    return (0.5 * image.float() + 0.5).clamp(0.0, 1.0)


def _png(image: Image) -> bytes:
    """The image as a PNG file, packed quickly rather than well."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
