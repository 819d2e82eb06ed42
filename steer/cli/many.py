"""Runs of many prompts from the command line: `steer generate --prompts`, `steer resume`, `steer status`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from .console import print_json, say
from .inputs import find_method, own_options, settings_of

if TYPE_CHECKING:
    from ..generation.generator import Generator
    from ..generation.run_directory import RunDirectory

Which = Literal["missing", "failed", "all"]


def generator_of(options: Mapping[str, Any], device: str | None, *, download: bool = False) -> Generator:
    """The model, rewards and method of a run's options, as `run.yaml` has them."""
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
    out: Path, options: Mapping[str, Any], generator: Generator, entries: Sequence[Mapping[str, Any]]
) -> RunDirectory:
    """The run directory of these rows. All of them, and the first with its rewards, are tried before it is made."""
    from ..errors import ModelError, PromptError, RemoteError, RewardError, RunDirectoryError
    from ..generation.run_directory import RunDirectory

    try:
        rows = generator.rows(entries)
        generator.score(generator.process(rows[0].prompt, **rows[0].call))
        return RunDirectory.open(out, options, rows)
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


def finish(directory: RunDirectory, numbers: Mapping[str, int], as_json: bool, quiet: bool) -> None:
    """Prints how a run of many prompts stands; exit code 1 where rows failed or are missing."""
    if as_json:
        print_json({"out": str(directory.path), **numbers})
    elif not quiet:
        typer.echo(f"{counted(numbers)}: {directory.path / 'metadata.jsonl'}")
    if numbers["failed"] or numbers["missing"]:
        if not quiet:
            say(f"go on by [bold]steer resume {escape(str(directory.path))}[/]")
        raise typer.Exit(1)


def run_many(
    generator: Generator,
    directory: RunDirectory,
    *,
    which: Which = "missing",
    shard: str | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    show: bool = True,
) -> dict[str, int]:
    """Makes rows of a run directory, showing progress, and returns how many there are in each state."""
    from ..generation.place import place

    states = directory.states()
    wanted = {"missing": states["missing"] + states["failed"], "failed": states["failed"]}.get(which)
    wanted = sorted(wanted) if wanted is not None else [row.index for row in directory.rows]
    if dry_run:
        say(f"{len(wanted)} rows to make; {_counted(states)} in {escape(str(directory.path))}")
        return {name: len(rows) for name, rows in states.items()}
    here = place(shard)
    if which == "all":
        for index in wanted:
            directory.forget(index)
    if workers:
        from ..generation import workers as pool

        found: Iterable[tuple[int, Any]] = pool.run(generator, directory, wanted, workers=workers)
    else:
        found = generator.run(directory, wanted, here, claim=shard is None)
    with _bar(len(wanted), show) as advance:
        for index, error in found:
            advance()
            if error:
                kind = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
                say(f"[red]row {index} failed:[/] {escape(' '.join(kind.split()))}")
    directory.gather()
    states = directory.states()
    if not states["missing"] and not states["failed"]:
        shutil.rmtree(directory.path / "claims", ignore_errors=True)
    return {name: len(rows) for name, rows in states.items()}


def counted(numbers: Mapping[str, int]) -> str:
    """Numbers of rows in words."""
    return ", ".join(f"{count} {name}" for name, count in numbers.items())


def _counted(states: Mapping[Any, list[int]]) -> str:
    return counted({name: len(rows) for name, rows in states.items()})


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


def config_callback(context: typer.Context, path: Path | None) -> Path | None:
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
    given = given.get("options", given)  # run.yaml of an earlier run
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
