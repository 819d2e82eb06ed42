"""Text to image at equal NFE: the embedded pipeline `emoji`, steered by one CLIP network and judged by another.

    python examples/benchmarks/emoji.py --out runs/emoji.json [--keys 5] [--budget 160] [--picture FILE.png]

24 prompts, of which half leave much open ("animal"). Of each method: reward and judge of its best sample by the reward,
and of its population (weighted; best-of-N and searches keep the best only). 10 steps with guidance are 20 network rows
a sample. Means over prompts, standard errors over keys. Finished runs are kept in --out: repeat the command to go on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import CLIPModel, CLIPTokenizer

import steer
from steer import rewards, search

PROMPTS = (
    "animal", "heart", "person", "vehicle", "food", "happy face", "sad face", "plant",
    "animal, blue background", "vehicle, yellow background", "a red heart", "a green heart", "blue butterfly",
    "a fox", "a hamburger", "a sunflower", "a rainbow", "a house", "a yellow car, pink background",
    "woman firefighter, dark skin tone", "man farmer, light skin tone", "crying face", "small dog, on the left",
    "star, purple background",
)  # fmt: skip
SHOWN = (4, 10, 12, 13, 15, 19)
DRAWN = ("unsteered", "best-of-N", "SMC, T = 0.02")
METHODS: dict[str, Callable[..., Any]] = {
    "unsteered": partial(steer.sample, method="rollout"),
    "best-of-N": search.best_of_n,
    "SMC, T = 0.02": partial(steer.smc, temperature=0.02),
    "SVDD argmax": partial(search.svdd, candidates=4, select="argmax"),
    "DTS*": search.dts_star,
}
JUDGE = Path(__file__).parents[1] / "assets" / "emoji-judge"


def judge() -> rewards.CLIPScore:
    """The network that no method sees."""
    tokenizer = CLIPTokenizer.from_pretrained(JUDGE)
    tokenize = partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
    return rewards.CLIPScore(model=CLIPModel.from_pretrained(JUDGE).eval(), tokenizer=tokenize, prefix="")


def run(method: str, key: int, budget: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Numbers of one run on all prompts, and its best pictures."""
    process = steer.load("emoji", prompt=list(PROMPTS), steps=10)
    start = time.perf_counter()
    result = METHODS[method](process, rewards.clip_emoji(), budget=budget, key=key)
    seconds = time.perf_counter() - start
    best = process.decode(result.best[:, None])
    place = result.reward.argmax(1)
    if method == "unsteered":  # any one sample of it
        best, place = process.decode(result.x[:, :1]), torch.zeros_like(place)
    asked = [prompt for prompt in PROMPTS for _ in range(result.reward.shape[1])]
    judged = judge()(result.decoded, prompts=asked).view_as(result.reward)
    weight = result.log_weight.exp()
    numbers = {
        "best reward": result.reward.gather(1, place[:, None]).mean().item(),
        "best judge": judged.gather(1, place[:, None]).mean().item(),
        "reward": (weight * result.reward).sum(1).mean().item(),
        "judge": (weight * judged).sum(1).mean().item(),
        "nfe": result.cost.nfe / len(PROMPTS),
        "rewards": result.cost.rewards / len(PROMPTS),
        "decodes": result.cost.decodes / len(PROMPTS),
        "seconds": seconds,
    }
    return numbers, best


def table(found: dict[str, dict[str, Any]], keys: int) -> str:
    """The means, in Markdown."""
    names = ("best reward", "best judge", "reward", "judge")
    lines = ["| method | " + " | ".join(names) + " | NFE | rewards | seconds |", "|---" * (len(names) + 4) + "|"]
    for method in METHODS:
        rows = [found[f"{method}/{key}"] for key in range(keys)]
        cells = [method]
        for name in names:
            values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            cells.append(f"{values.mean():.3f} ± {values.std() / math.sqrt(keys):.3f}")
        cells += [f"{rows[0][name]:.0f}" for name in ("nfe", "rewards", "seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(pictures: dict[str, torch.Tensor], path: Path, size: int = 128) -> None:
    """A row of pictures for each method, with its name."""
    left, top = 110, 34
    sheet = Image.new("RGB", (left + size * len(SHOWN), top + size * len(pictures)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, place in enumerate(SHOWN):
        words = PROMPTS[place].replace(", ", ",\n").replace("woman ", "woman\n")
        pen.multiline_text((left + column * size + 6, 4), words, fill="black", spacing=2)
    for row, (method, images) in enumerate(pictures.items()):
        pen.text((6, top + row * size + size // 2 - 6), method, fill="black")
        for column, place in enumerate(SHOWN):
            pixels = (images[place].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            cell = Image.fromarray(pixels).resize((size - 4, size - 4), Image.Resampling.LANCZOS)
            sheet.paste(cell, (left + column * size + 2, top + row * size + 2))
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji.json"))
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--budget", type=int, default=160, help="network rows per prompt")
    parser.add_argument("--picture", type=Path, help="draw the pictures of the first key here")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    pictures: dict[str, torch.Tensor] = {}
    for key in range(args.keys):
        for method in METHODS:
            if f"{method}/{key}" in found and not (args.picture and key == 0 and method in DRAWN):
                continue
            found[f"{method}/{key}"], best = run(method, key, args.budget)
            if key == 0:
                pictures[method] = best
            args.out.write_text(json.dumps(found, indent=1))
            print(f"{method}, key {key}: {found[f'{method}/{key}']}", flush=True)
        if key == 0 and args.picture:
            draw({name: pictures[name] for name in DRAWN}, args.picture)
    print(table(found, args.keys))


if __name__ == "__main__":
    main()
