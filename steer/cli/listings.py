"""`steer models` and `steer methods`: what there is."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .console import print_json
from .flags import (
    AsJson,
)
from .inputs import (
    find_method,
)


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
