"""Train the denoisers of two particle systems, DW-4 and LJ-13, that `examples/benchmarks/driftlite_dw4.py` steers.

    python examples/train/particle_systems.py dw4
    python examples/train/particle_systems.py lj13

DW-4: four particles in the plane, E = sum_{i<j} [0.9 (d_ij - 4)^4 - 4 (d_ij - 4)^2]. LJ-13: thirteen in space,
E = 2 sum_{i<j} [d_ij^-12 - 2 d_ij^-6] + sum_i |x_i - mean|^2 / 2 (every pair counted twice, as bgflow does). Both are
from Köhler, Klein and Noé 2020 (Equivariant flows, 2006.02425), in the forms of Ren et al. 2025 (DriftLite,
2509.21655). Data are states of a long run of parallel Metropolis chains at temperature 2.

Energies see no translation, so configurations have mean zero: a subspace of dimension (n - 1) d. States here are its
coordinates (n - 1, d) in an orthonormal basis, divided by `scale` (unit variance per coordinate), where densities and
divergences exist. The network turns them into positions, is equivariant under rotations, reflections and permutations
of these (an EGNN: Satorras, Hoogeboom and Welling 2021, 2102.09844), and predicts E[x_0 | x_0 + sigma eps] with the
preconditioning of Karras et al. 2022 (EDM), adapted to low noise.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import steer

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMA_DECAY = 0.999
SIGMAS = (-1.2, 1.5)  # mean and standard deviation of log sigma in training, sigma in units of the data's


@dataclass(frozen=True)
class System:
    """Particles that attract and repel in pairs.

    pair:  energy of a pair by its distance.      trap: times |x - mean|^2 / 2, added to the energy.
    scale: standard deviation of a coordinate at temperature 2, the unit of the network's states.
    stiffness: of the energy in its wells, over 2 and in that unit, for the loss.
    """

    name: str
    particles: int
    dims: int
    pair: Callable[[Tensor], Tensor]
    trap: float
    scale: float
    stiffness: float
    width: int
    layers: int

    @property
    def event(self) -> tuple[int, int]:
        return self.particles - 1, self.dims

    def basis(self) -> Tensor:
        """Orthonormal basis (n, n - 1) of mean-free vectors: Helmert's."""
        n = self.particles
        rows = [[1.0] * k + [-float(k)] + [0.0] * (n - k - 1) for k in range(1, n)]
        basis = torch.tensor(rows, dtype=torch.float64).T
        return basis / basis.norm(dim=0)

    def positions(self, state: Tensor) -> Tensor:
        """Mean-free positions (..., n, d) of states (..., n - 1, d)."""
        return self.scale * (self.basis().to(state) @ state)

    def states(self, x: Tensor) -> Tensor:
        """States (..., n - 1, d) of positions (..., n, d), whatever their mean."""
        return self.basis().to(x).mT @ x / self.scale

    def distances(self, x: Tensor) -> Tensor:
        """(..., n (n - 1) / 2) distances within positions (..., n, d)."""
        i, j = torch.triu_indices(self.particles, self.particles, 1)
        return (x[..., i, :] - x[..., j, :]).norm(dim=-1)

    def energy(self, x: Tensor) -> Tensor:
        """Energies (...) of positions (..., n, d)."""
        centred = x - x.mean(-2, keepdim=True)
        return self.pair(self.distances(x)).sum(-1) + 0.5 * self.trap * centred.square().sum((-1, -2))


def double_well(d: Tensor) -> Tensor:
    """0.9 (d - 4)^4 - 4 (d - 4)^2."""
    square = (d - 4.0).square()
    return 0.9 * square.square() - 4.0 * square


def lennard_jones(d: Tensor) -> Tensor:
    """2 (d^-12 - 2 d^-6)."""
    sixth = d.pow(-6)
    return 2.0 * (sixth.square() - 2.0 * sixth)


SYSTEMS = {
    "dw4": System("dw4", 4, 2, double_well, 0.0, 2.1, 40.0, width=32, layers=3),
    "lj13": System("lj13", 13, 3, lennard_jones, 1.0, 1.25, 150.0, width=32, layers=3),
}


