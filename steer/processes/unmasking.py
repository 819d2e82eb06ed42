"""How a masked process reveals its tokens: rules, and the exact distributions of the steps they make.

A step makes two choices, which positions it reveals and what it writes there, both drawn from known distributions, so
every step has an exact log-prob. Positions revealed by one step are written independently of one another given what
was visible before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import NotStochasticError, ShapeError, SteerError
from ..key import Key

Order = Callable[[Tensor, Tensor], Tensor]
"""(tokens [B, N, L], log-probs [B, N, L, V]) -> scores [B, N, L]: the masked position of highest score comes first."""


class MaskLevel(NamedTuple):
    """One level of a masked process.

    t: expected share of masks. length: how many positions the chain writes, L where no prompt is given.
    mask: the token that is the mask.
    """

    t: float
    length: int
    mask: int

    @property
    def masks(self) -> int:
        """How many masks a state has here under rules that reveal a fixed number: t L, rounded (a half up)."""
        return math.floor(self.t * self.length + 0.5)


@runtime_checkable
class Positions(Protocol):
    """The distribution of the set of positions that a step reveals."""

    def sample(self, key: Key) -> Tensor:
        """A draw, [B, N, L] bool."""
        ...

    def log_prob(self, chosen: Tensor) -> Tensor:
        """Log-probability of the set [B, N, L]: [B, N] float64; -inf for one that cannot be drawn."""
        ...


@runtime_checkable
class UnmaskRule(Protocol):
    """How a step chooses positions, and how the forward process masks them again."""

    def __call__(self, x: Tensor, log_prob: Tensor, here: MaskLevel, there: MaskLevel) -> Positions: ...

    def reveals(self, here: MaskLevel, there: MaskLevel) -> bool:
        """Whether the step reveals anything, known without evaluating the network."""
        ...

    def hides(self, x: Tensor, here: MaskLevel, there: MaskLevel, key: Key) -> Tensor:
        """Positions [B, N, L] bool that a draw of the forward process from `here` back to `there` masks.

        x holds what the chain writes only, without its prompt.
        """
        ...


@dataclass(frozen=True, eq=False)
class BernoulliPositions:
    """Every masked position with the same chance, independently. masked: [B, N, L] bool."""

    masked: Tensor
    chance: float

    def sample(self, key: Key) -> Tensor:
        """Each position's own coin."""
        return self.masked & (key.uniform(self.masked.shape, device=self.masked.device) < self.chance)

    def log_prob(self, chosen: Tensor) -> Tensor:
        """Product of the coins of the masked positions."""
        impossible = (chosen & ~self.masked).any(2)
        sides = torch.tensor([1.0 - self.chance, self.chance], dtype=torch.float64, device=chosen.device).log()
        return torch.where(self.masked, sides[chosen.long()], 0.0).sum(2).masked_fill(impossible, -math.inf)


@dataclass(frozen=True, eq=False)
class UniformSubset:
    """A uniformly drawn set of masked positions. masked: [B, N, L] bool. count: how many, [B, N], at most all."""

    masked: Tensor
    count: Tensor

    def sample(self, key: Key) -> Tensor:
        """The positions of the highest random scores."""
        return highest(key.uniform(self.masked.shape, device=self.masked.device), self)

    def log_prob(self, chosen: Tensor) -> Tensor:
        """One over the number of sets of that size."""
        total, count = self.masked.sum(2).double(), self.count.double()
        sets = torch.lgamma(total + 1.0) - torch.lgamma(count + 1.0) - torch.lgamma(total - count + 1.0)
        possible = (chosen.sum(2) == self.count) & ~(chosen & ~self.masked).any(2)
        return torch.where(possible, -sets, -math.inf)


@dataclass(frozen=True, eq=False)
class FixedPositions:
    """One set and no other, [B, N, L] bool."""

    chosen: Tensor

    def sample(self, key: Key) -> Tensor:
        """The set."""
        return self.chosen

    def log_prob(self, chosen: Tensor) -> Tensor:
        """0 for the set."""
        return torch.where((chosen == self.chosen).all(2), 0.0, -math.inf).double()


def highest(score: Tensor, among: UniformSubset) -> Tensor:
    """The `count` positions of highest score, [B, N, L] bool; of equal ones the first."""
    ranked = torch.where(among.masked, score, -math.inf).argsort(dim=2, descending=True, stable=True)
    rank = torch.arange(score.shape[2], device=score.device).expand_as(ranked)
    return torch.zeros_like(ranked).scatter_(2, ranked, rank) < among.count[..., None]


