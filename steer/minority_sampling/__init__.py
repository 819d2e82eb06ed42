"""Minority generation: samples from where the data are thin, and the numbers by which to judge them."""

from __future__ import annotations

from typing import Any

from ..errors import SteerError
from ..guidance import Hooks, guide
from ..processes.gaussian import need_gaussian
from ..types import GaussianPath
from .agreement import AgreedRarity, agreed_rarity
from .boost import Boost, BoostAndSkip, boost_and_skip
from .guidance import minority_guidance, self_guided
from .metrics import Minority, minority_metrics
from .score import minority_score, quantile_labels
from .token import NewToken, minority_prompt

__all__ = [
    "AgreedRarity",
    "Boost",
    "BoostAndSkip",
    "Minority",
    "NewToken",
    "agreed_rarity",
    "boost_and_skip",
    "minority",
    "minority_guidance",
    "minority_metrics",
    "minority_prompt",
    "minority_score",
    "quantile_labels",
    "self_guided",
]


_CURE = (
    "make the models of a composition rarer, or the process without own_solver; a masked process is tilted by a reward "
    "that is high for rare samples"
)


def minority(process: GaussianPath, method: BoostAndSkip | Hooks) -> Any:
    """The process whose samples are rarer: every sampler and search runs on it as on any other.

    Methods compose: minority(minority(process, a), b).

    The distribution itself changes: a sampler with a reward r, run on the result, aims at rare(x) exp(r(x) / T). To
    keep the target p(x) exp(r(x) / T), give hooks as a proposal instead:
    steer.smc(process, reward, proposal=steer.follow(hooks)). Judge rarity by `minority_metrics`, never by a distance
    alone.

    Args:
        process: on a Gaussian path.
        method: `boost_and_skip(kappa)`, a start of too much variance: no gradients, no training;
            `self_guided(scale)`, the gradient of the model's own reconstruction loss: no training;
            `minority_guidance(classifier)`, a noisy classifier of rarity, trained on quantiles of the minority score.

    Raises:
        StateSpaceError: where the process is on no Gaussian path with a transition rule.
        SteerError: for a method of another type.
    """
    process = need_gaussian(process, "minority sampling", cure=_CURE)
    if isinstance(method, Hooks):
        return guide(process, method)
    if isinstance(method, BoostAndSkip):
        return method(process)
    raise SteerError(
        "method is steer.boost_and_skip(kappa), steer.self_guided(scale) or steer.minority_guidance(classifier), got "
        f"{method!r}"
    )
