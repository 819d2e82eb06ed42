"""What the command line prints: JSON on stdout, messages on stderr."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console


def print_json(value: Any) -> None:
    """Prints a value on stdout as one line of strict JSON: NaN and infinities, which JSON lacks, as null."""
    from ..files import to_json

    typer.echo(to_json(value, indent=None).decode(), nl=False)


def say(markup: str) -> None:
    """Prints rich markup on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(markup)
