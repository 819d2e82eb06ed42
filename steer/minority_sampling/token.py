"""MinorityPrompt: one new token, learned at every step so that the prompt's rarer images are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SteerError
from ..guidance import Hooks, Step
from ..types import GaussianPath
from .score import Distance, euclidean
from .signal_level import level_near, share

Conditional = Callable[[Tensor, float, Tensor], Tensor]
"""(x [B, N, *event], t, text (B N, L, width)) -> E[x_0 | x, text], differentiable in the text."""


@dataclass(frozen=True, eq=False)
class NewToken:
    """A prompt with one token that the text encoder has no row for. Built by `NewToken.insert`.

    encoder: a transformers text encoder (CLIP, T5): callable on ids, with `get_input_embeddings()`. Never changed.
    plain:   ids (1, L) of the prompt. ids: the same with the token's place in them. slot: that place.
    initial: the row to begin from, (width,).
    """

    encoder: Any
    plain: Tensor
    ids: Tensor
    slot: int
    initial: Tensor

    @classmethod
    def insert(cls, encoder: Any, ids: Tensor, *, before: int, init: int | Tensor) -> NewToken:
        """The prompt with a new token ahead of the first id `before` (the end-of-text token).

        Args:
            ids: of the prompt, [1, L], padded; one padding token makes room.
            before: the end-of-text token.
            init: the id of a word whose row to begin from, or a row [width].

        Raises:
            ModelError: where there is no end or no room.
        """
        places = (ids[0] == before).nonzero()[:, 0]
        if ids.ndim != 2 or len(ids) != 1 or len(places) == 0:
            raise ModelError(f"ids must be (1, L) and hold the end token {before}, got shape {tuple(ids.shape)}")
        slot = int(places[0])
        if slot == ids.shape[1] - 1:
            raise ModelError(f"the prompt fills all {ids.shape[1]} places; shorten it, or pad it to a longer one")
        table = encoder.get_input_embeddings().weight.detach()
        row = table[init] if isinstance(init, int) else init.to(table)
        # The place needs some id to be looked up, which is overwritten; it must not be an end token, by which CLIP
        # finds where to pool.
        stand_in = init if isinstance(init, int) and init != before else int(next(i for i in range(3) if i != before))
        longer = torch.cat([ids[:, :slot], ids.new_full((1, 1), stand_in), ids[:, slot:-1]], 1)
        return cls(encoder=encoder, plain=ids, ids=longer, slot=slot, initial=row.clone())

    def encode(self, rows: Tensor) -> Tensor:
        """Hidden states [M, L, width] of the prompt with M different rows [M, width] for the token."""

        def write(module: Any, inputs: Any, found: Tensor) -> Tensor:
            del module, inputs
            return torch.cat([found[:, : self.slot], rows[:, None].to(found), found[:, self.slot + 1 :]], 1)

        handle = self.encoder.get_input_embeddings().register_forward_hook(write)
        try:
            return self.encoder(self.ids.expand(len(rows), -1))[0]
        finally:
            handle.remove()

    def encode_plain(self, count: int) -> Tensor:
        """Hidden states [M, L, width] of the prompt without the token."""
        with torch.no_grad():
            return self.encoder(self.plain)[0].expand(count, -1, -1)


@dataclass(frozen=True, eq=False)
class LearnedToken:
    """The prediction under a token learned at this state. Built by `minority_prompt`."""

    token: NewToken
    conditional: Conditional
    iterations: int
    rate: float
    balance: float
    signal: float
    highest: float
    distance: Distance

    def acts(self, process: GaussianPath, k: int) -> bool:
        """Whether a token is learned at level k: at first, where there is little signal."""
        return share(process.levels[k]) <= self.highest

    def rows(self, process: GaussianPath) -> int:
        """Network rows per particle and chain, beside the model's own."""
        return (2 * self.iterations + 1) * sum(self.acts(process, k) for k in range(process.steps))

    def __call__(self, step: Step) -> Tensor:
        if not self.acts(step.process, step.k):
            return step.x0
        x, t, meter = step.x.detach(), step.here.t, step.process.meter
        assert meter is not None
        count = x.shape[0] * x.shape[1]
        with torch.enable_grad():
            rows = self.token.initial.expand(count, -1).clone().requires_grad_()
            adam = torch.optim.Adam([rows], lr=self.rate)
            for i in range(self.iterations):
                with meter.network(2 * count):
                    loss = self.loss(step, x, rows, i)
                with meter.gradient(2 * count):
                    (rows.grad,) = torch.autograd.grad(-loss.sum(), rows)
                adam.step()
                step.note("loss", loss)
        with torch.no_grad(), meter.network(count):
            return self.conditional(x, t, self.token.encode(rows))

    def loss(self, step: Step, x: Tensor, rows: Tensor, i: int) -> Tensor:
        """What the token raises, [B N]: the distance from the prediction under it to its plain reconstruction."""
        process, level = step.process, level_near(step.process, self.signal)
        here = process.levels[level]
        under = self.conditional(x, step.here.t, self.token.encode(rows))
        eps = step.key.fold("token", step.k, i).normal(x.shape, dtype=x.dtype, device=x.device)
        restored = self.conditional(
            here.alpha * under + here.sigma * eps, here.t, self.token.encode_plain(len(rows))
        ).flatten(0, 1)
        under = under.flatten(0, 1)
        return self.distance(under.detach(), restored) + self.balance * self.distance(under, restored.detach())


