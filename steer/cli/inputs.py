"""What the command line is given, as objects: models, rewards, methods and their options; and errors, as one line."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from ..processes.gaussian import GaussianProcess
    from ..results.result import Result
    from .progress import Watch


@contextmanager
def reported_errors(debug: bool, as_json: bool) -> Iterator[None]:
    """Errors of the run as one line, and exit code 1."""
    from ..errors import SteerError
    from ..types import Stop

    try:
        yield
    except (SteerError, OSError, KeyboardInterrupt, Stop) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            message = "interrupted at once; what was not written yet is lost"
        elif isinstance(error, Stop):
            message = "interrupted; nothing was written"
        if as_json:
            typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
        say(f"[bold red]error:[/] [red]{escape(message)}[/]")
        raise typer.Exit(1) from None


def say(markup: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(markup)


def open_model(model: str, steps: int | None, label: int | None, device: str) -> GaussianProcess:
    """An embedded model on a device."""
    import torch

    import steer

    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device!r} cannot be used here; use --device cpu", param_hint="--device") from error
    try:
        return steer.load(model, steps=steps, labels=label, device=where)
    except steer.ShapeError as error:
        raise typer.BadParameter(str(error), param_hint="--label") from error
    except steer.ModelError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


def open_reward(spec: str, process: Any = None) -> Callable[..., Any]:
    """The reward that a specification stands for; one of text, on a process that has a text."""
    from .. import rewards
    from ..errors import SteerError

    try:
        return rewards.from_spec(spec, process.text)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--reward") from error


def find_method(name: str) -> Callable[..., Any]:
    """The method of that name."""
    from ..errors import SteerError
    from ..evaluation.methods import resolve

    try:
        return resolve(name)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from error


def metrics_of(spec: str, reward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The held-out judge of a reward, where there is one."""
    from .. import rewards

    if not isinstance(reward, rewards.DigitLogProb):
        return {}
    return {f"held-out judge p({spec.partition(':')[2]})": rewards.judge(cast(Any, reward).label)}


def own_options(sampler: Callable[..., Any], name: str, n: int, guided: float | None) -> dict[str, Any]:
    """What the command line's own flags mean to a method: pictures to keep, and guidance."""
    import steer

    accepted, options = inspect.signature(sampler).parameters, {}
    if "keep" in accepted:
        options["keep"] = n
    if guided is not None:
        if "proposal" not in accepted:
            raise typer.BadParameter(f"{name} has no proposal to guide; use --method smc", param_hint="--guided")
        options["proposal"] = steer.guided(guided)
    return options


def settings_of(sampler: Callable[..., Any], name: str, settings: Sequence[str]) -> dict[str, Any]:
    """A method's own options from NAME=VALUE."""
    from ..errors import SteerError
    from .options import parsed

    try:
        return parsed(name, sampler, settings)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error


def by_method(settings: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """METHOD.NAME=VALUE as the NAME=VALUE of each method."""
    own: dict[str, list[str]] = {}
    for setting in settings:
        method, dot, rest = setting.partition(".")
        if not dot or method not in names:
            raise typer.BadParameter(
                f"{setting!r} must be METHOD.NAME=VALUE of a method compared: {', '.join(names)}", param_hint="--set"
            )
        own.setdefault(method, []).append(rest)
    return own


def parse_budgets(text: str) -> list[int]:
    """Budgets, rising, from "2000" or "500,1000,2000"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(f"whole numbers from 1 on, as 500,1000,2000; got {text!r}", param_hint="--budget")
    return sorted({int(part) for part in parts})


def unsteered_run(
    process: GaussianProcess, reward: Callable[..., Any], count: int, seed: int, watch: Watch
) -> Result | None:
    """Unsteered samples from the run's own noise, slot by slot; None where Ctrl-C was pressed."""
    from ..samplers.rollout import rollout

    unsteered = rollout(process, reward, particles=count, key=seed, keep_states=False, on_step=watch)
    return None if unsteered.interrupted else unsteered


def command_line(context: typer.Context) -> str:
    """The command line of this run, without flags and options left at their defaults."""
    words = ["steer", context.info_name or ""]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if value is not None and value != option.default and not isinstance(value, bool):
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [option.opts[0], str(one)]
    return shlex.join(words)
