"""GenEval, counts and layouts on scenes written by hand, and on random ones for what must always hold."""

from __future__ import annotations

import random

import pytest
import torch

from steer.errors import RewardError
from steer.rewards.detection.count_and_layout import Count, Layout
from steer.rewards.detection.detector import Detection
from steer.rewards.detection.geneval import GenEval, places

IMAGE = torch.rand(1, 3, 20, 40, generator=torch.Generator().manual_seed(0))


def scene(*objects: tuple[str, float, tuple[float, float, float, float]], masks=None) -> Detection:
    labels, scores, boxes = zip(*objects, strict=True) if objects else ((), (), ())
    return Detection(torch.tensor(boxes).float().view(-1, 4), labels, torch.tensor(scores).float().view(-1), masks)


def detector(*scenes: Detection):
    return lambda pictures, labels: list(scenes)


def at(x: float, y: float = 10, side: float = 4) -> tuple[float, float, float, float]:
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def row(*include, tag="two_object", exclude=(), prompt="p"):
    return {"prompt": prompt, "tag": tag, "include": list(include), "exclude": list(exclude)}


def judged(found: Detection, task, colors=None) -> tuple[float, float]:
    """(correct, share) of one scene."""
    return tuple(
        GenEval(detector(found), [task], colors, score=score)(IMAGE, prompts=["p"]).item()
        for score in ("correct", "share")
    )


CAT, DOGS = {"class": "cat", "count": 1}, {"class": "dog", "count": 2}


# -- the official rules


def test_every_clause_must_hold_and_more_are_no_fault():
    dogs = [("dog", 0.9, at(5)), ("dog", 0.8, at(15))]
    assert judged(scene(("cat", 0.9, at(30)), *dogs), row(CAT, DOGS)) == (1.0, 1.0)
    assert judged(scene(("cat", 0.9, at(30)), *dogs, ("dog", 0.7, at(20))), row(CAT, DOGS)) == (1.0, 1.0)
    assert judged(scene(("cat", 0.9, at(30)), dogs[0]), row(CAT, DOGS)) == (0.0, 0.75)
    assert judged(scene(*dogs), row(CAT, DOGS)) == (0.0, 0.5)
    assert judged(scene(), row(CAT, DOGS)) == (0.0, 0.0)


def test_any_exclusion_rules_out():
    """As the benchmark counts: n are wanted and n + 1 are excluded."""
    task = row(DOGS, tag="counting", exclude=[{"class": "dog", "count": 3}])
    dogs = [("dog", 0.95, at(5 * i)) for i in range(1, 8)]
    assert judged(scene(*dogs[:2]), task) == (1.0, 1.0)
    correct, share = judged(scene(*dogs[:3]), task)
    assert correct == 0.0
    assert share == pytest.approx((1 + 2 / 3) / 2)
    assert judged(scene(*dogs), task) == (0.0, 0.5)  # five too many: no less than 0


def test_confidence_must_exceed_the_threshold_of_the_tag():
    assert judged(scene(("cat", 0.31, at(5))), row(CAT))[0] == 1.0
    assert judged(scene(("cat", 0.29, at(5))), row(CAT))[0] == 0.0
    assert judged(scene(("cat", 0.89, at(5))), row(CAT, tag="counting"))[0] == 0.0
    assert judged(scene(("cat", 0.91, at(5))), row(CAT, tag="counting"))[0] == 1.0


def test_at_most_sixteen_of_a_class_count_and_overlaps_stay():
    same = [("dog", 0.95, at(5))] * 20
    assert judged(scene(*same), row({"class": "dog", "count": 16}))[0] == 1.0
    assert judged(scene(*same), row({"class": "dog", "count": 17}))[0] == 0.0


def test_colors_are_asked_of_the_surest_objects_only():
    asked = []

    def colors(crops, label):
        asked.append(([crop.size for crop in crops], label))
        return ["red", "blue"][: len(crops)]

    found = scene(("dog", 0.5, at(5, side=2)), ("dog", 0.9, at(15, side=6)), ("dog", 0.7, at(30, side=4)))
    assert judged(found, row(DOGS | {"color": "red"}, tag="colors"), colors) == (0.0, 0.75)
    assert asked[0] == ([(6, 6), (4, 4)], "dog")
    assert judged(found, row({"class": "dog", "count": 1, "color": "red"}), colors) == (1.0, 1.0)
    with pytest.raises(RewardError, match="names a color, and GenEval was given no colors"):
        GenEval(detector(found), [row(DOGS | {"color": "red"})])
    with pytest.raises(RewardError, match="one color for each of 2 crops, got 1"):
        judged(found, row(DOGS | {"color": "red"}), lambda crops, label: ["red"])


def test_crops_stand_on_grey_where_masks_are_known():
    mask = torch.zeros(1, 20, 40, dtype=torch.bool)
    mask[0, 10, 20] = True
    crops = []
    found = scene(("dog", 0.9, (19.0, 9.0, 22.0, 12.0)), masks=mask)
    task = row({"class": "dog", "count": 1, "color": "red"})
    judged(found, task, lambda seen, label: crops.extend(seen) or ["red"] * len(seen))
    assert crops[0].size == (3, 3)
    assert crops[0].getpixel((0, 0)) == (153, 153, 153)
    assert crops[0].getpixel((1, 1)) == tuple((IMAGE[0, :, 10, 20] * 255).round().int().tolist())


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (at(5), at(30), {"left of"}),
        (at(30), at(5), {"right of"}),
        (at(10, 3), at(10, 17), {"above"}),
        (at(10, 17), at(10, 3), {"below"}),
        (at(5, 5), at(15, 15), {"left of", "above"}),
        (at(5, 10), at(25, 14), {"left of"}),
        (at(10), at(10), set()),
        (at(10), at(10.7), set()),  # within a tenth of both widths
        (at(10), at(11.0), set()),  # 0.2 of 1 remains: not half of the distance
        (at(10), at(12.0), {"left of"}),  # 1.2 of 2 remains
    ],
)
def test_places(a, b, expected):
    assert places(torch.tensor(a).float(), torch.tensor(b).float()) == expected