@dataclass(frozen=True, eq=False)
class Unmasking:
    """The distribution of one step: positions are chosen, then each gets a token from its own distribution.

    x:         tokens [B, N, L] before the step, int64. mask: the token that is the mask.
    log_token: log-probs [B, N, L, V] of what is written.
    positions: the distribution of what is revealed. stochastic: False where the step reveals nothing.
    """

    x: Tensor
    mask: int
    log_token: Tensor
    positions: Positions
    stochastic: bool = True

    def sample(self, key: Key) -> Tensor:
        """One draw per particle, by inversion: one uniform per position and not one per token."""
        if not self.stochastic:
            return self.x
        chosen = self.positions.sample(key.fold("positions"))
        # A vocabulary has tokens of probability 1e-13. Sums in float32, and uniforms on a grid of 2**-32, never draw
        # them, so both have 53 bits; only what is revealed pays for that.
        at = chosen.nonzero(as_tuple=True)
        below = self.log_token.detach()[at].double().exp_().cumsum_(1)
        point = key.fold("tokens").fine_uniform(self.x.shape, device=self.x.device)[at][:, None] * below[:, -1:]
        # A token of probability zero never exceeds a point that the one before it does not; rounding up to the total
        # is the one way past the end.
        drawn = torch.searchsorted(below, point, right=True)[:, 0]
        return self.x.index_put(at, torch.minimum(drawn, (below < below[:, -1:]).sum(1)))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of the tokens [B, N, L]: of the positions, and of the tokens there. [B, N] float64."""
        if not self.stochastic:
            raise NotStochasticError("a step that reveals nothing has no density; leave it out, or take fewer steps")
        chosen = (x != self.mask) & (self.x == self.mask)
        token = self.log_token.gather(3, torch.where(chosen, x, 0)[..., None])[..., 0].double()
        kept = (x == self.x) | chosen
        written = torch.where(chosen, token, 0.0).sum(2).masked_fill(~kept.all(2), -math.inf)
        return written + self.positions.log_prob(chosen)


@dataclass(frozen=True)
class Ancestral:
    """Reveals every masked position independently, so that t L masks are left on average. By `steer.unmask()`.

    A mask at share t is gone at share t' < t with probability (t - t') / t: the true reverse of independent masking
    (Sahoo et al. 2024, MDLM; Shi et al. 2024, MD4).
    """

    def __call__(self, x: Tensor, log_prob: Tensor, here: MaskLevel, there: MaskLevel) -> BernoulliPositions:
        return BernoulliPositions(x == here.mask, (here.t - there.t) / here.t)

    def reveals(self, here: MaskLevel, there: MaskLevel) -> bool:
        return there.t < here.t

    def hides(self, x: Tensor, here: MaskLevel, there: MaskLevel, key: Key) -> Tensor:
        return BernoulliPositions(x != here.mask, (there.t - here.t) / (1.0 - here.t)).sample(key)


@dataclass(frozen=True)
class FixedCountUnmasking:
    """Reveals a fixed number of positions a step, down to t L masks (rounded). By `steer.unmask(order=...)`.

    order: scores of positions, highest first; None for a uniformly drawn set. Any order that is chosen by what is
    visible keeps the distribution of a chain that reveals one position a step. The forward process masks a
    uniformly drawn set, which is the reverse of the random order alone.
    """

    order: Order | None = None

    def __call__(self, x: Tensor, log_prob: Tensor, here: MaskLevel, there: MaskLevel) -> Positions:
        masked = x == here.mask
        many = (masked.sum(2) - there.masks).clamp(min=0)
        subset = UniformSubset(masked, many if self.reveals(here, there) else torch.zeros_like(many))
        if self.order is None:
            return subset
        scores = self.order(x, log_prob)
        if scores.shape != x.shape:
            raise ShapeError(
                f"an order must return one score per position, (B, N, L) = {tuple(x.shape)}, got {tuple(scores.shape)}"
            )
        return FixedPositions(highest(scores, subset))

    def reveals(self, here: MaskLevel, there: MaskLevel) -> bool:
        return there.masks < here.masks

    def hides(self, x: Tensor, here: MaskLevel, there: MaskLevel, key: Key) -> Tensor:
        shown = x != here.mask
        return UniformSubset(shown, (there.masks - (~shown).sum(2)).clamp(min=0)).sample(key)


def unmask(order: str | Order | None = None) -> Ancestral | FixedCountUnmasking:
    """How a masked process reveals its tokens.

    With a fixed number, steps = length reveals one token a step; in more steps than that, some reveal nothing.

    Args:
        order: None, each position independently with the schedule's probability, as trained (MDLM, MD4); "random", a
            fixed number of positions a step, drawn uniformly; "confidence", that many where the network is surest of a
            token (MaskGIT, Chang et al. 2022, without its noise: positions are chosen by the prediction, then tokens
            are drawn); a function of (tokens [B, N, L], log-probs [B, N, L, V]) to scores [B, N, L], the highest of
            masked ones first: the model's own order.
    """
    if order is None:
        return Ancestral()
    if callable(order):
        return FixedCountUnmasking(order)
    if order not in ("random", "confidence"):
        raise SteerError(f"order is None, 'random', 'confidence' or a function of tokens and log-probs, got {order!r}")
    return FixedCountUnmasking(confidence if order == "confidence" else None)


def confidence(x: Tensor, log_prob: Tensor) -> Tensor:
    """The largest log-probability at each position, [B, N, L]."""
    return log_prob.amax(3)
