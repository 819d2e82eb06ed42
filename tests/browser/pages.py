"""The pages that are looked at: one of each kind that reports have."""

import dataclasses
import functools

import steer
from steer import rewards, search

PROMPTS = ("three", "a three that leans to the left, written with a thick pen by somebody in a great hurry", "3")


@functools.cache
def digits():
    return steer.load("digits", steps=8)


def threes():
    return rewards.DigitLogProb(3)


def many_e(x):
    return (x == 4).double().sum(1)


def run(folder):
    """Digits by smc, beside unsteered ones, with a judge."""
    result = steer.smc(digits(), threes(), particles=16, temperature=0.5, keep_states=True, key=1)
    reference = steer.rollout(digits(), threes(), particles=16, key=1)
    command = "steer generate --model digits --reward digit:3 --method smc --temperature 0.5 --budget 128 --out runs/3"
    return result.report(
        folder, reference=reference, metrics={"judge": rewards.judge(3)}, count=16, about={"command": command}
    )


def heavy(folder):
    """A diagnosis of several sentences: weights with a heavy tail, from unsteered samples."""
    return steer.importance_sampling(digits(), threes(), particles=64, temperature=0.02, key=1).report(folder)


def tree(folder):
    """A search that selects: most of its leaves are worthless."""
    result = search.dts_star(digits(), threes(), budget=300, key=1)
    return result.report(folder, reference=steer.rollout(digits(), threes(), particles=16, key=1))


def letters(folder):
    """Samples that are texts; trees of two problems, folded, of a search that weights its leaves."""
    process = steer.load("letters", steps=6)
    result = search.dts(process, many_e, budget=80, batch=2, levels=3, key=1)
    return result.report(folder, reference=steer.rollout(process, many_e, particles=12))


def prompts(folder):
    """A run of several prompts, one of them long."""
    process = dataclasses.replace(digits(), problems=len(PROMPTS), prompts=PROMPTS)
    result = steer.smc(process, threes(), particles=6, temperature=0.5, keep_states=True, key=2)
    return result.report(folder, reference=steer.rollout(process, threes(), particles=6, key=2))


def videos(folder):
    """Samples that move, and pictures larger than they are shown."""
    process = steer.from_denoiser(
        lambda x, t: 0.5 * x, steer.VP(), 4, event=(3, 3, 160, 160), decoder=lambda x: (x / 2.0 + 0.5).clamp(0.0, 1.0)
    )
    return steer.smc(process, lambda x: x.mean((1, 2, 3, 4)), particles=4, keep_states=True).report(folder)


def comparison(folder):
    """Methods at one budget, with a judge."""
    return steer.compare(
        digits(), threes(), methods=["smc", "svdd"], budget=128, keys=3, metrics={"judge": rewards.judge(3)}
    ).report(folder)


def budgets(folder):
    """Methods at several budgets, near one another."""
    return steer.compare(
        digits(), threes(), methods=["smc", "svdd", "dts"], budget=[64, 96, 128, 192], keys=2,
        metrics={"judge": rewards.judge(3)},
    ).report(folder)  # fmt: skip


def failure(folder):
    """A method that fails on a seed, with a long text; and samples that are texts."""

    def fragile_sampler_of_a_long_name(process, reward, *, key, **options):
        if key.seed % 2:
            raise RuntimeError(
                "expected all tensors on one device, got cuda:0 and cpu in /srv/models/transformer/attention"
            )
        return steer.smc(process, reward, key=key, **options)

    process = steer.load("letters", steps=4)
    return steer.compare(process, many_e, methods=[fragile_sampler_of_a_long_name], budget=32, keys=2).report(folder)


PAGES = {make.__name__: make for make in (run, heavy, tree, letters, prompts, videos, comparison, budgets, failure)}
