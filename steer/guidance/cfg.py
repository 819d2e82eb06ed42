"""Classifier-free guidance out of two processes: damped across the common direction, dropped once it is not needed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..core.chain import run_chain
from ..core.loop import Loop
from ..core.run import Run
from ..cost import Cost, Meter
from ..errors import ModelError, ShapeError, StateSpaceError, SteerError
from ..key import Key, as_key
from ..processes.gaussian import need_gaussian
from ..processes.parameterization import eps
from ..types import GaussianPath
from .guided_process import CURE, GuidedProcess, guide
from .hooks import Hooks, Log, Step


@dataclass(frozen=True, eq=False)
class CFGHook:
    """The x0 hook of `classifier_free`."""

    unconditional: GaussianPath
    weight: float
    damped: bool
    until: int

    def __call__(self, at: Step) -> Tensor:
        if at.k >= self.until:
            return at.x0
        with torch.no_grad():
            other = self.unconditional.metered(at.process.meter or Meter()).denoise(at.x.detach(), at.k, at.key)
        at.note("similarity", similarity(at, other))
        if self.damped and at.here.sigma > 0.0 and at.here.alpha > 0.0:
            x = at.x.detach()
            noise = shared_part(eps(x, at.x0, at.here), eps(x, other, at.here))
            other = (x - at.here.sigma * noise) / at.here.alpha
        return other + self.weight * (at.x0 - other)

    def rows(self, process: GaussianPath) -> int:
        """Rows of the unconditional network that one chain costs a particle."""
        return min(self.until, process.steps) * self.unconditional.rows

    def only(self, problem: int) -> CFGHook:
        return replace(self, unconditional=self.unconditional.only(problem))


def similarity(at: Step, other: Tensor) -> Tensor:
    """Cosine [B, N] between the noises that two predictions stand for."""
    pair = (eps(at.x.detach(), x0, at.here).double().flatten(2) for x0 in (at.x0, other))
    return torch.nn.functional.cosine_similarity(*pair, dim=2)


def shared_part(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """The unconditional noise projected on the first right singular vector of the two, every particle by itself.

    That vector is the leading eigenvector (a, b) of the 2 x 2 Gram matrix, taken through the rows: a u + b c.
    """
    rows = torch.stack([unconditional, conditional], 2).double().flatten(3)
    leading = torch.linalg.eigh(rows @ rows.mT).eigenvectors[..., -1]
    direction = torch.nn.functional.normalize((leading[..., None] * rows).sum(2), dim=2)
    length = (rows[:, :, 0] * direction).sum(2, keepdim=True)
    return (length * direction).view(unconditional.shape).to(unconditional.dtype)


def classifier_free(
    conditional: GaussianPath,
    unconditional: GaussianPath,
    weight: float,
    *,
    damped: bool = False,
    until: int | None = None,
) -> GuidedProcess:
    """Guidance u + weight (c - u) of two processes on one grid (Ho & Salimans 2022, weight = 1 + their w).

    Args:
        conditional, unconditional: processes on the same time grid and event.
        weight: w; 1 is the conditional model, 0 the unconditional one.
        damped: tangential damping (TCFG, 2503.18137): u's noise keeps only what it shares with c's, its projection on
            the first right singular vector of the two.
        until: the level from which on the conditional model runs alone, all levels by default; see `adaptive`.

    Raises:
        ShapeError: where grids or events differ.
        StateSpaceError: where one of the two is on no Gaussian path, or the unconditional one has mean hooks.
        ModelError: where the unconditional one is a pipeline opened with prompt="", in place of which the pipeline's
            own guidance takes zeros (SDXL, Kolors).

    Cost per step: a row of both, from `until` on one of the conditional alone; `.rows` is the average rounded up. The
    log has the "similarity" of the two noises at the guided levels.
    """
    for process in (conditional, unconditional):
        need_gaussian(process, "classifier-free guidance", cure=CURE)
    if conditional.times != unconditional.times or conditional.event != unconditional.event:
        raise ShapeError(
            f"guidance mixes predictions at the same levels, got grids of {conditional.steps} and {unconditional.steps}"
            f" steps and events {conditional.event} and {unconditional.event}; give both processes the same times"
        )
    _check_empty_prompt(unconditional)
    if unconditional.hooks is not None and unconditional.hooks.mean:
        raise StateSpaceError(
            f"guidance mixes predictions, and this unconditional {type(unconditional).__name__} has mean hooks, which "
            "move steps; guide the mixture instead: guide(classifier_free(conditional, unconditional, weight), hooks)"
        )
    last = conditional.steps if until is None else until
    if not 0 <= last <= conditional.steps:
        raise SteerError(f"until is a level in [0, {conditional.steps}], got {until}")
    mixed = CFGHook(unconditional, weight, damped, last)
    return guide(conditional, Hooks(x0=(mixed,), extra=(mixed.rows,)))


def _check_empty_prompt(unconditional: GaussianPath) -> None:
    """Raises where a pipeline was opened with an empty prompt, and itself guides from zeros in its place."""
    call = getattr(getattr(unconditional, "denoiser", None), "call", None)
    pipe = getattr(call, "user_pipe", None)
    empty = any(not prompt.strip() for prompt in unconditional.prompts or ())
    if pipe is None or not empty or not getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        return
    if "pooled_prompt_embeds" in inspect.signature(type(pipe).__call__).parameters:  # else zeroed while it is encoded
        raise ModelError(
            f"{type(pipe).__name__} guides itself from embeddings of zeros, and this unconditional process has "
            'those of prompt="", another distribution; open it with prompt_embeds=torch.zeros_like(...) and '
            "pooled_prompt_embeds=torch.zeros_like(...) of the conditional's, or leave guidance to the pipeline: "
            "steer.from_pipeline(pipe, prompt=..., guidance_scale=w)"
        )


def adaptive(
    conditional: GaussianPath,
    unconditional: GaussianPath,
    weight: float,
    *,
    similar: float = 0.991,
    batch: int = 1,
    particles: int = 16,
    key: Key | int = 0,
    seed: int | None = None,
    damped: bool = False,
) -> tuple[GuidedProcess, Cost]:
    """Classifier-free guidance that drops the unconditional pass where the two models agree, and what finding out cost.

    A pilot population, `particles` full chains per problem, finds the level by `settled`. Any run under full guidance
    that is made anyway is as good a pilot, and then finding out costs nothing:

        classifier_free(c, u, weight, until=settled(result.process.log))

    Args:
        similar: cosine of the two noises above which the unconditional pass is dropped.
        batch: problems of the pilot run; a conditioned process has its own number.
        particles: of the pilot population, per problem.
        key: names the noise of the pilot run.
        seed: the same as `key`; give one of them.
        Others: as `classifier_free`.

    Returns:
        The guided process, and the cost of the pilot run.

    Source: Castillo et al. 2023 (Adaptive Guidance, 2312.12487); their threshold is similar's default.
    Differs: they decide for every sample, by its cosine at the step before. That is a function of the path: from the
    state alone the cosine is not known without the very pass that is to be saved, and weights, trees and replays need
    steps that are functions of their state. One level for all is, and the ledger shows a saving known in advance.
    """
    if not -1.0 <= similar <= 1.0:
        raise SteerError(f"similar is a cosine in [-1, 1], got {similar}")
    guided = classifier_free(conditional, unconditional, weight, damped=damped)
    run = Run.open("adaptive", guided, _nothing, batch=batch, temperature=1.0, key=as_key(key, seed).fold("adaptive"))
    run_chain(Loop(run), run.begin(particles))
    until = settled(cast(GuidedProcess, run.process).log, similar)
    return classifier_free(conditional, unconditional, weight, damped=damped, until=until), run.meter.cost()


def _nothing(samples: Tensor) -> Tensor:
    return torch.zeros(len(samples), device=samples.device)


def settled(log: Log, similar: float = 0.991) -> int:
    """The first level from which the mean cosine stays above `similar`: what `until` of `classifier_free` takes.

    Args:
        log: of a run of `classifier_free`, `result.process.log`.
        similar: cosine of the conditional and the unconditional noise, in [-1, 1].

    Returns:
        The level, 0 where the cosine is above `similar` throughout.

    Raises:
        SteerError: where the log has no "similarity": the run was of another process.
    """
    table = log.table("similarity")
    if not table:
        raise SteerError(
            f"settled reads the similarity that classifier_free notes, and this log has {log.names}; give it "
            "result.process.log of a run under classifier_free"
        )
    return 1 + max((k for k, (mean, _) in table.items() if not mean > similar), default=-1)
