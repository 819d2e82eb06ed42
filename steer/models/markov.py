"""Small languages with exact answers: a masked process whose data is a Markov chain of tokens, and tables of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.objective import check_temperature
from ..core.population import log_potential
from ..errors import ModelError, ShapeError
from ..key import Key
from ..processes.masked import MaskedProcess, masking_times
from ..processes.unmasking import Ancestral, UnmaskRule

MAX_STRINGS = 1 << 20
"""Largest number of strings in a table."""


@dataclass(frozen=True, eq=False)
class Table:
    """A distribution over all S = V^L strings of L tokens out of V.

    Args:
        strings: The strings [S, L], int64, in the order of numbers written in base V.
        log_mass: Log-probability of each string, [S] float64; probabilities sum to one.
        log_evidence: Log of the normalizing constant E_p[exp(r / T)] if this is p tilted by a reward, 0 if not.
    """

    strings: Tensor
    log_mass: Tensor
    log_evidence: float = 0.0

    @cached_property
    def mass(self) -> Tensor:
        """Probabilities of all strings, [S]."""
        return self.log_mass.exp()

    def tilted(self, reward: Callable[[Tensor], Any], *, temperature: float = 1.0) -> Table:
        """Multiply this distribution by exp(r(x) / temperature) and normalise it.

        Args:
            reward: Function of all strings [S, L] at once to scores [S].
            temperature: Positive, in units of the reward.

        Returns:
            The tilted distribution, with its normalizing constant in `log_evidence`.

        Raises:
            ShapeError: If the reward returns another shape.
        """
        raw = reward(self.strings)
        scores = raw if isinstance(raw, Tensor) else torch.as_tensor(raw)
        if scores.shape != self.log_mass.shape:
            raise ShapeError(
                f"a reward of strings {tuple(self.strings.shape)} must return shape {tuple(self.log_mass.shape)}, "
                f"got {tuple(scores.shape)}; return one score per string"
            )
        log_mass = self.log_mass + log_potential(scores.double(), check_temperature(temperature))
        log_total = torch.logsumexp(log_mass, 0)
        return Table(self.strings, log_mass - log_total, self.log_evidence + float(log_total))

    def mean(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Exact mean of f, a function of strings [S, L] to values [S, ...]."""
        return torch.tensordot(self.mass, f(self.strings).double(), 1)

    def index(self, x: Tensor) -> Tensor:
        """Row of each string [..., L] in the table, [...]."""
        length = self.strings.shape[1]
        base = round(len(self.strings) ** (1.0 / length))
        return (x * base ** torch.arange(length - 1, -1, -1)).sum(-1)

    def shares(self, x: Tensor, log_weight: Tensor) -> Tensor:
        """Total weight of every string, [B, S], in samples x [B, N, L] with log-weights [B, N]."""
        weight = torch.softmax(log_weight, 1)
        return weight.new_zeros(len(x), len(self.strings)).scatter_add_(1, self.index(x), weight)

    def total_variation(self, x: Tensor, log_weight: Tensor) -> Tensor:
        """Total variation distance, [B], between this distribution and samples x [B, N, L] with log-weights [B, N]."""
        return 0.5 * (self.shares(x, log_weight) - self.mass).abs().sum(1)


