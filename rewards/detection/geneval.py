"""GenEval: whether the objects that a prompt names are in the image, as many, in the color and place it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steer.errors import RewardError
from steer.torch_modes import scores_in_full
from steer.types import RewardSpec

from ..pil_images import crop, to_rgb
from ..scoring import check_prompts
from .detector import Detection, Detector, detect

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIDENCE = 0.3
"""The confidence that an object must exceed, as in the benchmark."""
COUNTING_CONFIDENCE = 0.9
"""The same for prompts tagged "counting"."""
MOST_OBJECTS = 16
"""Objects per class at most, as in the benchmark."""
POSITION_TOLERANCE = 0.1
"""Share of both boxes' sizes by which centers must differ before a position counts, as in the benchmark."""
NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""The benchmark's names of classes that detectors of COCO, and those with Pascal's names, call otherwise."""
_POSITIONS = ("left of", "right of", "above", "below")

Colors = Callable[["list[Image]", str], Sequence[str]]
"""From crops and the label of their object to the color of each; `rewards.CLIPColors` is the official one."""


@dataclass(frozen=True)
class Clause:
    """One requirement of a task: at least `count` objects of a class.

    Args:
        label: of the class.
        count: >= 1.
        color: of all of them; None for any.
        position: (place, index of an earlier clause), place being "left of", "right of", "above" or "below"; None for
            any.
    """

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """What one prompt asks for.

    Args:
        include: clauses that must all hold.
        exclude: clauses of which none may hold: there must be fewer objects than each counts.
        counting: whether the prompt is tagged "counting", for which objects need a higher confidence.
    """

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()
    counting: bool = False


@dataclass(frozen=True, eq=False)
class GenEval:
    """1 where an image has what its prompt asks for, else 0; or the share that it has.

    Called with images `[M, 1 or 3, H, W]` in [0, 1] and M prompts.

    Args:
        detector: a `Detector`. The official figures are of mmdetection's Mask2Former (Swin-S, COCO); closest is
            TransformersDetector("facebook/mask2former-swin-small-coco-instance",
            names=rewards.detection.geneval.NAMES), another training of that network.
        tasks: rows of the benchmark's evaluation_metadata.jsonl as dictionaries: prompt, tag, include and exclude.
            Samples find theirs by prompt.
        colors: from crops and a label to colors; needed where a task names a color.
        score: "correct" for the benchmark's 0 or 1; "share" for the mean over every condition of the task of how far
            it is met, in [0, 1]: a clause's count min(found, n)/n, its color the share of the n surest objects that
            have it, its position the share of pairs in place, an exclusion 1 less its excess. It is 1 exactly where
            "correct" is.

    Returns:
        Scores `[M]` in [0, 1], float32, without a gradient.

    Raises:
        RewardError: for a prompt without a task, malformed tasks, and colors that are needed and not given.
        ShapeError: for samples of another shape.

    Cost: one detector call for the batch, one color call per clause with a color.
    Source: Ghosh et al. 2023, "GenEval" (arXiv 2310.11513); github.com/djghosh13/geneval, MIT, evaluate_images.py.
        Written anew: clauses of `include` are joined by AND and of `exclude` by OR, found >= count, no suppression of
        overlapping boxes, colors and places of the surest objects only.
    Differs: "share" from the shaped score of Flow-GRPO's server in two ways. Conditions of objects that were not found
        count 0 rather than being left out of the mean, and more objects than asked for cost nothing unless the task
        excludes them.
    """

    detector: Detector = field(repr=False)
    tasks: Sequence[Mapping[str, Any]] | Mapping[str, Task] = field(repr=False)
    colors: Colors | None = field(default=None, repr=False)
    score: Literal["correct", "share"] = "correct"
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        if self.score not in ("correct", "share"):
            raise RewardError(f"GenEval(score=...) must be 'correct' or 'share', got {self.score!r}")
        tasks = self.tasks if isinstance(self.tasks, Mapping) else dict(map(read_task, self.tasks))
        if self.colors is None and any(clause.color for task in tasks.values() for clause in task.include):
            raise RewardError("a task names a color, and GenEval was given no colors; pass colors=rewards.CLIPColors()")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "spec", RewardSpec("1", (0.0, 1.0), "none", prompts=True))

    @scores_in_full
    def __call__(self, samples: Tensor, *, prompts: Sequence[str]) -> Tensor:
        pictures = to_rgb(samples, "GenEval")
        check_prompts(prompts, len(pictures), "GenEval")
        tasks = [self._task(prompt) for prompt in prompts]
        labels = [[clause.label for clause in (*task.include, *task.exclude)] for task in tasks]
        found = detect(self.detector, pictures, labels)
        scores = [
            self._score(self.conditions(picture, detection, task))
            for picture, detection, task in zip(pictures, found, tasks, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _score(self, conditions: list[float]) -> float:
        if self.score == "correct":
            return float(min(conditions) == 1.0)
        return sum(conditions) / len(conditions)

    def conditions(self, picture: Image, found: Detection, task: Task) -> list[float]:
        """How far each condition of a task is met.

        Args:
            picture: a PIL image, RGB.
            found: the objects in it.
            task: what its prompt asks for.

        Returns:
            One number in [0, 1] per condition; as many for every image of the task.

        Raises:
            RewardError: where `colors` does not name one color per crop.
        """
        above = COUNTING_CONFIDENCE if task.counting else CONFIDENCE
        met: list[float] = []
        groups: list[list[int]] = []  # of each clause the objects that meet it; empty where they do not
        for clause in task.include:
            objects = found.of(clause.label, above, MOST_OBJECTS)[: clause.count]
            of_clause = [len(objects) / clause.count]
            if clause.color:
                of_clause.append(self._count_colored(picture, found, objects, clause) / clause.count)
            if clause.position:
                place, target = clause.position
                pairs = [(a, b) for a in objects for b in groups[target]] if min(of_clause) == 1.0 else []
                in_place = sum(place in places(found.boxes[a], found.boxes[b]) for a, b in pairs)
                of_clause.append(in_place / len(pairs) if pairs else 0.0)
            groups.append(objects if min(of_clause) == 1.0 else [])
            met += of_clause
        for clause in task.exclude:
            excess = len(found.of(clause.label, above, MOST_OBJECTS)) - clause.count + 1
            met.append(1.0 - min(max(excess, 0) / clause.count, 1.0))
        return met

    def _count_colored(self, picture: Image, found: Detection, objects: list[int], clause: Clause) -> int:
        """How many of the objects have the clause's color."""
        if not objects or self.colors is None:
            return 0
        crops = [_crop_object(picture, found, i) for i in objects]
        named = list(self.colors(crops, clause.label))
        if len(named) != len(crops):
            raise RewardError(
                f"colors must name one color for each of {len(crops)} crops, got {len(named)}; return a list of as "
                "many names as crops"
            )
        return sum(color == clause.color for color in named)

    def _task(self, prompt: str) -> Task:
        tasks = self.tasks
        if not isinstance(tasks, Mapping) or prompt not in tasks:
            raise RewardError(f"GenEval has no task for the prompt {prompt!r}; add the row of that prompt to tasks")
        return tasks[prompt]


