"""Values that others published for real weights, and pictures whose right answer is known by construction.

Published values belong to pictures that do not ship here. STEER_GOLDEN names a folder with them: `CLIP.png` of
github.com/openai/CLIP, and `1.webp` to `4.webp` of assets/images of github.com/THUDM/ImageReward. Weights are looked
for in the hub's cache; nothing is downloaded. What is absent is said in the reason for skipping.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from steer.errors import RewardError
from steer.rewards.detection.detector import TransformersDetector
from steer.rewards.detection.geneval import NAMES, GenEval
from steer.rewards.ocr import OCR, TransformersReader
from steer.rewards.pretrained.clip_score import CLIPScore
from steer.rewards.pretrained.image_reward import ImageReward
from steer.rewards.pretrained.vqa_score import VQAScore


def picture(name):
    """A published picture, (1, 3, H, W) in [0, 1]."""
    folder = os.environ.get("STEER_GOLDEN")
    if folder is None or not (path := Path(folder) / name).exists():
        pytest.skip(f"{name} is not here; STEER_GOLDEN names the folder of such pictures (test_golden.py says which)")
    return tensor(Image.open(path))


def tensor(image):
    image = image.convert("RGB")
    return torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(1, *image.size[::-1], 3).movedim(3, 1) / 255


def scored(reward, images, prompts):
    try:
        return reward(images, prompts=prompts)
    except RewardError as error:
        pytest.skip(f"weights are not in the cache: {error}")


def test_clip_says_what_its_readme_says():
    """Probabilities .9927937, .00421068, .00299572 of three captions are 100 times the differences of cosines."""
    image, captions = picture("CLIP.png"), ["a diagram", "a dog", "a cat"]
    cosines = scored(CLIPScore(prefix="", scale=1.0), image.expand(3, -1, -1, -1), captions)
    probabilities = (100.0 * cosines).softmax(0)
    torch.testing.assert_close(probabilities, torch.tensor([0.9927937, 0.00421068, 0.00299572]), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"), [("1.webp", 0.58116), ("2.webp", 0.27453), ("3.webp", -1.41318), ("4.webp", -2.02957)]
)
def test_image_reward_says_what_its_readme_says(name, value):
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    assert scored(ImageReward(), picture(name), [prompt]).item() == pytest.approx(value, abs=0.01)


def test_a_pretrained_reader_reads_print():
    image = Image.new("RGB", (384, 96), "white")
    ImageDraw.Draw(image).text((20, 20), "OPEN", fill="black", font=ImageFont.load_default(56))
    reader = pretrained(TransformersReader, "microsoft/trocr-base-printed")
    scores = OCR(reader)(tensor(image).expand(2, -1, -1, -1), prompts=['a sign "OPEN"', 'a sign "bicycle"'])
    assert scores[0] == 1.0
    assert scores[1] < 0.5


def test_a_pretrained_detector_finds_nothing_on_grey():
    detector = pretrained(TransformersDetector, "facebook/mask2former-swin-small-coco-instance", names=NAMES)
    task = {"prompt": "a photo of a dog", "tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    grey = torch.full((1, 3, 256, 256), 0.5)
    assert GenEval(detector, [task])(grey, prompts=[task["prompt"]]).item() == 0.0


def test_a_pretrained_model_answers_about_colour():
    red = torch.zeros(2, 3, 336, 336)
    red[:, 0] = 0.9
    scores = scored(
        pretrained(VQAScore, "llava-hf/llava-1.5-7b-hf"), red, ["a plain red square", "a plain blue square"]
    )
    assert scores[0] > 0.5 > scores[1]
    assert math.isfinite(scores.sum())


def pretrained(kind, name, **options):
    try:
        return kind(name, **options)
    except RewardError as error:
        pytest.skip(f"weights are not in the cache: {error}")
