"""Every pipeline of diffusers' own test-suite through steer, against the plain pipeline.

    python examples/benchmarks/pipelines_survey.py PATH_TO_DIFFUSERS [--only flux] [--jobs 2]
        [--out survey.json] [--markdown docs/pipelines_survey.md]

PATH_TO_DIFFUSERS is a source tree (its tests/ hold a tiny configuration of every pipeline); the installed diffusers is
what runs. Tokenizers come from `pipelines_stand_ins`, parameters that are entirely zero are made random so that
outputs depend on everything. Of every pipeline class that runs here by itself:

    whole run      from the latents that the plain pipeline drew, its own solver (`steer.own_solver`) ends at the same
                   latents and the same output; so does eta = 0 where the solver is DDIM or Euler. A scheduler that
                   draws noise is exchanged for DDIM or Euler first, in both. Latents that the plain pipeline never
                   uses again, as inpainting pastes over them, count in the output only.
    verify         `steer.verify` over all steps, last step first, and of a row in a batch
    random access  a later level in a batch of three equals the same row alone; just beside a level nearly the same
    gradient       of the output, or else of the predicted clean latents, with respect to noisy latents
    decode         three rows at once, finite, the first as by itself
    two prompts    with a second, longer prompt, `steer.verify` again: every prompt as by itself

Outcomes: works; refused (by a SteerError, at opening or by verify); wrong (differs, and nothing said so); crashed (any
other exception). Every test module runs in a process of its own. An hour of CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

WORKS, REFUSED, WRONG, CRASHED, NOT_RUN = "works", "refused", "WRONG", "CRASHED", "not run here"
PER_CLASS, PER_MODULE = 900, 1800  # seconds
SAME, CLOSE = 1e-4, 2e-3  # relative: the same arithmetic in another batch; the same solver in other arithmetic
BYTE = 1e-2  # of outputs, which some pipelines round to bytes
ROUNDING = 2e-4  # of verify: random decoders enlarge the rounding of float32, to nothing where they run in float64
EULER = ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")
# Schedulers that draw noise, and what has the same levels without: first match of the name.
QUIET = {"FlowMatch": EULER[1], "Euler": EULER[0], "CogVideoX": "CogVideoXDDIMScheduler", "": "DDIMScheduler"}


@dataclass
class Row:
    """What is known of one pipeline class. Differences are relative to the largest value compared."""

    module: str
    pipeline: str
    does: str = ""
    scheduler: str = ""
    outcome: str = WORKS
    why: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    gradient: str = ""
    two_prompts: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Plain:
    """One run of the plain pipeline: latents before and after every step, output and the name of its field."""

    before: list[Tensor]
    after: list[Tensor]
    output: Tensor
    field: str


class Differs(Exception):
    """Something differs in silence."""


def survey_class(tester: type, row: Row) -> None:
    """Fills in a row. Raises what steer or the pipeline raise."""
    import steer

    def stage(name: str) -> None:
        row.why = name

    try:
        pipe, call, steps = dummy(tester)
        # priors, safety and super-resolution stages sit in sub-pipelines of some: those own the schedulers
        row.scheduler = (
            type(getattr(pipe, "scheduler", None)).__name__.removesuffix("Scheduler").replace("NoneType", "")
        )
        plain = run_plain(pipe, call, steps, record=False)
        row.does = f"{given(call)} to {plain.field}"
        again = run_plain(pipe, call, steps, record=False)
        if not bool(plain.output.isfinite().all()):
            raise ValueError("the plain pipeline's output is not finite")
        if not torch.equal(plain.output, again.output):
            raise ValueError("the plain pipeline gives another output for the same generator")
    except Exception as error:
        row.outcome, row.why = NOT_RUN, described(error)
        return
    stage("opening")
    process = opened(pipe, call, steps)
    stage("verify")
    direct = not hasattr(process.denoiser, "call")  # bare UNets, which steer evaluates without the pipeline
    alone = ""
    if not direct:
        try:
            verified = steer.verify(process, steps=process.steps, tolerance=ROUNDING)
        except steer.ModelError as error:
            if "chunk=1" not in str(error):
                raise
            alone = f"with chunk=1: {error}"
            call["chunk"] = 1
            process = opened(pipe, call, steps)
            verified = steer.verify(process, steps=process.steps, tolerance=ROUNDING)
        row.differences["verify"] = max(filter(None, verified[1:]), default=0.0)
    stage("whole run")
    solver, plain = None, run_plain(pipe, call, steps)
    with contextlib.suppress(steer.ModelError):  # noise in its steps, or more than a prediction: another one, below
        solver = None if direct else steer.own_solver(process)
    if solver is None and (name := quiet(row.scheduler)) != row.scheduler:
        try:
            plain, process = with_scheduler(pipe, call, steps, name)
            row.scheduler += f" → {name}"
            solver = None if direct else steer.own_solver(process)
        except Exception:  # no other scheduler fits; verify has compared this pipeline with its own
            plain = None
    if plain is not None:
        whole_runs(row, process, solver, plain)
    stage("random access")
    x = process.prior(steer.Key(5), process.problems or 1, 3)
    with torch.no_grad():
        last = process.steps - 1
        compare(row, "another batch and level", process.denoise(x, last)[:, :1], process.denoise(x[:, :1], last), SAME)
        between_levels(row, process, x)
        stage("decode")
        x0 = process.denoise(x, last)
        compare(row, "decode", process.decode(x0)[::3], process.decode(x0[:, :1]), BYTE)
    stage("gradient")
    row.gradient = gradient(process, x[:, :1])
    stage("two prompts")
    row.two_prompts, refusal = two_prompts(pipe, call, steps)
    stage(
        refusal or alone
        if plain is not None
        else "verified only: its scheduler draws noise, and none without fits its loop"
    )


def two_prompts(pipe: Any, call: dict[str, Any], steps: int) -> tuple[str, str]:
    """The largest difference of two prompts together from each alone, or why there is none; and a refusal's reason.

    Raises Differs where verify finds that a process of two prompts, which opened, is wrong.
    """
    import steer

    for words in (" among a great many other things", "<eos><mask>"):  # the vocabulary of some encoders ends at 8
        second = with_second_prompt(call, words)
        if second is None:
            return "no prompt", ""
        try:
            run_plain(pipe, {name: second_of(value, call[name]) for name, value in second.items()}, steps, record=False)
            break
        except Exception:  # text that has to hold certain words, say
            continue
    else:
        return "no other prompt", ""
    try:
        process = opened(pipe, second, steps)
    except steer.SteerError as error:
        return "refused", f"two prompts: {' '.join(str(error).split())}".replace("|", "/")
    except Exception as error:  # the pipeline's own complaint
        try:
            run_plain(pipe, second, steps, record=False)
        except Exception:
            return "one at a time", f"two prompts: {described(error)}"
        raise
    try:
        verified = steer.verify(process, steps=2, tolerance=ROUNDING)
    except steer.ModelError as error:
        raise Differs(f"{error}") from error
    return f"{max(filter(None, verified[1:]), default=0.0):.0e}", ""


def with_second_prompt(call: dict[str, Any], words: str) -> dict[str, Any] | None:
    """The arguments with a second, longer prompt, and all that is of prompts doubled; None where there are none."""
    from steer.pipelines.families import PER_PROBLEM_ARGUMENTS, PROMPT_ARGUMENTS

    if not any(call.get(name) is not None for name in (*PROMPT_ARGUMENTS, "prompt_embeds")):
        return None
    new = {}
    for name, value in call.items():
        ours = name.startswith(PER_PROBLEM_ARGUMENTS) and not name.startswith("negative_prompt_2")
        if ours and isinstance(value, str) and name in PROMPT_ARGUMENTS:
            new[name] = [value, f"{value}{words}"]
        elif ours and isinstance(value, list) and len(value) == 1:
            entry = value[0]
            new[name] = [entry, f"{entry}{words}" if isinstance(entry, str) else entry[: max(1, len(entry) // 2)]]
        elif ours and torch.is_tensor(value) and value.ndim > 1 and len(value) == 1:
            other = value.flip(-1) if value.is_floating_point() else value.clone()
            if not value.is_floating_point():
                other[:, max(1, value.shape[1] // 2) :] = 0  # a mask, of a shorter prompt
            new[name] = torch.cat([value, other])
        else:
            new[name] = value
    return new


def second_of(value: Any, before: Any) -> Any:
    """What the second of two prompts has of an argument, in the form in which the first was given."""
    if value is before:
        return value
    return value[1:] if torch.is_tensor(value) or isinstance(before, list) else value[1]


def whole_runs(row: Row, process: Any, solver: Any, plain: Plain) -> None:
    """Steer's runs from the plain pipeline's first latents against its last latents and its output."""
    problems = process.problems or 1
    first, final = (x.float().view(problems, -1, *x.shape[1:]) for x in (plain.before[0], plain.after[-1]))
    # Where its next step started from what a step returned: elsewhere the pipeline itself never looks at that.
    used = torch.stack([a == b for a, b in zip(plain.after, plain.before[1:], strict=False)] or [final == final])
    used = used.all(0).view_as(final)
    if torch.equal(first[:, :1].expand_as(first), first):  # a loop that carries every row once per guidance branch
        first, final, used = first[:, :1], final[:, :1], used[:, :1]
    with torch.no_grad():
        if solver is not None:
            x = torch.cat([first[:, :, None], *[torch.zeros_like(first)[:, :, None]] * solver.slots], 2)
            for k in range(solver.steps):
                x = solver.transition(x, solver.denoise(x, k), k).mean
            compare(row, "own solver, latents", x[:, :, 0][used], final[used], SAME)
            compare(row, "own solver, output", flat(solver.decode(x), plain.output), plain.output, SAME)
        if solver is None or row.scheduler.split(" → ")[-1] in (
            "DDIM",
            *(name.removesuffix("Scheduler") for name in EULER),
        ):
            x = first
            for k in range(process.steps):
                x = process.transition(x, process.denoise(x, k), k).mean
            compare(row, "eta = 0, latents", x[used], final[used], CLOSE)
            compare(row, "eta = 0, output", flat(process.decode(x), plain.output), plain.output, CLOSE)


def flat(decoded: Tensor, output: Tensor) -> Tensor:
    """Several images of one state, which are an axis in steer, one after another as the pipeline returns them."""
    return decoded.flatten(0, 1) if decoded.ndim > output.ndim else decoded


def between_levels(row: Row, process: Any, x: Tensor) -> None:
    """A prediction just above the second level against that at the level.

    The unit is how far the first level's prediction is: pipelines that look their level up by the loop's index, and
    not by the timestep, would give that one.
    """
    from steer.pipelines import noise_levels
    from steer.processes import schedules

    if process.steps < 2:
        return
    first, second = process.times[:2]
    near, there = (process.denoiser(x, second + share * (first - second)) for share in (1e-6, 0.0))
    if not hasattr(process.denoiser, "grid"):
        compare(row, "between levels", near, there, CLOSE)
        return
    grid = process.denoiser.grid
    output = process.denoiser.output(x, grid.indices[0])
    other = noise_levels.x0_from_output(output, x, schedules.level(grid.schedule, second), grid.kind, grid.data_std)
    off, unit = float((near - there).abs().max()), float((other - there).abs().max())
    row.differences["between levels"] = off / float(there.abs().max())
    if not off <= 0.05 * unit + 1e-5 * float(there.abs().max()):
        raise Differs(f"between levels: {off / unit:.1e} of the way to the level before")


def gradient(process: Any, x: Tensor) -> str:
    """ "output" or "latents": of what the gradient with respect to noisy latents is finite and not zero."""
    import steer

    problem = "is None"
    for name in ("output", "latents"):
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = process.denoise(leaf, process.steps // 2)
            try:
                value = process.decode(value) if name == "output" else value
                if not value.requires_grad:
                    continue
                weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
                (found,) = torch.autograd.grad((value.float() * weights).sum(), leaf)
            except (RuntimeError, steer.NotDifferentiableError):  # a decoder that edits in place, or by numpy
                if name == "latents":
                    raise
                continue
        if bool(found.isfinite().all()) and bool(found.any()):
            return name
        problem = "is zero" if bool(found.isfinite().all()) else "is not finite"
    return f"none: it {problem}"


def compare(row: Row, name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Notes the largest difference, relative to the largest value. Raises Differs above the tolerance."""
    if ours.shape != theirs.shape:
        raise Differs(f"{name}: shape {tuple(ours.shape)} for {tuple(theirs.shape)}")
    ours, theirs = ours.double(), theirs.double()
    row.differences[name] = float((ours - theirs).abs().max()) / (float(theirs.abs().max()) or 1.0)
    if not row.differences[name] <= tolerance:
        raise Differs(f"{name}: differs by {row.differences[name]:.1e}")


