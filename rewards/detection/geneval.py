"""GenEval: whether the objects that a prompt names are in the image, as many, in the color and place it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.types import RewardSpec

from ..pil_images import crop, to_rgb
from .detector import Detection, Detector, detect

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIDENCE, COUNTING_CONFIDENCE, MOST_OBJECTS, SLACK = 0.3, 0.9, 16, 0.1
"""The official thresholds: confidence, that of prompts tagged "counting", objects per class, and of positions."""
NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip
"""What the benchmark calls the classes that detectors of COCO, and those with Pascal's names, call otherwise."""
_PLACES = ("left of", "right of", "above", "below")

Colors = Callable[["list[Image]", str], Sequence[str]]
"""Crops and the label of their object, to the color of each; `rewards.CLIPColors` is the official one."""


@dataclass(frozen=True)
class Clause:
    """At least `count` objects of a class, in `color`, each `position` = (place, index of an earlier clause)."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """What one prompt asks for: every clause of `include`, and fewer objects than each of `exclude` counts."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    counting: bool = False


@dataclass(frozen=True, eq=False)
class GenEval:
    """1 where an image (M, 1 or 3, H, W) in [0, 1] has what its prompt asks for, else 0; or the share that it has.

    detector: a `rewards.detect.Detector`. The official figures are of mmdetection's Mask2Former (Swin-S, COCO); closest
        is TransformersDetector("facebook/mask2former-swin-small-coco-instance", names=rewards.geneval.NAMES), another
        training of that network.
    tasks: rows of the benchmark's evaluation_metadata.jsonl as dictionaries: prompt, tag, include and exclude.
        Samples find theirs by prompt.
    colors: needed where a task names a color.
    score: "correct" for the benchmark's 0 or 1; "share" for the mean over every condition of the task of how far it is
        met, in [0, 1]: a clause's count min(found, n)/n, its color the n surest objects' share in it, its position the
        share of pairs in place, an exclusion 1 less its excess. It is 1 exactly where "correct" is. Conditions of
        objects that were not found count 0 rather than falling out of the mean, and more objects than asked for are
        no fault unless the task excludes them, both unlike the shaped score of Flow-GRPO's server.
    Cost: one detector call for the batch, one color call per clause with a color. No gradient; scores float32.
    Raises RewardError for a prompt without a task and for malformed tasks.
    Source: Ghosh et al. 2023, "GenEval" (arXiv 2310.11513); github.com/djghosh13/geneval, MIT, evaluate_images.py.
    Written anew: clauses of `include` are joined by AND and of `exclude` by OR, found >= count, no suppression of
    overlapping boxes, colors and places of the surest objects only.
    """

    detector: Detector = field(repr=False)
    tasks: Sequence[Mapping[str, Any]] | Mapping[str, Task] = field(repr=False)
    colors: Colors | None = field(default=None, repr=False)
    score: Literal["correct", "share"] = "correct"
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        if self.score not in ("correct", "share"):
            raise RewardError(f"GenEval(score=...) is 'correct' or 'share', got {self.score!r}")
        tasks = self.tasks if isinstance(self.tasks, Mapping) else dict(map(read_task, self.tasks))
        if self.colors is None and any(c.color for task in tasks.values() for c in task.include):
            raise RewardError("a task names a color, and GenEval was given no colors; pass colors=rewards.CLIPColors()")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "spec", RewardSpec("1", (0.0, 1.0), "none", prompts=True))

    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        pictures = to_rgb(samples, "GenEval")
        tasks = [self._task(prompt) for prompt in prompts]
        if len(tasks) != len(pictures):
            raise RewardError(f"GenEval needs {len(pictures)} prompts, one per sample, got {len(tasks)}")
        labels = [[clause.label for clause in (*task.include, *task.exclude)] for task in tasks]
        found = detect(self.detector, pictures, labels)
        met = [self.conditions(*each) for each in zip(pictures, found, tasks, strict=True)]
        shares = [min(each) if self.score == "correct" else sum(each) / len(each) for each in met]
        scores = [float(share == 1.0) for share in shares] if self.score == "correct" else shares
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def conditions(self, picture: Image, found: Detection, task: Task) -> list[float]:
        """How far each condition of a task is met, in [0, 1]: as many numbers for every image."""
        above = COUNTING_CONFIDENCE if task.counting else CONFIDENCE
        met: list[float] = []
        groups: list[list[int]] = []  # of each clause the objects that meet it; empty where they do not
        for clause in task.include:
            objects = found.of(clause.label, above, MOST_OBJECTS)[: clause.count]
            mine = [len(objects) / clause.count]
            if clause.color:
                mine.append(self._colored(picture, found, objects, clause) / clause.count)
            if clause.position:
                place, target = clause.position
                pairs = [(a, b) for a in objects for b in groups[target]] if min(mine) == 1.0 else []
                held = sum(place in places(found.boxes[a], found.boxes[b]) for a, b in pairs)
                mine.append(held / len(pairs) if pairs else 0.0)
            groups.append(objects if min(mine) == 1.0 else [])
            met += mine
        for clause in task.exclude:
            excess = len(found.of(clause.label, above, MOST_OBJECTS)) - clause.count + 1
            met.append(1.0 - min(max(excess, 0) / clause.count, 1.0))
        return met

    def _colored(self, picture: Image, found: Detection, objects: list[int], clause: Clause) -> int:
        """How many of the objects have the clause's color."""
        if not objects or self.colors is None:
            return 0
        crops = [_alone(picture, found, i) for i in objects]
        named = list(self.colors(crops, clause.label))
        if len(named) != len(crops):
            raise RewardError(f"colors must name one color for each of {len(crops)} crops, got {len(named)}")
        return sum(color == clause.color for color in named)

    def _task(self, prompt: str) -> Task:
        tasks = self.tasks
        if not isinstance(tasks, Mapping) or prompt not in tasks:
            raise RewardError(f"GenEval has no task for the prompt {prompt!r}; give it the row of that prompt")
        return tasks[prompt]


