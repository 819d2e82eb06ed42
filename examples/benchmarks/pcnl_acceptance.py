"""How often Langevin proposals are accepted, by dimension and by how many directions the reward curves.

    python examples/benchmarks/pcnl_acceptance.py [--draws 400] [--large] [--out acceptance.json]

The tilted prior is N(0, I_d) exp(-|x_1..k - 2|^2 / 2), which is Gaussian: states are drawn from it exactly, one
proposal is made from each, and the mean of min(1, A) is the stationary acceptance, with its standard error. The first
rows are those of k = 10 at growing d, where pCNL does not change and MALA collapses; in the others every direction
curves, and both do. --large adds (10000, 10000) and (65536, 65536): half a minute at 300 draws.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path

import torch

from steer import Key
from steer.particles.langevin import crank_nicolson, euler
from steer.particles.metropolis_hastings import ProposalCoefficients, log_acceptance
from steer.particles.tilted_prior import TiltedState

COLUMNS = [("pcnl", crank_nicolson, step) for step in (0.05, 0.5, 2.0)] + [
    ("mala", euler, step) for step in (0.05, 0.5)
]


def tilted(x: torch.Tensor, rank: int) -> TiltedState:
    """States with the log-tilt and its gradient."""
    gradient = torch.zeros_like(x)
    gradient[..., :rank] = 2.0 - x[..., :rank]
    return TiltedState(x, -0.5 * gradient.square().sum(2), gradient)


def acceptance(move: ProposalCoefficients, rank: int, size: int, draws: int, key: Key) -> tuple[float, float]:
    """Mean of min(1, A) over exact draws, and its standard error; in chunks of at most 2^24 numbers."""
    rates, chunk = [], max(1, min(draws, 2**24 // size))
    keep, pull, variance = (coefficient.item() for coefficient in move)
    for first in range(0, draws, chunk):
        here = key.shifted(slot=first)
        x = here.fold("x").normal((1, min(chunk, draws - first), size))
        x[..., :rank] = 1.0 + math.sqrt(0.5) * x[..., :rank]
        start = tilted(x, rank)
        noise = here.fold("z").normal(x.shape)
        end = tilted(keep * x + pull * start.gradient + math.sqrt(variance) * noise, rank)
        rates.append(log_acceptance(move, start, end).exp().clamp(max=1.0)[0])
    rate = torch.cat(rates)
    return rate.mean().item(), rate.std().item() / math.sqrt(len(rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cases = [(10, 100), (10, 1000), (10, 65_536), (1000, 1000)]
    cases += [(10_000, 10_000), (65_536, 65_536)] if arguments.large else []
    rows = []
    print(f"{'k':>6} {'d':>6}  " + "  ".join(f"{name} {step:<4}".center(15) for name, _, step in COLUMNS))
    for rank, size in cases:
        cells = [
            acceptance(
                move(torch.full((1,), step, dtype=torch.float64)), rank, size, arguments.draws,
                Key(0).fold(name, str(step), rank, size),
            )
            for name, move, step in COLUMNS
        ]  # fmt: skip
        rows.append({"k": rank, "d": size} | {f"{n} {s}": cell for (n, _, s), cell in zip(COLUMNS, cells, strict=True)})
        print(f"{rank:>6} {size:>6}  " + "  ".join(f"{mean:.3f} ± {error:.3f}".center(15) for mean, error in cells))
    if arguments.out:
        run = {"draws": arguments.draws, "python": platform.python_version(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({**run, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
