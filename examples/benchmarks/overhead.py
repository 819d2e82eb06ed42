"""What steering adds to the loop one would write by hand.

    python examples/benchmarks/overhead.py [--out overhead.json]

Three figures, each against a bare torch loop (predict, score, ancestral step with torch.randn) in the same run, as the
minimum CPU time over interleaved rounds on one thread: a ratio or a difference, never an absolute speed. Kernels are
dispatched operations that compute (views are free); reads are scalars read on the host. On an accelerator, those of
`FiniteWatch` are copied behind the queued work and read a step later, so they stall nothing.
Where the package `particles` is installed (`pip install particles`, Chopin's), `steer.smc` beside it on one
linear-Gaussian Feynman-Kac model in the plane, both in absolute time. Then every sampler beside `steer.smc` at equal
particles on the null network, and how both grow with particles and problems: the exponent of time against their number,
at most 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import steer

VIEWS = {
    "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "alias", "as_strided", "permute",
    "transpose", "t", "unbind", "detach", "split", "diagonal", "_reshape_alias", "lift_fresh",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def computing(self) -> int:
        return sum(n for name, n in self.count.items() if name not in VIEWS and name != "_local_scalar_dense")

    @property
    def reads(self) -> int:
        return self.count["_local_scalar_dense"]


def keep_freed_memory() -> None:
    """Has glibc keep freed memory. By default it gives some back to the system and takes it again, at every step or
    never, by what happened to be freed before: up to 1 ms a step here, of either loop."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def bare_loop(process: steer.GaussianProcess, reward: Callable, batch: int, particles: int) -> torch.Tensor:
    """The loop one writes without a library: no weights, no lineage, noise from the global generator."""
    shape = (batch, particles, *process.event)
    x = torch.randn(shape) * process.levels[0].sigma
    for k in range(process.steps):
        x0 = process.denoiser(x, process.times[k])
        reward(x0.flatten(0, 1))
        law = process.transition(x, x0, k)
        x = law.mean + law.std * torch.randn(shape)
    return x


