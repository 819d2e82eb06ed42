"""The command line: `steer generate`, `steer compare`, `steer preflight`, `steer resume`, `steer status`,
`steer report`, `steer models`, `steer methods`, `steer serve-reward`.

Exit codes: 0 done; 1 failed or interrupted at run time; 2 wrong usage. With --json, stdout holds one JSON object and
nothing else; progress and errors go to stderr.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files import check_writable
from ..version import __version__
from .console import print_json, say
from .flags import (
    AsJson,
    Call,
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
    Shown,
    Steps,
    Temperature,
    Workers,
)
from .inputs import (
    by_method,
    command_line,
    device_of,
    find_method,
    metrics_of,
    open_model,
    open_reward,
    own_options,
    parse_budgets,
    reported_errors,
    rewards_by_name,
    settings_of,
    unsteered_run,
)
from .many import Which, counted, finish, generator_of, open_directory, read_entries, run_many
from .outputs import print_comparison, print_run, write_comparison_files, write_run
from .progress import Interrupt, Watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Steers samples of frozen diffusion and flow models by a reward.",
)


def _only(prompts: list[str] | None) -> str | None:
    if len(prompts or ()) > 1:
        raise typer.BadParameter("one prompt at a time here; several make a run directory", param_hint="--prompt")
    return prompts[0] if prompts else None


def main() -> None:
    """Runs the command line. SIGTERM is Ctrl-C: what was paid for is written before the end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Steers samples of frozen diffusion and flow models by a reward."""


@app.command(
    epilog="Examples: steer generate --model digits --reward digit:3 --method smc --budget 4000 --out runs/threes; "
    "steer generate --model ./my-pipeline --prompts prompts.jsonl --reward clip:FILE --budget 2000 --out runs/foxes"
)
def generate(
    context: typer.Context,
    model: Model,
    reward: RewardSpec,
    out: Out,
    method: Annotated[str, typer.Option(help="smc, best_of_n, ...; an unknown name lists them all.")] = "smc",
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
    temperature: Temperature = 1.0,
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
    only_failed: OnlyFailed = False,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Samples steered by a reward: writes images.png, result.safetensors, result.json and report.html.

    Ctrl-C (or SIGTERM) stops the run after the current step and writes what is finished; a second stops it at once. A
    run that fails leaves what it had: a result marked interrupted, or the states under way, partial.safetensors.
    """
    if budget is not None and particles is not None:
        raise typer.BadParameter("give --budget or --particles, not both", param_hint="--particles")
    if prompts is not None or len(prompt or ()) > 1:
        options = {"model": model, "call": list(call or ()), "reward": reward, "method": method, "budget": budget}
        options |= {"particles": particles, "temperature": temperature, "seed": seed, "steps": steps, "dtype": dtype}
        options |= {"set": list(settings or ()), "guided": guided, "n": n or 1}
        with reported_errors(debug, as_json):
            entries = read_entries(prompts, prompt)
            maker = generator_of(options, device_of(device), download=download)
            directory = open_directory(out, options, maker, entries)
            which: Which = "all" if force else "failed" if only_failed else "missing"
            found = run_many(
                maker,
                directory,
                which=which,
                shard=shard,
                workers=workers,
                dry_run=dry_run,
                show=not (quiet or as_json),
            )
        finish(directory, found, as_json, quiet or dry_run)
        return
    n, rewarded = n or 16, " + ".join(reward)
    asked = {"model": model, "reward": rewarded, "method": method, "seed": seed, "temperature": temperature}
    asked |= {"prompt": _only(prompt), "call": ", ".join(call) if call else None}
    from ..core.loop import keeping

    with reported_errors(debug, as_json, out, **asked, command=command_line(context)):
        given = {"prompt": _only(prompt), "call": call or (), "dtype": dtype, "download": download}
        process = open_model(model, steps, label, device, **given)
        score = open_reward(reward, process)
        sampler = find_method(method)
        options = own_options(sampler, method, n, guided) | settings_of(sampler, method, settings or [])
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
        about = {**asked, "steps": process.steps, "label": label, "guided": guided}
        about |= {"options": ", ".join(settings) if settings else None, "command": command_line(context)}
        numbers = write_run(result, unsteered, out, min(n, result.reward.shape[1]), about, metrics_of(rewarded, score))
        print_run(numbers, out, about, as_json, quiet)
    if interrupt.asked:
        what = "the samples so far" if result.interrupted else "the finished run, without unsteered samples,"
        say(f"[yellow]interrupted:[/] {what} written to {escape(str(out))}")
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
    """Runs several methods at equal budget: compare.json, report.html and an images.png per method.

    Several budgets, --budget 500,1000,2000, give the reward of each method against its NFE.

    Ctrl-C ends the comparison at the last seed that every method has run, and writes that.
    """
    import steer

    names, budgets = [name.strip() for name in methods.split(",") if name.strip()], parse_budgets(budget)
    rewarded, asked = " + ".join(reward), {"prompt": _only(prompt), "call": ", ".join(call) if call else None}
    asked = {"model": model, "reward": rewarded, "seed": seed, **asked}
    with reported_errors(debug, as_json, out, **asked, command=command_line(context)):
        given = {"prompt": _only(prompt), "call": call or (), "dtype": dtype, "download": download}
        process = open_model(model, steps, label, device, **given)
        score = open_reward(reward, process)
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
                metrics=metrics_of(rewarded, score),
                options=options,
            )
        about = {**asked, "steps": process.steps, "label": label}
        about |= {"options": ", ".join(settings)} if settings else {}
        facts = write_comparison_files(table, out, n, {**about, "command": command_line(context)})
    if as_json:
        print_json(facts)
    elif not quiet:
        print_comparison(table, out)
    if table.interrupted:
        at = f" at {len(table.at)} of {len(budgets)} budgets" if len(budgets) > 1 else ""
        say(f"[yellow]interrupted:[/] {table.keys} of {keys} seeds{at} written to {escape(str(out))}")
        raise typer.Exit(1)


