"""Distil the embedded generator `digits-flow` into a twin that needs few steps.

    python examples/train/digits_flow_twin.py [--measure-only]

The twin is the teacher's network, told to predict where the teacher's ODE ends instead of the mean E[x_0 | x_t]: its
velocity at x_t is (x_t - end) / t. Two kinds of states teach it, half of every batch each:

chord   x_t = (1 - t) end + t noise on the straight line from a noise to the end of its own ODE, which is where a
        deterministic sampler with such a network goes (reflow, Liu et al. 2023, 2209.03003);
jump    x_t = (1 - t) x_0 + t fresh noise around a finished sample, and the end of the ODE that starts there, which is
        where a stochastic sampler goes (the consistency function of Song et al. 2023, 2303.01469, by regression on
        solved ODEs).

Chords alone leave a twin that is good without noise and lost with it. All states come from the teacher, no scan is
read but to measure. About ten minutes on one busy CPU core.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.utils import logging
from digits_data import Digits, splits
from digits_generators import NULL_CLASS, build_unet, fit, flow_scheduler
from digits_quality import Metrics, measure
from torch import Tensor
from torch.nn import functional as F

import steer

ROOT = Path(__file__).resolve().parents[2]
TEACHER, TWIN = ROOT / "steer/assets/digits-flow", ROOT / "examples/assets/digits-flow-twin"
NULL_SHARE = 1 / 3
ODE_STEPS = 32
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 128, 5e-4, 0.995
MEASURED = [("teacher", 4), ("teacher", 8), ("teacher", 50), ("twin", 1), ("twin", 2), ("twin", 4), ("twin", 8)]
RULES = {"ODE": steer.ode(), "ancestral": steer.ddim(eta=1.0)}
COLUMNS = ("judge_accuracy", "frechet_conditional", "frechet_unconditional")


class States(NamedTuple):
    """What the twin learns from: states x at times t, (M, 1, 8, 8) and (M, 1, 1, 1), and the ends of their ODEs."""

    x: Tensor
    t: Tensor
    end: Tensor
    labels: Tensor


def pipeline(folder: Path) -> DDPMPipeline:
    """The stored generator, in float32, frozen."""
    logging.disable_progress_bar()
    pipe = DDPMPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipe.unet.float().eval().requires_grad_(False)
    return pipe


def process(folder: Path, steps: int, rule: steer.Rule, labels: int | list[int] | None = None) -> steer.GaussianProcess:
    """A stored generator on a uniform grid. The scheduler's own grid spends its last step on t = .001."""
    made = steer.from_pipeline(pipeline(folder), steps=steps, transition=rule, class_labels=labels)
    return made.with_times(steer.uniform_times(made.schedule, steps))


