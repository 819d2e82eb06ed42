"""`steer play`: the playground, a page in the browser."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from .console import say
from .flags import (
    Debug,
    Device,
)
from .inputs import (
    device_of,
    reported_errors,
)


def play(
    model: Annotated[
        str,
        typer.Option(help="What the page begins with: an embedded model (`steer models`), a folder, or owner/name."),
    ] = "emoji",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 7860,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 127.0.0.1 is this machine alone; whoever reaches another can open models and "
            "rewards of this machine."
        ),
    ] = "127.0.0.1",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Opens a page that runs methods and shows them at work: samples, genealogy, cost; and the same run as Python.

    Serves until Ctrl-C. The page loads nothing from elsewhere and sends nothing away.
    """
    from ..playground.page import launch

    with reported_errors(debug, as_json=False):
        page = launch(model, host=host, port=port, browser=not no_browser, device=device_of(device))
        typer.echo(page.local_url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("stopped")
        finally:
            page.close()
