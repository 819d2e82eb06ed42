"""Steered pictures as a Ray Dataset: prompts in, a Parquet file of pictures and scores out.

    pip install "steer-diffusion[ray]"
    python examples/dataset_ray.py examples/prompts.jsonl --workers 2 --out runs/emoji.parquet

`steer.Generator` is a stateful callable of columns: Ray starts `--workers` of it, each loads the model once, and a
worker that is lost is started again. On a cluster, begin with `ray.init("auto")`; `--gpus 1` gives each worker a GPU.
For files on disk and rows that go on from a journal, use a run directory: `steer generate --prompts ... --workers 2`.
"""

import argparse
from pathlib import Path

import ray

import steer
from steer.generation.prompts import read_prompts


def main() -> None:
    args = arguments()
    ray.init(num_cpus=args.workers, include_dashboard=False, logging_level="ERROR")
    rows = [{"index": index, **entry} for index, entry in enumerate(read_prompts(args.prompts))]
    pictures = ray.data.from_items(rows).map_batches(
        steer.Generator,
        fn_constructor_args=(args.model,),
        fn_constructor_kwargs={
            "reward": args.reward,
            "method": args.method,
            "budget": args.budget,
            "seed": args.seed,
            "keep": args.keep,
            "device": "cuda" if args.gpus else "cpu",
        },
        batch_size=1,
        num_cpus=1,
        num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    pictures.write_parquet(str(args.out.absolute()))

    made = ray.data.read_parquet(str(args.out.absolute()))
    print(f"{made.count()} pictures, mean score {made.mean('score'):.4g}: {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help=".txt, .jsonl, .csv or .parquet; further columns are call arguments")
    parser.add_argument("--model", default="emoji", help="an embedded model, a folder, or owner/name on the Hub")
    parser.add_argument("--reward", default="clip-emoji", help="what to follow, as on the command line of steer")
    parser.add_argument("--method", default="svdd", help=", ".join(steer.methods()))
    parser.add_argument("--budget", type=int, default=400, help="network rows per prompt")
    parser.add_argument("--keep", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker; 0 runs on the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji.parquet"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
