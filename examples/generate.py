"""The best picture for every prompt of a file, at a budget you state.

    python examples/generate.py examples/prompts.txt --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --device cuda --reward jpeg --method best_of_n --budget 1600 --out runs/prompts

Writes one PNG per prompt, scores.json, and the run itself. `--look` prints what `steer.preflight` finds before anything
is spent. A model is a repository of the Hub or a folder; its weights are read from safetensors and none of its code is
run.
"""

import argparse
import json
import re
from pathlib import Path

import steer
from steer import rewards
from steer.report.images import to_images


def main() -> None:
    args = arguments()
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    reward = rewards.from_spec(args.reward)
    process = steer.from_hub(args.model, prompt=prompts, steps=args.steps, device=args.device, **json.loads(args.call))

    if args.look:
        print(steer.preflight(process, reward, key=args.seed))
    result = steer.sample(process, reward, method=args.method, budget=args.budget, key=args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    pictures = to_images(process.decode(result.best[:, None]))
    scores = {}
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        name = f"{i:03d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower())[:40].strip('-')}.png"
        picture.save(args.out / name)
        best, mean = float(result.reward[i].max()), float(result.reward[i].mean())
        scores[name] = {"prompt": prompt, "score": best, "mean of its candidates": mean}
        print(f"{best:10.4g}  {name}")
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    result.save(args.out)
    print(f"{result.cost.nfe:,} network rows in {result.cost.seconds['total']:.1f} s; all of it is in {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a text file, one prompt per line")
    parser.add_argument("--model", required=True, help="a diffusers pipeline: owner/name on the Hub, or a folder")
    parser.add_argument("--reward", default="jpeg", help="what to follow, as on the command line of steer")
    parser.add_argument("--method", default="best_of_n", help=", ".join(steer.methods()))
    parser.add_argument("--budget", type=int, default=1600, help="network rows per prompt")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--call", default="{}", help="more of the pipeline's arguments: '{\"height\": 512}'")
    parser.add_argument("--look", action="store_true", help="print a preflight first")
    parser.add_argument("--out", type=Path, default=Path("runs/prompts"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
