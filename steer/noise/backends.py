"""Which backend makes a draw: the fused kernel of the device where it works, torch operations elsewhere."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SteerError
from . import reference

CHOICES = ("auto", "reference")
_KERNEL_OF = {"cpu": "numba", "cuda": "triton"}
log = logging.getLogger("steer")


class Fill(Protocol):
    """Writes draws into `out` [problems, count], float64 or float32; `reference.fill` says what the arguments are."""

    def __call__(
        self, kind: str, out: Tensor, first: int, problem: int, step: int, words: tuple[int, int], /
    ) -> None: ...


_proven: dict[tuple[torch.device, str, torch.dtype], Fill] = {}
_broken: set[str] = set()
_proving = threading.RLock()


def check_choice(noise: str) -> None:
    """Raises SteerError for a name of no choice."""
    if noise not in CHOICES:
        raise SteerError(
            f"a key's noise is made by 'auto', the fastest backend that its device has, or 'reference', torch "
            f"operations, which give the same numbers; got {noise!r}"
        )


def fill(kind: str, out: Tensor, first: int, problem: int, step: int, words: tuple[int, int], noise: str) -> None:
    """`reference.fill` by the backend of a choice, "auto" or "reference"."""
    made_by = reference.fill
    if noise == "auto":
        use = (out.device, kind, out.dtype)
        made_by = _proven.get(use) or _prove(*use)
    made_by(kind, out, first, problem, step, words)


def name_of(noise: str, device: torch.device | str) -> str:
    """The backend that makes normals on a device: "numba", "triton" or "reference"."""
    device = torch.device(device)
    kernel = _KERNEL_OF.get(device.type)
    if noise == "reference" or kernel is None:
        return "reference"
    if not any(on.type == device.type for on, *_ in _proven):  # nothing was drawn there yet
        fill("normal", torch.empty(1, 1, device=device), 0, 0, 0, (0, 0), noise)
    return "reference" if kernel in _broken else kernel


def _prove(device: torch.device, kind: str, dtype: torch.dtype) -> Fill:
    """The backend for draws of a kind, once it has made some as the reference does to the last bit."""
    kernel = _KERNEL_OF.get(device.type)
    with _proving:
        made_by = None if kernel is None or kernel in _broken else _kernel(kernel, device, kind, dtype)
        _proven[device, kind, dtype] = made_by = made_by or reference.fill
    return made_by


def _kernel(name: str, device: torch.device, kind: str, dtype: torch.dtype) -> Fill | None:
    """A kernel that was tried; None, and a line in the log, where it does not load, compile or agree."""
    try:
        made_by = _loaded(name)
        drawn, expected = torch.empty(2, 2, 1500, dtype=dtype, device=device).unbind(0)
        for backend, out in ((made_by, drawn), (reference.fill, expected)):
            backend(kind, out, (1 << 34) - 1401, 7, 11, (0x9E3779B9, 0xBB67AE85))
        if torch.equal(drawn, expected):
            return made_by
        reason = f"its {kind} draws differ by up to {float((drawn - expected).abs().max()):.2g}"
    except Exception as error:  # whatever a compiler raises, torch can draw
        reason = f"{type(error).__name__}: {error}"
    _broken.add(name)
    log.warning(
        "noise on this %s is made by torch operations, the same numbers at some ten times the time, because the %s "
        "kernel does not work here (%s)", device.type, name, reason,
    )  # fmt: skip
    return None


@lru_cache(maxsize=2)
def _loaded(name: str) -> Fill:
    """The kernel, compiled when it is first called."""
    if name == "triton":
        from .triton_kernel import fill

        return fill
    from .numba_kernel import compiled

    try:
        return compiled(cache=True)
    except RuntimeError:  # numba found no directory to write to
        log.warning(
            "the noise kernel is compiled in every process, some seconds each, because numba has nowhere to keep it: "
            "neither the folder of steer nor the user's cache can be written; set NUMBA_CACHE_DIR to one that can"
        )
        return compiled(cache=False)
