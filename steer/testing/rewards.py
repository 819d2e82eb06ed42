"""The check of rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SteerError
from ..key import Key
from ..types import RewardSpec
from .statistics import CheckFailed, described


def check_reward(reward: Callable[..., Any], samples: Tensor, *, prompts: Sequence[str] | None = None) -> None:
    """Checks that a reward is a function of its samples, and keeps what its `spec` says.

    One finite number (or -inf) a sample; the same scores twice, in any order and in parts (unless `spec.scope` is
    "groupwise"); samples left as they were; scores within `spec.bounds`; a gradient where `spec.gradient` is "exact",
    equal to finite differences along a random direction, and none where it is "none".

    Args:
        reward: `f(samples) -> [M]`, or `f(samples, prompts=...)`.
        samples: at least three samples of the kind it is meant for, [M, *event], different from one another.
        prompts: M texts, for a reward that reads them.

    Raises:
        CheckFailed: naming the first promise that is broken.
    """
    if len(samples) < 3:
        raise SteerError(f"a reward is checked on at least three different samples, got {len(samples)}")
    spec = getattr(reward, "spec", None)
    spec = spec if isinstance(spec, RewardSpec) else RewardSpec()

    def scored(x: Tensor, rows: Sequence[int]) -> Tensor:
        texts = {} if prompts is None else {"prompts": [prompts[row] for row in rows]}
        return torch.as_tensor(reward(x, **texts))

    everyone, before = list(range(len(samples))), samples.clone()
    with torch.no_grad():
        scores = scored(samples, everyone)
    if scores.shape != (len(samples),):
        raise CheckFailed(f"{len(samples)} samples must get scores of shape ({len(samples)},), got {described(scores)}")
    if not torch.equal(samples, before):
        raise CheckFailed("the reward wrote into its samples; work on a copy")
    if bool(scores.isnan().any() | (scores == torch.inf).any()):
        raise CheckFailed(f"scores must be finite, or -inf to forbid a sample, got {scores.tolist()}")
    low, high = spec.bounds
    if bool(((scores < low) & (scores > -torch.inf)).any() | (scores > high).any()):
        raise CheckFailed(f"scores must be in the bounds {spec.bounds} that the spec states, got {scores.tolist()}")
    with torch.no_grad():
        kept = scores.clone()
        again = scored(samples, everyone)
        if not torch.equal(kept, scores):
            raise CheckFailed("a second call changed the scores of the first: return a new tensor every time")
        _same("called twice", again, scores)
        if spec.scope == "pointwise":
            flipped = scored(samples.flip(0), everyone[::-1]).flip(0)
            _same("in reverse order", flipped, scores)
            parts = [scored(samples[i : i + 1], [i]) for i in everyone]
            _same("one by one", torch.cat(parts), scores)
    _check_gradient(scored, samples, everyone, spec)


def _check_gradient(scored: Callable[..., Tensor], samples: Tensor, rows: list[int], spec: RewardSpec) -> None:
    if not samples.is_floating_point() or spec.gradient not in ("exact", "none"):
        return
    x = samples.detach().double().requires_grad_() if spec.gradient == "exact" else samples.detach().requires_grad_()
    with torch.enable_grad():
        try:
            scores = scored(x, rows)
        except Exception as error:
            if spec.gradient == "none":
                return
            raise CheckFailed(
                f"the spec says gradient='exact', and on float64 samples that want one the reward raised {error}"
            ) from error
    if spec.gradient == "none":
        if scores.requires_grad:
            raise CheckFailed("the spec says gradient='none', and the scores carry one")
        return
    if not scores.requires_grad:
        raise CheckFailed("the spec says gradient='exact', and the scores carry none")
    finite = scores > -torch.inf
    (gradient,) = torch.autograd.grad(scores[finite].double().sum(), x)
    direction = Key(0).fold("direction").normal((1, *samples.shape))[0].to(x.dtype)
    step = 1e-4 * float(samples.detach().double().std() or 1.0)
    with torch.no_grad():
        up, down = (scored(x + sign * step * direction, rows).double() for sign in (1.0, -1.0))
    slope = (gradient * direction).flatten(1).sum(1)[finite]
    numeric = ((up - down) / (2.0 * step))[finite]
    if not torch.allclose(slope.double(), numeric, rtol=2e-2, atol=2e-2 * float(numeric.abs().max())):
        raise CheckFailed(
            f"the gradient along a random direction is {slope.tolist()}, and finite differences give {numeric.tolist()}"
        )


def _same(how: str, scores: Tensor, expected: Tensor) -> None:
    if not torch.allclose(scores.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
        raise CheckFailed(
            f"scores must not depend on the call: {how} they are {scores.tolist()}, and were {expected.tolist()}; say "
            "scope='groupwise' in the spec if a score is meant to depend on the other samples"
        )