def read_task(row: Mapping[str, Any]) -> tuple[str, Task]:
    """Prompt and task of a row of evaluation_metadata.jsonl; RewardError naming what is malformed."""
    try:
        include = tuple(_clause(raw, index) for index, raw in enumerate(row.get("include", ())))
        exclude = tuple(_clause(raw, 0) for raw in row.get("exclude", ()))
        if not (include or exclude) or any(clause.color or clause.position for clause in exclude):
            raise ValueError("a task includes or excludes something, and excludes by class and count only")
        return row["prompt"], Task(include, exclude, row["tag"] == "counting")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RewardError(
            "a task is a row of GenEval's evaluation_metadata.jsonl with prompt, tag and clauses of class, count, "
            f"color and position, got {row!r} ({error!r})"
        ) from error


def places(a: Tensor, b: Tensor) -> set[str]:
    """Where box a is as seen from box b: "left of", "right of", "above", "below"; none where they hardly differ.

    Offsets of the centers count less SLACK times both boxes' widths (heights), and a direction where they are more than
    half of the distance of the centers.
    """
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    extent = (a[2:] - a[:2]).abs() + (b[2:] - b[:2]).abs()
    moved = (offset.abs() - SLACK * extent).clamp(min=0) * offset.sign()
    if bool((moved.abs() < 1e-3).all()):
        return set()
    dx, dy = (moved / offset.norm()).tolist()
    return {place for place, held in zip(_PLACES, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if held}


def _clause(raw: Mapping[str, Any], index: int) -> Clause:
    position = raw.get("position")
    clause = Clause(raw["class"], raw["count"], raw.get("color"), None if position is None else (*position,))
    if not isinstance(clause.label, str) or type(clause.count) is not int or clause.count < 1:
        raise ValueError("a class is a text and a count at least 1")
    if clause.position:
        place, target = clause.position
        if place not in _PLACES or type(target) is not int or not 0 <= target < index:
            raise ValueError(f"a position is one of {_PLACES} and the index of an earlier clause")
    return clause


def _alone(picture: Image, found: Detection, index: int) -> Image:
    """The crop of one object, on a grey background (#999) where its mask is known."""
    from PIL import Image

    if found.masks is not None:
        levels = found.masks[index].to(torch.uint8).mul(255).cpu()
        blank = Image.new("RGB", picture.size, color="#999")
        picture = Image.composite(picture, blank, Image.fromarray(levels.numpy()))
    return crop(picture, found.boxes[index])