@app.command(epilog="Example: steer resume runs/foxes --workers 2")
def resume(
    directory: Annotated[Path, typer.Argument(file_okay=False, help="A run directory of `steer generate --prompts`.")],
    device: Device = "auto",
    download: Download = False,
    workers: Workers = None,
    shard: Shard = None,
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
        maker = generator_of(run.options, device_of(device), download=download)
        which: Which = "all" if force else "failed" if only_failed else "missing"
        show = not (quiet or as_json)
        found = run_many(maker, run, which=which, shard=shard, workers=workers, dry_run=dry_run, show=show)
    finish(run, found, as_json, quiet or dry_run)


@app.command(epilog="Example: steer status runs/foxes")
def status(
    directory: Annotated[Path, typer.Argument(file_okay=False, help="A run directory of `steer generate --prompts`.")],
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
    typer.echo(counted(numbers))
    for index, error in list(errors.items())[:10]:
        typer.echo(f"row {index}: {error['type']}: {error['message']}")


@app.command("preflight", epilog="Example: steer preflight --model digits --reward digit:3 --samples 16")
def preflight_(
    model: Model,
    reward: RewardSpec,
    samples: Annotated[int, typer.Option(min=4, help="Unsteered samples to measure; 4 rank coarsely.")] = 4,
    prompt: Prompt = None,
    call: Call = None,
    temperature: Temperature = 1.0,
    steps: Steps = None,
    seed: Seed = 0,
    label: Label = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    download: Download = False,
    config: Config = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measures before a run: whether seeds matter, how early predictions rank samples, the gradient, seconds per call.

    Prints the measurements, and the method and budget that it recommends.
    """
    from ..evaluation.preflight import preflight

    with reported_errors(debug, as_json):
        given = {"prompt": _only(prompt), "call": call or (), "dtype": dtype, "download": download}
        process = open_model(model, steps, label, device, **given)
        score = open_reward(reward, process)
        found = preflight(process, score, samples=samples, temperature=temperature, key=seed)
    if as_json:
        about = {"model": model, "reward": " + ".join(reward), "seed": seed, "steps": steps, "label": label}
        about |= {"prompt": _only(prompt), "call": ", ".join(call) if call else None}
        print_json({"about": about, **found.to_dict()})
    else:
        typer.echo(str(found))


@app.command(epilog="Example: steer report runs/threes")
def report(
    directory: Annotated[Path, typer.Argument(file_okay=False, help="A directory that `steer generate` wrote.")],
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
        saved = load_run(directory)
        about = {name: fact for name, fact in saved.facts["run"].items() if name != "shown"}
        if "model" not in about or "reward" not in about:
            raise typer.BadParameter(
                f"{directory} names no model and reward, so it was saved from Python; load it there with "
                "Saved.result(process), and write the page with its .report(...)"
            )
        out = out or directory
        given = {
            "prompt": about.get("prompt"),
            "call": (about.get("call") or "").split(", ") if about.get("call") else (),
        }
        process = open_model(about["model"], saved.facts["process"]["steps"], about.get("label"), device, **given)
        result, metrics = saved.result(process), metrics_of(about["reward"], open_reward(about["reward"], process))
        index = shown(result, min(n, result.reward.shape[1]))
        title = f"{about['reward']} on {about['model']}"
        path = write_report(
            result,
            out,
            reference=saved.reference(process),
            metrics=metrics,
            index=index,
            title=title,
            about=about,
        )
    say(f"report  {escape(str(path))}")


@app.command(epilog="Example: steer models --json")
def models(as_json: AsJson = False) -> None:
    """Lists the pretrained models that ship with steer, with size, measured quality and licence."""
    from ..models.catalogue import embedded

    found = embedded()
    if as_json:
        print_json({"models": found})
        return
    table = Table("name", "kind", "parameters", "measured", "licence", box=None, header_style="bold")
    for card in found:
        table.add_row(card["name"], card["kind"], f"{card['parameters']:,}", card["measured"], card["licence"])
    Console().print(table)


@app.command(epilog="Example: steer methods --json")
def methods(as_json: AsJson = False) -> None:
    """Lists the methods and the options that `--set NAME=VALUE` can set."""
    from ..evaluation.methods import methods as names
    from .options import listed

    found = [listed(name, find_method(name)) for name in names()]
    if as_json:
        print_json({"methods": found})
        return
    table = Table("name", "returns", "--set", box=None, header_style="bold", show_lines=False)
    for entry in found:
        own = ", ".join(f"{name}={default}" for name, default in entry["options"].items())
        table.add_row(entry["name"], escape(entry["returns"]), escape(own))
    Console().print(table)


@app.command("serve-reward", epilog="Example: steer serve-reward jpeg:- --port 8000")
def serve_reward(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC...", help="Reward to serve: digit:3, clip, jpeg, ...; several as NAME=SPEC."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on, of IPv4 or IPv6. 127.0.0.1 and ::1 are this machine alone.")
    ] = "127.0.0.1",
    token_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable that holds the token clients must send; default: one made up, printed."
        ),
    ] = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Serve without a token, on this machine alone.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Requests held at once; more are rejected, to be retried.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Concurrent calls of the rewards.")] = 1,
    memory: Annotated[int, typer.Option(min=1, help="MiB that all requests hold together.")] = 1024,
    debug: Debug = False,
) -> None:
    """Serves rewards over HTTP, for --reward remote:URL and rewards.Remote, until Ctrl-C.

    Prints each reward's address, and the token. Clients on the command line send the token in STEER_REWARD_TOKEN.
    """
    from .. import rewards
    from ..errors import RewardError

    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise typer.BadParameter(f"the environment variable {token_env} is not set", param_hint="--token-env")
    if token and no_token:
        raise typer.BadParameter("give --token-env or --no-token, not both", param_hint="--no-token")
    with reported_errors(debug, as_json=False):
        served = rewards_by_name(specs)
        try:
            server = rewards.serve(
                served if len(served) > 1 else next(iter(served.values())),
                host=host,
                port=port,
                token=False if no_token else token,
                queue=queue,
                threads=threads,
                memory=memory << 20,
            )
        except RewardError as error:
            raise typer.BadParameter(str(error), param_hint="--host") from error
    with server:
        for name in served:
            typer.echo(f"{server.url}/{name}" if len(served) > 1 else server.url)
        if token is None and server.token:
            typer.echo(f"STEER_REWARD_TOKEN={server.token}")
        try:
            server.wait()
        except KeyboardInterrupt:
            say("stopped")
