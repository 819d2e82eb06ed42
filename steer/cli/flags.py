"""The options that several commands share: their types and help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Options from a YAML file, as defaults: flags win. A name that is no option is refused."""
    if path is None:
        return None
    import yaml

    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint="--config") from error
    if not isinstance(given, dict):
        raise typer.BadParameter("must be names and values, such as budget: 2000", param_hint="--config")
    if "options" in given:  # run.yaml of an earlier run
        given = {**given["options"], **(given.get("how") or {})}
    names = {flag.lstrip("-").replace("-", "_"): p.name for p in context.command.params for flag in p.opts}
    unknown = sorted(name for name in given if name.replace("-", "_") not in names)
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(unknown)} is no option of steer {context.info_name}; there are {', '.join(sorted(names))}",
            param_hint="--config",
        )
    defaults: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            defaults[names[name.replace("-", "_")]] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


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
        "--config", callback=_from_file, is_eager=True, help="Options from a YAML file, or run.yaml; flags win."
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


def _number_or_auto(value: str | float) -> str | float:
    """A temperature, or "auto": what the option was given as text, or its default."""
    if value == "auto":
        return value
    try:
        return _positive(float(value))
    except ValueError:
        raise typer.BadParameter(f'must be a positive number or "auto", got {value}') from None


TemperatureOrAuto = Annotated[
    Any,
    typer.Option(
        parser=_number_or_auto,
        metavar="X|auto",
        help="Divides the reward. For log-probabilities (digit:...) 1 is Bayes' posterior; lower is greedier. auto: "
        "chosen from unsteered samples before the run, as by --set ess=0.5.",
    ),
]
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str | float) -> float | None:
    """Seconds of "60s", "5m", "1h" or a number of seconds; None of "never"."""
    if text == "never":
        return None
    number, unit = (str(text)[:-1], str(text)[-1:]) if str(text)[-1:] in _SECONDS else (str(text), "s")
    try:
        seconds = float(number) * _SECONDS[unit]
    except ValueError:
        seconds = math.nan
    if not 0.0 <= seconds < math.inf:
        raise typer.BadParameter(f"must be a time, as 60s, 5m or 1h, or never, got {text}", param_hint="--checkpoint")
    return seconds


def _time(text: str | None) -> str | None:
    """What was given, where it is a time."""
    if text is not None:
        seconds_of(text)
    return text


Checkpoint = Annotated[
    str | None,
    typer.Option(
        callback=_time,
        metavar="TIME",
        help="Between two snapshots of a row under way, by which its journal stays small: 60s if not given; 5m, never.",
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps per sample; default: the model's own.")]
Seed = Annotated[int, typer.Option(help="Random seed: the same seed gives the same samples.")]
Label = Annotated[int | None, typer.Option(help="Condition a class-conditional model on this class; default: none.")]
RunFolder = Annotated[Path, typer.Argument(file_okay=False, help="A run directory of `steer generate --prompts`.")]
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
