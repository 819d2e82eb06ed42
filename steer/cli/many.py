"""Runs of many prompts from the command line: `steer generate --prompts`, `steer resume`, `steer status`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from .console import print_json, say
from .flags import seconds_of
from .inputs import find_method, own_options, reported_errors, settings_of

if TYPE_CHECKING:
    from ..generation.generator import Generator
    from ..generation.run_directory import RunDirectory

Which = Literal["missing", "failed", "all"]


def generator_of(
    options: Mapping[str, Any], device: str | None, *, download: bool = False, checkpoint: str | None = None
) -> Generator:
    """The model, rewards and method of a run's options, as `run.yaml` has them. checkpoint: as the flag was given."""
    from ..execution.journal import CHECKPOINT
    from ..generation.generator import Generator
    from ..generation.prompts import call_arguments

    sampler = find_method(options["method"])
    own = own_options(sampler, options["method"], options["n"], options["guided"])
    own |= settings_of(sampler, options["method"], options["set"])
    return Generator(
        options["model"],
        reward=options["reward"],
        method=options["method"],
        budget=options["budget"],
        particles=options["particles"],
        temperature=options["temperature"],
        seed=options["seed"],
        steps=options["steps"],
        device=device,
        dtype=options["dtype"],
        call=call_arguments(options["call"]),
        options=own,
        keep=options["n"],
        download=download,
        checkpoint=CHECKPOINT if checkpoint is None else seconds_of(checkpoint),
    )


def read_entries(path: Path | None, prompts: Sequence[str] | None) -> list[dict[str, Any]]:
    """The rows of a file of prompts, or of several --prompt."""
    from ..errors import PromptError
    from ..generation.prompts import read_prompts

    if path is None:
        return [{"prompt": text} for text in prompts or ()]
    if prompts:
        raise typer.BadParameter("give --prompt or --prompts, not both", param_hint="--prompts")
    try:
        return read_prompts(path)
    except PromptError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from error


def open_directory(
    out: Path,
    options: Mapping[str, Any],
    generator: Generator,
    entries: Sequence[Mapping[str, Any]],
    how: Mapping[str, Any],
) -> RunDirectory:
    """The run directory of these rows. All of them, and the first with its rewards, are tried before it is made."""
    from ..errors import ModelError, PromptError, RemoteError, RewardError, RunDirectoryError
    from ..generation.run_directory import RunDirectory

    try:
        rows = generator.rows(entries)
        generator.score(generator.process(rows[0].prompt, **rows[0].call))
        return RunDirectory.open(out, options, rows, how)
    except RemoteError:  # no wrong usage: the run cannot begin
        raise
    except RewardError as error:
        raise typer.BadParameter(str(error), param_hint="--reward") from error
    except PromptError as error:
        raise typer.BadParameter(str(error), param_hint="--prompts") from error
    except RunDirectoryError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    except ModelError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


def chosen(force: bool, only_failed: bool) -> Which:
    """Which rows --force and --only-failed ask for."""
    return "all" if force else "failed" if only_failed else "missing"


@dataclass(frozen=True)
class Making:
    """Which rows of a run are made, by whom, and what is said of it."""

    which: Which = "missing"
    shard: str | None = None
    workers: int | None = None
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    debug: bool = False


def make_rows(generator: Generator, directory: RunDirectory, how: Making) -> None:
    """Makes rows of a run, and prints how it stands; exit code 1 where rows failed or are missing afterwards."""
    with reported_errors(how.debug, how.as_json):
        wanted = _wanted(directory, how.which)
        if how.dry_run:
            say(f"{len(wanted)} rows to make; {counted(directory.states())} in {escape(str(directory.path))}")
        else:
            _make(generator, directory, wanted, how)
        numbers = {name: len(rows) for name, rows in directory.states().items()}
    if how.as_json:
        print_json({"out": str(directory.path), **numbers})
    elif not (how.quiet or how.dry_run):
        typer.echo(f"{counted(directory.states())}: {directory.path / 'metadata.jsonl'}")
    if numbers["failed"] or numbers["missing"]:
        if not (how.quiet or how.dry_run):
            say(f"go on by [bold]steer resume {escape(str(directory.path))}[/]")
        raise typer.Exit(1)


def _wanted(directory: RunDirectory, which: Which) -> list[int]:
    """Indices of the rows to make."""
    states = directory.states()
    if which == "all":
        return [row.index for row in directory.rows]
    return sorted(states["failed"] + (states["missing"] if which == "missing" else []))


def _make(generator: Generator, directory: RunDirectory, wanted: list[int], how: Making) -> None:
    """Makes rows, showing progress and what failed."""
    from ..generation.place import place

    here = place(how.shard)
    if how.which == "all":
        for index in wanted:
            if index % here.world == here.rank:  # each process its own, or a late one would undo what others have made
                directory.forget(index)
    if how.workers:
        from ..generation import workers as pool

        found: Iterable[tuple[int, Any]] = pool.run(generator, directory, wanted, workers=how.workers)
    else:
        found = generator.run(directory, wanted, here, claim=how.shard is None)
    with _bar(len(wanted), not (how.quiet or how.as_json)) as advance:
        for index, error in found:
            advance()
            if error:
                kind = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
                say(f"[red]row {index} failed:[/] {escape(' '.join(kind.split()))}")
    directory.gather()
    states = directory.states()
    if not states["missing"] and not states["failed"]:
        shutil.rmtree(directory.path / "claims", ignore_errors=True)


def counted(states: Mapping[Any, list[int]]) -> str:
    """How many rows there are in each state, in words."""
    return ", ".join(f"{len(rows)} {name}" for name, rows in states.items())


class _bar:
    """A progress bar of rows on stderr; plain lines, a tenth apart, where that is no terminal."""

    def __init__(self, total: int, show: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.total, self.done = Console(stderr=True), total, 0
        self.lines = show and not self.console.is_terminal
        columns = (TextColumn("[bold]rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not show or self.lines)
        self.task = self.bar.add_task("rows", total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return self.advance

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def advance(self) -> None:
        """One row is done."""
        self.done += 1
        self.bar.advance(self.task)
        if self.lines and self.done * 10 // self.total > (self.done - 1) * 10 // self.total:
            self.console.print(f"{self.done:,} of {self.total:,} rows", highlight=False)