def dummy(tester: type) -> tuple[Any, dict[str, Any], int]:
    """The tests' own pipeline, silent and random everywhere, its call arguments, and a number of steps."""
    test = tester()
    pipe = test.pipeline_class(**test.get_dummy_components())
    by_device = "device" in inspect.signature(test.get_dummy_inputs).parameters
    call = test.get_dummy_inputs("cpu") if by_device else test.get_dummy_inputs()
    generator = torch.Generator().manual_seed(1)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                if bool((parameter == 0).all()):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "scheduler", None) is not None and pipe.scheduler.config.get("thresholding"):
        pipe.scheduler.register_to_config(thresholding=False)  # the cure that steer names
    steps = (
        2 if "SCM" in type(getattr(pipe, "scheduler", None)).__name__ else max(3, call.get("num_inference_steps", 3))
    )
    for name in ("generator", "num_inference_steps", "return_dict", "num_images_per_prompt"):
        call.pop(name, None)
    mask = call.get("mask_image")
    if isinstance(mask, Image.Image) and mask.convert("L").getextrema()[1] < 128:
        mask.paste("white", (0, 0, mask.width // 2, mask.height))  # keeps everything, which leaves nothing to check
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "output_type" in parameters and call.get("output_type") != "latent":
        call["output_type"] = "pt"
    return pipe, call, min(steps, 5)


def run_plain(pipe: Any, call: dict[str, Any], steps: int, record: bool = True) -> Plain:
    """The pipeline as its user runs it, its scheduler's steps recorded or let alone."""
    arguments = {name: value for name, value in call.items() if name != "chunk"}
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" in parameters:
        arguments["num_inference_steps"] = steps
    if "generator" in parameters:
        arguments["generator"] = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    with recorded(pipe.scheduler if record else None) as seen:
        output = pipe(**arguments)
    name, first = next(iter(output.items())) if hasattr(output, "items") else ("tuple", output[0])
    if not torch.is_tensor(first):
        first = torch.stack([torch.as_tensor(part) for part in first])
    return Plain([before for before, _ in seen], [after for _, after in seen], first, name)


@contextlib.contextmanager
def recorded(scheduler: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(latents, next latents) of every step that a scheduler takes inside."""
    seen: list[tuple[Tensor, Tensor]] = []
    step = getattr(scheduler, "step", None)
    if step is None:
        yield seen
        return

    def recording(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        seen.append((sample.clone(), following.clone()))  # copies, as some loops write into their latents
        return result

    scheduler.step = functools.wraps(step)(recording)
    try:
        yield seen
    finally:
        del scheduler.step


def opened(pipe: Any, call: dict[str, Any], steps: int) -> Any:
    import steer

    call = dict(call)
    if call.get("output_type") == "pt":
        del call["output_type"]
    if "generator" in inspect.signature(type(pipe).__call__).parameters and hasattr(pipe, "components"):
        call["generator"] = torch.Generator().manual_seed(0)
    if not unconditional(pipe):
        return steer.from_pipeline(pipe, steps=steps, transition=steer.ddim(eta=0.0), **call)
    kept = {name: value for name, value in call.items() if name == "class_labels"}
    return steer.from_pipeline(pipe, steps=steps, transition=steer.ddim(eta=0.0), **kept)


def unconditional(pipe: Any) -> bool:
    """Whether steer evaluates a bare UNet, which takes none of the pipeline's arguments."""
    from steer.pipelines import unet2d

    return unet2d.is_bare_unet(pipe)


def quiet(scheduler: str) -> str:
    """The scheduler, without the suffix, that takes a noisy one's place."""
    name = next(other for start, other in QUIET.items() if scheduler.startswith(start))
    return name.removesuffix("Scheduler")


def with_scheduler(pipe: Any, call: dict[str, Any], steps: int, name: str) -> tuple[Plain, Any]:
    """The plain run and the process with another scheduler of the same training."""
    import diffusers

    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind.from_config(pipe.scheduler.config)
    for part in filter(None, (pipe, getattr(pipe, "decoder_pipe", None))):  # a combined one, and the loop in it
        part.register_modules(scheduler=scheduler)
    return run_plain(pipe, call, steps), opened(pipe, call, steps)


def given(call: dict[str, Any]) -> str:
    """What the pipeline starts from, in a word."""
    for word, names in {
        "mask": ("mask_image", "mask"),
        "control": ("control_image", "control_images", "control_video", "conditioning_frames"),
        "video": ("video",),
        "image": ("image", "images", "image_embeds", "init_image"),
        "text": ("prompt", "prompt_embeds"),
    }.items():
        if any(call.get(name) is not None for name in names):
            return word
    return "noise" if "class_labels" not in call else "label"


def described(error: BaseException) -> str:
    """One line: the first sentence of an error, with its type where it is not steer's."""
    text = " ".join(str(error).split())
    text = text.replace(os.environ.get("SURVEYED", "\0"), "").replace("|", "/")
    return f"{type(error).__name__}: {text}"[:400]


def survey_module(module: str, sent: Any) -> None:
    """Surveys the classes of one test module, in a process of its own; rows go through a pipe."""
    try:
        found = importlib.import_module(module)
    except BaseException as error:
        sent.send(
            asdict(Row(module.removeprefix("tests.pipelines."), "(module)", outcome=NOT_RUN, why=described(error)))
        )
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {PER_CLASS} s")

    signal.signal(signal.SIGALRM, stop)
    seen: set[type] = set()
    for tester in list(vars(found).values()):
        # Statically: diffusers' placeholders for what is not installed raise whenever they are asked.
        if not inspect.isclass(tester) or tester.__module__ != module:
            continue
        kind, inputs = (inspect.getattr_static(tester, name, None) for name in ("pipeline_class", "get_dummy_inputs"))
        if inputs is None or not inspect.isclass(kind) or kind in seen:
            continue
        seen.add(kind)
        row, start = Row(module.removeprefix("tests.pipelines."), kind.__name__), time.time()
        try:
            signal.alarm(PER_CLASS)
            survey_class(tester, row)
        except Exception as error:
            judge(row, error)
        finally:
            signal.alarm(0)
        row.seconds = round(time.time() - start, 1)
        sent.send(asdict(row))
    sent.close()


def judge(row: Row, error: Exception) -> None:
    """The outcome of a class whose survey ended early, `why` being the stage."""
    import steer

    if isinstance(error, steer.SteerError):
        row.outcome, row.why = REFUSED, f"{row.why}: {' '.join(str(error).split())}".replace("|", "/")
    elif isinstance(error, Differs):
        row.outcome, row.why = WRONG, f"{row.why}: {error}"
    else:
        import traceback

        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        row.outcome, row.why = CRASHED, f"{row.why}: {described(error)} ({where})"


def prepare(source: str) -> None:
    """Makes the source tree's tests importable, offline and silent, and imports what most of them need."""
    import logging

    import pipelines_stand_ins  # after the environment is set, which transformers reads once

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.path.insert(0, source)
    os.environ["SURVEYED"] = source
    pipelines_stand_ins.install()

    for name in ("test_pipelines_common", "stable_diffusion_3.test_pipeline_stable_diffusion_3", "wan.test_wan"):
        importlib.import_module(f"tests.pipelines.{name}")


def run_module(context: Any, module: str) -> list[dict[str, Any]]:
    """The rows of one module, or of as many of its classes as came back in time."""
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=survey_module, args=(module, theirs))
    child.start()
    theirs.close()
    rows, end = [], time.time() + PER_MODULE
    with contextlib.suppress(EOFError):
        while ours.poll(max(0.0, end - time.time())):
            rows.append(ours.recv())
        rows.append(
            asdict(
                Row(
                    module.removeprefix("tests.pipelines."),
                    "(module)",
                    outcome=NOT_RUN,
                    why=f"took more than {PER_MODULE} s",
                )
            )
        )
    child.kill()
    child.join()
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table and its totals."""
    import diffusers

    counts = Counter(row["outcome"] for row in rows)
    ran = [row for row in rows if row["outcome"] != NOT_RUN]
    share = counts[WORKS] / max(1, len(ran))
    lines = [
        "# Pipelines of diffusers, surveyed", "",
        f"Written by `examples/benchmarks/pipelines_survey.py`, whose docstring says what is checked: diffusers "
        f"{diffusers.__version__}, the tiny configurations of its own test suite, on CPU. Differences are relative to "
        "the largest value; 0 means bitwise equal.", "",
        f"{len(rows)} configurations of pipelines were found, and {len(ran)} run here without steer. Of these, "
        f"{counts[WORKS]} work with it ({share:.0%}), {counts[REFUSED]} are refused with an error that gives the "
        f"reason, {counts[WRONG]} give wrong results without an error, and {counts[CRASHED]} crash.", "",
        "| pipeline | does | scheduler | outcome | whole run | rows, levels | two prompts | gradient of | why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(ran, key=lambda row: (row["outcome"] == WORKS, row["pipeline"])):
        found = row["differences"]
        whole = max((value for name, value in found.items() if name.startswith(("own", "eta"))), default=None)
        other = max((value for name, value in found.items() if not name.startswith(("own", "eta"))), default=None)
        cells = [
            row["pipeline"].removesuffix("Pipeline"), row["does"], row["scheduler"], row["outcome"],
            *("" if value is None else "0" if value == 0 else f"{value:.0e}" for value in (whole, other)),
            row.get("two_prompts", ""), row["gradient"], short(row["why"], 200),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Not counted, because the pipeline does not run here without steer:", ""]
    for row in rows:
        if row["outcome"] == NOT_RUN:
            name = row["module"] if row["pipeline"] == "(module)" else row["pipeline"]
            lines.append(f"- {name}: {short(row['why'], 120)}")
    return "\n".join(lines) + "\n"


def short(text: str, length: int) -> str:
    """A reason in one cell, without the parts that every one of its kind shares."""
    shared = "given latents in the form of those that it hands to scheduler.step, it raised "
    text = text.replace(shared, "").replace("<", "&lt;")
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path, metavar="PATH_TO_DIFFUSERS")
    parser.add_argument("--only", default="", help="pattern of test modules; other rows of --out are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
        "DIFFUSERS_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    source = arguments.source.resolve()
    files = sorted(source.glob("tests/pipelines/*/test_*.py"))
    names = [str(path.relative_to(source).with_suffix("")).replace("/", ".") for path in files]
    names = [name for name in names if re.search(arguments.only, name) and "onnx" not in name]
    prepare(str(source))
    context = multiprocessing.get_context("fork")  # what was imported above is not imported again
    rows: list[dict[str, Any]] = []
    if arguments.only and arguments.out and arguments.out.exists():
        again = {name.removeprefix("tests.pipelines.") for name in names}
        rows = [row for row in json.loads(arguments.out.read_text()) if row["module"] not in again]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in as_completed([pool.submit(run_module, context, name) for name in names]):
            rows += done.result()
            for row in done.result():
                print(f"{row['pipeline']:44} {row['outcome']:12} {row['seconds']:6} {row['why'][:150]}", flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(rows, indent=1))
    rows.sort(key=lambda row: (row["module"], row["pipeline"]))
    print(dict(Counter(row["outcome"] for row in rows)))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))


if __name__ == "__main__":
    main()
