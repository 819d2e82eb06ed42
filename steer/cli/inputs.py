"""Turns command-line arguments into models, rewards, methods and their options; prints errors as one line."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.markup import escape

from .console import print_json, say

if TYPE_CHECKING:
    from ..processes.gaussian import GaussianProcess
    from ..results.result import Result
    from .progress import Watch


@contextmanager
def reported_errors(debug: bool, as_json: bool, out: Path | None = None, **about: Any) -> Iterator[None]:
    """Prints an error of the run as one line and exits with code 1; with `debug` it is raised.

    out: where what was paid for before it is written, whatever the error. about: what the run is, for the files.
    """
    from ..errors import SteerError
    from ..types import Stop
    from .outputs import write_partial

    try:
        yield
    except BaseException as error:
        written = None
        if out is not None:
            with suppress(OSError):  # the error itself is what must be seen
                written = write_partial(getattr(error, "partial", None), out, about)
        if debug or not isinstance(error, SteerError | OSError | KeyboardInterrupt | Stop):
            if written is not None:
                say(f"what the run had until then is in {escape(str(written))}")
            raise
        message = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt | Stop):
            message = "interrupted"
        message += f"; what the run had until then is in {written}" if written is not None else ""
        if isinstance(error, KeyboardInterrupt | Stop) and written is None:
            message += "; nothing was written"
        if as_json:
            partial = None if written is None else str(written)
            print_json({"error": {"type": type(error).__name__, "message": message, "partial": partial}})
        say(f"[bold red]error:[/] [red]{escape(message)}[/]")
        raise typer.Exit(1) from None


def open_model(
    model: str,
    steps: int | None,
    label: int | None,
    device: str,
    *,
    prompt: str | None = None,
    call: Sequence[str] = (),
    dtype: str = "fp32",
    download: bool = False,
) -> Any:
    """A model that ships with steer, a folder, or a repository of the hub, opened for a prompt and call arguments."""
    from ..errors import ModelError, PromptError, ShapeError
    from ..generation.generator import Generator
    from ..generation.prompts import call_arguments

    where = device_of(device)
    try:
        given = call_arguments(call)
    except PromptError as error:
        raise typer.BadParameter(str(error), param_hint="--call") from error
    try:
        generator = Generator(model, reward=None, steps=steps, device=where, dtype=dtype, download=download)
        accepted = generator.accepted
        if label is not None and "label" not in accepted:
            raise typer.BadParameter(f"{model} takes no label", param_hint="--label")
        if (prompt is None) == ("prompt" in accepted):
            words = "needs a prompt: --prompt TEXT" if prompt is None else "takes no prompt"
            raise typer.BadParameter(f"{model} {words}", param_hint="--prompt")
        return generator.process(prompt, **given, **({} if label is None else {"label": label}))
    except ShapeError as error:
        raise typer.BadParameter(str(error), param_hint="--label" if label is not None else "--call") from error
    except ModelError as error:
        more = "" if download or Path(model).is_dir() else "; --download fetches what is not on this machine"
        raise typer.BadParameter(f"{error}{more}", param_hint="--model") from error


def device_of(device: str) -> str:
    """The device of that name, which is tried; "auto" is this process's GPU where there is one."""
    import torch

    from ..generation.place import place

    if device == "auto":
        if torch.cuda.is_available():
            return f"cuda:{place().local % torch.cuda.device_count()}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device!r} cannot be used here; use --device cpu", param_hint="--device") from error
    return device


def open_reward(specs: Sequence[str], process: Any = None) -> Callable[..., Any]:
    """The sum of the rewards specified; rewards of text need a process that reads its samples as text."""
    from .. import rewards
    from ..errors import RemoteError, SteerError

    try:
        return rewards.from_specs(specs, None if process is None else process.text)
    except RemoteError:  # no wrong usage: the run cannot begin
        raise
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--reward") from error


def rewards_by_name(specs: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The rewards of several specifications NAME=SPEC; without a NAME, the word that the SPEC begins with."""
    served: dict[str, Callable[..., Any]] = {}
    for text in specs:
        name, equals, spec = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):  # an equals sign of the SPEC itself
            name, spec = text.partition(":")[0], text
        if name in served:
            raise typer.BadParameter(f"two rewards are called {name!r}; give NAME=SPEC", param_hint="SPEC...")
        served[name] = open_reward([spec])
    return served


def find_method(name: str) -> Callable[..., Any]:
    """The sampler of that name."""
    from ..errors import SteerError
    from ..evaluation.methods import resolve

    try:
        return resolve(name)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from error


def metrics_of(spec: str, reward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Measures beside the reward: a held-out judge, where the reward has one."""
    from .. import rewards

    if not isinstance(reward, rewards.DigitLogProb):
        return {}
    return {f"held-out judge p({spec.partition(':')[2]})": rewards.judge(cast(Any, reward).label)}


def own_options(sampler: Callable[..., Any], name: str, n: int, guided: float | None) -> dict[str, Any]:
    """Keyword arguments of a method from the flags --n and --guided."""
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
    """Keyword arguments of a method from --set NAME=VALUE."""
    from ..errors import SteerError
    from .options import parsed

    try:
        return parsed(name, sampler, settings)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error


def by_method(settings: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Sorts METHOD.NAME=VALUE settings by method, as NAME=VALUE."""
    own: dict[str, list[str]] = {}
    for setting in settings:
        method, dot, rest = setting.partition(".")
        if not dot or method not in names:
            raise typer.BadParameter(
                f"{setting!r} must be METHOD.NAME=VALUE, for a method that is compared: {', '.join(names)}",
                param_hint="--set",
            )
        own.setdefault(method, []).append(rest)
    return own


def parse_budgets(text: str) -> list[int]:
    """Budgets in rising order, from "2000" or "500,1000,2000"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise typer.BadParameter(
            f"must be whole numbers of at least 1, as in 500,1000,2000; got {text!r}", param_hint="--budget"
        )
    return sorted({int(part) for part in parts})


def unsteered_run(
    process: GaussianProcess, reward: Callable[..., Any], count: int, seed: int, watch: Watch
) -> Result | None:
    """Unsteered samples from the same starting noises as the run; None if Ctrl-C was pressed."""
    from ..samplers.rollout import rollout

    unsteered = rollout(process, reward, particles=count, key=seed, keep_states=False, on_step=watch)
    return None if unsteered.interrupted else unsteered


def command_line(context: typer.Context) -> str:
    """The command line that makes this run again: flags and options at their defaults are left out."""
    words = ["steer", context.info_name or ""]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if value is not None and value != option.default and not isinstance(value, bool):
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [option.opts[0], str(one)]
    return shlex.join(words)
