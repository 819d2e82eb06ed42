"""`steer generate`: samples of one prompt, or a run directory of many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..files import check_writable
from .console import say
from .flags import (
    AsJson,
    Call,
    Checkpoint,
    Config,
    Debug,
    Device,
    Download,
    DryRun,
    Dtype,
    Force,
    Label,
    Model,
    OnlyFailed,
    Out,
    Prompt,
    Quiet,
    RewardSpec,
    Seed,
    Shard,
    Steps,
    TemperatureOrAuto,
    Workers,
)
from .inputs import (
    command_line,
    device_of,
    find_method,
    own_options,
    reported_errors,
    settings_of,
    unsteered_run,
)
from .many import Making, chosen, generator_of, make_rows, open_directory, read_entries
from .outputs import print_run, write_run
from .progress import Interrupt, Watch
from .subject import Subject


def generate(
    context: typer.Context,
    model: Model,
    reward: RewardSpec,
    out: Out,
    method: Annotated[str, typer.Option(help="auto, smc, best_of_n, ...; an unknown name lists them all.")] = "smc",
    goal: Annotated[str | None, typer.Option(help="Of --method auto: best, population or rollouts.")] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="NFE to spend, never exceeded. Counted in network rows: one sample in a call of the network."
        ),
    ] = None,
    particles: Annotated[
        int | None, typer.Option(min=1, help="Number of samples, in place of a budget; 16 if neither is given.")
    ] = None,
    prompt: Prompt = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="A file of prompts: .txt, .jsonl, .csv or .parquet. Other columns are arguments of the call, or "
            "notes. Writes a run directory that can be resumed and shared.",
        ),
    ] = None,
    call: Call = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="How many pictures to show: 16, and 1 a prompt of a file.")
    ] = None,
    temperature: TemperatureOrAuto = 1.0,
    steps: Steps = None,
    seed: Seed = 0,
    label: Label = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="An option of the method, as often as needed; see `steer methods`."
        ),
    ] = None,
    guided: Annotated[
        float | None, typer.Option(min=0.0, help="Guide proposals by this multiple of the reward's gradient (smc).")
    ] = None,
    reference: Annotated[
        int, typer.Option(min=0, help="Unsteered samples to compare with; not counted in the budget.")
    ] = 64,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    download: Download = False,
    config: Config = None,
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
    """Samples steered by a reward: writes images.png or videos/, result.safetensors, result.json and report.html.

    Ctrl-C (or SIGTERM) stops the run after the current step and writes what is finished; a second stops it at once. A
    run that fails leaves what it had: a result marked interrupted, or the states under way, partial.safetensors.
    """
    if budget is not None and particles is not None:
        raise typer.BadParameter("give --budget or --particles, not both", param_hint="--particles")
    settings = [*(settings or []), *([f"goal={goal}"] if goal else [])]
    many = prompts is not None or len(prompt or ()) > 1
    _refuse_unused(context, many)
    if many:
        options = {"model": model, "call": list(call or ()), "reward": reward, "method": method, "budget": budget}
        options |= {"particles": particles, "temperature": temperature, "seed": seed, "steps": steps, "dtype": dtype}
        options |= {"set": settings, "guided": guided, "n": n or 1}
        with reported_errors(debug, as_json):
            entries = read_entries(prompts, prompt)
            maker = generator_of(options, device_of(device), download=download, checkpoint=checkpoint)
            directory = open_directory(out, options, maker, entries, {"checkpoint": checkpoint} if checkpoint else {})
        how = Making(chosen(force, only_failed), shard, workers, dry_run, as_json, quiet, debug)
        make_rows(maker, directory, how)
        return
    from ..core.loop import keeping

    n, subject = n or 16, Subject.given(model, reward, prompt, call, steps, label, dtype)
    asked = {**subject.facts(), "method": method, "seed": seed, "temperature": temperature}
    with reported_errors(debug, as_json, out, **asked, command=command_line(context)):
        process, score = subject.open(device, download=download)
        sampler = find_method(method)
        options = own_options(sampler, method, n, guided) | settings_of(sampler, method, settings)
        options |= {"budget": budget, "particles": particles, "temperature": temperature, "key": seed}
        rows = budget or (particles or 16) * process.steps * process.rows
        show, unsteered = not (quiet or as_json), None
        check_writable(out)
        with Interrupt() as interrupt:
            with Watch(rows, method, show, interrupt) as watch:
                result = sampler(process, watch.watching(score), **options, **watch.hook(sampler))
            if reference and method != "rollout" and not interrupt.asked:
                with (
                    keeping(result),
                    Watch(reference * process.steps * process.rows, "unsteered", show, interrupt) as watch,
                ):
                    unsteered = unsteered_run(process, score, reference, seed, watch)
        about = {**asked, "steps": process.steps, "guided": guided}
        about |= {"options": ", ".join(settings) if settings else None, "command": command_line(context)}
        shown = min(n, result.reward.shape[1])
        numbers = write_run(result, unsteered, out, shown, subject.title, about, subject.metrics(score))
        print_run(numbers, out, about, as_json, quiet)
    if interrupt.asked:
        what = "the samples so far" if result.interrupted else "the finished run, without unsteered samples,"
        say(f"[yellow]interrupted:[/] {what} written to {escape(str(out))}")
        raise typer.Exit(1)


_OF_MANY = ("workers", "shard", "checkpoint", "only_failed", "force", "dry_run")
_OF_ONE = ("label", "reference")


def _refuse_unused(context: typer.Context, many: bool) -> None:
    """A usage error for options that a run of many prompts has and one of a single prompt has not, or the reverse."""
    for name in _OF_ONE if many else _OF_MANY:
        source = context.get_parameter_source(name)
        if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP") and context.params[name] is not None:
            cure = "give labels as a column of the file" if name == "label" else "leave it out"
            why = f"a run of many prompts has none; {cure}" if many else "it is of runs of many prompts, --prompts FILE"
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")