def minority_prompt(
    token: NewToken,
    conditional: Conditional,
    *,
    iterations: int = 10,
    rate: float = 1e-2,
    balance: float = 1.0,
    signal: float = 0.06,
    highest: float = 0.014,
    distance: Distance = euclidean,
) -> Hooks:
    """MinorityPrompt: at the noisiest levels, the prediction under a token that makes it hard to restore.

        maximise over v   d(stop x0(x_t; v), x0(x_s)) + balance d(x0(x_t; v), stop x0(x_s)),   x_s from x0(x_t; v),

    x0(x_s) under the plain prompt, by `iterations` steps of Adam on one row of the embedding.

    Every particle has a row of its own, and every guided level begins anew from `token.initial`.

    Args:
        token: `NewToken.insert(encoder, ids, before=end, init=word)`.
        conditional: the model's prediction given text, see `Conditional`: its conditional branch, without guidance.
        iterations: steps of Adam per guided level, >= 1.
        rate: learning rate of Adam, > 0.
        balance: weight of the second distance.
        signal: share of signal alpha^2 / (alpha^2 + sigma^2) at s. The paper's .75 T of Stable Diffusion is .06.
        highest: share up to which levels learn a token; the paper's last tenth of T is below .014.
        distance: d, between [M, *event] tensors, [M]; Euclidean by default.

    Returns:
        Hooks, for `guide` or `follow`.

    Raises:
        SteerError: iterations below 1, or a rate that is not positive.

    Cost per guided step: 2 iterations + 1 network rows per particle, and 2 iterations backward passes.

    Source: Um & Ye 2025 (MinorityPrompt, 2410.07838) and the released code.
    Differs: one row is a parameter, where the code optimises the table and restores the rest; rows do not carry over
    from step to step, so that a prediction is a function of its state, as searches that go back to states require;
    later levels run under the plain prompt.
    """
    if iterations < 1 or not rate > 0.0:
        raise SteerError(f"iterations and rate are positive, got {iterations} and {rate}")
    hook = LearnedToken(
        token=token,
        conditional=conditional,
        iterations=iterations,
        rate=float(rate),
        balance=float(balance),
        signal=signal,
        highest=highest,
        distance=distance,
    )
    return Hooks(x0=(hook,), extra=(hook.rows,))
