"""A dataset of steered pictures from a file of prompts, by as many processes as you start.

    python examples/dataset.py examples/prompts.jsonl --out runs/emoji
    torchrun --nproc-per-node 4 examples/dataset.py prompts.jsonl --model ./my-pipeline --reward clip:FILE --out runs/a
    srun --ntasks 16 python examples/dataset.py ...        # or a SLURM array

`steer generate --prompts` does the same without a script. Kill it at any point and start the same line again: rows
that are finished stay, rows under way go on from their journals, failed ones are tried again. Every number of processes
makes the same pictures, bit for bit.
"""

import argparse
from pathlib import Path

import torch

import steer
from steer.generation.place import place
from steer.generation.prompts import read_prompts
from steer.generation.run_directory import RunDirectory


def main() -> None:
    args = arguments()
    here = place()  # RANK and WORLD_SIZE, or SLURM's variables; no process group is needed
    options = {name: value for name, value in vars(args).items() if name not in ("prompts", "out")}
    device = f"cuda:{here.local}" if torch.cuda.is_available() else "cpu"
    generator = steer.Generator(**options, device=device)
    run = RunDirectory.open(args.out, options, generator.rows(read_prompts(args.prompts)))

    unfinished = [index for state in ("missing", "failed") for index in run.states()[state]]
    for index, error in generator.run(run, sorted(unfinished), here):
        print(f"row {index}: {error or 'made'}", flush=True)
    run.gather()

    states = run.states()
    if not states["missing"] and not states["failed"]:
        pictures = list(run.metadata())
        mean = sum(picture["score"] for picture in pictures) / len(pictures)
        print(f"{len(pictures)} pictures of {len(run.rows)} prompts, mean score {mean:.4g}: {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help=".txt, .jsonl, .csv or .parquet; further columns are call arguments")
    parser.add_argument("--model", default="emoji", help="an embedded model, a folder, or owner/name on the Hub")
    parser.add_argument("--reward", default="clip-emoji", help="what to follow, as on the command line of steer")
    parser.add_argument("--method", default="svdd", help=", ".join(steer.methods()))
    parser.add_argument("--budget", type=int, default=400, help="network rows per prompt")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the model's own")
    parser.add_argument("--keep", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
