"""The options that several commands share: their types and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .many import config_callback

Model = Annotated[
    str,
    typer.Option(
        help="An embedded model (`steer models`), a folder with a model_index.json, or owner/name of the hub."
    ),
]
RewardSpec = Annotated[
    list[str],
    typer.Option(
        "--reward",
        metavar="SPEC",
        help="Reward to steer by: digit:3, jpeg, clip:FILE, remote:URL, my.module:Mine; several are summed, with "
        "weights as in 0.5*clip.",
    ),
]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What the model is asked for, if it takes prompts.")
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        "--call", metavar="NAME=VALUE", help="An argument of the pipeline's call: guidance_scale=5, height=768."
    ),
]
Dtype = Annotated[str, typer.Option(help="Of the networks: fp32, bf16 or fp16. States stay float32.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch what is not on this machine yet from the hub.")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=config_callback, is_eager=True, help="Options from a YAML file, or run.yaml; flags win."
    ),
]
Out = Annotated[
    Path, typer.Option(file_okay=False, help="Directory to write to; files of an earlier run there are replaced.")
]


def _positive(value: float) -> float:
    if not value > 0.0:
        raise typer.BadParameter(f"must be positive, got {value}")
    return value


Temperature = Annotated[
    float,
    typer.Option(
        callback=_positive,
        help="Divides the reward. For log-probabilities (digit:...) 1 is Bayes' posterior; lower is greedier.",
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps per sample; default: the model's own.")]
Seed = Annotated[int, typer.Option(help="Random seed: the same seed gives the same samples.")]
Label = Annotated[int | None, typer.Option(help="Condition a class-conditional model on this class; default: none.")]
Shown = Annotated[int, typer.Option("--n", min=1, help="How many pictures to show.")]
Shard = Annotated[
    str | None, typer.Option(metavar="I/N", help="Make the I-th of N parts alone; else RANK or SLURM's variables say.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes, by Ray (pip install steer-diffusion[ray]).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many rows there are to make, and stop.")]
OnlyFailed = Annotated[bool, typer.Option("--only-failed", help="Make failed rows again, and no others.")]
Force = Annotated[bool, typer.Option("--force", help="Make all rows again.")]
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1, mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
