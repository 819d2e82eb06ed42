"""Pages of one HTML file each, which need nothing from outside; and numbers as text."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import plain, versions, write_atomically
from .pictures import to_file

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from PIL.Image import Image

    from .pictures import Video

ASSETS = Path(__file__).parent / "assets"
"""Templates, styles and scripts of the pages."""


def write_page(
    template: str,
    directory: Path,
    *,
    title: str,
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
    interrupted: bool = False,
    assets: Sequence[str] = (),
    **values: Any,
) -> Path:
    """Writes report.html: a page that works offline, where no text of the caller's becomes markup.

    Args:
        template: A file of assets/ that extends page.html.j2.
        directory: Where to write; it is made.
        title: Of the page.
        about: Facts for its head, by name; `command` gets a line of its own, None is left out.
        facts: The page's numbers, which it carries as JSON.
        interrupted: Whether the run was stopped early.
        assets: Names of the further styles and scripts that its figures need; it must be readable without scripts.
        values: What the template shows.

    Returns:
        The file's path.
    """
    style = "".join(asset(name) for name in ("page.css", *assets) if name.endswith(".css"))
    script = "".join(asset(name) for name in assets if name.endswith(".js"))
    chips = {**about, "date": datetime.now().strftime("%Y-%m-%d %H:%M")}
    text = render(
        template,
        title=title,
        chips=[(name, _said(fact)) for name, fact in chips.items() if fact is not None and name != "command"],
        command=about.get("command"),
        interrupted=interrupted,
        facts=plain({"about": about, **facts, "versions": versions()}),
        made_with=", ".join(f"{name} {version}" for name, version in versions().items() if version),
        style=trusted(style),
        script=trusted(script),
        policy=_policy(script),
        **values,
    )
    return write_atomically(directory / "report.html", text.encode())


def _said(fact: Any) -> Any:
    """A fact in words: several in a row."""
    return ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else fact


def render(template: str, **values: Any) -> Markup:
    """A template of assets/ with these values, escaped where they are text."""
    return trusted(_templates().get_template(template).render(values))


def trusted(markup: str) -> Markup:
    """Markup that templates take as it is: their own output, files of assets/, and SVG of matplotlib."""
    from markupsafe import Markup

    return Markup(markup)


def asset(name: str) -> str:
    """The text of a file of assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    """The templates. They escape every value that is not Markup, and refuse names they were not given."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "whole": whole, "data_uri": data_uri}
    found.policies["json.dumps_kwargs"] = {"allow_nan": False}  # and in the order given, not sorted
    return found


def _policy(script: str) -> str:
    """What a browser may load or run for the page: pictures within it, its styles, and this script alone."""
    allowed = "'none'"
    if script:
        allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src {allowed}"
    )


def data_uri(picture: Image | Video) -> str:
    """A picture as an address that holds it."""
    suffix, blob = to_file(picture)
    return f"data:image/{suffix[1:]};base64,{base64.b64encode(blob).decode()}"


def number(value: float | None) -> str:
    """A number to three significant digits, with a true minus sign; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def with_error(mean: float | None, error: float | None) -> str:
    """mean ± error, both to the error's second significant digit and at most four decimals."""
    if mean is None or error is None or not error > 0.0 or math.isinf(error):
        return number(mean)
    decimals = min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def whole(value: float) -> str:
    """A number without decimals; a dash for none."""
    return "–" if math.isnan(value) else f"{value:,.0f}"
