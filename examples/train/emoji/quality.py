"""Measure `emoji` and write its model card.

    python examples/train/emoji/quality.py

Reads the exported pipeline and reward, and the judge of the work folder. Every number of generated pictures stands
beside the same number of real ones.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from autoencoder import quality as reconstruction
from card import write
from clip import embed_captions, embed_pictures
from data import TONES, WORK, chosen, load
from diffusers import StableDiffusionPipeline
from export import ASSETS, REWARD
from latents import Latents
from latents import read as read_latents
from lessons import BACKGROUNDS, Lessons, compose, held_out, held_out_background
from sheet import samples
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

STEPS, GUIDANCE = 20, 3.0
PROMPTS = 96
PAIRS = 256
EACH = 24
CATEGORIES = ("heart", "animal", "person", "happy face", "vehicle", "food", "flower", "weather")

Numbers = dict[str, float]


class Eyes:
    """A CLIP network with its tokenizer: looks at pictures (M, 3, 64, 64) in [-1, 1]."""

    def __init__(self, folder: Path) -> None:
        self.net = CLIPModel.from_pretrained(folder).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit embeddings (M, 64)."""
        return torch.cat([embed_pictures(self.net, part) for part in pictures.split(256)])

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Unit embeddings (M, 64)."""
        return embed_captions(self.net, self.tokenizer, captions)

    def ranks(self, pictures: Tensor, right: list[int], captions: list[str]) -> Tensor:
        """The rank, from 1, of each picture's right caption among all."""
        scores = self.pictures(pictures) @ self.captions(captions).T
        return (scores >= scores.gather(1, torch.tensor(right)[:, None])).sum(1)