@dataclass(frozen=True, eq=False)
class MarkovLanguage:
    """Strings whose tokens are a Markov chain: p(x) = initial[x_1] prod_i matrix[x_i, x_(i+1)].

    Args:
        initial: Probabilities of the first token, [V] float64.
        matrix: Probabilities of the next token given a token, [V, V] float64; rows sum to one.
        length: L.

    Raises:
        ShapeError: For a matrix of another size.
        ModelError: For numbers that are not probabilities.
    """

    initial: Tensor
    matrix: Tensor
    length: int

    def __post_init__(self) -> None:
        size = len(self.initial)
        if self.matrix.shape != (size, size):
            raise ShapeError(
                f"a chain of {size} tokens needs a matrix ({size}, {size}), got {tuple(self.matrix.shape)}"
            )
        rows = torch.cat([self.initial[None], self.matrix])
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(1), torch.ones(size + 1, dtype=rows.dtype)):
            raise ModelError(
                "initial and every row of the matrix must be probabilities, none below 0 and each summing to 1; got "
                f"sums from {rows.sum(1).min():.4g} to {rows.sum(1).max():.4g} and a least entry {rows.min():.4g}"
            )

    @property
    def vocabulary(self) -> int:
        """Number of tokens V; the mask is token V."""
        return len(self.initial)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of strings [..., L]: [...] float64."""
        return self.initial.log()[x[..., 0]] + self.matrix.log()[x[..., :-1], x[..., 1:]].sum(-1)

    def log_marginals(self, x: Tensor) -> Tensor:
        """Exact log-probabilities of every token given those that are not masked.

        Where no string agrees with the visible tokens, every token is equally likely: such states have probability 0
        under the data, but a chain that reveals several tokens together can reach them.

        Args:
            x: Strings [M, L], where V is the mask.

        Returns:
            log p(token i = v | visible tokens), [M, L, V] float64.

        Cost: 2 L products of [M, V] and [V, V]: forward and backward messages, normalised at every position.
        """
        eye = torch.eye(self.vocabulary, dtype=torch.float64)
        seen = torch.cat([eye, torch.ones(1, self.vocabulary, dtype=torch.float64)])[x]
        forward, backward = [self.initial.expand_as(seen[:, 0])], [torch.ones_like(seen[:, 0])]
        for i in range(self.length - 1):
            forward.append(_normalised(forward[-1] * seen[:, i]) @ self.matrix)
            backward.append(_normalised(backward[-1] * seen[:, self.length - 1 - i]) @ self.matrix.T)
        marginal = torch.stack(forward, 1) * torch.stack(backward[::-1], 1) * seen
        possible = marginal.sum(2, keepdim=True) > 0.0
        return torch.where(possible, _normalised(marginal), 1.0 / self.vocabulary).log()

    @cached_property
    def table(self) -> Table:
        """Every string and its probability."""
        strings = enumerate_strings(self.vocabulary, self.length)
        return Table(strings, self.log_prob(strings))

    def exact(self, reward: Any, *, temperature: float = 1.0, prompt: Tensor | None = None) -> Table:
        """The distribution p(x) exp(r(x) / temperature) and its normalizing constant; see `Table.tilted`.

        Args:
            reward: Function of strings [S, L] to scores [S].
            temperature: Positive, in units of the reward.
            prompt: Tokens [L] that strings must agree with, where they are not the mask V.

        Raises:
            ModelError: For a prompt that no string agrees with.
        """
        table = self.table
        if prompt is not None:
            agrees = ((table.strings == prompt) | (prompt == self.vocabulary)).all(1)
            log_mass = table.log_mass.masked_fill(~agrees, -math.inf)
            if not bool((log_mass > -math.inf).any()):
                raise ModelError(f"no string of this language agrees with the prompt {prompt.tolist()}")
            table = Table(table.strings, log_mass - torch.logsumexp(log_mass, 0))
        return table.tilted(reward, temperature=temperature)


def _normalised(message: Tensor) -> Tensor:
    """Non-negative numbers [..., V] scaled to sum to one; zeros stay zero."""
    total = message.sum(-1, keepdim=True)
    return message / torch.where(total > 0.0, total, 1.0)


@dataclass(frozen=True, eq=False)
class _Marginals:
    """The exact network of a language. A class, since processes go to other processes by pickle."""

    language: MarkovLanguage

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.language.log_marginals(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def markov_language(
    initial: Any,
    matrix: Any,
    length: int,
    *,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    transition: UnmaskRule | None = None,
) -> MaskedProcess:
    """A masked process whose data is a Markov chain of tokens, with exact conditionals and exact tilted answers.

    Args:
        initial: Probabilities of the first token, [V].
        matrix: Probabilities of the next token given a token, [V, V]; rows sum to one.
        length: Number of tokens L.
        steps: Number of steps, one per token by default.
        times: The masking schedule, in place of an evenly spaced one: steps + 1 shares of masks falling from 1 to 0.
        transition: `steer.unmask(...)`; independently revealed positions by default.

    Returns:
        A process over tokens [B, N, L]. Its `.exact(reward)` is the tilted distribution of the data. The chain samples
        the data exactly where each step reveals one token, that is, by `steer.unmask("random")`, `"confidence"` or any
        order at steps = length. Where several are revealed together, its distribution is `masked_chain_law(process)`.

    Raises:
        ShapeError: For a matrix of another size.
        ModelError: For numbers that are not probabilities.
    """
    first, following = (torch.as_tensor(part, dtype=torch.float64) for part in (initial, matrix))
    language = MarkovLanguage(first, following, length)

    grid = masking_times(times if times is not None else steps or length)
    size = language.vocabulary
    return MaskedProcess(
        network=_Marginals(language),
        times=grid,
        length=length,
        vocabulary=size,
        mask=size,
        rule=transition or Ancestral(),
        reference=language,
    )


def masked_chain_law(process: MaskedProcess, *, chunk: int = 64) -> Table:
    """Exact distribution of the chain's final state at its number of steps and rule; for small V and L only.

    Sums exp(log_prob) of every step over all (V + 1)^L states, masks included. So it holds for any network, and
    includes the effect of revealing several tokens at once: its `.tilted(reward)` is what samplers target.

    Args:
        process: A masked process whose mask is token V.
        chunk: States per prediction.

    Returns:
        The distribution over strings without masks.

    Raises:
        ModelError: For another mask token, and where there are too many states.

    Cost: steps x (V + 1)^L predictions and steps x (V + 1)^(2 L) log-probabilities.
    """
    base = process.vocabulary + 1
    if process.mask != process.vocabulary:
        raise ModelError(
            f"masked_chain_law needs the mask to be token V = {process.vocabulary}, got mask={process.mask}; open "
            "the network with its mask as the last token"
        )
    if base ** (2 * process.length) > MAX_STRINGS * 16:
        raise ModelError(
            f"a table of steps between {base}^{process.length} states is too large (at most {MAX_STRINGS * 16} pairs); "
            "take fewer tokens or a shorter string, or reveal one token a step, where the chain follows its "
            "conditionals exactly"
        )
    states = enumerate_strings(base, process.length)
    weights = base ** torch.arange(process.length - 1, -1, -1)
    mass = torch.zeros(len(states), dtype=torch.float64)
    mass[(process.prior(Key(0), 1, 1)[0, 0] * weights).sum()] = 1.0  # all masks, or the prompt
    for k in range(process.steps):
        after = torch.zeros_like(mass)
        for rows in mass.nonzero()[:, 0].split(chunk):
            x = states[rows][:, None]
            step = process.transition(x, process.denoise(x, k), k)
            if not step.stochastic:
                after[rows] += mass[rows]
                continue
            wide = x.expand(-1, len(states), -1)
            step = process.transition(wide, step.log_token.expand(*wide.shape, -1), k)
            after += mass[rows] @ step.log_prob(states.expand(len(rows), -1, -1)).exp()
        mass = after
    strings = enumerate_strings(process.vocabulary, process.length)
    return Table(strings, mass[(strings * weights).sum(1)].log())


def enumerate_strings(vocabulary: int, length: int) -> Tensor:
    """List all strings in the order of numbers written in base V.

    Args:
        vocabulary: V.
        length: L.

    Returns:
        Strings [V^L, L], int64.

    Raises:
        ModelError: For more than `MAX_STRINGS` strings.
    """
    if length * math.log(vocabulary) > math.log(MAX_STRINGS):
        raise ModelError(
            f"{vocabulary}^{length} strings are too many to list, at most {MAX_STRINGS}; take fewer tokens or a "
            "shorter string"
        )
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
