"""What `steer.preflight` says of its measurements, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .choice import Chosen
from .findings import SAME, Preflight, signed

_PUSH = (0.05, 10.0)  # standard deviations of a step's noise between which a gradient is worth following


def advice(found: Preflight, best: Chosen, population: Chosen) -> tuple[str, ...]:
    """The reasons for the two methods, and further advice, in sentences; the decisive one first."""
    return (f"for one best sample {best.call}: {best.why}", *_remarks(found, best, population))


def _remarks(found: Preflight, best: Chosen, population: Chosen) -> Iterator[str]:
    """Further advice, each sentence of which is true whatever the others say."""
    if not (found.seeds_matter and found.rewards_differ):
        return
    yield f"for a population {population.call}: {population.why}"
    yield from _of_noise(found)
    sight = found.clearest
    if found.coarse:
        yield f"{found.samples * found.problems} samples rank nothing reliably: use samples=16 before a decision"
    elif found.stochastic and sight is None:
        yield (
            "at no step before the last does r(x0_hat) rank samples as the final reward does: choosing early is then "
            "by chance"
        )
    elif found.stochastic and sight is not None:
        yield (
            f"r(x0_hat) ranks samples from step {found.usable_from} of {found.steps} on, best at step {sight.k} (rank "
            f"correlation {signed(sight.rank_correlation)}, of {found.samples * found.problems} samples)"
        )
    yield from _of_gradient(found)
    if found.price >= 1.0:
        yield (
            f"a score costs {found.price:.2g} network rows; methods that score predictions pay it at every step: give "
            f'method="auto" a reward_price={found.price:.1g}, or score at a few levels only '
            "(steer.fk_steering, steer.difference(at=...))"
        )
    if found.forbidden:
        yield f"{found.forbidden} of {found.samples * found.problems} samples are forbidden (-inf)"


def _of_noise(found: Preflight) -> Iterator[str]:
    """What the starting noise and that of the steps decide."""
    if not found.stochastic:
        yield (
            "no step draws noise (an ODE): for methods that choose among steps use a stochastic transition, "
            "process.with_rule(steer.ddim(eta=1.0)) or steer.unmask"
        )
    elif found.seed_effect is not None and found.noise_effect is not None:
        if found.noise_effect < 0.1 * found.seed_effect:
            yield (
                "steps draw noise, but the starting noise still decides nearly everything: prefer many starting noises"
            )
        elif found.seed_effect <= SAME < found.noise_effect:
            yield "the starting noise does not matter: all diversity comes from the noise of the steps"


def _of_gradient(found: Preflight) -> Iterator[str]:
    """Whether the gradient is of a size to follow at this temperature."""
    low, high = _PUSH
    push = found.gradient.push
    if not found.gradient.available or math.isnan(push) or not found.stochastic:
        return
    said = f"the gradient would shift a step by {push:.2g} standard deviations of its noise"
    if push < low:
        yield f"{said}, which changes nothing at this temperature: lower the temperature before guidance is tried"
    elif push < high:
        yield f"{said}, a useful size: proposal=steer.guided(1.0), at three network rows for one, may pay"
    else:
        yield f"{said}: raise the temperature, or use a small guidance scale"