def read_task(row: Mapping[str, Any]) -> tuple[str, Task]:
    """Prompt and task of a row of evaluation_metadata.jsonl.

    Args:
        row: with prompt, tag and clauses in include and exclude.

    Returns:
        The prompt and its task.

    Raises:
        RewardError: saying what is malformed.
    """
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
    """Where box a is as seen from box b.

    Offsets of the centers are reduced by POSITION_TOLERANCE times both boxes' widths (heights). A direction counts
    where the reduced offset is more than half of the distance of the centers.

    Args:
        a: `[4]`, left, top, right, bottom in pixels.
        b: the same.

    Returns:
        A set of "left of", "right of", "above", "below"; empty where the boxes hardly differ.
    """
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    extent = (a[2:] - a[:2]).abs() + (b[2:] - b[:2]).abs()
    reduced = (offset.abs() - POSITION_TOLERANCE * extent).clamp(min=0) * offset.sign()
    if bool((reduced.abs() < 1e-3).all()):
        return set()
    dx, dy = (reduced / offset.norm()).tolist()
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {place for place, held in zip(_POSITIONS, holds, strict=True) if held}


def _clause(raw: Mapping[str, Any], index: int) -> Clause:
    """A clause as the benchmark writes it. index: its place among the task's; positions refer to earlier ones."""
    position = raw.get("position")
    clause = Clause(raw["class"], raw["count"], raw.get("color"), None if position is None else (*position,))
    if not isinstance(clause.label, str) or type(clause.count) is not int or clause.count < 1:
        raise ValueError("a class is a text and a count at least 1")
    if clause.position:
        place, target = clause.position
        if place not in _POSITIONS or type(target) is not int or not 0 <= target < index:
            raise ValueError(f"a position is one of {_POSITIONS} and the index of an earlier clause")
    return clause


def _crop_object(picture: Image, found: Detection, index: int) -> Image:
    """The crop of one object, on a grey background (#999) where its mask is known."""
    from PIL import Image

    if found.masks is not None:
        levels = found.masks[index].to(torch.uint8).mul(255).cpu()
        blank = Image.new("RGB", picture.size, color="#999")
        picture = Image.composite(picture, blank, Image.fromarray(levels.numpy()))
    return crop(picture, found.boxes[index])
