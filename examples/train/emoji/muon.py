"""Muon, an optimizer whose steps are matrices with all singular values near one (K. Jordan and others, 2024)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor) -> Tensor:
    """Each of (N, rows, columns) with its singular values moved near one, by five steps of Newton and Schulz."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if tall else matrices).bfloat16().contiguous()
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; convolutions count as matrices of (out, in x height x width).

    Steps are scaled to the size that AdamW's have, so that both can share a rate.
    """

    def __init__(self, weights: Iterable[Tensor], rate: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(weights, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move all weights, those of one shape together."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                shapes[len(weight), weight[0].numel()].append(weight)
            for (rows, columns), weights in shapes.items():
                momenta = [self.state[w].setdefault("momentum", torch.zeros_like(w)) for w in weights]
                gradients = [weight.grad for weight in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                steps = orthogonal(torch.stack([step.reshape(rows, columns) for step in ahead]))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
                size = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                for weight, step in zip(weights, steps, strict=True):
                    weight.add_(step.reshape(weight.shape), alpha=-size)
