"""Files and printed tables of a run or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..report.comparison import Comparison, Comparisons
    from ..results.result import Result

PARTIAL_FACTS = "partial.json"
VIDEOS = "videos"


def write_run(
    result: Result,
    reference: Result | None,
    out: Path,
    n: int,
    title: str,
    about: dict[str, Any],
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Writes the files of a run, and returns its numbers. The result comes first, in case drawing it fails."""
    from ..files import write_atomically
    from ..report.images import grid, is_images, to_png
    from ..report.pictures import is_videos, to_file, to_pictures
    from ..report.run_report import shown, summary, write_report
    from ..results.saving import PARTIAL, save_result

    for stale in ("compare.json", "images.png", PARTIAL, PARTIAL_FACTS):  # of an earlier command
        (out / stale).unlink(missing_ok=True)
    _forget_videos(out)
    index = shown(result, n)
    save_result(result, out, reference=reference, **about, shown=index.tolist())
    chosen = result.take(index)
    if is_images(chosen.decoded):
        write_atomically(out / "images.png", to_png(grid(chosen.decoded, least=96)))
    elif is_videos(chosen.decoded):
        for place, video in enumerate(to_pictures(chosen.decoded)):  # the best first
            suffix, blob = to_file(video)
            write_atomically(out / VIDEOS / f"{place:02d}{suffix}", blob)
    write_report(result, out, reference=reference, metrics=metrics, index=index, title=title, about=about)
    texts = {"texts": chosen.texts} if result.process.text is not None else {}
    return summary(result, reference, metrics) | texts


def write_partial(partial: Any, out: Path, about: dict[str, Any]) -> Path | None:
    """Writes what an error left of a run, and returns the file or directory; None where there is nothing.

    A comparison as compare.json; a Result as any run's; states under way as partial.safetensors, and partial.json.
    """
    from ..core.trajectory import Trajectory
    from ..files import plain, to_json, versions, write_atomically
    from ..report.comparison import Comparison, Comparisons
    from ..results.saving import save_partial

    if isinstance(partial, Comparison | Comparisons):
        facts = {"about": about, **partial.to_dict(), "interrupted": True, "versions": versions()}
        return write_atomically(out / "compare.json", to_json(plain(facts)))
    if isinstance(partial, Trajectory):
        facts = {"about": about, "level": partial.k, "steps": partial.process.steps, "versions": versions()}
        write_atomically(out / PARTIAL_FACTS, to_json(plain(facts)))
    return save_partial(partial, out, **about)


def write_comparison_files(
    comparison: Comparison | Comparisons, out: Path, n: int, title: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Writes the files of a comparison, and returns its numbers. Pictures are of the first seed."""
    from ..files import plain, to_json, versions, write_atomically
    from ..report.comparison_report import sheets, write_comparison
    from ..report.pictures import to_file
    from ..results.saving import FACTS, PARTIAL, TENSORS

    for stale in (FACTS, TENSORS, "images.png", PARTIAL, PARTIAL_FACTS):  # an earlier `steer generate`'s
        (out / stale).unlink(missing_ok=True)
    _forget_videos(out)
    facts = plain({"about": about, **comparison.to_dict(), "versions": versions()})
    write_atomically(out / "compare.json", to_json(facts))
    for name, picture in sheets(comparison, n).items():
        suffix, blob = to_file(picture)
        for stale in (out / name).glob("images.*"):
            stale.unlink()
        write_atomically(out / name / f"images{suffix}", blob)
    write_comparison(comparison, out, count=n, title=f"{title}, methods at equal budget", about=about)
    return {"out": str(out), **facts}


def _forget_videos(out: Path) -> None:
    """Removes the videos of an earlier command."""
    for path in (out / VIDEOS).glob("[0-9]*.webp"):
        path.unlink()


def print_run(numbers: dict[str, Any], out: Path, about: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Prints a run's numbers, as JSON or as a short table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..report.page import number
    from .console import print_json

    if as_json:
        files = sorted(path.name for path in out.iterdir() if path.is_file())
        print_json({"out": str(out), "files": files, "about": about, **numbers})
    elif not quiet:
        lines = Table.grid(padding=(0, 2))
        for name, measured in {"mean reward": numbers["reward"], **numbers["metrics"]}.items():
            before = f"{number(measured['unsteered'])} → " if "unsteered" in measured else ""
            lines.add_row(escape(name), f"{before}[bold]{number(measured['steered'])}[/]")
        apart = numbers["reference_cost"]
        aside = f", and {apart['nfe']:,} for the unsteered samples" if apart else ""
        if numbers["temperature_choice"] is not None:
            chosen = numbers["temperature_choice"]
            lines.add_row("temperature", f"{number(chosen['temperature'])}, chosen for {chosen['asked']}")
        if numbers["method_choice"] is not None:
            lines.add_row("method", escape(numbers["method_choice"]))
        lines.add_row("in short", escape(numbers["verdict"]))
        lines.add_row("NFE", f"{numbers['cost']['nfe']:,} network rows{aside}")
        if "texts" in numbers:
            lines.add_row("samples", escape(", ".join(numbers["texts"])))
        lines.add_row("report", escape(str(out / "report.html")))
        Console(highlight=False).print(lines)


def print_comparison(comparison: Comparison | Comparisons, out: Path) -> None:
    """Prints a comparison: a row for each method, and budget where there are several; the caller's measures apart."""
    from rich.console import Console
    from rich.markup import escape

    from ..report.page import number, whole, with_error

    rows = [(stage.budget, row) for of_method in zip(*(s.rows for s in comparison.at), strict=True)
            for stage, row in zip(comparison.at, of_method, strict=True)]  # fmt: skip
    several = len(comparison.at) > 1
    measured = [
        [with_error(*row.reward), with_error(*row.best), with_error(*row.gain), number(row.ess), whole(row.nfe),
         number(row.seconds)] for _, row in rows
    ]  # fmt: skip
    tables = [(["reward", "best", "over best of n", "ESS", "NFE", "seconds"], measured)]
    for name in rows[0][1].metrics:
        cells = [[with_error(*row.metrics[name]), with_error(*row.of_best[name])] for _, row in rows]
        tables.append(([escape(name), "of the best"], cells))
    for heads, cells in tables:
        heads = ["method", *(["budget"] if several else []), *heads]
        firsts = [[row.method, *([f"{budget:,}"] if several else [])] for budget, row in rows]
        _print_table(heads, [[*first, *line] for first, line in zip(firsts, cells, strict=True)])
    for sentence in comparison.at[-1].remarks:
        Console(highlight=False).print(f"- {escape(sentence)}")
    Console(soft_wrap=True, highlight=False).print(f"report  {escape(str(out / 'report.html'))}")


def _print_table(heads: list[str], rows: list[list[str]]) -> None:
    """Prints a table whose names are whole at every width."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for head in heads:
        table.add_column(head, no_wrap=head in ("method", "budget"), overflow="fold")
    for i, row in enumerate(rows):
        table.add_row("" if i and rows[i - 1][0] == row[0] else row[0], *row[1:])
    console = Console()
    (console if console.is_terminal else Console(width=max(console.width, 120))).print(table)  # a pipe has no width
