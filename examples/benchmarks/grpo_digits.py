"""GRPO on digits-flow by collector, at equal network rows of rollouts: windows, branching and steering compared.

    python examples/benchmarks/grpo_digits.py [--keys 5] [--rows 23040] [--arms plain mixed] [--json F] [--figure F]
    python examples/benchmarks/grpo_digits.py --curves F --figure docs/grpo.png

The policy learns "draw a 3" from a classifier's probability; the judge has another architecture and other data and is
never trained on; diversity is the mean distance of pairs of images. Samples for these are the ODE's, from the same 200
noises every time. Arms differ by their batches alone (about 960 rows of rollouts an update); optimizer, rate and clip
are shared. Rows of the update's own passes are not counted in "rows", but time has them: seconds of one thread, wall
time on a core that nobody else uses.

plain:     4 groups of 24, all steps but the last stochastic.
mixed:     the same with two stochastic steps from a random start in the first half, the ODE elsewhere.
branching: 22 trees of 16 leaves (splits at 0, 3, 6, 9: 43 rows a tree), depth-wise advantages.
steered:   4 groups of 24 from steer.smc, weighted back to the policy; a refused batch (ESS) is drawn again at 1.5 times
           the temperature, and paid for.
unweighted: the same populations treated as if the policy had drawn them, which is biased.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

import steer
from steer import grpo, rewards

DIGIT, STEPS, TEMPERATURE = 3, 10, 0.35
REWARD, JUDGE = rewards.DigitProb(DIGIT, "digits-classifier"), rewards.judge(DIGIT)
ARMS = ("plain", "mixed", "branching", "steered", "unweighted")


def collected(arm: str, policy: steer.GaussianProcess, key: steer.Key) -> tuple[grpo.RolloutBatch, torch.Tensor, float]:
    """A batch, its advantages, and the network rows it took."""
    if arm == "branching":
        batch = grpo.branch(policy, REWARD, groups=22, splits=(0, 3, 6, 9), key=key)
        return batch, grpo.depth_advantages(batch).value, batch.cost["nfe"] * batch.rows
    if arm in ("plain", "mixed"):
        window = grpo.every(0.99) if arm == "plain" else grpo.first_half(2)
        batch = grpo.collect(policy, REWARD, groups=4, group_size=24, window=window, key=key)
        return batch, grpo.advantages(batch).value, batch.cost["nfe"] * batch.rows
    temperature, spent = TEMPERATURE, 0.0
    while True:
        try:
            batch = grpo.collect(
                policy, REWARD, groups=4, group_size=24, window=grpo.every(0.99), key=key, method=steer.smc,
                temperature=temperature, objective="policy_gradient" if arm == "steered" else "tilted_sft",
            )  # fmt: skip
            break
        except steer.SteerError as error:
            if error.partial is None:
                raise
            spent, temperature = spent + error.partial.cost.nfe, 1.5 * temperature
    spent += batch.cost["nfe"] * batch.rows
    if arm == "unweighted":
        batch = replace(batch, log_w_base=torch.zeros_like(batch.log_w_base))
    return batch, grpo.advantages(batch).value, spent


def updated(policy, batch, advantage, optimizer, clip: float = 1e-3) -> None:
    """One step of the optimizer on all levels of a batch."""
    weight, steps = batch.weights(), grpo.by_level(batch, distinct=batch.method == "branch")
    optimizer.zero_grad()
    for step in steps:
        new = grpo.log_prob(policy, batch, step, reduction="mean").log_prob
        loss = grpo.clipped_loss(
            new, step.of(batch.logp("mean")), step.of(advantage), clip=clip, weight=step.of(weight), mask=step.valid
        )
        (loss / len(steps)).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def measured(process: steer.GaussianProcess) -> dict[str, float]:
    """Reward, judge and diversity of the ODE's samples from 200 noises."""
    result = steer.rollout(process.with_rule(steer.ode()), REWARD, particles=200, key=99, keep_states=False)
    images = result.decoded
    pairs = torch.pdist(images.flatten(1))
    return {
        "reward": float(result.reward.mean()),
        "judge": float(JUDGE(images).mean()),
        "diversity": float(pairs.mean()),
    }


def run(arm: str, key: int, rows: int, rate: float, every: int) -> list[dict[str, Any]]:
    """The curve of one arm and key: a point each time `every` rows were spent."""
    pipe = DDPMPipeline.from_pretrained(str(files("steer") / "assets" / "digits-flow"), local_files_only=True)
    policy = steer.from_pipeline(pipe, steps=STEPS, transition=steer.flow_sde(0.7))
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=rate, weight_decay=1e-4)
    curve, spent, updates, seconds, drawn = [], 0.0, 0, 0.0, 0.0
    while True:
        if spent >= len(curve) * every:
            curve.append(
                {"rows": spent, "updates": updates, "seconds": seconds, "collecting": drawn, **measured(policy)}
            )
        if spent >= rows:
            return curve
        began = time.process_time()
        batch, advantage, cost = collected(arm, policy, steer.Key(key).fold(updates))
        drawn += time.process_time() - began
        updated(policy, batch, advantage, optimizer)
        spent, updates, seconds = spent + cost, updates + 1, seconds + time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--rows", type=int, default=23_040, help="network rows of rollouts for each arm and key")
    parser.add_argument("--every", type=int, default=3_840, help="rows between two points of a curve")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--curves", type=Path, help="JSON of an earlier run to draw, in place of a run")
    options = parser.parse_args()
    curves: list[dict[str, Any]] = json.loads(options.curves.read_text()) if options.curves else []
    for key in range(0 if options.curves else options.keys):
        for arm in options.arms:
            curve = run(arm, key, options.rows, options.rate, options.every)
            curves.append({"arm": arm, "key": key, "rate": options.rate, "points": curve})
            last = curve[-1]
            print(
                f"{arm:10s} key {key}  reward {last['reward']:.3f}  judge {last['judge']:.3f}  diversity "
                f"{last['diversity']:.2f}  {last['updates']} updates  {last['seconds']:.0f} s "
                f"({last['collecting']:.0f} collecting)", flush=True,
            )  # fmt: skip
            if options.json:
                options.json.write_text(json.dumps(curves))
    if options.figure:
        draw(curves, options.figure)


def draw(curves: list[dict[str, Any]], path: Path) -> None:
    """Reward, judge, diversity and time over updates, and reward over rows: mean of keys, band of a standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("updates", y) for y in ("reward", "judge", "diversity", "seconds")] + [("rows", "reward")]
    labels = {
        "rows": "network rows of rollouts",
        "judge": "held-out judge",
        "seconds": "seconds of one thread",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), constrained_layout=True)
    for arm in dict.fromkeys(curve["arm"] for curve in curves):
        runs = [curve["points"] for curve in curves if curve["arm"] == arm]
        length = min(map(len, runs))
        for axis, (x, y) in zip(axes, panels, strict=True):
            across, values = (torch.tensor([[float(point[n]) for point in r[:length]] for r in runs]) for n in (x, y))
            middle, error = values.mean(0), values.std(0, correction=0) / max(1, len(runs) - 1) ** 0.5
            axis.plot(across.mean(0), middle, label=arm)
            axis.fill_between(across.mean(0), middle - error, middle + error, alpha=0.2)
            axis.set(xlabel=labels.get(x, x), ylabel=labels.get(y, y))
    axes[0].legend()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