def fastest(runs: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Least CPU seconds of each run over interleaved rounds, after one that warms up."""
    best = dict.fromkeys(runs, float("inf"))
    for i in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if i:
                best[name] = min(best[name], time.process_time() - began)
    return best


def per_step(process, reward, batch: int, particles: int, rounds: int, **options) -> dict[str, float]:
    """Microseconds per step, ratio, and what a step dispatches, of `steer.smc` beside the bare loop."""

    def steered():
        return steer.smc(process, reward, batch=batch, particles=particles, **options)

    def bare():
        return bare_loop(process, reward, batch, particles)

    with torch.no_grad():
        best = fastest({"steer": steered, "bare": bare}, rounds)
        counts = {}
        for name, run in (("steer", steered), ("bare", bare)):
            with Kernels() as counts[name]:
                run()
    steps = process.steps
    return {
        "bare_us": best["bare"] / steps * 1e6,
        "steer_us": best["steer"] / steps * 1e6,
        "added_us": (best["steer"] - best["bare"]) / steps * 1e6,
        "ratio": best["steer"] / best["bare"],
        "kernels_added": (counts["steer"].computing - counts["bare"].computing) / steps,
        "reads": counts["steer"].reads / steps,
    }


def mixture(rounds: int) -> dict[str, float]:
    """4096 particles on 25 modes in the plane, 100 steps: the most a toy can complain about overhead."""
    axis = torch.arange(-2.0, 3.0) * 2
    process = steer.models.gaussian_mixture(torch.cartesian_prod(axis, axis), torch.full((25,), 0.05), steps=100)
    return per_step(process, lambda x: -0.25 * x.square().sum(1), 1, 4096, rounds)


def null_network(rounds: int) -> dict[str, float]:
    """8 problems x 8 particles of 8x8x1 states and a network that costs nothing: the loop itself."""
    process = steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), 100, event=(1, 8, 8))
    return per_step(process, lambda x: x.mean((1, 2, 3)), 8, 8, rounds, temperature=0.05)


def linear_gaussian(particles: int, rounds: int) -> dict[str, float]:
    """steer.smc and particles.SMC on one Feynman-Kac model, in microseconds per step, beside a bare torch loop.

    Data N(0, I / 2) in the plane on a VP path of 100 steps; the potential at each level is exp(v_k - v_{k-1}), v_k the
    reward -|x|^2 / 4 of the prediction, and at the end of the sample. Resampled systematically below an ESS of N / 2.
    The means of both log-evidences are printed: they estimate one number.
    """
    import numpy as np
    import particles as peer

    def denoiser(x, t):
        at = steer.VP()(t)
        return x * (0.5 * at.alpha / (0.5 * at.alpha**2 + at.sigma**2))

    def reward(x):
        return -0.25 * x.square().sum(1)

    process = steer.from_denoiser(denoiser, steer.VP(), 100, event=(2,))
    one = torch.ones(1, 1, 2)
    predicted = [process.denoise(one, k) for k in range(process.steps)]
    laws = [process.transition(one, x0, k) for k, x0 in enumerate(predicted)]
    moves = [(float(law.mean[0, 0, 0]), law.std) for law in laws]
    shrinkage = [*(float(x0[0, 0, 0]) for x0 in predicted), 1.0]
    weight = steer.difference(at=range(process.steps))

    class Chain(peer.FeynmanKac):
        def M0(self, N):
            return process.levels[0].sigma * np.random.randn(N, 2)  # noqa: NPY002, what particles draws by itself

        def M(self, t, xp):
            scale, std = moves[t - 1]
            return scale * xp + std * np.random.randn(*xp.shape)  # noqa: NPY002

        def value(self, t, x):
            x0 = shrinkage[t] * x
            return -0.25 * (x0 * x0).sum(1)

        def logG(self, t, xp, x):
            return self.value(t, x) - (0.0 if t == 0 else self.value(t - 1, xp))

    evidence: dict[str, list[float]] = {"steer": [], "particles": []}

    def steered():
        key = len(evidence["steer"])
        result = steer.smc(process, reward, particles=particles, weight=weight, key=key)
        evidence["steer"].append(result.log_evidence.item())

    def peers():
        run = peer.SMC(fk=Chain(T=process.steps + 1), N=particles, resampling="systematic", ESSrmin=0.5)
        run.run()
        evidence["particles"].append(run.logLt)

    with torch.no_grad():
        runs = {"steer": steered, "particles": peers, "bare": lambda: bare_loop(process, reward, 1, particles)}
        best = fastest(runs, rounds)
    figures = {f"{name}_us": seconds / process.steps * 1e6 for name, seconds in best.items()}
    figures["ratio"] = best["steer"] / best["particles"]
    return figures | {f"log_evidence_{name}": sum(found) / len(found) for name, found in evidence.items()}


def resampling(rounds: int) -> dict[str, float]:
    """One systematic resampling of 16 problems x 8 particles, indices only."""
    log_weight, key = steer.Key(0).normal((16, 8)), steer.Key(1)

    def resample():
        for step in range(100):
            steer.systematic(log_weight, key.at(step), 8)

    def torchs_own():
        for _ in range(100):
            torch.multinomial(torch.softmax(log_weight, 1), 8, replacement=True)

    best = fastest({"steer": resample, "torch.multinomial": torchs_own}, rounds)
    return {"steer_us": best["steer"] * 1e4, "torch_multinomial_us": best["torch.multinomial"] * 1e4}


SAMPLERS: dict[str, Callable[..., object]] = {
    "smc": steer.smc,
    "smc, guided": partial(steer.smc, proposal=steer.guided(1.0)),
    "fk_steering": steer.fk_steering,
    "tds": steer.tds,
    "das": steer.das,
    "psi": steer.psi,
    "fkc, kernel ratio": steer.fkc,
    "fkc, annealing": lambda process, reward, **options: steer.fkc(process, exponent=2.0, **options),
    "driftlite, vcg": steer.driftlite,
    "driftlite, ecg": partial(steer.driftlite, control="ecg"),
    "particle_gibbs": steer.particle_gibbs,
    "waste_free": steer.waste_free,
}


def samplers(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds per step of every sampler at 8 x 8 particles, what that adds to SMC, and exponents of growth."""
    process = steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), 40, event=(64,))
    figures: dict[str, dict[str, float]] = {}
    shapes = {"8x8": (8, 8), "8x512": (8, 512), "8x2048": (8, 2048), "128x32": (128, 32), "512x32": (512, 32)}
    runs = {
        (name, shape): partial(sampler, process, lambda x: x.mean(1), batch=batch, particles=count, temperature=0.05)
        for name, sampler in SAMPLERS.items()
        for shape, (batch, count) in shapes.items()
    }
    best = fastest(runs, rounds)
    for name in SAMPLERS:
        base, smc = best[name, "8x8"], best["smc", "8x8"]
        figures[name] = {
            "us_per_step": base / process.steps * 1e6,
            "added_to_smc_us": (base - smc) / process.steps * 1e6,
            "growth_in_particles": math.log(best[name, "8x2048"] / best[name, "8x512"], 4),
            "growth_in_problems": math.log(best[name, "512x32"] / best[name, "128x32"], 4),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--samplers", action="store_true", help="every sampler beside smc too (minutes)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    figures = {
        "mixture N=4096 (goal ratio <= 1.16)": mixture(arguments.rounds),
        "null network 8x8, 8x8x1 (goal added <= 110 us, kernels <= 50, reads 2)": null_network(arguments.rounds),
        "systematic resampling 16x8 (goal <= 30 us)": resampling(arguments.rounds),
    }
    if importlib.util.find_spec("particles") is not None:
        for count in (256, 4096, 65_536):
            name = f"linear-Gaussian model, N={count} (goal steer below particles)"
            figures[name] = linear_gaussian(count, arguments.rounds)
    if arguments.samplers:
        figures |= {f"sampler {name}": figure for name, figure in samplers(arguments.rounds).items()}
    for name, figure in figures.items():
        print(name)
        print("   " + "  ".join(f"{key} {value:.4g}" for key, value in figure.items()))
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        arguments.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
