"""Masked discrete diffusion: tokens that start as masks and are filled in step by step.

The absorbing case of discrete diffusion (Austin et al. 2021, D3PM): the forward process replaces tokens by a mask,
and the reverse process draws them from a network that sees the partly masked tokens. A chain that reveals one position
a step has the distribution of the network's own conditionals. One that reveals several writes them independently, and
has another one, whatever the network (`models.masked_chain_law` gives it for small models): samplers tilt that of the
chain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..cost import Meter
from ..errors import ModelError, StateSpaceError, SteerError
from ..key import Key
from .gaussian import check_batch
from .parameterization import checked_output, only
from .unmasking import Ancestral, MaskLevel, Unmasking, UnmaskRule

Logits = Callable[[Tensor, float], Tensor]
"""(tokens [B, N, L] with masks, share of masks t) -> logits [B, N, L, V]; conditioning closed over."""
Completion = Callable[[Tensor, Tensor], Tensor]
"""(tokens [B, N, L], log-probs [B, N, L, V]) -> tokens [B, N, L] without masks where there were masks."""


@dataclass(frozen=True, eq=False)
class MaskedProcess:
    """A network of token logits with a masking schedule: levels k = 0 (all masked) to k = steps (no mask left).

    States are tokens [B, N, L], int64, with `mask` where nothing is written yet; predictions are log-probs
    [B, N, L, V]. Samplers that need draws and values only run on it as on any process; what follows a gradient raises
    StateSpaceError.

    network:    logits for tokens and the share of masks t.
    times:      expected share of masks at every level, steps + 1 numbers falling from 1 to 0.
    length:     L. vocabulary: V. mask: the mask's token, V by default; a smaller one is never written.
    rule:       which positions a step reveals: `steer.unmask(...)`.
    completion: how a prediction becomes the clean state that rewards score on the way; by default the likeliest token
                at each mask. The distribution that samplers target does not depend on it, their variance does.
    decoder:    tokens [M, L] to what rewards see; None: the tokens.
    text:       tokens [M, L] to M strings, for people; None where tokens are not text.
    Others as `GaussianProcess`.
    """

    network: Logits
    times: tuple[float, ...]
    length: int
    vocabulary: int
    mask: int
    rule: UnmaskRule = field(default_factory=Ancestral)
    completion: Completion | None = None
    decoder: Callable[[Tensor], Tensor] | None = None
    text: Callable[[Tensor], list[str]] | None = None
    problems: int | None = None
    prompts: tuple[str, ...] | None = None
    rows: int = 1
    reference: Any = None
    device: torch.device | str = "cpu"
    meter: Meter | None = None

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in itertools.pairwise(self.times))
        if len(self.times) < 2 or not falls or self.times[0] != 1.0 or self.times[-1] != 0.0:
            raise SteerError(
                "a masking schedule is the share of masks at each level and must fall strictly from 1 to 0, got "
                f"{len(self.times)} numbers from {self.times[:1]} to {self.times[-1:]}; a whole number of steps makes "
                "an even one"
            )
        if not 0 <= self.mask <= self.vocabulary:
            raise SteerError(f"the mask must be a token in [0, V], V = {self.vocabulary}, got {self.mask}")
        if not isinstance(self.rule, UnmaskRule):
            raise StateSpaceError(
                f"{self.rule} is no rule for tokens, which have no Gaussian path; use steer.unmask(order=...)"
            )

    def __repr__(self) -> str:
        return f"MaskedProcess(length={self.length}, vocabulary={self.vocabulary}, steps={self.steps}, {self.rule})"

    @property
    def steps(self) -> int:
        """Number of transitions, and of predictions."""
        return len(self.times) - 1

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one state, (L,)."""
        return (self.length,)

    @property
    def dtype(self) -> torch.dtype:
        """Tokens are int64."""
        return torch.int64

    @property
    def visits(self) -> Sequence[int]:
        """Every level once, in order."""
        return range(self.steps + 1)

    @property
    def hooks(self) -> None:
        """None: nothing intervenes in the chain."""
        return None

    @property
    def prior_moments(self) -> None:
        """None: the prior is all masks."""
        return None

    def level(self, k: int) -> MaskLevel:
        """Level k as rules see it."""
        return MaskLevel(self.times[k], self.length, self.mask)

    def prior(self, key: Key, batch: int, particles: int) -> Tensor:
        """Masks, shape [B, N, L]: nothing is drawn, and every particle begins the same."""
        self.check_batch(batch)
        return torch.full((batch, particles, self.length), self.mask, device=self.device)

    def denoise(self, x: Tensor, k: int, key: Key | None = None) -> Tensor:
        """Log-probs [B, N, L, V] of the tokens at level k, at least float32. Counted by the meter.

        What it says of positions that are not masked is of no consequence.
        """
        if self.meter is None:
            return self._predict(x, k)
        with self.meter.network(x.shape[0] * x.shape[1] * self.rows):
            x0 = self._predict(x, k)
        self.meter.finite.prediction(x, x0, k, self.steps)
        return x0

    def _predict(self, x: Tensor, k: int) -> Tensor:
        logits = checked_output(
            self.network(x, self.times[k]),
            x,
            (*x.shape, self.vocabulary),
            "the network must return logits of shape {shape} = (B, N, L, V) for tokens (B, N, L); where V counts the "
            f"mask, say vocabulary={self.vocabulary + 1}, mask={self.mask}",
        )
        if self.mask < self.vocabulary:
            at_mask = torch.arange(self.vocabulary, device=logits.device) == self.mask
            logits = logits.masked_fill(at_mask, -math.inf)
        return torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, 3)

    def complete(self, x: Tensor, x0: Tensor) -> Tensor:
        """Tokens [B, N, L] with every mask filled: by the likeliest token, or by `completion`."""
        filled = x0.argmax(3) if self.completion is None else self.completion(x, x0)
        return torch.where(x == self.mask, filled.to(x.dtype), x)

    def transition(self, x: Tensor, x0: Tensor, k: int) -> Unmasking:
        """The distribution of the step from level k to k + 1."""
        positions = self.rule(x, x0, self.level(k), self.level(k + 1))
        return Unmasking(x, self.mask, x0, positions, self.stochastic(k))

    def stochastic(self, k: int) -> bool:
        """Whether the step from level k reveals anything, and so draws a token: also the last one does."""
        return self.rule.reveals(self.level(k), self.level(k + 1))

    def noise(self, x: Tensor, k_from: int, k_to: int, key: Key) -> Tensor:
        """A draw of the forward process from level k_from back to level k_to <= k_from: some tokens masked again."""
        if not 0 <= k_to <= k_from <= self.steps:
            raise SteerError(f"noise goes from a level to a noisier one, k_to <= k_from, got {k_from} to {k_to}")
        if k_to == k_from:
            return x
        hidden = self.rule.hides(x, self.level(k_from), self.level(k_to), key.at(k_to))
        return x.masked_fill(hidden, self.mask)

    def decode(self, x: Tensor) -> Tensor:
        """Clean states [B, N, L] as rewards see them, (B * N, ...). Counted by the meter where it costs."""
        flat = x.flatten(0, 1)
        if self.decoder is None:
            return flat
        if self.meter is None:
            return self.decoder(flat)
        with self.meter.decoding(flat.shape[0]):
            return self.decoder(flat)

    def metered(self, meter: Meter) -> MaskedProcess:
        """This process, counting into a meter."""
        return replace(self, meter=meter)

    def only(self, problem: int) -> MaskedProcess:
        """This process conditioned on one of its problems alone, as `GaussianProcess.only`."""
        if self.problems in (None, 1):
            return self
        prompts = None if self.prompts is None else (self.prompts[problem],)
        return replace(self, network=only(self.network, problem), problems=1, prompts=prompts)

    def with_rule(self, rule: UnmaskRule) -> MaskedProcess:
        """This process revealing its tokens in another way."""
        return replace(self, rule=rule)

    def with_times(self, times: Sequence[float] | int) -> MaskedProcess:
        """This process on another masking schedule, or an even one of so many steps."""
        return replace(self, times=masking_times(times))

    def exact(self, reward: Any, temperature: float = 1.0) -> Any:
        """The data's distribution tilted by exp(r(x) / temperature), as a table; for enumerable models only."""
        if self.reference is None:
            raise ModelError("exact answers exist for steer.models' analytic processes only; this one has a network")
        return self.reference.exact(reward, temperature=temperature)

    def check_batch(self, batch: int) -> None:
        """Raises ShapeError where the model's conditioning does not have that many problems."""
        check_batch(self.problems, batch)


