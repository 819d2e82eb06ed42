"""How particles move: the drift added to a weighted SDE, as coefficients of three basis fields.

A weighted SDE (`weighted_sde`) runs dx = [-f + (g^2 + V^2) S / 2 + b] dt + V dw with any drift b, and pays for it by
b . S + div b in the log-weights. Every transport here is b = g^2 / 2 (theta_1 grad rho + theta_2 S_q + theta_3 x),
where S = S_q + grad rho is the target's score, S_q the models' share of it. The fixed ones are those of Feynman-Kac
Correctors (Skreta et al. 2025, 2503.02819); the controls choose theta at every step, in every problem, so that
log-weights vary least (DriftLite, Ren et al. 2025, 2509.21655, Secs. 3 and 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

REWARD, SCORE, STATE = 0, 1, 2  # the order of the bases
VARIANCE_RIDGE, ENERGY_RIDGE = 1e-8, 1e-3
"""Of the scaled systems. Score and state are collinear in the noise. VCG's equations stay consistent there. ECG's do
not where a learned score is no gradient field: its right side has what log q, followed along the path, says of the
little that is left of one basis beside the other, and coefficients of 1e4 came of an error of 1e-3 in the denoiser."""


class ControlBasis(NamedTuple):
    """What a control sees of every particle at one level. Bases j = 0, 1, 2: grad rho, S_q and x.

    bases: [B, N, 3, D]. cost: b_j . S + div b_j, [B, N, 3]. rate: what the weights gain with b = 0, in units of g^2 /
    2, [B, N]. potentials: functions whose gradients the bases are, [B, N, 3]; None where nobody needs them.
    """

    bases: Tensor
    cost: Tensor
    rate: Tensor
    potentials: Tensor | None


Control = Callable[[ControlBasis, Tensor, Tensor], Tensor]
"""(fields, log_weight [B, N], theta [B, 3] so far) -> correction of theta [B, 3]."""


@dataclass(frozen=True, eq=False)
class Transport:
    """A drift by its coefficients. Built by `score_transport`, `half_transport`, ..., `vcg`, `ecg`.

    theta:      (number of exponents A, v) -> coefficients of grad rho, S_q and x before any control.
    control:    chooses a correction of them at every step; None for a fixed drift.
    flow:       whether without noise the drift is meant to be the probability flow: tells the step's integrals.
    potentials: whether the control needs log q_i along the path.
    memory:     level -> coefficients [B, 3] of an earlier pass, which replace `theta` (iterative refinement).
    """

    theta: Callable[[float, float], tuple[float, float, float]]
    control: Control | None = None
    flow: bool = False
    potentials: bool = False
    memory: Mapping[int, Tensor] | None = None

    def start(self, k: int, total: float, v: float, like: Tensor) -> Tensor:
        """Coefficients [B, 3] before control at level k, for log-weights like [B, N]."""
        if self.memory is not None and k in self.memory:
            return self.memory[k]
        return like.new_tensor(self.theta(total, v)).expand(like.shape[0], 3)


score_transport = Transport(lambda total, v: (0.0, 0.0, 0.0))
"""b = 0: follow the whole score, half of it for the flow and half for the noise. FKC's "target score"."""

half_transport = Transport(lambda total, v: (-1.0, 0.0, 0.0))
"""Follow the reward by the noise's half alone: no Laplacian of the reward (FKC, Prop. 3.4)."""

base_transport = Transport(lambda total, v: (-(1.0 + v), 0.0, 0.0))
"""Do not follow the reward at all."""

flow_transport = Transport(lambda total, v: (-1.0, 1.0 / total - 1.0, 0.0), flow=True)
"""Follow the models' own average probability flow, the score of the target by the noise's half: the sharp choice for
annealing and products, exact for Gaussians, at the price of the score's divergence."""


def vcg(base: Transport = score_transport) -> Transport:
    """Variance-controlling guidance: theta minimises the weighted variance of the log-weights' rate.

    Args:
        base: the drift that is corrected.

    Returns:
        What `steer.fkc(transport=...)` takes.

    Source: DriftLite (Ren et al. 2025), Sec. 4.1.
    Differs: rate and bases are centred by their weighted means (the paper writes raw moments), scaled to a unit
    diagonal, and given a ridge of 1e-8, since score and state are collinear in the noise.
    """
    return Transport(base.theta, _least_variance, flow=True)


def ecg(base: Transport = score_transport) -> Transport:
    """Energy-controlling guidance: theta is the Galerkin solution of div(pi grad A) = -pi rate.

    Needs log q along the path (an estimate, so only with noise v = 1), and its weights a divergence as VCG's do.

    Args:
        base: the drift that is corrected.

    Returns:
        What `steer.fkc(transport=...)` takes.

    Source: DriftLite (Ren et al. 2025), Sec. 4.2.
    Differs: a ridge of 1e-3 of the scaled system, see `transports.ENERGY_RIDGE`.
    """
    return Transport(base.theta, _least_energy, flow=True, potentials=True)


def _least_variance(fields: ControlBasis, log_weight: Tensor, theta: Tensor) -> Tensor:
    weight = torch.softmax(log_weight, 1)
    cost = fields.cost - (weight[..., None] * fields.cost).sum(1, keepdim=True)
    rate = fields.rate + (fields.cost * theta[:, None]).sum(2)
    rate = rate - (weight * rate).sum(1, keepdim=True)
    weighted = weight[..., None] * cost
    return _solve(weighted.mT @ cost, -(weighted * rate[..., None]).sum(1), VARIANCE_RIDGE)


def _least_energy(fields: ControlBasis, log_weight: Tensor, theta: Tensor) -> Tensor:
    assert fields.potentials is not None
    weight = torch.softmax(log_weight, 1)
    rate = fields.rate + (fields.cost * theta[:, None]).sum(2)
    rate = rate - (weight * rate).sum(1, keepdim=True)
    # Centring the potentials changes no expectation, since the rate is centred, and spares digits.
    potentials = fields.potentials - (weight[..., None] * fields.potentials).sum(1, keepdim=True)
    energy = torch.einsum("bn,bnid,bnjd->bij", weight, fields.bases, fields.bases)
    return _solve(energy, torch.einsum("bn,bn,bnj->bj", weight, rate, potentials), ENERGY_RIDGE)


def _solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solutions [B, 3] of (scaled matrix + ridge) theta = right; a basis that is zero everywhere gets 0."""
    size = matrix.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(size > 0.0, 1.0 / size, 0.0)
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    scaled = matrix * scale[:, :, None] * scale[:, None, :] + ridge * eye
    return torch.linalg.solve(scaled, (right * scale)[..., None])[..., 0] * scale
