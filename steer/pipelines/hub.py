"""`steer.from_hub`: opens a pretrained pipeline by name, from the Hugging Face Hub or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from ..files import DIGESTS, check_digests
from ..processes.gaussian import GaussianProcess
from .from_pipeline import from_pipeline

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def from_hub(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> GaussianProcess:
    """Load a pretrained diffusers pipeline, by its repository ("owner/name") or its folder, and open it as a process.

    Args:
        name: A repository of the Hugging Face Hub, or a folder.
        revision: Branch, tag or commit; give a commit to make a run repeatable.
        variant: Which weight files, "fp16" say.
        dtype: Dtype of the networks, float32 by default; states stay float32.
        device: Where the pipeline goes.
        local_files_only: Load from the folder or the cache, never over the network.
        **options: As `steer.from_pipeline`: steps, transition, chunk, and the pipeline's own prompt,
            guidance_scale, ...

    Returns:
        The process of the pipeline, whose modules are in eval mode and need no gradients.

    Raises:
        ModelError: Where there is no such pipeline, where weights are pickled, and where code of the repository would
            have to run. Only safetensors files are read. Where the folder has a file SHA256SUMS, as `sha256sum`
            writes it, also where a file is not the one that it lists.

    To set up the scheduler, adapters or offloading first, load the pipeline yourself and open it by
    `steer.from_pipeline`.
    """
    pipe = load_pipeline(
        name, revision=revision, variant=variant, dtype=dtype, device=device, local_files_only=local_files_only
    )
    return from_pipeline(pipe, **options)


def load_pipeline(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    local_files_only: bool = False,
) -> Any:
    """The pipeline of `from_hub`, to be opened for one prompt after another."""
    import diffusers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
    renamed = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)
    given = {"revision": revision, "variant": variant, "dtype" if renamed else "torch_dtype": dtype or torch.float32}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(name),
            use_safetensors=True,
            local_files_only=local_files_only or folder.is_dir(),
            **{key: value for key, value in given.items() if value is not None},
        )
    # What diffusers, transformers and the hub's client raise; the last three at class names and settings that are none.
    except (OSError, ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"no pipeline could be loaded from {str(name)!r} ({type(error).__name__}: {_first_line(error)}); steer "
            "reads model_index.json, with classes that the installed diffusers and transformers have, and safetensors "
            "weights, and runs no code of a repository; a gated or private one needs `hf auth login`"
        ) from error
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            _check_complete(name, part, module)
            module.eval().requires_grad_(False)
    if device is not None:
        pipe.to(device)
    return pipe


def _check_complete(name: str | Path, part: str, module: torch.nn.Module) -> None:
    """Raises ModelError where a network's files lack some of its weights, of which diffusers only warns."""
    absent = [weight for weight, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]
    if absent:
        raise ModelError(
            f"the files of {str(name)!r} lack {len(absent)} weight(s) of its {part}, {absent[0]} first: they do not "
            "fit its config.json, or are not whole; restore both from where they came from"
        )


def _check_folder(folder: Path) -> None:
    """Raises ModelError for a folder without a pipeline, or where a component has only pickled weights."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} holds no pipeline: it has no model_index.json; write one with "
            f"pipe.save_pretrained({str(folder)!r})"
        )
    if (folder / DIGESTS).is_file():
        check_digests(folder)
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [path for path in part.iterdir() if path.is_file()]
        pickled = sorted(path.name for path in files if path.suffix in _PICKLED)
        if pickled and not any(path.suffix == ".safetensors" for path in files):
            raise ModelError(
                f"{part} has its weights as {', '.join(pickled)} only, and opening such a file can run code; save them "
                "as safetensors, which only holds numbers: pipe.save_pretrained(folder, safe_serialization=True), on a "
                "machine where you trust the file"
            )


def _first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "no message")
