"""What the networks of `emoji` learn from: batches of varied pictures, and captions that say how they vary.

A prompt should leave something to choose from. So pictures are mirrored, made smaller, moved, recoloured and put on
coloured backgrounds, and captions mention each of this only most of the time; some captions name a category only
("animal"). The batch of a step depends on the seed and the step alone, so that training can stop and go on.
"""

import hashlib
import math
import random
from typing import NamedTuple

import torch
from data import Design
from torch import Tensor
from torch.nn import functional as F

BACKGROUNDS = {
    "red": (214, 45, 45),
    "orange": (250, 150, 40),
    "yellow": (255, 221, 80),
    "green": (80, 180, 80),
    "blue": (70, 130, 235),
    "purple": (150, 90, 200),
    "pink": (250, 150, 190),
    "brown": (140, 95, 60),
    "black": (25, 25, 25),
    "grey": (160, 160, 160),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
NATURAL = ("face", "person", "hand", "body", "building", "place", "landscape", "medal", "celebration")  # not recoloured
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


class Batch(NamedTuple):
    """pictures (B, 3, 64, 64) in [-1, 1], their captions, and which designs they show."""

    pictures: Tensor
    captions: list[str]
    designs: list[int]


def one_in(many: int, *words: str) -> bool:
    """A choice by hash that every script makes alike."""
    return int(hashlib.sha256("/".join(words).encode()).hexdigest(), 16) % many == 0


def held_out(design: Design) -> bool:
    """One toned person in twenty is never trained on: the role is seen in other tones, the tone on other roles."""
    return bool(design.tone) and design.category == "person" and one_in(20, design.name)


def held_out_background(design: Design, colour: str) -> bool:
    """One pair of design and background in ten is never trained on."""
    return one_in(10, design.base, colour)


def compose(pictures: Tensor, backgrounds: Tensor | None = None) -> Tensor:
    """Pictures with alpha, (B, 4, H, W) in 0..255, on backgrounds (B, 3), else white: (B, 3, H, W) in [-1, 1]."""
    pictures = pictures.float()
    ground = torch.full((len(pictures), 3), 255.0) if backgrounds is None else backgrounds
    return (pictures[:, :3] + ground[:, :, None, None] * (1 - pictures[:, 3:] / 255)) / 127.5 - 1


def colourfulness(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The mean colour of each picture's colourful parts, (N, 3) in 0..1, and the mean chroma of its whole, (N,)."""
    pictures = pictures.float() / 255
    alpha = pictures[:, 3].flatten(1)
    chroma = torch.einsum("ij,njp->nip", YIQ[1:], pictures[:, :3].flatten(2))
    strength = chroma.norm(dim=1)
    weight = strength * (alpha > 0.5)
    colour = (pictures[:, :3].flatten(2) * weight[:, None]).sum(2) / weight.sum(1, keepdim=True).clamp(min=1e-6)
    return colour, chroma.sum(2).norm(dim=1) / alpha.sum(1).clamp(min=1.0)


def colour_name(red: float, green: float, blue: float) -> str:
    """The everyday word for a strong colour."""
    high, low = max(red, green, blue), min(red, green, blue)
    hue = math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    if hue < 45 and high < 0.65 and hue > 10:
        return "brown"
    for limit, name in ((14, "red"), (40, "orange"), (72, "yellow"), (165, "green"), (255, "blue"), (295, "purple")):
        if hue < limit:
            return name
    return "pink" if hue < 348 and low > 0.2 else "red"


def hue_rotation(angle: float) -> Tensor:
    """The matrix that turns hues and keeps brightness, (3, 3)."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.linalg.inv(YIQ) @ torch.tensor([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]) @ YIQ


class Lessons:
    """Batches of pictures with captions.

    designs, pictures: as `data.load` gives them.
    seed: with the step it determines a batch.
    keywords: which of a design's keywords captions may use, all of them or every other one from `keywords`.
    bases: the designs that are drawn from, by their base names, or all.
    """

    def __init__(
        self,
        designs: list[Design],
        pictures: Tensor,
        seed: int = 0,
        keywords: int | None = None,
        bases: set[str] | None = None,
    ) -> None:
        self.designs, self.pictures, self.seed = designs, pictures, seed
        self.words = [d.keywords if keywords is None else d.keywords[keywords::2] for d in designs]
        used = [not held_out(design) and (bases is None or design.base in bases) for design in designs]
        self.weights = [design.weight * use for design, use in zip(designs, used, strict=True)]
        colour, chroma = colourfulness(pictures)
        natural = [any(word in design.category for word in NATURAL) for design in designs]
        self.colour = [
            None if n or c < 0.1 else tuple(r) for n, c, r in zip(natural, chroma, colour.tolist(), strict=True)
        ]

    def subject(self, index: int, rng: random.Random, colour: str) -> str:
        """What the picture shows: a name, a keyword or a category, with its colour where that is known."""
        design, words, choice = self.designs[index], self.words[index], rng.random()
        named = any(word in design.base.split() for word in COLOURS)
        if choice < 0.5:
            text = design.name
        elif choice < 0.6:
            text = design.base
        elif choice < 0.7 and words:
            text = f"{design.name}, {rng.choice(words)}"
        elif choice < 0.78 and words:
            text, named = rng.choice(words), False
        else:
            text, named = design.category, False
            if design.tone and rng.random() < 0.7:
                text = f"{text}, {design.tone}"
        return f"{colour} {text}" if colour and not named else text

    def vary(self, index: int, rng: random.Random) -> tuple[Tensor, Tensor, tuple[int, int, int], str]:
        """One variation: affine map (2, 3), colour matrix (3, 3), background, caption."""
        design, colour, turn = self.designs[index], "", torch.eye(3)
        mean = self.colour[index]
        if mean and rng.random() < 0.2:
            turn = hue_rotation(rng.uniform(0, 2 * math.pi))
            colour = colour_name(*(turn @ torch.tensor(mean)).clamp(0, 1).tolist())
            words = [word for word in COLOURS if word in design.base.split()]
            if words:  # the name itself tells another colour
                colour, turn = "", torch.eye(3)
        elif mean and rng.random() < 0.3:
            colour = colour_name(*mean)
        text = self.subject(index, rng, colour if rng.random() < 0.85 else "")
        scale, across, down = 1.0, 0.0, 0.0
        if rng.random() < 0.12:
            scale = rng.uniform(0.5, 0.9)
            across, down = rng.uniform(-1, 1) * (1 - scale), rng.uniform(-1, 1) * (1 - scale)
            if scale < 0.7 and rng.random() < 0.7:
                text = f"small {text}"
        if rng.random() < 0.3:
            text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
        if max(abs(across), abs(down)) > 0.2 and rng.random() < 0.7:
            side = ("left", "right")[across > 0] if abs(across) > abs(down) else ("top", "bottom")[down > 0]
            text = f"{text}, {'on' if abs(across) > abs(down) else 'at'} the {side}"
        ground = (255, 255, 255)
        if rng.random() < 0.25:
            name = rng.choice([name for name in BACKGROUNDS if not held_out_background(design, name)])
            ground = BACKGROUNDS[name]
            if rng.random() < 0.85:
                text += f", {name} background" if rng.random() < 0.7 else f" on a {name} background"
        mirror = -1.0 if design.mirror and rng.random() < 0.15 else 1.0
        affine = torch.tensor([[mirror / scale, 0.0, -mirror * across / scale], [0.0, 1 / scale, -down / scale]])
        return affine, turn, ground, text

    def batch(self, size: int, step: int) -> Batch:
        """The batch of a step."""
        rng = random.Random(f"{self.seed}/{step}")
        chosen = rng.choices(range(len(self.designs)), self.weights, k=size)
        affine, turn, ground, captions = zip(*(self.vary(index, rng) for index in chosen), strict=True)
        pictures = self.pictures[chosen].float()
        moved = torch.stack(affine)
        same = (moved == torch.eye(2, 3)).all(2).all(1)
        if not same.all():
            grid = F.affine_grid(moved[~same], [int((~same).sum()), 4, 64, 64], align_corners=False)
            pictures[~same] = F.grid_sample(pictures[~same], grid, align_corners=False)
        colours = torch.einsum("nij,njhw->nihw", torch.stack(turn), pictures[:, :3])
        colours = torch.minimum(colours.clamp(min=0), pictures[:, 3:])
        pictures = torch.cat([colours, pictures[:, 3:]], 1)
        return Batch(compose(pictures, torch.tensor(ground, dtype=torch.float32)), list(captions), chosen)
