"""`steer export`: a finished run of many prompts in the form that another tool reads."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .console import print_json
from .flags import AsJson, Debug, RunFolder
from .inputs import reported_errors


class Form(str, Enum):
    """What an export can be."""

    parquet = "parquet"
    webdataset = "webdataset"
    geneval = "geneval"


def export(
    directory: RunFolder,
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="parquet: one file, pictures included; webdataset: tar shards of 1,000 rows; geneval: a folder for "
            "each prompt, as its evaluate_images.py reads.",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory to write to, new or empty.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Writes the finished rows of a run as parquet, WebDataset shards or GenEval's folders."""
    from ..generation.exports import FORMS
    from ..generation.run_directory import RunDirectory

    with reported_errors(debug, as_json):
        run = RunDirectory(directory)
        written = FORMS[form.value](run, out)
        numbers = {name: len(rows) for name, rows in run.states().items()}
    if as_json:
        print_json({"out": str(out), "files": [str(path.relative_to(out)) for path in written], **numbers})
        return
    left = numbers["failed"] + numbers["missing"]
    typer.echo(f"{numbers['finished']} rows written to {out}" + (f"; {left} are not finished" if left else ""))