@torch.no_grad()
def ends(unet: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Where the teacher's ODE takes states x from times t (M, 1, 1, 1), by Euler steps of t / steps."""
    parts = []
    for part, start, classes in zip(x.split(250), t.split(250), labels.split(250), strict=True):
        for k in range(steps):
            now = start * (1.0 - k / steps)
            part = part - start / steps * unet(part, 1000 * now.flatten(), class_labels=classes).sample
        parts.append(part)
    return torch.cat(parts)


def lessons(unet: torch.nn.Module, count: int) -> tuple[States, Tensor]:
    """`count` jumps, and the noises from which the finished samples came, whose chords are drawn during training."""
    labels = torch.where(torch.rand(count) < NULL_SHARE, NULL_CLASS, torch.arange(count) % NULL_CLASS)
    noise, one = torch.randn(count, 1, 8, 8), torch.ones(count, 1, 1, 1)
    clean = ends(unet, noise, one, labels, ODE_STEPS)
    t = torch.rand(count, 1, 1, 1)
    x = (1 - t) * clean + t * torch.randn_like(clean)
    return States(x, t, ends(unet, x, t, labels, ODE_STEPS // 2), labels), torch.stack([noise, clean])


def distil(count: int, steps: int, seed: int) -> UNet2DModel:
    """The exponential moving average of a copy of the teacher, trained with Adam on half chords and half jumps."""
    torch.manual_seed(seed)
    unet = pipeline(TEACHER).unet
    jumps, (noise, clean) = lessons(unet, count)
    unet.train().requires_grad_(True)

    def loss() -> Tensor:
        a, b = torch.randint(count, (2, BATCH_SIZE // 2))
        time_b = torch.rand(len(b), 1, 1, 1)
        x = torch.cat([jumps.x[a], (1 - time_b) * clean[b] + time_b * noise[b]])
        t, labels = torch.cat([jumps.t[a], time_b]), torch.cat([jumps.labels[a], jumps.labels[b]])
        target = torch.cat([(jumps.x[a] - jumps.end[a]) / jumps.t[a], noise[b] - clean[b]])
        return F.mse_loss(unet(x, 1000 * t.flatten(), class_labels=labels).sample, target)

    average = fit(unet, loss, steps, LEARNING_RATE, EMA_DECAY)
    twin = build_unet()
    twin.load_state_dict(average.state_dict())
    return twin


def quality(folder: Path, steps: int, rule: steer.Rule, each: int) -> Metrics:
    """Measures of `each` samples of every class and as many, 10 `each`, of the null class."""

    def sample(labels: list[int] | None, batch: int, particles: int) -> Tensor:
        made = process(folder, steps, rule, labels)
        return steer.rollout(made, unscored, batch=batch, particles=particles, keep_states=False).x.flatten(0, 1)

    def unscored(images: Tensor) -> Tensor:
        return images.new_zeros(len(images))

    labels = torch.arange(10).repeat_interleave(each)
    order = torch.arange(10 * each).view(10, each).T.flatten()  # every part of the samples holds all classes
    conditional = Digits(sample(list(range(10)), 10, each)[order], labels[order])
    return measure(conditional, sample(None, 1, 10 * each), splits())


CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [digits, class-conditional, rectified-flow, distilled]
---

# digits-flow-twin

`digits-flow` (`steer/assets/digits-flow`) distilled into a generator for few steps: same U-Net, classes (0..9, 10 for
any), path x_t = (1 - t) image + t noise and scheduler. The network still answers with a velocity, but
x_t - t velocity is no mean: it is where the teacher's ODE from x_t ends, so a single prediction is a digit. Weights are
stored in float16.

    process = steer.from_pipeline(DDPMPipeline.from_pretrained(folder), steps=5)

Made by

    python examples/train/digits_flow_twin.py --states {states} --steps {steps} --seed {seed}

from {states:,} samples of the teacher ({ode} Euler steps; a third of the null class), their noises, and the ends of
the ODE from as many freshly noised ones. Half of every batch of {batch} lies on the straight line from noise to sample,
half is freshly noised. Adam, {steps} steps, one cycle to {rate}; moving average {decay}.

## Measured

{samples:,} samples of each kind by `examples/train/digits_quality.py` on a uniform grid, seed 0. Judge: share in which
the held-out judge sees the class asked for. Fréchet distances to the train scans in the judge's features: a class asked
for, and the null class. The ODE is Euler's; ancestral is `steer.ddim(eta=1.0)`.

{table}

Samples closer to a train scan than 1 % of held-out scans are: {copies}.

## Limits

For tests and benchmarks of sampling methods. As predictions are no posterior means, the score that they imply is not
that of the noised law: samplers that need a score, and weights that need transition densities of a true reverse SDE,
are not exact on this model. The teacher learned from scans of *Optical Recognition of Handwritten Digits* (Alpaydin and
Kaynak 1998, https://doi.org/10.24432/C50P49, CC BY 4.0).
"""


def card(metrics: dict[str, Metrics], **facts: object) -> str:
    """The model card."""
    lines = ["| generator | steps | rule | judge | Fréchet, class | Fréchet, null class |", "|---|---|---|---|---|---|"]
    for name, found in metrics.items():
        numbers = [f"{found[column]:.3f}" for column in COLUMNS]
        lines.append(f"| {' | '.join([*name.split(', '), *numbers])} |")
    share = "share_closer_than_held_out_1st_percentile"
    copies = ", ".join(f"{metrics[name][share]:.1%} ({name})" for name in ("twin, 4, ODE", "teacher, 50, ODE"))
    return CARD.format(table="\n".join(lines), copies=copies, **facts)


def main() -> None:
    """Distil the twin, store it, measure it beside its teacher and write its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=16000, help="samples of the teacher")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=200, help="samples of every class that are measured")
    parser.add_argument("--out", type=Path, default=TWIN)
    parser.add_argument("--measure-only", action="store_true", help="measure the stored one, do not train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.measure_only:
        began = time.time()
        twin = distil(arguments.states, arguments.steps, arguments.seed)
        print(f"{time.time() - began:.0f} s")
        stored = DDPMPipeline(twin.half(), flow_scheduler())  # pyright: ignore[reportArgumentType]
        stored.save_pretrained(arguments.out, safe_serialization=True)
    folders = {"teacher": TEACHER, "twin": arguments.out}
    metrics = {}
    for rule, (name, steps) in [(rule, row) for rule in RULES for row in MEASURED if rule == "ODE" or row[1] > 1]:
        found = metrics[f"{name}, {steps}, {rule}"] = quality(folders[name], steps, RULES[rule], arguments.each)
        print(name, steps, rule, *(f"{column} {found[column]:.3f}" for column in COLUMNS), flush=True)
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    facts = {"ode": ODE_STEPS, "batch": BATCH_SIZE, "rate": LEARNING_RATE, "decay": EMA_DECAY}
    facts |= {"states": arguments.states, "steps": arguments.steps, "seed": arguments.seed}
    (arguments.out / "README.md").write_text(card(metrics, samples=10 * arguments.each, **facts))


if __name__ == "__main__":
    main()
