"""A complete GRPO training run on the embedded digits flow: steer collects, forty lines of torch train.

    python examples/grpo_digits.py [--updates 30] [--groups 4] [--rows 24] [--digit 3] [--window first-half]

The policy learns to draw one digit from a classifier's probability. A second classifier, of another architecture and
trained on other data, is used for evaluation only. Under 30 seconds with --updates 5. The same loop trains any process:
hand the parameters of its network, or of LoRA layers in it, to the optimizer.
"""

import argparse
import copy
import time
from importlib.resources import files

import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

import steer
from steer import grpo, rewards

WINDOWS = {
    "every": lambda update: grpo.every(0.99),
    "first-half": lambda update: grpo.first_half(2),
    "sliding": lambda update: grpo.sliding(update, size=4, every=5),
}


def classifier(digit: int) -> rewards.DigitProb:
    """The reward: a classifier's probability of a digit."""
    return rewards.DigitProb(digit, "digits-classifier")


def opened(unet: torch.nn.Module, scheduler, steps: int, rule: steer.Rule) -> steer.GaussianProcess:
    """The process around a network, unlabelled."""
    return steer.from_pipeline(DDPMPipeline(unet, scheduler), steps=steps, transition=rule)


def update(policy, reference, batch, optimizer, *, clip: float = 1e-3, beta: float = 0.0) -> None:
    """One pass over a batch, one optimizer step for all of its levels."""
    advantage, weight = grpo.advantages(batch, limit=5.0).value, batch.weights()
    steps = grpo.by_level(batch)
    optimizer.zero_grad()
    for step in steps:
        new = grpo.log_prob(policy, batch, step, reduction="mean")
        old = step.of(batch.logp("mean"))
        loss = grpo.clipped_loss(
            new.log_prob, old, step.of(advantage), clip=clip, weight=step.of(weight), mask=step.valid
        )
        if beta:
            with torch.no_grad():
                mean = grpo.log_prob(reference, batch, step).mean
            loss = loss + beta * grpo.kl(new.mean, mean, new.std)[step.valid].mean()
        (loss / len(steps)).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def evaluated(process: steer.GaussianProcess, digit: int, samples: int) -> tuple[float, float, float]:
    """Reward, held-out judge and diversity (mean distance of pairs) of deterministic samples, always the same noise."""
    result = steer.rollout(
        process.with_rule(steer.ode()), classifier(digit), particles=samples, key=99, keep_states=False
    )
    images = result.decoded
    judge = rewards.judge(digit)(images)
    return float(result.reward.mean()), float(judge.mean()), float(torch.pdist(images.flatten(1)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("updates", 30), ("groups", 4), ("rows", 24), ("digit", 3), ("steps", 10), ("samples", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", choices=WINDOWS, default="every")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL to the first policy")
    options = parser.parse_args()

    pipe = DDPMPipeline.from_pretrained(str(files("steer") / "assets" / "digits-flow"), local_files_only=True)
    rule = steer.flow_sde(0.7)
    reference = opened(copy.deepcopy(pipe.unet).requires_grad_(False), pipe.scheduler, options.steps, rule)
    policy = opened(pipe.unet, pipe.scheduler, options.steps, rule)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=options.rate, weight_decay=1e-4)
    began = time.perf_counter()
    for number in range(options.updates + 1):
        if number % 5 == 0 or number == options.updates:
            reward, judge, spread = evaluated(policy, options.digit, options.samples)
            seconds = time.perf_counter() - began
            print(f"{number:4d}  reward {reward:.3f}  judge {judge:.3f}  diversity {spread:.2f}  {seconds:.0f} s")
        if number < options.updates:
            batch = grpo.collect(
                policy, classifier(options.digit), groups=options.groups, group_size=options.rows,
                key=steer.Key(0).fold(number), window=WINDOWS[options.window](number), policy_version=number,
            )  # fmt: skip
            update(policy, reference, batch, optimizer, beta=options.beta)


if __name__ == "__main__":
    main()