def metropolis(
    system: System, log_density: Callable[[Tensor], Tensor], key: steer.Key, *, chains: int, sweeps: int, keep: int
) -> Tensor:
    """States (chains * keep, n - 1, d) of Metropolis chains: `keep` of each, evenly over the second half.

    A sweep moves every particle once, by a Gaussian whose width, of the chain and the move, is log-uniform from .05 to
    3: small steps inside wells, large ones between them. Chains start widely spread.
    log_density: of positions (chains, n, d), up to a constant.
    """
    n, d = system.particles, system.dims
    generator = torch.Generator().manual_seed(int(key.fold("metropolis").uniform((1, 1, 1)).item() * 2**53))
    x = system.scale * 1.5 * torch.randn((chains, n, d), generator=generator, dtype=torch.float64)
    value, kept = log_density(x), []
    marks = {sweeps - 1 - (sweeps // 2 * i) // keep for i in range(keep)}
    for sweep in range(sweeps):
        for i in range(n):
            width = torch.exp(torch.empty(chains, 1).uniform_(math.log(0.05), math.log(3.0), generator=generator))
            moved = x.clone()
            moved[:, i] += width.double() * torch.randn((chains, d), generator=generator, dtype=torch.float64)
            there = log_density(moved)
            accept = torch.rand(chains, generator=generator, dtype=torch.float64).log() < there - value
            x = torch.where(accept[:, None, None], moved, x)
            value = torch.where(accept, there, value)
        x = x - x.mean(1, keepdim=True)
        if sweep in marks:
            kept.append(system.states(x))
    return torch.cat(kept)


def reach(sigma: Tensor, stiffness: float) -> Tensor:
    """The order of E[x_0 | x] - x / (1 + sigma^2): EDM's coefficient where noise blurs the wells, sigma^2 below."""
    return sigma.square() / ((1.0 + sigma.square()) * (sigma.square() + 1.0 / stiffness)).sqrt()


class Network(nn.Module):
    """E[state | state + sigma eps] for states (M, n - 1, d), equivariant in positions."""

    def __init__(self, system: System):
        super().__init__()
        width = system.width
        self.stiffness = system.stiffness
        self.register_buffer("basis", system.basis().float(), persistent=False)
        self.clock = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(system.layers))

    def forward(self, state: Tensor, sigma: Tensor) -> Tensor:
        """States (M, n - 1, d) at noise sigma, (M,) or (1,) in units of the data's standard deviation."""
        sigma = sigma.to(state)[:, None, None]
        total = 1.0 + sigma.square()
        x = self.basis @ (state / total.sqrt())
        phase = sigma[:, :, 0].log() * 2.0 ** torch.arange(-3.0, 1.0)
        clock = self.clock(torch.cat([sigma[:, :, 0].log() / 4.0, phase.sin(), phase.cos()], 1))
        feature, start = clock[:, None].expand(len(state), x.shape[1], -1), x
        for layer in self.layers:
            x, feature = layer(x, feature)
        moved = self.basis.mT @ (x - start)
        return state / total + reach(sigma, self.stiffness) * moved


class Layer(nn.Module):
    """One round of messages between all pairs of particles."""

    def __init__(self, width: int):
        super().__init__()
        self.sender, self.receiver = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.distance = nn.Linear(len(CENTRES) + 1, width, bias=False)
        self.message = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.pull = nn.Linear(width, 1)
        self.update = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.pull.weight)
        nn.init.zeros_(self.pull.bias)

    def forward(self, x: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (M, n, d) and features (M, n, width) after the round."""
        apart = x[:, :, None] - x[:, None]
        square = apart.square().sum(3, keepdim=True)
        ramp = (square + 0.01).sqrt()
        bumps = (-0.5 * ((ramp - x.new_tensor(CENTRES)) / SPREAD).square()).exp()
        between = self.sender(feature)[:, :, None] + self.receiver(feature)[:, None]
        message = self.message(between + self.distance(torch.cat([ramp, bumps], 3)))
        moved = x + (self.pull(message) * apart).mean(2)
        return moved, feature + self.update(torch.cat([feature, message.mean(2)], 2))


CENTRES, SPREAD = tuple(0.3 * i for i in range(1, 12)), 0.3


class Lesson(NamedTuple):
    """Clean states and the gradients of their log-density, (M, n - 1, d) each."""

    clean: Tensor
    score: Tensor

    def some(self, count: int) -> Lesson:
        """Rows drawn at random."""
        rows = torch.randint(len(self.clean), (count,))
        return Lesson(self.clean[rows], self.score[rows])


def lesson(system: System, states: Tensor) -> Lesson:
    """Equilibrium states at temperature 2 with their scores, in float32."""
    states = states.requires_grad_(True)
    (gradient,) = torch.autograd.grad(system.energy(system.positions(states)).sum(), states)
    return Lesson(states.detach().float(), (-0.5 * gradient).float())


def loss(network: Network, shown: Lesson, stiffness: float) -> Tensor:
    """Mean squared error of E[x_0 | x], in units of `reach`, at random noise levels.

    Both x_0 and x + sigma^2 grad log p(x_0) have this mean given x (target score matching: De Bortoli et al. 2024,
    2402.08667). Regression is on the mixture that has no variance at all for data N(0, 1 / stiffness).
    """
    sigma = (SIGMAS[0] + SIGMAS[1] * torch.randn(len(shown.clean))).exp()[:, None, None]
    noisy = shown.clean + sigma * torch.randn_like(shown.clean)
    share = sigma.square() * stiffness / (1.0 + sigma.square() * stiffness)
    aim = share * shown.clean + (1.0 - share) * (noisy + sigma.square() * shown.score)
    error = (network(noisy, sigma[:, 0, 0]) - aim).square()
    return (error / reach(sigma, stiffness).square()).mean()


def train(
    system: System, data: Lesson, held_out: Lesson, *, steps: int, batch: int, seed: int
) -> tuple[Network, float]:
    """The moving average of a network's weights, trained by Adam on states, and its loss on held-out ones."""
    torch.manual_seed(seed)
    network = Network(system)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05, cycle_momentum=False)
    unseen = math.nan
    for step in range(1, steps + 1):
        value = loss(network, data.some(batch), system.stiffness)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if step % 500 == 0 or step == steps:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(0)
                unseen = float(loss(average.module, held_out, system.stiffness))
            print(f"step {step}: train loss {value.item():.4f}, held-out loss {unseen:.4f}", flush=True)
    return average.module.eval().requires_grad_(False), unseen


