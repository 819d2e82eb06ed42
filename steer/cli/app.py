"""The command line: `steer generate`, `steer compare`, `steer preflight`, `steer resume`, `steer status`,
`steer export`, `steer report`, `steer models`, `steer methods`, `steer serve-reward`, `steer play`.

Exit codes: 0 done; 1 failed or interrupted at run time; 2 wrong usage. With --json, stdout holds one JSON object and
nothing else; progress and errors go to stderr.
"""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from ..version import __version__
from .compare import compare
from .export import export
from .generate import generate
from .listings import methods, models
from .play import play
from .preflight import preflight
from .saved_runs import report, resume, status
from .serve_reward import serve_reward

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Steers samples of frozen diffusion and flow models by a reward.",
)


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


_EXAMPLES = {
    generate: "steer generate --model digits --reward digit:3 --method smc --budget 4000 --out runs/threes; "
    "steer generate --model ./my-pipeline --prompts prompts.jsonl --reward clip:FILE --budget 2000 --out runs/foxes",
    compare: "steer compare --model digits --reward digit:3 --methods smc,best_of_n --budget 2000 --keys 5 "
    "--out runs/compare",
    resume: "steer resume runs/foxes --workers 2",
    status: "steer status runs/foxes",
    export: "steer export runs/foxes --as parquet --out data/foxes",
    preflight: "steer preflight --model digits --reward digit:3 --samples 16",
    report: "steer report runs/threes",
    models: "steer models --json",
    methods: "steer methods --json",
    serve_reward: "steer serve-reward jpeg:- --port 8000",
    play: "steer play --model digits",
}
for _command, _example in _EXAMPLES.items():
    _name = _command.__name__.replace("_", "-")
    app.command(_name, epilog=f"Example{'s' if '; steer' in _example else ''}: {_example}")(_command)
