"""The command line: `steer generate`, `steer compare`, `steer models`.

Exit codes: 0 done; 1 failed or interrupted at run time; 2 wrong usage. With --json, stdout holds one JSON object and
nothing else; progress and errors go to stderr.
"""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .progress import Interrupt, Watch

if TYPE_CHECKING:
    from .process import GaussianProcess
    from .result import Result
    from .sample import Comparison

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Samples of frozen diffusion and flow models that follow a reward.",
)

Model = Annotated[str, typer.Option(help="An embedded model; `steer models` lists them.")]
RewardSpec = Annotated[str, typer.Option("--reward", help="What to follow: digit:3, digit:even, ink:-1, jpeg, ...")]
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
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps per sample.")]
Seed = Annotated[int, typer.Option(help="Names all noise of the run: same seed, same samples.")]
Label = Annotated[int | None, typer.Option(help="Condition a class-conditional model on this class; default: none.")]
Shown = Annotated[int, typer.Option("--n", min=1, help="How many pictures to show.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Runs the command line."""
    app()


@app.command(
    epilog="Example: steer generate --model digits --reward digit:3 --method smc --budget 4000 --n 16 --seed 0 "
    "--out runs/threes"
)
def generate(
    context: typer.Context,
    model: Model,
    reward: RewardSpec,
    out: Out,
    method: Annotated[str, typer.Option(help="smc, best_of_n, ...; an unknown name lists them all.")] = "smc",
    budget: Annotated[int | None, typer.Option(min=1, help="Network rows to spend, never exceeded.")] = None,
    particles: Annotated[int | None, typer.Option(min=1, help="Instead of a budget; 16 without either.")] = None,
    n: Shown = 16,
    temperature: Temperature = 1.0,
    steps: Steps = 50,
    seed: Seed = 0,
    label: Label = None,
    guided: Annotated[
        float | None, typer.Option(min=0.0, help="Guide proposals by this multiple of the reward's gradient (smc).")
    ] = None,
    reference: Annotated[int, typer.Option(min=0, help="Unsteered samples to compare with, at a cost apart.")] = 64,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Makes samples that follow a reward: images.png, result.safetensors, result.json and report.html.

    Ctrl-C ends the run after the step in progress and writes what was paid for; a second Ctrl-C does not wait.
    """
    if budget is not None and particles is not None:
        raise typer.BadParameter("give --budget or --particles, not both", param_hint="--particles")
    with _errors(debug, as_json):
        process, score = _process(model, steps, label, device), _reward(reward)
        sampler = _method(method)
        options = _options(sampler, method, n, guided)
        options |= {"budget": budget, "particles": particles, "temperature": temperature, "key": seed}
        rows = budget or (particles or 16) * process.steps * process.rows
        show, unsteered = not (quiet or as_json), None
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written should fail before it is paid for
        with Interrupt() as interrupt:
            with Watch(rows, method, show, interrupt) as watch:
                result = sampler(process, watch.watching(score), **options, **watch.hook(sampler))
            if reference and method != "rollout" and not interrupt.asked:
                with Watch(reference * process.steps * process.rows, "unsteered", show, interrupt) as watch:
                    unsteered = _reference(process, score, reference, seed, watch)
        about = {"model": model, "reward": reward, "method": method, "seed": seed, "steps": steps, "label": label}
        about |= {"temperature": temperature, "guided": guided, "command": _command(context)}
        numbers = _write(result, unsteered, out, min(n, result.reward.shape[1]), about, _metrics(reward, score))
        _print_run(numbers, out, about, as_json, quiet)
    if interrupt.asked:
        what = "what was paid for" if result.interrupted else "the finished run, without all of its report,"
        _say(f"[yellow]interrupted:[/] {what} is in {escape(str(out))}")
        raise typer.Exit(1)


@app.command(
    epilog="Example: steer compare --model digits --reward digit:3 --methods smc,best_of_n --budget 2000 --keys 5 "
    "--out runs/compare"
)
def compare(
    context: typer.Context,
    model: Model,
    reward: RewardSpec,
    out: Out,
    methods: Annotated[str, typer.Option(help="Names, separated by commas; rollout and best_of_n always run.")] = "smc",
    budget: Annotated[int, typer.Option(min=1, help="Network rows for each method and key, never exceeded.")] = 2000,
    keys: Annotated[int, typer.Option(min=1, help="Independent repeats; their spread is the standard error.")] = 5,
    n: Annotated[int, typer.Option("--n", min=1, help="Pictures per method; best_of_n keeps this many.")] = 16,
    temperature: Temperature = 1.0,
    steps: Steps = 50,
    seed: Seed = 0,
    label: Label = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Runs several methods at equal budget: compare.json, report.html and an images.png per method.

    Ctrl-C ends the comparison at the last key that every method has run, and writes that.
    """
    import steer

    names = [name.strip() for name in methods.split(",") if name.strip()]
    with _errors(debug, as_json):
        process, score = _process(model, steps, label, device), _reward(reward)
        everyone = list(dict.fromkeys(["rollout", "best_of_n", *names]))
        options = {name: _options(_method(name), name, n, None) for name in everyone}
        total = budget * keys * len(everyone)
        out.mkdir(parents=True, exist_ok=True)
        with Interrupt() as interrupt, Watch(total, "compare", not (quiet or as_json), interrupt) as watch:
            for name in everyone:
                options[name] |= watch.hook(_method(name))
            table = steer.compare(
                process, watch.watching(score), methods=names, budget=budget, temperature=temperature, key=seed,
                keys=keys, metrics=_metrics(reward, score), options=options,
            )  # fmt: skip
        about = {"model": model, "reward": reward, "seed": seed, "steps": steps, "label": label}
        facts = _write_comparison(table, out, n, {**about, "command": _command(context)})
    if as_json:
        typer.echo(json.dumps(facts))
    elif not quiet:
        _print_comparison(table, out)
    if table.interrupted:
        _say(f"[yellow]interrupted:[/] {table.keys} of {keys} keys are in {escape(str(out))}")
        raise typer.Exit(1)


@app.command(epilog="Example: steer models --json")
def models(as_json: AsJson = False) -> None:
    """Lists the pretrained models that ship with steer: what they are, how good, under which licence."""
    from .catalogue import embedded

    found = embedded()
    if as_json:
        typer.echo(json.dumps({"models": found}))
        return
    table = Table("name", "kind", "parameters", "measured", "licence", box=None, header_style="bold")
    for card in found:
        table.add_row(card["name"], card["kind"], f"{card['parameters']:,}", card["measured"], card["licence"])
    Console().print(table)


@contextmanager
def _errors(debug: bool, as_json: bool) -> Iterator[None]:
    """Errors of the run as one line, and exit code 1."""
    from .errors import SteerError
    from .types import Stop

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
        _say(f"[bold red]error:[/] [red]{escape(message)}[/]")
        raise typer.Exit(1) from None


def _say(markup: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(markup)


def _process(model: str, steps: int, label: int | None, device: str) -> GaussianProcess:
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


def _reward(spec: str) -> Callable[..., Any]:
    from rewards import from_spec

    from .errors import SteerError

    try:
        return from_spec(spec)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--reward") from error


def _method(name: str) -> Callable[..., Any]:
    from .errors import SteerError
    from .sample import resolve

    try:
        return resolve(name)
    except SteerError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from error


def _metrics(spec: str, reward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The held-out judge of a reward, where there is one."""
    from rewards.classifier import DigitLogProb, judge

    if not isinstance(reward, DigitLogProb):
        return {}
    return {f"held-out judge p({spec.partition(':')[2]})": judge(reward.label)}


def _options(sampler: Callable[..., Any], name: str, n: int, guided: float | None) -> dict[str, Any]:
    import steer

    accepted, options = inspect.signature(sampler).parameters, {}
    if "keep" in accepted:
        options["keep"] = n
    if guided is not None:
        if "proposal" not in accepted:
            raise typer.BadParameter(f"{name} has no proposal to guide; use --method smc", param_hint="--guided")
        options["proposal"] = steer.guided(guided)
    return options


def _reference(
    process: GaussianProcess, reward: Callable[..., Any], count: int, seed: int, watch: Watch
) -> Result | None:
    """Unsteered samples from the run's own noise, slot by slot; None where Ctrl-C was pressed."""
    from .rollout import rollout

    unsteered = rollout(process, reward, particles=count, key=seed, keep_states=False, on_step=watch)
    return None if unsteered.interrupted else unsteered


def _write(
    result: Result, reference: Result | None, out: Path, n: int, about: dict[str, Any], metrics: dict[str, Any]
) -> dict[str, Any]:
    """The run's files, and its numbers. What was paid for comes first: the result, then pictures of it."""
    from .images import grid, is_images, to_png
    from .report import shown, summary, write_report
    from .saving import save_result, write_atomically

    index = shown(result, n)
    save_result(result, out, reference=reference, **about, shown=index.tolist())
    chosen = result.take(index)
    if is_images(chosen.decoded):
        write_atomically(out / "images.png", to_png(grid(chosen.decoded, least=96)))
    title = f"{about['reward']} on {about['model']}"
    write_report(result, out, reference=reference, metrics=metrics, index=index, title=title, about=about)
    return summary(result, reference, metrics)


def _write_comparison(comparison: Comparison, out: Path, n: int, about: dict[str, Any]) -> dict[str, Any]:
    from .images import grid, is_images, to_png
    from .report import shown, write_comparison
    from .saving import plain, to_json, versions, write_atomically

    facts = plain({"about": about, **comparison.to_dict(), "versions": versions()})
    write_atomically(out / "compare.json", to_json(facts))
    pictures = {}
    for name, (first, *_) in comparison.results.items():
        chosen = first.take(shown(first, min(n, first.reward.shape[1])))
        if is_images(chosen.decoded):
            pictures[name] = grid(chosen.decoded, least=96)
            write_atomically(out / name / "images.png", to_png(pictures[name]))
    title = f"{about['reward']} on {about['model']}, methods at equal budget"
    write_comparison(comparison, out, pictures=pictures, title=title, about=about)
    return {"out": str(out), **facts}


def _print_run(numbers: dict[str, Any], out: Path, about: dict[str, Any], as_json: bool, quiet: bool) -> None:
    from .page import number

    if as_json:
        files = sorted(path.name for path in out.iterdir() if path.is_file())
        typer.echo(json.dumps({"out": str(out), "files": files, "about": about, **numbers}))
    elif not quiet:
        lines = Table.grid(padding=(0, 2))
        for name, measured in {"mean reward": numbers["reward"], **numbers["metrics"]}.items():
            before = f"{number(measured['unsteered'])} → " if "unsteered" in measured else ""
            lines.add_row(escape(name), f"{before}[bold]{number(measured['steered'])}[/]")
        apart = numbers["reference_cost"]
        aside = f", and {apart['nfe']:,} for the unsteered samples" if apart else ""
        lines.add_row("network rows", f"{numbers['cost']['nfe']:,}{aside}")
        lines.add_row("report", escape(str(out / "report.html")))
        Console(highlight=False).print(lines)


def _print_comparison(comparison: Comparison, out: Path) -> None:
    from .page import number, with_error

    names = list(comparison.rows[0].metrics)
    heads = ["method", "reward", "best", *map(escape, names), "ess", "rows", "seconds"]
    table = Table(*heads, box=None, header_style="bold")
    for row in comparison.rows:
        measured = (row.reward, row.best, *(row.metrics[name] for name in names))
        cells = (with_error(mean, error) for mean, error in measured)
        table.add_row(row.method, *cells, number(row.ess), f"{row.nfe:,.0f}", f"{row.seconds:.2f}")
    Console().print(table)
    Console(soft_wrap=True, highlight=False).print(f"report  {escape(str(out / 'report.html'))}")


def _command(context: typer.Context) -> str:
    """The command line of this run, without flags and options left at their defaults."""
    words = ["steer", context.info_name or ""]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if value is not None and value != option.default and not isinstance(value, bool):
            words += [option.opts[0], str(value)]
    return shlex.join(words)