def from_logits(
    network: Logits,
    times: Sequence[float] | int,
    *,
    length: int,
    vocabulary: int,
    mask: int | None = None,
    transition: UnmaskRule | None = None,
    completion: Completion | None = None,
    decoder: Callable[[Tensor], Tensor] | None = None,
    text: Callable[[Tensor], list[str]] | None = None,
    problems: int | None = None,
    device: torch.device | str = "cpu",
) -> MaskedProcess:
    """A masked process from a network of token logits.

    Args:
        network: function of tokens [B, N, L], int64, masks included, and the share of masks t in [0, 1] (1 - alpha in
            papers; networks that need no time ignore it) to logits [B, N, L, V].
        times: number of steps, evenly spaced in t, or the share of masks at each level, falling from 1 to 0: any alpha
            schedule is a choice of these.
        length: L, tokens in a state.
        vocabulary: V, number of tokens.
        mask: the mask's token; V by default. Where the network has a logit for it (mask < V), it is never drawn.
        transition: `steer.unmask(order=...)`; independently revealed positions by default.
        completion: how a prediction becomes the clean state that rewards score on the way; by default the likeliest
            token at each mask. See `MaskedProcess`.
        decoder: tokens [M, L] to what rewards see; None: the tokens.
        text: tokens [M, L] to M strings, for people; None where tokens are not text.
        problems: number of conditionings the network is closed over (axis 0), None where any batch runs.
        device: where states are.

    Returns:
        The process, over states [B, N, L].

    Raises:
        SteerError: no step, shares of masks that do not fall from 1 to 0, or a mask outside [0, V].
        StateSpaceError: a transition rule that is not one for tokens.

    Source: Sahoo et al. 2024 (MDLM), which any absorbing-state model reduces to: zero probability of the mask, and
    tokens once written stay.
    """
    return MaskedProcess(
        network=network,
        times=masking_times(times),
        length=length,
        vocabulary=vocabulary,
        mask=vocabulary if mask is None else mask,
        rule=transition or Ancestral(),
        completion=completion,
        decoder=decoder,
        text=text,
        problems=problems,
        device=device,
    )


def masking_times(times: Sequence[float] | int) -> tuple[float, ...]:
    """Shares of masks by level: as given, or evenly from 1 to 0 in a number of steps."""
    if isinstance(times, int):
        if times < 1:
            raise SteerError(f"a chain has at least one step, got {times}")
        return tuple(1.0 - k / times for k in range(times + 1))
    return tuple(float(t) for t in times)
