"""`steer resume`, `steer status` and `steer report`: what a directory of an earlier run is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .console import print_json, say
from .flags import (
    AsJson,
    Checkpoint,
    Debug,
    Device,
    Download,
    DryRun,
    Force,
    OnlyFailed,
    Quiet,
    RunFolder,
    Shard,
    Shown,
    Workers,
)
from .inputs import (
    device_of,
    reported_errors,
)
from .many import Making, chosen, counted, generator_of, make_rows
from .subject import Subject


def resume(
    directory: RunFolder,
    device: Device = "auto",
    download: Download = False,
    workers: Workers = None,
    shard: Shard = None,
    checkpoint: Checkpoint = None,
    only_failed: OnlyFailed = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Goes on with a run of many prompts: what is missing is made, failed rows are tried again.

    Rows that were killed go on from their journals. Any number of processes may do this at once.
    """
    from ..generation.run_directory import RunDirectory

    with reported_errors(debug, as_json):
        run = RunDirectory(directory)
        checkpoint = checkpoint or run.how.get("checkpoint")
        maker = generator_of(run.options, device_of(device), download=download, checkpoint=checkpoint)
    make_rows(maker, run, Making(chosen(force, only_failed), shard, workers, dry_run, as_json, quiet, debug))


def status(
    directory: RunFolder,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Says how many rows of a run are finished, failed and missing, and why rows failed. Writes metadata.jsonl anew."""
    from ..generation.run_directory import RunDirectory

    with reported_errors(debug, as_json):
        run = RunDirectory(directory)
        states = run.states()
        run.gather()
        errors = {index: run.error(index) for index in states["failed"]}
    numbers = {name: len(rows) for name, rows in states.items()}
    if as_json:
        print_json({**numbers, "errors": {str(i): f"{e['type']}: {e['message']}" for i, e in errors.items()}})
        return
    typer.echo(counted(states))
    for index, error in list(errors.items())[:10]:
        typer.echo(f"row {index}: {error['type']}: {error['message']}")


def report(
    directory: Annotated[
        Path,
        typer.Argument(
            file_okay=False, help="A directory that `steer generate` wrote, or a row's, RUN/rows/000/000012."
        ),
    ],
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Directory to write to; default: the same.")] = None,
    n: Shown = 16,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Writes report.html of a saved run again: after an update of steer, or with another number of pictures.

    Intermediate states are not saved, so they are not shown.
    """
    from ..report.run_report import shown, write_report
    from ..saved import load_run

    with reported_errors(debug, as_json=False):
        if (directory / "run.yaml").exists():
            raise typer.BadParameter(
                f"{directory} is a run of many prompts, and a page is of one: name a row, {directory}/rows/000/000000"
            )
        saved = load_run(directory)
        about = _asked(directory, saved.facts["run"])
        if "model" not in about or "reward" not in about:
            raise typer.BadParameter(
                f"{directory} names no model and reward, so it was saved from Python; load it there with "
                "Saved.result(process), and write the page with its .report(...)"
            )
        subject = Subject.saved(about, saved.facts["process"]["steps"])
        process, score = subject.open(device)
        result = saved.result(process)
        path = write_report(
            result,
            out or directory,
            reference=saved.reference(process),
            metrics=subject.metrics(score),
            index=shown(result, min(n, result.reward.shape[1])),
            title=subject.title,
            about=about,
        )
    say(f"report  {escape(str(path))}")


def _asked(directory: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved run was asked for. A row of many prompts has its own share, and the rest from the run's options."""
    from ..generation.run_directory import run_of_row

    run = run_of_row(directory)
    if run is None:
        return {name: fact for name, fact in facts.items() if name != "shown"}
    given = run.options
    call = [*given["call"], *(f"{name}={json.dumps(value)}" for name, value in facts["call"].items())]
    asked = {name: given[name] for name in ("model", "method", "budget", "temperature", "seed", "dtype", "guided")}
    reward = given["reward"][0] if len(given["reward"]) == 1 else given["reward"]
    options = ", ".join(given["set"]) or None
    own = {"row": facts["index"], "prompt": facts["prompt"], "call": call or None, "options": options}
    return {**asked, "reward": reward, **own}