def test_positions_need_their_target_and_all_pairs():
    left = row(DOGS, CAT | {"position": ["left of", 0]}, tag="position")
    dogs = [("dog", 0.9, at(20)), ("dog", 0.8, at(30))]
    assert judged(scene(*dogs, ("cat", 0.9, at(5))), left) == (1.0, 1.0)
    assert judged(scene(*dogs, ("cat", 0.9, at(25))), left) == (0.0, pytest.approx((1 + 1 + 0.5) / 3))
    # A failed place is not made good, and a missing object does not shorten the mean.
    assert judged(scene(*dogs, ("cat", 0.9, at(38))), left) == (0.0, pytest.approx(2 / 3))
    assert judged(scene(*dogs), left) == (0.0, pytest.approx(1 / 3))
    assert judged(scene(dogs[0], ("cat", 0.9, at(5))), left) == (0.0, pytest.approx((0.5 + 1) / 3))


def test_share_is_one_exactly_where_correct_is_and_never_leaves_its_bounds():
    draw = random.Random(0)
    task = row(
        {"class": "dog", "count": 2, "color": "red"},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
        exclude=[{"class": "dog", "count": 4}, {"class": "cat", "count": 3}],
    )
    seen = {0.0: 0, 1.0: 0}
    for _ in range(600):
        objects = [
            (draw.choice(["dog", "cat"]), draw.uniform(0.2, 1), at(draw.choice([5, 20, 35]), 10))
            for _ in range(draw.randrange(2, 6))
        ]
        named = [draw.choice(["red", "red", "red", "blue"]) for _ in range(16)]
        correct, share = judged(scene(*objects), task, lambda crops, label, named=named: named[: len(crops)])
        assert 0.0 <= share <= 1.0
        assert (share == 1.0) == (correct == 1.0)
        seen[correct] += 1
    assert min(seen.values()) >= 20


def test_samples_find_their_tasks_by_prompt_in_order():
    cat, dog = scene(("cat", 0.9, at(5))), scene(("dog", 0.9, at(5)))
    tasks = [row(CAT, prompt="a cat"), row({"class": "dog", "count": 1}, prompt="a dog")]
    reward = GenEval(detector(cat, dog, cat), tasks)
    assert reward(IMAGE.expand(3, -1, -1, -1), prompts=["a cat", "a cat", "a dog"]).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(RewardError, match="no task for the prompt 'a cow'"):
        reward(IMAGE, prompts=["a cow"])
    with pytest.raises(RewardError, match="needs 1 prompts"):
        reward(IMAGE, prompts=["a cat", "a dog"])


@pytest.mark.parametrize(
    "task",
    [
        {"prompt": "p"},
        row(),
        row({"class": "cat"}),
        row({"class": "cat", "count": 0}),
        row({"class": "cat", "count": "1"}),
        row(CAT | {"position": ["left of", 0]}),
        row(CAT, CAT | {"position": ["near", 0]}),
        row(CAT, CAT | {"position": ["left of", 1]}),
        row(CAT, exclude=[CAT | {"color": "red"}]),
    ],
)
def test_malformed_tasks_are_named(task):
    with pytest.raises(RewardError, match=r"a task is a row of GenEval's evaluation_metadata\.jsonl"):
        GenEval(detector(), [task])


# -- counts and layouts


def test_counts_are_squared_distances():
    found = scene(("dog", 0.9, at(5)), ("dog", 0.4, at(9)), ("dog", 0.1, at(9)), ("cat", 0.9, at(5)))
    reward = Count(detector(found), {"p": {"dog": 5, "cat": 0}, "q": {"dog": 2}})
    assert reward(IMAGE, prompts=["p"]).item() == -(3**2) - 1
    assert reward(IMAGE, prompts=["q"]).item() == 0.0
    with pytest.raises(RewardError, match="Count has no numbers for the prompt 'r'"):
        reward(IMAGE, prompts=["r"])


def test_layouts_are_mean_overlaps():
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    found = scene(("dog", 0.9, (0, 0, 20, 20)), ("dog", 0.8, (30, 0, 40, 20)), ("cat", 0.9, (20, 0, 40, 20)))
    reward = Layout(detector(found), {"p": [("dog", right), ("dog", left)], "q": [("cat", left)], "r": [("cow", left)]})
    assert reward(IMAGE, prompts=["p"]).item() == pytest.approx((1 + 0.5) / 2)
    assert reward(IMAGE, prompts=["q"]).item() == 0.0
    assert reward(IMAGE, prompts=["r"]).item() == 0.0
    one = Layout(detector(scene(("dog", 0.9, (0, 0, 40, 20)))), {"p": [("dog", left), ("dog", right)]})
    assert one(IMAGE, prompts=["p"]).item() == pytest.approx(0.25)  # one box serves one wish
    with pytest.raises(RewardError, match="0 <= left < right <= 1"):
        Layout(detector(found), {"p": [("dog", (0.5, 0.0, 0.2, 1.0))]})
    with pytest.raises(RewardError, match="at least one box"):
        Layout(detector(found), {"p": []})
