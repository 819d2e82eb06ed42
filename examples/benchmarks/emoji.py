"""Text to image at equal NFE: the embedded pipeline `emoji`, steered by one CLIP network and judged by another.

    python examples/benchmarks/emoji.py --out runs/emoji.json [--keys 5] [--budget 160]

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


def run(method: str, key: int, budget: int) -> dict[str, float]:
    """Numbers of one run on all prompts."""
    process = steer.load("emoji", prompt=list(PROMPTS), steps=10)
    start = time.perf_counter()
    result = METHODS[method](process, rewards.clip_emoji(), budget=budget, key=key)
    seconds = time.perf_counter() - start
    place = result.reward.argmax(1) if method != "unsteered" else torch.zeros(len(PROMPTS), dtype=torch.long)
    asked = [prompt for prompt in PROMPTS for _ in range(result.reward.shape[1])]
    judged = judge()(result.decoded, prompts=asked).view_as(result.reward)
    weight = result.log_weight.exp()
    return {
        "best reward": result.reward.gather(1, place[:, None]).mean().item(),
        "best judge": judged.gather(1, place[:, None]).mean().item(),
        "reward": (weight * result.reward).sum(1).mean().item(),
        "judge": (weight * judged).sum(1).mean().item(),
        "nfe": result.cost.nfe / len(PROMPTS),
        "rewards": result.cost.rewards / len(PROMPTS),
        "decodes": result.cost.decodes / len(PROMPTS),
        "seconds": seconds,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji.json"))
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--budget", type=int, default=160, help="network rows per prompt")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in (f"{method}/{key}" for key in range(args.keys) for method in METHODS):
        if name not in found:
            method, _, key = name.rpartition("/")
            found[name] = run(method, int(key), args.budget)
            args.out.write_text(json.dumps(found, indent=1))
            print(f"{name}: {found[name]}", flush=True)
    print(table(found, args.keys))


if __name__ == "__main__":
    main()
