"""`steer preflight`: what a model and a reward allow, measured before a run."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import print_json
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
    Prompt,
    RewardSpec,
    Seed,
    Steps,
    Temperature,
)
from .inputs import (
    reported_errors,
)
from .subject import Subject


def preflight(
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
    import steer

    subject = Subject.given(model, reward, prompt, call, steps, label, dtype)
    with reported_errors(debug, as_json):
        process, score = subject.open(device, download=download)
        found = steer.preflight(process, score, samples=samples, temperature=temperature, key=seed)
    if as_json:
        print_json({"about": {**subject.facts(), "seed": seed, "steps": process.steps}, **found.to_dict()})
    else:
        typer.echo(str(found))