def load(system: System, folder: Path | None = None) -> Network:
    """The stored network of a system."""
    network = Network(system)
    network.load_state_dict(load_file((folder or ASSETS / system.name) / "model.safetensors"))
    return network.eval().requires_grad_(False)


def process(system: System, network: Network, schedule: steer.VP, times: tuple[float, ...]) -> steer.GaussianProcess:
    """The network on a Gaussian path, with states (n - 1, d)."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma, _, _ = schedule(t)
        return network(x.flatten(0, 1) / alpha, x.new_tensor([sigma / alpha])).view(x.shape)

    return steer.from_denoiser(denoise, schedule, times, event=system.event)


def times(schedule: steer.VP, steps: int, end: float = 2e-3) -> tuple[float, ...]:
    """Levels even in log-SNR from sigma / alpha = 20, about the most that the network has seen."""
    return steer.log_snr_times(schedule, steps, start=steer.schedules.time_at(schedule, math.atan(20.0)), end=end)


@torch.no_grad()
def samples(network: Network, system: System, count: int, key: steer.Key, steps: int = 200) -> Tensor:
    """Unsteered states (count, n - 1, d)."""
    schedule = steer.VP()
    law = process(system, network, schedule, times(schedule, steps))
    return steer.rollout(law, lambda x: torch.zeros(len(x)), particles=count, key=key).x[0].double()


def compared(system: System, ours: Tensor, truth: Tensor) -> dict[str, float]:
    """Wasserstein-1 distances of energies and of interatomic distances; both sets equally weighted states."""
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000

    def gap(a: Tensor, b: Tensor) -> float:
        return float((_quantiles(a, grid) - _quantiles(b, grid)).abs().mean())

    left, right = system.positions(ours), system.positions(truth)
    return {
        "energy_mean": float(system.energy(left).mean()),
        "energy_mean_true": float(system.energy(right).mean()),
        "energy_w1": gap(system.energy(left), system.energy(right)),
        "distance_w1": gap(system.distances(left).flatten(), system.distances(right).flatten()),
    }


def _quantiles(values: Tensor, at: Tensor) -> Tensor:
    return values.sort().values[(at * len(values)).long()]


CARD = """---
license: mit
library_name: steer
tags: [particles, equivariant, diffusion]
---

