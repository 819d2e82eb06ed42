"""What a pipeline does before its loop: the noise it draws and the pipelines that it runs first."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .argument_division import same_value
from .families import COMBINED_PIPELINES

DrawFunction = Callable[..., Tensor]
"""draw(original, shape, generator=, device=, dtype=, layout=), which replaces diffusers' `randn_tensor`."""


def inner_pipelines(pipe: Any) -> list[str]:
    """Names of the other pipelines that a pipeline runs, sorted."""
    return sorted(name for name, part in vars(pipe).items() if hasattr(part, "components") and callable(part))


def owner_of_loop(pipe: Any) -> Any:
    """The pipeline whose loop makes the samples: the decoder of a combined pipeline, else the pipeline itself."""
    return pipe.decoder_pipe if set(inner_pipelines(pipe)) == COMBINED_PIPELINES else pipe


def copy_pipeline(pipe: Any, scheduler: Any) -> Any:
    """Copy a pipeline so that its loop uses another scheduler. Modules are shared, and the copy shows no progress bar.

    Other schedulers and guiders keep state while a pipeline runs, so the copy gets its own.

    Args:
        pipe: The pipeline, which is only read.
        scheduler: The scheduler of the copy's loop.

    Returns:
        The copy.
    """
    other = copy.copy(pipe)
    other.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if hasattr(part, "config_name") and not isinstance(part, torch.nn.Module):
            vars(other)[name] = copy.deepcopy(part)
    if owner_of_loop(pipe) is pipe:
        vars(other)["scheduler"] = scheduler
    else:
        vars(other)["prior_pipe"] = copy_pipeline(pipe.prior_pipe, copy.deepcopy(pipe.prior_pipe.scheduler))
        vars(other)["decoder_pipe"] = copy_pipeline(pipe.decoder_pipe, scheduler)
    return other


def constant_draw(value: float) -> DrawFunction:
    """Draws that are all equal to one number.

    The latents that a pipeline starts from are affine in their noise, so two such numbers give their mean and standard
    deviation whatever else they contain: an encoded image, packing, the scheduler's own scale.
    """

    def draw(original: Any, shape: Any, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        return torch.full(tuple(shape), value, device=device, dtype=dtype)

    return draw


def same_draw_per_row(rows: int) -> DrawFunction:
    """Draws of one row, repeated over a batch, so that what is drawn before the loop is the same for every particle.

    A batch of several copies, one for each branch of guidance, has a draw for each copy, as a single row has.
    """

    def draw(original: Any, shape: Any, **options: Any) -> Tensor:
        if shape[0] % rows:
            return original(shape, **options)
        return original((shape[0] // rows, *shape[1:]), **options).repeat_interleave(rows, 0)

    return draw


@contextmanager
def noise_replaced(modules: list[dict[str, Any]], draw: DrawFunction) -> Iterator[None]:
    """Within this context, draws by diffusers' `randn_tensor` in some modules' functions are made by `draw`.

    Args:
        modules: Global names of the modules, from `modules_that_draw`.
        draw: What draws instead.
    """
    drawn = [module["randn_tensor"] for module in modules]

    def replacement(original: Any) -> Any:
        names = ("generator", "device", "dtype", "layout")
        return lambda shape, *args, **options: draw(original, shape, **dict(zip(names, args, strict=False)), **options)

    try:
        for module, original in zip(modules, drawn, strict=True):
            module["randn_tensor"] = replacement(original)
        yield
    finally:
        for module, original in zip(modules, drawn, strict=True):
            module["randn_tensor"] = original


def modules_that_draw(pipe: Any, *, encoders: bool = False) -> list[dict[str, Any]]:
    """Global names of the modules whose `randn_tensor` a pipeline calls.

    Args:
        pipe: The pipeline.
        encoders: Whether to include those of its encoders, which draw from the distribution of an encoded image.
    """
    functions = [getattr(type(pipe), name, None) for name in ("__call__", "prepare_latents")]
    if encoders:
        functions += [type(part).encode for part in pipe.components.values() if has_encoder(part)]
    names = {id(f.__globals__): f.__globals__ for f in map(inspect.unwrap, filter(None, functions))}
    if encoders:
        from diffusers.models.autoencoders import vae

        names[id(vars(vae))] = vars(vae)
    return [module for module in names.values() if "randn_tensor" in module]


def has_encoder(component: Any) -> bool:
    """Whether a component of a pipeline encodes images, frames or sound."""
    return isinstance(component, torch.nn.Module) and callable(getattr(type(component), "encode", None))


class EncodedOnce:
    """Forwards everything to an autoencoder, but encodes equal rows, and equal inputs of later calls, once.

    Args:
        module: The autoencoder, which is never modified.
    """

    def __init__(self, module: torch.nn.Module):
        vars(self).update(_module=module, _known=[])

    def encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The autoencoder's `encode`: each distinct row of x once."""
        module, known = vars(self)["_module"], vars(self)["_known"]
        if torch.is_grad_enabled() or not torch.is_tensor(x) or x.ndim == 0:
            return module.encode(x, *args, **kwargs)
        rows, places = _distinct_rows(x)
        given = (x[rows], args, kwargs)
        encoded = next((answer for before, answer in known if same_value(before, given)), None)
        if encoded is None:
            encoded = module.encode(*given[:1], *args, **kwargs)
            known.append((given, encoded))
            del known[:-KEPT_ENCODINGS]
        return _taken(encoded, len(rows), torch.tensor(places, device=x.device))

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(vars(self)["_module"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_module"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_module"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(vars(self)["_module"], name)


KEPT_ENCODINGS = 16
"""Inputs whose encoding is kept, by each autoencoder of an opened pipeline."""


def _distinct_rows(x: Tensor) -> tuple[list[int], list[int]]:
    """The first row of every group of equal rows, and for each row the place of its group among them."""
    rows: list[int] = []
    places = []
    for i in range(len(x)):
        place = next((p for p, row in enumerate(rows) if torch.equal(x[row], x[i])), len(rows))
        if place == len(rows):
            rows.append(i)
        places.append(place)
    return rows, places


def _taken(value: Any, count: int, places: Tensor) -> Any:
    """An encoder's output with the rows at `places` of its `count` rows, as often as they are named."""
    if torch.is_tensor(value):
        return value.index_select(0, places.to(value.device)) if value.ndim and len(value) == count else value
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(part, count, places) for part in value)
    if hasattr(value, "items"):
        return type(value)(**{name: _taken(part, count, places) for name, part in value.items()})
    if hasattr(value, "sample") and hasattr(value, "mode"):  # a distribution
        other = copy.copy(value)
        vars(other).update({name: _taken(part, count, places) for name, part in vars(value).items()})
        return other
    return value
