"""The check of samplers and searches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..key import Key, as_key
from ..processes.from_network import from_denoiser
from ..processes.gaussian import GaussianProcess
from ..processes.schedules import VP, RectifiedFlow
from ..results.result import Law, Result
from .statistics import LIMIT, CheckFailed, described, worst, z_scores
from .targets import LINEAR, Nothing, exact_chain, learned_process, plane_mixture


def check_sampler(
    method: Callable[..., Result],
    *,
    law: Law = "target",
    particles: int = 12,
    runs: int = 256,
    key: Key | int = 0,
    **options: Any,
) -> float:
    """Puts a method through what every method of `steer.methods()` owes.

    Shapes, dtypes and normalised weights; `result.law`; the same result for the same key and another for another; the
    global random generator left alone; costs equal to a spy's count; the budget kept; no influence of other problems
    in the batch; no autograd graph left; NaN rewards refused with what was paid for in `.partial`; and for a sampler of
    a distribution, weighted means and normalizing constants equal to the closed form.

    Args:
        method: `f(process, reward, *, batch, particles, budget, temperature, key, ...) -> Result`.
        law: what its weighted means estimate, as `Result.law`: "none" for a search, whose samples are not compared.
        particles: N of the statistical runs; more where weights are rarely usable.
        runs: independent problems that statistics are taken over.
        key: names the draws of the checks.
        options: passed on to the method.

    Returns:
        The largest |z| met, 0 for a search.

    Raises:
        CheckFailed: naming the first promise that is broken.

    Cost: some 30 runs on mixtures in the plane, a few seconds.
    """
    key = as_key(key)

    def run(process: GaussianProcess, reward: Callable[..., Any], **more: Any) -> Result:
        return method(process, reward, **{**options, **more})

    _check_result(run, law, key)
    _check_repeats(run, key)
    _check_cost(run, key)
    _check_independence(run, key)
    _check_bad_reward(run, key)
    return 0.0 if law == "none" else _check_distribution(run, law, particles, runs, key)


def _check_result(run: Callable[..., Result], law: Law, key: Key) -> None:
    result = run(learned_process(), LINEAR, particles=6, batch=2, key=key)
    if result.x.shape[0] != 2 or result.x.shape[2:] != (2,) or result.reward.shape != result.x.shape[:2]:
        raise CheckFailed(f"x must be [B, N, *event] and reward [B, N], got {described(result.x, result.reward)}")
    for name in ("reward", "log_weight", "log_evidence"):
        tensor = getattr(result, name)
        if tensor.dtype != torch.float64 or tensor.requires_grad:
            raise CheckFailed(f"{name} must be float64 without a gradient, got {described(tensor)}")
    total = result.log_weight.exp().sum(1)
    if not torch.allclose(total, torch.ones_like(total)):
        raise CheckFailed(f"weights must sum to one within each problem, got {total.tolist()}")
    if not torch.allclose(result.reward, LINEAR(result.x.flatten(0, 1)).view(result.reward.shape)):
        raise CheckFailed("result.reward must be the reward of result.x")
    if result.law != law:
        raise CheckFailed(f"result.law must be {law!r}, got {result.law!r}; set it where the Result is made")


def _check_repeats(run: Callable[..., Result], key: Key) -> None:
    before = torch.get_rng_state()
    first, again, other = (run(learned_process(), LINEAR, particles=6, key=k) for k in (key, key, key.fold("other")))
    if not (torch.equal(first.x, again.x) and torch.equal(first.log_weight, again.log_weight)):
        raise CheckFailed("the same key must give the same result to the last bit: draw from the key alone")
    if torch.equal(first.x, other.x):
        raise CheckFailed("another key must give another result")
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed("torch's global generator was drawn from: draw from the key alone")


def _check_cost(run: Callable[..., Result], key: Key) -> None:
    model, counted = learned_process(), {"rows": 0, "scored": 0}

    def denoise(x: Tensor, t: float) -> Tensor:
        counted["rows"] += x.shape[0] * x.shape[1]
        return model.denoiser(x, t)

    def score(x: Tensor) -> Tensor:
        counted["scored"] += len(x)
        return LINEAR(x)

    process = from_denoiser(denoise, model.schedule, model.times, event=model.event, dtype=model.dtype)
    for given in ({"particles": 7}, {"budget": 83}):
        counted.update(rows=0, scored=0)
        cost = run(process, score, batch=2, key=key, **given).cost
        if (cost.nfe, cost.rewards) != (counted["rows"], counted["scored"]):
            raise CheckFailed(
                f"result.cost must count every call, {counted['rows']} network rows and {counted['scored']} rewards; "
                f"got {cost.nfe} and {cost.rewards}: evaluate on the run's own process and objective"
            )
        if "budget" in given and cost.nfe > 2 * 83:
            raise CheckFailed(f"a budget of 83 network rows per problem was exceeded: {cost.nfe / 2:g}")


def _check_independence(run: Callable[..., Result], key: Key) -> None:
    alone, together = (run(learned_process(), LINEAR, particles=6, batch=batch, key=key) for batch in (1, 3))
    if not torch.allclose(together.x[:1], alone.x, rtol=1e-9, atol=1e-9):
        raise CheckFailed("a problem must give the same result alone and in a batch: particles interact within axis 0")
    if torch.equal(together.x[0], together.x[1]):
        raise CheckFailed("the problems of a batch must have noise of their own")


def _check_bad_reward(run: Callable[..., Result], key: Key) -> None:
    def reward(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) == 2, torch.nan, LINEAR(x))

    try:
        run(learned_process(), reward, particles=6, key=key)
    except NonFiniteError:
        return
    except Exception as error:
        raise CheckFailed(f"a NaN reward must be a NonFiniteError, got {type(error).__name__}: {error}") from error
    raise CheckFailed("a NaN reward went unnoticed: score samples by the run's objective (steer.core.run.Run)")


def _check_distribution(run: Callable[..., Result], law: Law, particles: int, runs: int, key: Key) -> float:
    found = 0.0
    for schedule in (VP(), RectifiedFlow()):
        process = exact_chain(schedule)
        target = process.exact(LINEAR if law == "target" else Nothing())
        for problems in (runs, 16 * runs):  # a chance excess is judged by more problems under another key
            result = run(process, LINEAR, batch=problems, particles=particles, key=key.fold("law", problems))
            if law == "model":
                result = replace(result, log_evidence=torch.zeros_like(result.log_evidence))
            score, name = worst(z_scores(result, target, plane_mixture()))
            if score < LIMIT:
                break
        else:
            raise CheckFailed(
                f"on {schedule}, {name} is off by {score:.1f} standard errors over {16 * runs} runs (limit {LIMIT}): "
                f"weighted means do not estimate what law={law!r} says"
            )
        found = max(found, score)
    return found
