"""What steer adds to a diffusers pipeline: a Stable Diffusion 1.5 of small width, through steer and by itself.

    python examples/benchmarks/pipeline_overhead.py [--width 64] [--side 32] [--particles 4] [--steps 5] [--rounds 5]

The same latents, rows and steps: `pipe(...)` with DDIM at eta = 0 and output_type="latent"; `steer.rollout` of the
process at eta = 0, whose latents must come out equal; and `steer.smc` with a reward of the latents, which costs
nothing. Least CPU seconds over interleaved rounds, on one thread. Decoder and reward are left out on both sides: the
ledger shows that rollout decodes and scores N samples, and SMC N per weighted level.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

import steer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny_pipelines import prepared, sd15


def pipeline(width: int) -> diffusers.StableDiffusionPipeline:
    """SD1.5's network with `width` for its 320 channels: four levels, cross-attention in three of them."""
    pipe = sd15()
    config = {"block_out_channels": (width, 2 * width, 4 * width, 4 * width), "norm_num_groups": 16}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=pipe.unet.config.cross_attention_dim, **config, **blocks,
    )  # fmt: skip
    pipe = prepared(
        diffusers.StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, steps, torch_rows = arguments.particles, arguments.steps, 2 * arguments.particles
    pipe, size = pipeline(arguments.width), arguments.side * pipe_scale()
    call = {"prompt": "a cat", "guidance_scale": 7.5, "height": size, "width": size, "output_type": "latent"}
    process = steer.from_pipeline(pipe, steps=steps, transition=steer.ddim(0.0), **call)
    stochastic = process.with_rule(steer.ddim(1.0))
    latents = process.prior(steer.Key(0).fold("prior"), 1, count)  # as samplers draw it

    def plain():
        return pipe(**call, latents=latents[0], num_images_per_prompt=count, num_inference_steps=steps).images

    def reward(x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))

    runs: dict[str, Callable[[], torch.Tensor]] = {
        "pipe(...)": plain,
        "steer.rollout": lambda: steer.rollout(process, reward, particles=count, keep_states=False).x[0],
        "steer.smc": lambda: steer.smc(stochastic, reward, particles=count).x[0],
    }
    best = dict.fromkeys(runs, float("inf"))
    for i in range(arguments.rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            out = run()
            if i:
                best[name] = min(best[name], time.process_time() - began)
            if name == "pipe(...)":
                expected = out
            elif name == "steer.rollout":
                error = float((out - expected).abs().max() / expected.abs().max())
                assert error < 1e-4, f"another sample: {error:.1e}"
    bare = best["pipe(...)"]
    print(f"{torch_rows} network rows a step, {bare / steps * 1e3:.0f} ms of CPU")
    for name, seconds in best.items():
        print(f"{name:15} {seconds / steps * 1e3:8.1f} ms a step   {100 * (seconds / bare - 1):+.2f} %")


def pipe_scale() -> int:
    """Pixels per latent of the tiny autoencoder."""
    return 2


if __name__ == "__main__":
    main()
