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
    one_prompt,
    open_model,
    open_reward,
    reported_errors,
)


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

    with reported_errors(debug, as_json):
        given = {"prompt": one_prompt(prompt), "call": call or (), "dtype": dtype, "download": download}
        process = open_model(model, steps, label, device, **given)
        score = open_reward(reward, process)
        found = steer.preflight(process, score, samples=samples, temperature=temperature, key=seed)
    if as_json:
        about = {"model": model, "reward": " + ".join(reward), "seed": seed, "steps": steps, "label": label}
        about |= {"prompt": one_prompt(prompt), "call": ", ".join(call) if call else None}
        print_json({"about": about, **found.to_dict()})
    else:
        typer.echo(str(found))
