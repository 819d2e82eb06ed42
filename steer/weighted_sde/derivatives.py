"""Predictions of a composite, values of its states, and the derivatives of both that weights and drifts need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.objective import Objective, at_level
from ..core.population import log_potential
from ..errors import NotDifferentiableError
from ..key import Key
from .composite import Composite
from .look_ahead import LookAhead

NO_GRADIENT = (
    "use a differentiable reward, or steer.fkc with transport=steer.base_transport and weight=steer.KernelRatio(), "
    "which needs none"
)


class Evaluation(NamedTuple):
    """A population at one level and the derivatives there: float64, events flat, zeros where not asked for.

    x0:         average prediction [B, N, *event].     components: score of every model, [B, N, I, D].
    score:      S_q = sum a_i s_i, [B, N, D].          divergence: of S_q, [B, N].
    reward:     scores of the look-ahead, [B, N].      value:      rho, [B, N].
    gradient:   of rho, [B, N, D].                     laplacian:  of rho, [B, N].
    """

    x0: Tensor
    components: Tensor
    score: Tensor
    divergence: Tensor
    reward: Tensor
    value: Tensor
    gradient: Tensor
    laplacian: Tensor

    def tempered(self, exponent: Tensor) -> Evaluation:
        """With rho times an exponent [B, N]."""
        return self._replace(
            value=exponent * self.value,
            gradient=exponent[..., None] * self.gradient,
            laplacian=exponent * self.laplacian,
        )


class RequiredDerivatives(NamedTuple):
    """What of an Evaluation a level needs."""

    value: bool
    gradient: bool
    laplacian: bool
    divergence: bool


@dataclass(frozen=True, eq=False)
class ValueDerivatives:
    """Evaluates a population: one prediction per state and component, and derivatives through it.

    probes: Rademacher probes for traces (Hutchinson), None for the exact sum over coordinates.
    key:    names the probes.
    """

    target: Composite
    objective: Objective | None
    temperature: float
    look_ahead: LookAhead
    probes: int | None
    key: Key

    def value(self, x: Tensor, x0: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores of the look-ahead and rho before tempering, [B, N] each."""
        if self.objective is None:
            nothing = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
            return nothing, nothing
        clean = self.look_ahead.predict(self.target, x, x0, k, self.key)
        scores = self.objective(clean, at_level(self.target, k))
        return scores, log_potential(scores, self.temperature) * self.look_ahead.ramp(self.target.levels[k])

    def later_value(self, x: Tensor, x0: Tensor, k: int) -> Tensor:
        """rho of the same states at level k + 1. One prediction more, unless the look-ahead needs none."""
        with torch.no_grad():
            return self.value(x, x0 if self.look_ahead.local else self.target.denoise(x, k + 1, self.key), k + 1)[1]

    def __call__(self, x: Tensor, k: int, needs: RequiredDerivatives) -> Evaluation:
        """The population x [B, N, *event] at level k."""
        if self.target.meter is None:
            return self._at(x, k, needs)
        answer = self.target.meter.call("point", k, lambda x: self._at(x, k, needs)._asdict(), x, named=str(needs))
        return Evaluation(**answer)

    def _at(self, x: Tensor, k: int, needs: RequiredDerivatives) -> Evaluation:
        target = self.target
        nothing = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        with torch.set_grad_enabled(needs.gradient or needs.divergence), _twice(needs.laplacian):
            x = x.detach().requires_grad_() if torch.is_grad_enabled() else x
            before = self._paid()
            predictions = target.predict(x, k, self.key)
            x0 = target.average(predictions, k)
            predicted = self._paid()
            reward, value = self.value(x, x0, k) if needs.value else (nothing, nothing)
        state = x.detach().double()
        components = torch.stack([target.score(state, p.detach().double(), k).flatten(2) for p in predictions], 2)
        score = torch.einsum("bnid,i->bnd", components, components.new_tensor(target.at(k)))
        gradient, laplacian = torch.zeros_like(score), nothing
        if needs.gradient:
            rows = self._paid() - (predicted if self.look_ahead.local else before)  # that the value passes
            gradient, laplacian = self._value_derivatives(value, x, k, needs.laplacian, rows)
        divergence = nothing
        if needs.divergence:
            here, size = target.levels[k], score.shape[2]
            divergence = (self._trace(x0, x, k, predicted - before) * here.alpha - size) * (
                target.total(k) / here.sigma**2
            )
        return Evaluation(
            x0=x0.detach(),
            components=components,
            score=score,
            divergence=divergence,
            reward=reward.detach(),
            value=value.detach(),
            gradient=gradient,
            laplacian=laplacian,
        )

    def _value_derivatives(self, value: Tensor, x: Tensor, k: int, second: bool, rows: int) -> tuple[Tensor, Tensor]:
        if not value.requires_grad:
            raise NotDifferentiableError(
                "this transport and weight need the gradient of the reward, which returned scores without one (it "
                f"detaches, uses no_grad, or is not a torch function); {NO_GRADIENT}"
            )
        with self._counted(rows), torch.enable_grad():
            (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=second, retain_graph=True)
        laplacian = self._trace(gradient, x, k, rows) if second else torch.zeros_like(value)
        return gradient.detach().double().flatten(2), laplacian

    def _trace(self, field: Tensor, x: Tensor, k: int, rows: int) -> Tensor:
        """Divergence [B, N] of a field of x's shape. rows: of networks that it passes, for the cost."""
        found = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
        if not field.requires_grad:
            return found
        flat = field.flatten(2)
        for i in range(flat.shape[2] if self.probes is None else self.probes):
            probe = self._probe(flat, i, k)
            with self._counted(rows):
                (product,) = torch.autograd.grad((flat * probe).sum(), x, retain_graph=True, allow_unused=True)
            if product is not None:
                found = found + (product.flatten(2) * probe).double().sum(2)
        return found / (self.probes or 1)

    def _probe(self, flat: Tensor, i: int, k: int) -> Tensor:
        if self.probes is None:
            probe = torch.zeros_like(flat)
            probe[..., i] = 1.0
            return probe
        draw = self.key.fold("probe", i).at(k).uniform(flat.shape, device=flat.device)
        return torch.where(draw < 0.5, -1.0, 1.0).to(flat.dtype)

    def _paid(self) -> int:
        """Network rows so far."""
        return 0 if self.target.meter is None else self.target.meter.nfe

    def _counted(self, rows: int) -> AbstractContextManager[object]:
        """Counts rows that are differentiated through."""
        meter = self.target.meter
        return nullcontext() if meter is None or not rows else meter.gradient(rows)


def _twice(needed: bool) -> AbstractContextManager[object]:
    """Attention in plain operations where second derivatives are needed: torch's fused kernels have none."""
    if not needed:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