def frechet(first: Tensor, second: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features (M, D) and (N, D)."""
    first, second = first.double(), second.double()
    covariances = first.T.cov(), second.T.cov()
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    return ((first.mean(0) - second.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * root).item()


class Generated:
    """Draws pictures in [-1, 1] and counts the seconds."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline, self.seconds, self.many = pipeline, 0.0, 0

    def __call__(self, prompts: list[str], guidance: float = GUIDANCE, seed: int = 0) -> Tensor:
        start = time.process_time()
        pictures = 2 * samples(self.pipeline, prompts, STEPS, guidance, seed) - 1
        self.seconds += time.process_time() - start
        self.many += len(prompts)
        return pictures


def names(draw: Generated, eyes: dict[str, Eyes], lessons: Lessons) -> Numbers:
    """Is the right name the first, or among the first five, of all names without a tone that were trained on?"""
    plain = [i for i, design in enumerate(lessons.designs) if lessons.weights[i] and not design.tone]
    captions = [lessons.designs[index].name for index in plain]
    right = random.Random(0).sample(range(len(plain)), PROMPTS)
    shown = {"real": compose(lessons.pictures[[plain[i] for i in right]])}
    for guidance in (1.0, GUIDANCE, 5.0):
        shown[f"guidance_{guidance:g}"] = draw([captions[i] for i in right], guidance)
    found: Numbers = {"names": len(plain)}
    for who, eye in eyes.items():
        for what, pictures in shown.items():
            ranks = eye.ranks(pictures, right, captions)
            found[f"{who}_{what}_top1"] = (ranks <= 1).float().mean().item()
            found[f"{who}_{what}_top5"] = (ranks <= 5).float().mean().item()
    return found


def distances(draw: Generated, judge: Eyes, lessons: Lessons) -> Numbers:
    """Fréchet distances between pictures of training captions, and between two draws of real ones."""
    first, second = (lessons.batch(PAIRS, step) for step in (-1, -2))
    real, other = judge.pictures(first.pictures), judge.pictures(second.pictures)
    found = {"frechet_real": frechet(real, other)}
    for guidance in (1.0, GUIDANCE):
        made = draw(first.captions, guidance)
        found[f"frechet_guidance_{guidance:g}"] = frechet(judge.pictures(made), other)
    return found


def composition(draw: Generated, judge: Eyes, lessons: Lessons) -> Numbers:
    """Pairs that were trained on, and pairs that were not: tone with role, background with thing."""
    tones = [f"{tone} skin tone" for tone in TONES]
    known = {design.base for design, weight in zip(lessons.designs, lessons.weights, strict=True) if weight}
    toned = [d for d in lessons.designs if d.tone and d.category == "person" and d.base in known]
    found: Numbers = {}
    for label, wanted in (("seen", False), ("held_out", True)):
        chosen = [design for design in toned if held_out(design) == wanted]
        chosen = random.Random(1).sample(chosen, min(len(chosen), 48))
        features = judge.pictures(draw([design.name for design in chosen]))
        right = 0
        for design, feature in zip(chosen, features, strict=True):
            scores = judge.captions([f"{design.base}, {tone}" for tone in tones]) @ feature
            right += tones[int(scores.argmax())] == design.tone
        found[f"tone_{label}"] = right / len(chosen)
        found[f"tone_{label}_pairs"] = len(chosen)
    palette = torch.tensor([(255, 255, 255), *BACKGROUNDS.values()]) / 127.5 - 1
    bare = [design for design in lessons.designs if not design.tone and design.base in known]
    for label, wanted in (("seen", False), ("held_out", True)):
        pairs = [(d, c) for d in bare for c in BACKGROUNDS if held_out_background(d, c) == wanted]
        pairs = random.Random(2).sample(pairs, 48)
        pictures = draw([f"{design.name}, {colour} background" for design, colour in pairs])
        corners = torch.stack([pictures[:, :, y, x] for y in (1, 62) for x in (1, 62)]).median(0).values
        nearest = torch.cdist(corners, palette).argmin(1)
        wants = torch.tensor([1 + list(BACKGROUNDS).index(colour) for _, colour in pairs])
        found[f"background_{label}"] = (nearest == wants).float().mean().item()
        captions = [design.name for design in bare]
        ranks = judge.ranks(pictures, [captions.index(design.name) for design, _ in pairs], captions)
        found[f"background_{label}_top5"] = (ranks <= 5).float().mean().item()
    return found


def diversity(draw: Generated, judge: Eyes, lessons: Lessons) -> Numbers:
    """How far apart are pictures of one category prompt, as 1 - cosine of the judge, and how many designs appear?"""
    found: Numbers = {}
    whole = judge.pictures(compose(lessons.pictures))
    rng = random.Random(3)
    for category in CATEGORIES:
        kind = [i for i, d in enumerate(lessons.designs) if lessons.weights[i] and category in d.category.split(", ")]
        weights = [lessons.weights[i] for i in kind]
        real = whole[rng.choices(kind, weights, k=EACH)]
        made = judge.pictures(draw([category] * EACH))
        right = {lessons.designs[i].base for i in kind}
        nearest = [lessons.designs[int(i)].base for i in (made @ whole.T).argmax(1)]
        found[f"{category}_spread"] = spread(made)
        found[f"{category}_spread_real"] = spread(real)
        found[f"{category}_designs"] = len(set(nearest))
        found[f"{category}_right"] = sum(base in right for base in nearest) / EACH
    return found


def spread(features: Tensor) -> float:
    """Mean of 1 - cosine over pairs."""
    count = len(features)
    return (1 - ((features @ features.T).sum() - count) / (count * (count - 1))).item()


def memory(draw: Generated, lessons: Lessons, latents: Latents) -> Numbers:
    """Root mean square distance to the nearest of all training pictures, in [0, 1] pixels: is it a copy?

    Compared are names and categories, and, as yardsticks, the distance from a picture to the nearest other design, and
    what the decoder makes of a picture's own latents.
    """
    whole = compose(lessons.pictures)
    stock = torch.cat([whole, whole.flip(3)]).flatten(1)
    owners = [design.base for design in lessons.designs] * 2
    plain = [i for i, d in enumerate(lessons.designs) if lessons.weights[i] and not d.tone]
    plain = random.Random(4).sample(plain, 96)

    def nearest(pictures: Tensor, but: list[str] | None = None) -> tuple[Tensor, list[str]]:
        gaps = torch.cdist(pictures.flatten(1), stock) / 2 / stock.shape[1] ** 0.5
        if but is not None:
            for row, base in zip(gaps, but, strict=True):
                row[torch.tensor([owner == base for owner in owners])] = 9.0
        least = gaps.min(1)
        return least.values, [owners[int(i)] for i in least.indices]

    bases = [lessons.designs[i].base for i in plain]
    named, owner = nearest(draw([lessons.designs[i].name for i in plain]))
    free, _ = nearest(draw([category for category in CATEGORIES for _ in range(12)]))
    others, _ = nearest(whole[plain], bases)
    with torch.no_grad():
        decoded = draw.pipeline.vae.decode(latents.encode(whole[plain])).sample.clamp(-1, 1)
    return {
        "nearest_named": named.median().item(),
        "nearest_is_the_named": sum(a == b for a, b in zip(owner, bases, strict=True)) / len(bases),
        "nearest_category": free.median().item(),
        "nearest_other_design": others.median().item(),
        "nearest_decoded": nearest(decoded)[0].median().item(),
        "category_copies": (free < others.quantile(0.01)).float().mean().item(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--model", type=Path, default=ASSETS)
    parser.add_argument("--reward", type=Path, default=REWARD)
    parser.add_argument("--designs", choices=("core", "all"), default="core", help="what the generator learnt")
    args = parser.parse_args()
    lessons = Lessons(*load(args.work), bases=chosen(args.designs))
    latents = read_latents(args.work)
    eyes = {"judge": Eyes(args.work / "judge"), "reward": Eyes(args.reward)}
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    draw = Generated(pipeline)
    numbers: Numbers = {f"psnr_{key}": value for key, value in reconstruction(pipeline.vae, lessons, latents).items()}
    for measured in (
        lambda: names(draw, eyes, lessons),
        lambda: memory(draw, lessons, latents),
        lambda: distances(draw, eyes["judge"], lessons),
        lambda: composition(draw, eyes["judge"], lessons),
        lambda: diversity(draw, eyes["judge"], lessons),
    ):
        part = measured()
        print({key: round(value, 3) for key, value in part.items()}, flush=True)
        numbers |= part
    used = [design for design, weight in zip(lessons.designs, lessons.weights, strict=True) if weight]
    numbers |= {"pictures": len(used), "designs": len({design.base for design in used})}
    numbers["seconds_a_picture"] = draw.seconds / draw.many
    for name in ("generator", "decoder", "encoder", "reward", "judge"):
        progress = json.loads((args.work / f"{name}.json").read_text())
        numbers |= {f"{name}_{key}": progress[key] for key in ("step", "seconds", "loss")}
    (args.model / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    write(args.model, args.reward, numbers)


if __name__ == "__main__":
    main()
