"""The network of `letters`: a small bidirectional transformer that fills in masked letters of short words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..processes.masked import MaskedProcess, from_logits
from ..processes.unmasking import UnmaskRule, unmask

LENGTH = 8
ALPHABET = "abcdefghijklmnopqrstuvwxyz "
"""The vocabulary: token i is ALPHABET[i]; the space, token 26, pads words to eight letters."""
MASK = len(ALPHABET)


class LettersNet(nn.Module):
    """Bidirectional transformer from partly masked words to letter logits.

    Args:
        width: Number of channels.
        heads: Number of attention heads.
        hidden: Units of the feed-forward layers.
        layers: Number of blocks.
    """

    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.letter = nn.Embedding(MASK + 1, width)
        self.place = nn.Parameter(torch.zeros(LENGTH, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        """Letter logits at every position.

        Args:
            x: Tokens [..., 8] in 0 to 27, where 27 is the mask.

        Returns:
            Logits [..., 8, 27].
        """
        state = self.letter(x.flatten(0, -2)) + self.place
        for block in self.blocks:
            state = block(state)
        return self.head(self.norm(state)).unflatten(0, x.shape[:-1])


@dataclass(frozen=True, eq=False)
class _Logits:
    """The network as a function of states and time, of which it needs no time. Not a lambda: those are not pickled."""

    network: nn.Module

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.network(x)


class TransformerBlock(nn.Module):
    """Attention to all positions, then a feed-forward layer, each added to its input (pre-norm).

    Args:
        width: Number of channels.
        heads: Number of attention heads.
        hidden: Units of the feed-forward layer.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, state: Tensor) -> Tensor:
        """States [M, 8, width] after the block, from states of the same shape."""
        query, key, value = self.mix(self.norm(state)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        state = state + self.out(mixed)
        return state + self.feed(state)


def to_text(tokens: Tensor) -> list[str]:
    """Words from tokens.

    Args:
        tokens: Tokens [M, 8].

    Returns:
        M words, with "?" for a mask and "_" for a space inside a word; trailing spaces are dropped.
    """
    alphabet = ALPHABET + "?"
    rows = tokens.reshape(-1, tokens.shape[-1]).tolist()
    return ["".join(alphabet[i] for i in row).rstrip().replace(" ", "_") for row in rows]


def to_tokens(words: list[str]) -> Tensor:
    """Tokens from words.

    Args:
        words: M words of at most eight letters a-z; "?" is a mask.

    Returns:
        Tokens [M, 8].
    """
    alphabet = ALPHABET + "?"
    return torch.tensor([[alphabet.index(letter) for letter in word.ljust(LENGTH)] for word in words])


def letters_process(
    network: nn.Module, steps: int = LENGTH, transition: UnmaskRule | None = None, device: torch.device | str = "cpu"
) -> MaskedProcess:
    """Wrap a letters network as a masked process.

    Args:
        network: From tokens [..., 8] to logits [..., 8, 27], as `LettersNet`.
        steps: Number of steps; by default one letter a step.
        transition: `steer.unmask(...)`, in a random order by default.
        device: Where states are drawn.

    Returns:
        The process, with `text` set so that results show words.
    """
    return from_logits(
        _Logits(network),
        steps,
        length=LENGTH,
        vocabulary=len(ALPHABET),
        transition=transition or unmask("random"),
        text=to_text,
        device=device,
    )
