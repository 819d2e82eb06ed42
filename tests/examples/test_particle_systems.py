"""The particle systems of examples/train: energies, chains and the symmetries of their networks."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import steer

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES / "train"))
import particle_systems as particles  # noqa: E402


@pytest.fixture(params=["dw4", "lj13"])
def system(request):
    return particles.SYSTEMS[request.param]


def random_network(system):
    """With every weight drawn, so that nothing is zero by initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = particles.Network(system)
        for weight in network.parameters():
            weight.data = torch.randn_like(weight) * 0.2
    return network.requires_grad_(False)


def test_energies():
    square = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]], dtype=torch.float64)
    diagonal = 4.0 * math.sqrt(2.0) - 4.0
    assert particles.SYSTEMS["dw4"].energy(square) == pytest.approx(2.0 * (0.9 * diagonal**4 - 4.0 * diagonal**2))
    assert particles.lennard_jones(torch.tensor(1.0)) == -2.0  # every pair twice, well depth 1 at distance 1


def test_states_are_isometric_coordinates(system):
    x = steer.Key(0).normal((1, 5, system.particles, system.dims))[0] + 3.0
    back = system.positions(system.states(x))
    torch.testing.assert_close(back, x - x.mean(1, keepdim=True))
    torch.testing.assert_close(system.scale * system.states(x).flatten(1).norm(dim=1), back.flatten(1).norm(dim=1))


def test_networks_are_equivariant(system):
    network, sigma = random_network(system), torch.tensor([0.7])
    x = steer.Key(1).normal((1, 6, system.particles, system.dims), dtype=torch.float32)[0]
    turn = torch.linalg.qr(steer.Key(2).normal((1, system.dims, system.dims), dtype=torch.float32)[0]).Q
    order = torch.randperm(system.particles, generator=torch.Generator().manual_seed(3))

    def predicted(positions):
        return system.positions(network(system.states(positions), sigma))

    assert (predicted(x) - x / 1.49).abs().max() > 0.1  # more than the skip connection
    torch.testing.assert_close(predicted(x @ turn), predicted(x) @ turn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predicted(x[:, order]), predicted(x)[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predicted(x + 5.0), predicted(x), atol=1e-3, rtol=1e-3)


def test_chains_reach_their_law():
    trapped = replace(particles.SYSTEMS["dw4"], pair=torch.zeros_like, trap=1.0, scale=1.0)
    states = particles.metropolis(
        trapped, lambda x: -0.5 * trapped.energy(x), steer.Key(4), chains=2000, sweeps=60, keep=1
    ).flatten()
    assert abs(float(states.mean())) < 4.0 * math.sqrt(2.0 / len(states))
    assert abs(float(states.var()) - 2.0) < 4.0 * 2.0 * math.sqrt(2.0 / len(states))


def test_stored_denoiser():
    system = particles.SYSTEMS["dw4"]
    if not (particles.ASSETS / system.name / "model.safetensors").exists():
        pytest.skip("no stored weights; python examples/train/particle_systems.py dw4")
    network = particles.load(system)
    run = {"chains": 500, "sweeps": 300, "keep": 1}
    clean = particles.metropolis(system, lambda x: -0.5 * system.energy(x), steer.Key(5), **run).float()
    noisy = clean + 0.1 * steer.Key(6).normal((1, *clean.shape), dtype=torch.float32)[0]
    error = (network(noisy, torch.tensor([0.1])) - clean).square().mean()
    assert error < 0.9 * 0.01 / 1.01  # what shrinking alone, the best without knowledge of the energy, leaves
