"""`steer compare`: several methods at equal budget."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..files import check_writable
from .console import print_json, say
from .flags import (
    AsJson,
    Call,
    Config,
    Debug,
    Device,
    Download,
    Dtype,
    Label,
    Model,
    Out,
    Prompt,
    Quiet,
    RewardSpec,
    Seed,
    Steps,
    Temperature,
)
from .inputs import (
    by_method,
    command_line,
    find_method,
    own_options,
    parse_budgets,
    reported_errors,
    settings_of,
)
from .outputs import print_comparison, write_comparison_files
from .progress import Interrupt, Watch
from .subject import Subject


def compare(
    context: typer.Context,
    model: Model,
    reward: RewardSpec,
    out: Out,
    methods: Annotated[str, typer.Option(help="Names, separated by commas; rollout and best_of_n always run.")] = "smc",
    budget: Annotated[
        str, typer.Option(help="NFE (network rows) of each method and seed, never exceeded; several: 500,1000,2000.")
    ] = "2000",
    keys: Annotated[int, typer.Option(min=1, help="Seeds: independent repeats, for the standard errors.")] = 5,
    n: Annotated[
        int, typer.Option("--n", min=1, help="Pictures to show of each method; best_of_n keeps this many samples.")
    ] = 16,
    prompt: Prompt = None,
    call: Call = None,
    temperature: Temperature = 1.0,
    steps: Steps = None,
    seed: Seed = 0,
    label: Label = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.NAME=VALUE", help="An option of a method, as often as needed."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    download: Download = False,
    config: Config = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Runs several methods at equal budget: compare.json, report.html and an images.png (or .webp) per method.

    Several budgets, --budget 500,1000,2000, give the reward of each method against its NFE.

    Ctrl-C ends the comparison at the last seed that every method has run, and writes that.
    """
    import steer

    names, budgets = [name.strip() for name in methods.split(",") if name.strip()], parse_budgets(budget)
    subject = Subject.given(model, reward, prompt, call, steps, label, dtype)
    asked = {**subject.facts(), "seed": seed}
    with reported_errors(debug, as_json, out, **asked, command=command_line(context)):
        process, score = subject.open(device, download=download)
        everyone = list(dict.fromkeys(["rollout", "best_of_n", *names]))
        options = {name: own_options(find_method(name), name, n, None) for name in everyone}
        for name, own in by_method(settings or [], everyone).items():
            options[name] |= settings_of(find_method(name), name, own)
        total = sum(budgets) * keys * len(everyone)
        check_writable(out)
        with Interrupt() as interrupt, Watch(total, "compare", not (quiet or as_json), interrupt) as watch:
            for name in everyone:
                options[name] |= watch.hook(find_method(name))
            table = steer.compare(
                process,
                watch.watching(score),
                methods=names,
                budget=budgets if len(budgets) > 1 else budgets[0],
                temperature=temperature,
                key=seed,
                keys=keys,
                metrics=subject.metrics(score),
                options=options,
            )
        about = {**asked, "steps": process.steps}
        about |= {"options": ", ".join(settings)} if settings else {}
        about |= {"command": command_line(context)}
        facts = write_comparison_files(table, out, n, subject.title, about)
    if as_json:
        print_json(facts)
    elif not quiet:
        print_comparison(table, out)
    if table.interrupted:
        at = f" at {len(table.at)} of {len(budgets)} budgets" if len(budgets) > 1 else ""
        say(f"[yellow]interrupted:[/] {table.keys} of {keys} seeds{at} written to {escape(str(out))}")
        raise typer.Exit(1)
    if any(stage.failures for stage in table.at):
        raise typer.Exit(1)
