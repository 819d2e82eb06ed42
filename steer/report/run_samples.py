"""The samples of a run on its page, prompt by prompt: pictures, texts, or plots of what is neither."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import plots
from .page import number
from .pictures import is_pictures, thumbnail, to_pictures
from .run_result import RunResult


def problem_names(result: RunResult) -> list[str]:
    """What each problem of a run is called: its prompt, or its number."""
    prompts = result.process.prompts
    return list(prompts) if prompts else [f"problem {b}" for b in range(result.reward.shape[0])]


def samples(result: RunResult, reference: RunResult | None, index: Tensor) -> dict[str, Any]:
    """What the page shows of samples: a section for each problem, or plots where they are neither pictures nor texts.

    Args:
        result: The run, of B problems.
        reference: Unsteered samples of the same process and reward.
        index: Which particles to show, [B, M].

    Returns:
        `sections`, each with a `name` (None where there is one problem, without a prompt), `panels` of pictures and
        `texts`, of which one is empty; and `plots`, by name. Either is empty.
    """
    found = sections(result, reference, index)
    if found:
        drawn = []
    elif math.prod(result.x.shape[2:]) == 2:
        drawn = [("unsteered and steered", plots.samples_scatter(result, reference))]
    else:
        svgs = plots.coordinate_histograms(result, reference)
        drawn = [(f"coordinate {i}", svg) for i, svg in enumerate(svgs)]
    return {"sections": found, "plots": drawn}


def sections(result: RunResult, reference: RunResult | None, index: Tensor) -> list[dict[str, Any]]:
    """The `sections` of `samples`: empty where samples are neither pictures nor texts."""
    chosen = result.take(index)
    names = problem_names(result) if len(index) > 1 or result.process.prompts else [None]
    if result.process.text is not None:
        texts = _texts(chosen, reference)
        return [{"name": name, "panels": [], "texts": rows} for name, rows in zip(names, texts, strict=True)]
    if is_pictures(chosen.decoded):
        panels = _panels(chosen, reference, index)
        return [{"name": name, "panels": own, "texts": []} for name, own in zip(names, panels, strict=True)]
    return []


def _beside(reference: RunResult, count: int) -> RunResult:
    """Unsteered samples to show: those from the seeds of the run's own first particles, best first."""
    first = torch.arange(min(count, reference.reward.shape[1]), device=reference.root.device)
    chosen = reference.take(first.expand(len(reference.root), -1))
    return chosen.take(chosen.ranked())


def _firsts(run: RunResult, problems: int) -> list[int]:
    """Where each problem's samples begin in a run; those of a single repetition stand beside every problem."""
    count = run.reward.shape[1]
    return [b * count if len(run.reward) > 1 else 0 for b in range(problems)]


def _texts(chosen: RunResult, reference: RunResult | None) -> list[list[tuple[str, list[list[str]]]]]:
    """For each problem, its samples as text with their rewards, best first; unsteered ones before the others."""
    runs = [("steered", chosen.take(chosen.ranked()))]
    if reference is not None:
        runs.insert(0, ("unsteered", _beside(reference, chosen.reward.shape[1])))
    found: list[list[tuple[str, list[list[str]]]]] = [[] for _ in chosen.reward]
    for name, run in runs:
        count = run.reward.shape[1]
        rows = [[text, number(score)] for text, score in zip(run.texts, run.reward.flatten().tolist(), strict=True)]
        for own, first in zip(found, _firsts(run, len(found)), strict=True):
            own.append((name, rows[first : first + count]))
    return found


def _panels(chosen: RunResult, reference: RunResult | None, index: Tensor) -> list[list[dict[str, Any]]]:
    """For each problem, pictures of its samples, each with its reward and what a pointer over it says."""
    pairs = zip(index.flatten().tolist(), chosen.root.flatten().tolist(), strict=True)
    runs = [("Steered", chosen, [f"particle {particle}, from seed {root}" for particle, root in pairs])]
    if reference is not None:
        beside = _beside(reference, index.shape[1])
        runs.insert(0, ("Unsteered", beside, [""] * beside.reward.numel()))
    found: list[list[dict[str, Any]]] = [[] for _ in chosen.reward]
    for name, run, notes in runs:
        count = run.reward.shape[1]
        shown = zip(to_pictures(run.decoded), run.reward.flatten().tolist(), notes, strict=True)
        cells = [(thumbnail(picture), number(score), note) for picture, score, note in shown]
        columns = min(8, math.ceil(math.sqrt(count)))
        for own, first in zip(found, _firsts(run, len(found)), strict=True):
            own.append({"name": name, "columns": columns, "cells": cells[first : first + count]})
    return found