# {name}

The denoiser E[x_0 | x_0 + sigma eps] of {particles} particles in {dims} dimensions at temperature 2, with
{energy} (Köhler, Klein and Noé 2020, 2006.02425), in {size} mean-free coordinates of unit variance.
An EGNN with {parameters:,} parameters ({layers} layers of width {width}); see `Network` in
`examples/train/particle_systems.py`, which made it:

    python examples/train/particle_systems.py {name}

- Data: {data:,} states of {chains} Metropolis chains of {sweeps} sweeps, from their second half.
- Training: Adam, {steps} steps of {batch} states, one cycle to 3e-3; log sigma ~ N({SIGMAS[0]}, {SIGMAS[1]}^2);
  regression on x_0 and on the score of x_0 mixed (see `loss`); moving average {EMA_DECAY}. Data took
  {data_seconds:.0f} s, training {train_seconds:.0f} s on one (busy) CPU core.
- Held-out loss {held_out_loss:.4f}.

Measured, {samples:,} unsteered samples (200 ancestral steps) beside fresh states of other chains: mean energy
{energy_mean:.3f} (true {energy_mean_true:.3f}), Wasserstein-1 distance of energies {energy_w1:.3f} and of interatomic
distances {distance_w1:.4f}; between two sets of true states {energy_w1_floor:.3f} and {distance_w1_floor:.4f}.

For tests and benchmarks of sampling methods only.
"""


def main() -> None:
    """Data, training, measures and card of one system."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SYSTEMS)
    parser.add_argument("--steps", type=int, default=20000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--chains", type=int, default=4000)
    parser.add_argument("--sweeps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets the model's folder")
    parser.add_argument("--measure-only", action="store_true", help="measure the stored one, do not train")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    system, folder, key = SYSTEMS[arguments.name], arguments.out / arguments.name, steer.Key(arguments.seed)

    def equilibrium(name: str, chains: int, keep: int) -> Tensor:
        run = {"chains": chains, "sweeps": arguments.sweeps, "keep": keep}
        return metropolis(system, lambda x: -0.5 * system.energy(x), key.fold(name), **run)

    began = time.perf_counter()
    truth, others = equilibrium("truth", arguments.chains, 1), equilibrium("others", arguments.chains, 1)
    facts = {"chains": arguments.chains, "sweeps": arguments.sweeps, "steps": arguments.steps, "batch": arguments.batch}
    if arguments.measure_only:
        facts |= json.loads((folder / "metrics.json").read_text())
    else:
        data = equilibrium("data", arguments.chains, 50)
        print(f"{len(data)} states, standard deviation {data.std():.3f}", flush=True)
        facts |= {"data": len(data), "data_seconds": time.perf_counter() - began}
        began = time.perf_counter()
        network, unseen = train(
            system, lesson(system, data), lesson(system, others),
            steps=arguments.steps, batch=arguments.batch, seed=arguments.seed,
        )  # fmt: skip
        facts |= {"held_out_loss": unseen, "train_seconds": time.perf_counter() - began}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), folder / "model.safetensors")
    network = load(system, folder)
    floor = compared(system, others.detach(), truth)
    facts |= compared(system, samples(network, system, len(truth), key.fold("samples")), truth)
    facts |= {f"{name}_floor": floor[name] for name in ("energy_w1", "distance_w1")} | {"samples": len(truth)}
    (folder / "metrics.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(
        CARD.format(
            **facts, name=system.name, particles=system.particles, dims=system.dims, energy=ENERGIES[system.name],
            size=math.prod(system.event), layers=system.layers, width=system.width, SIGMAS=SIGMAS, EMA_DECAY=EMA_DECAY,
            parameters=sum(p.numel() for p in network.parameters()),
        )
    )  # fmt: skip
    print(json.dumps(facts, indent=2))


ENERGIES = {
    "dw4": "E = sum over pairs of 0.9 (d - 4)^4 - 4 (d - 4)^2",
    "lj13": "E = 2 sum over pairs of d^-12 - 2 d^-6, plus half the squared distances to the mean",
}

if __name__ == "__main__":
    main()
