"""How far exp(r / temperature) moves a model, from rewards of its samples; and the temperature that moves it so far.

With w_i = a_i exp(r_i / T), a_i the weights that make the samples those of the model:

    ESS share   (sum w)^2 / sum (w^2 / a)      how many samples of the model one of the tilted distribution is worth
    KL          sum w r / T / sum w - log sum w      of the tilted distribution to the model, in nats

The first falls and the second rises as T falls, so that either is met by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SteerError
from .population import normalise, weighted_mean

_DECADES = (-6.0, 9.0)  # of 1 / T, in units of 1 / (standard deviation of the rewards), between which T is looked for


@dataclass(frozen=True)
class Expected:
    """What is expected of a temperature.

    ess:    of the model's samples weighted by exp(r / temperature), as a share of them.
    reward: mean of the tilted distribution.
    kl:     of it to the model, in nats.
    """

    temperature: float
    ess: float
    reward: float
    kl: float


@dataclass(frozen=True, eq=False)
class Tilt:
    """Tilts of B models by a reward. Built by `Tilt.of`.

    reward:     of n samples of each model, [B, n] float64; -inf is forbidden.
    log_weight: by which they are samples of the model, [B, n], summing to one.
    """

    reward: Tensor
    log_weight: Tensor

    @classmethod
    def of(cls, reward: Tensor, log_weight: Tensor | None = None, *, pooled: bool = False) -> Tilt:
        """Tilts by rewards [B, n] of samples of equal weight, or of the weights given. pooled: all are of one model."""
        weight = torch.zeros_like(reward) if log_weight is None else log_weight
        reward, weight = (t.detach().double().cpu() for t in (reward, weight))
        weight = normalise(weight)
        if pooled:
            reward, weight = reward.reshape(1, -1), weight.reshape(1, -1) - math.log(len(weight))
        return cls(reward, weight)

    @property
    def samples(self) -> int:
        """How many there are of each model."""
        return self.reward.shape[1]

    @property
    def spread(self) -> float:
        """Standard deviation of the rewards that are finite, a mean over models; 0 where every model's are equal."""
        allowed = self.log_weight.masked_fill(self.reward == -torch.inf, -torch.inf)
        centred = self.reward - weighted_mean(allowed, self.reward)[:, None]
        return float(weighted_mean(allowed, centred.square()).sqrt().mean())

    def ess(self, temperature: float) -> float:
        """ESS share of these samples at a temperature, a mean over models."""
        return float(self._log_ess(temperature)[0].exp().mean())

    def ess_of_model(self, temperature: float) -> float:
        """ESS share of further samples of the models: these lack the rarest, so that their own is too high by what the
        jackknife says."""
        whole, without = self._log_ess(temperature)
        corrected = whole + (self.samples - 1) * (whole - without.mean(1))
        return float(corrected.exp().clamp(max=1.0).mean())

    def ess_factor(self, temperature: float) -> float:
        """Factor within which that is known, one standard error, by the jackknife: too low where tails are long."""
        without = self._log_ess(temperature)[1]
        error = without.std(1, correction=0) * math.sqrt(self.samples - 1.0)
        return math.exp(float(error.square().sum().sqrt()) / len(error))

    def kl(self, temperature: float) -> float:
        """KL to the model at a temperature in nats, a mean over models."""
        value = self._value(temperature)
        log_tilt = self.log_weight + value
        return float((weighted_mean(log_tilt, value) - log_tilt.logsumexp(1)).mean())

    def mean(self, temperature: float = math.inf) -> float:
        """Expected reward at a temperature; of the model's own samples that are not forbidden by default."""
        return float(weighted_mean(self.log_weight + self._value(temperature), self.reward).mean())

    def error(self) -> float:
        """Standard error of the mean reward of the model's own samples."""
        allowed = self.log_weight + self._value(math.inf)
        centred = self.reward - weighted_mean(allowed, self.reward)[:, None]
        weight = allowed.softmax(1)
        return float(torch.where(weight > 0, weight * centred, 0.0).square().sum().sqrt()) / len(weight)

    def temperature(self, *, ess: float | None = None, kl: float | None = None) -> float:
        """The temperature of an ESS share, or of a KL in nats, to three digits.

        Raises:
            SteerError: where none has it: all samples are forbidden, or rewards are constant or too often tied.
        """
        self._check()

        def reached(temperature: float) -> bool:
            return self.kl(temperature) >= kl if kl is not None else self.ess_of_model(temperature) <= (ess or 0.0)

        low, high = _DECADES
        warm, cold = (self.spread / 10.0**decade for decade in _DECADES)
        if reached(warm) or not reached(cold):
            wanted = f"a KL of {kl:g} nats" if kl is not None else f"an ESS of {ess:g} of the samples"
            raise SteerError(self._out_of_reach(wanted, warm, cold))
        for _ in range(50):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if reached(self.spread / 10.0**middle) else (middle, high)
        return float(f"{self.spread / 10.0**high:.3g}")

    def expected(self, temperature: float) -> Expected:
        """What is expected of a temperature."""
        return Expected(temperature, self.ess_of_model(temperature), self.mean(temperature), self.kl(temperature))

    def table(self, *others: float, shares: Sequence[float] = (0.9, 0.75, 0.5, 0.25, 0.1)) -> tuple[Expected, ...]:
        """What is expected of other temperatures, and of those that leave these ESS shares, the highest first.

        Shares of fewer than two samples are left out, and so are those that no temperature has.
        """
        found = set(others)
        for share in shares:
            with suppress(SteerError):
                found |= {self.temperature(ess=share)} if share * self.reward.numel() >= 2.0 else set()
        return tuple(self.expected(temperature) for temperature in sorted(found, reverse=True))

    def _log_ess(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log ESS share [B], and without each of the samples in turn [B, n]."""
        value = self._value(temperature)
        parts = (self.log_weight, self.log_weight + value, self.log_weight + 2.0 * value)
        sums = [part.logsumexp(1, keepdim=True) for part in parts]
        rest = [_without(part, total) for part, total in zip(parts, sums, strict=True)]
        whole, without = (2.0 * first - second - weight for weight, first, second in (sums, rest))
        least = self.log_weight.masked_fill(self.log_weight == -torch.inf, torch.inf).amin(1, keepdim=True)
        return whole[:, 0], torch.maximum(without, least)  # where one sample is all: the rest has at least one's share

    def _value(self, temperature: float) -> Tensor:
        """r / temperature [B, n], less the best of each model, for which nothing overflows."""
        value = (self.reward - self.reward.amax(1, keepdim=True)) / temperature
        return torch.where(self.reward == -torch.inf, -torch.inf, value)

    def _check(self) -> None:
        allowed = (self.reward > -torch.inf).any(1)
        if not bool(allowed.all()):
            raise SteerError(
                f"no temperature can be chosen: the reward forbids (-inf) all {self.samples} unsteered samples of "
                f"problem {int((~allowed).nonzero()[0])}; use a reward that says how far off a sample is, or give a "
                "number"
            )
        if not self.spread > 1e-9 * max(1.0, abs(self.mean())):
            raise SteerError(
                f"no temperature can be chosen: all {self.samples} unsteered samples score {self.mean():.4g}; use a "
                "reward that tells them apart, or give a number if it does so only rarely"
            )

    def _out_of_reach(self, wanted: str, warm: float, cold: float) -> str:
        """The message for what no temperature has."""
        ends = f"an ESS from {self.ess(warm):.2g} down to {self.ess(cold):.2g} of the samples, and a KL of "
        ends += f"{self.kl(warm):.2g} to {self.kl(cold):.2g} nats"
        return (
            f"no temperature can be chosen that gives {wanted}: as far as {self.samples} unsteered samples of each "
            f"problem show, from infinite to zero temperature this reward has {ends}; forbidden samples bound the one "
            "end, and ties for the best, or too few samples to see rarer ones, the other; ask for what lies between, "
            "or give a number"
        )


def _without(part: Tensor, total: Tensor) -> Tensor:
    """Logs of a sum without each of its terms, from their logs [B, n] and that of the sum [B, 1]."""
    return total + torch.log1p(-(part - total).exp().clamp(max=1.0 - 1e-12))
