"""Starts that only call the reward: stationary laws, the law of what begins there, costs, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from exact import LIMIT, exact_chain, z
from mcmc_starts import flat_process
from mcmc_starts import run_start as run

import steer
from steer.core.objective import open_objective
from steer.key import Key
from steer.models import GaussianMixture
from steer.particles import metropolis_hastings
from steer.particles.black_box_starts import EllipticalSlice

STARTS = {"pcn": steer.pcn, "slice": steer.elliptical_slice}
DATA = GaussianMixture(torch.tensor([[0.3, -0.2]]), torch.eye(2)[None] * 0.49)


class Tilted:
    """r(x) = -4 |x_1..k - 1|^2 / 2, of a number without a gradient: coordinates 1..k become N(.8, .2)."""

    def __init__(self, rank):
        self.rank, self.calls = rank, 0

    def __call__(self, x):
        self.calls += len(x)
        values = x.detach().numpy().reshape(len(x), -1)[:, : self.rank]
        return torch.from_numpy(-2.0 * ((values - 1.0) ** 2).sum(1))


def worst_of_stationary_law(start, size=16, rank=4, batch=256):
    """Worst |z| of mean and variance of tilted and free coordinates, over problems of one particle each."""
    state, _ = run(start, flat_process(size), Tilted(rank), batch=batch, particles=1)
    x = state.x[:, 0]
    tilted, free = x[:, :rank], x[:, rank : rank + 4]
    return max(abs(z(v.mean(1))) for v in (tilted - 0.8, (tilted - 0.8) ** 2 - 0.2, free, free**2 - 1.0))


@pytest.mark.parametrize("name", STARTS)
def test_stationary_law(name):
    assert worst_of_stationary_law(STARTS[name](chains=2, burn_in=60, kept=1)) < LIMIT


@pytest.mark.parametrize("name", STARTS)
def test_stationary_law_of_a_prior_with_moments_of_its_own(name):
    """N(3, 4) times exp(-4 (x - 1)^2 / 2) has precision 4.25 and mean 4.75 / 4.25."""
    process = replace(flat_process(8), initial=(torch.full((1, 1, 8), 3.0), 2.0))
    state, _ = run(STARTS[name](chains=2, burn_in=60, kept=1), process, Tilted(2), batch=256, particles=1)
    tilted = state.x[:, 0, :2] - 4.75 / 4.25
    assert abs(z(tilted.mean(1))) < LIMIT
    assert abs(z((tilted**2 - 1 / 4.25).mean(1))) < LIMIT


def test_a_slice_of_few_tries_keeps_the_law():
    assert worst_of_stationary_law(steer.elliptical_slice(chains=2, burn_in=120, kept=1, tries=2)) < LIMIT


@pytest.mark.parametrize("name", ["everything", "forgets where it stands"])
def test_mutants_of_pcn_are_rejected(monkeypatch, name):
    ratios = {
        "everything": lambda move, here, there: torch.full_like(here.value, torch.inf),
        "forgets where it stands": lambda move, here, there: there.value,
    }
    monkeypatch.setattr(metropolis_hastings, "log_acceptance", ratios[name])
    assert worst_of_stationary_law(steer.pcn(chains=2, burn_in=60, kept=1)) > LIMIT


def test_mutant_bracket_without_the_state_is_rejected(monkeypatch):
    """Angles drawn anew in a bracket that leaves out 0, where the chain stands, favour what is far."""

    class Wrong(EllipticalSlice):
        def step(self, tilt, at, log_size, key):
            class Shifted:
                def __init__(self, key):
                    self.key = key

                def fold(self, name):
                    return (
                        Shifted(self.key.fold(name))
                        if not str(name).startswith("angle ")
                        else Half(self.key.fold(name))
                    )

                def normal(self, *args, **options):
                    return self.key.normal(*args, **options)

                def uniform(self, *args, **options):
                    return self.key.uniform(*args, **options)

            class Half(Shifted):
                def uniform(self, *args, **options):
                    return 0.9 + 0.1 * self.key.uniform(*args, **options)

            return super().step(tilt, at, log_size, Shifted(key))

    start = replace(steer.elliptical_slice(chains=2, burn_in=60, kept=1), kernel=Wrong())
    assert worst_of_stationary_law(start) > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_stationary_law_at_4096_coordinates(name):
    start = STARTS[name](chains=16, burn_in=80, kept=1)
    state, _ = run(start, flat_process(4096, torch.float32), Tilted(10), batch=4, particles=16)
    tilted = state.x[..., :10].double().mean(2).flatten() - 0.8
    assert abs(z(tilted)) < LIMIT
    assert float(state.diagnostics["acceptance"].mean()) > 0.2


def flow_map(process):
    """An affine predictor, and the law of x0 that it makes of the prior."""
    level = process.levels[0]

    def predict(x):
        return 0.3 + 0.7 / math.hypot(0.7 * level.alpha, level.sigma) * (x - 0.3 * level.alpha)

    return predict


@pytest.mark.parametrize("budget", [60, 100, 301])
@pytest.mark.parametrize("name", STARTS)
def test_the_ledger_is_what_was_called_and_within_the_budget(name, budget):
    process, tilt = exact_chain(DATA, "vp", 4), Tilted(1)
    cost = steer.psi(process, tilt, budget=budget, start=STARTS[name](x0_predictor=flow_map(process), chains=3)).cost
    assert cost.nfe <= budget
    assert cost.rewards == tilt.calls
    assert cost.grads == 0


def test_pcn_leads_its_step_to_the_acceptance_and_no_further():
    state, _ = run(steer.pcn(chains=8, burn_in=200, kept=100), flat_process(64), Tilted(10), batch=4, particles=8)
    assert float((state.diagnostics["acceptance"] - 0.35).abs().max()) < 0.1
    flat, _ = run(
        steer.pcn(chains=8, burn_in=50, kept=1), flat_process(64), lambda x: 0.0 * x[:, 0], batch=4, particles=8
    )
    assert flat.diagnostics["step_size"].tolist() == pytest.approx([0.8] * 4)


def test_slice_chains_in_a_batch_are_the_chains_alone():
    """Rows of a call hold the chains that are still open; which others are is nothing to a chain."""
    batch, _ = run(
        steer.elliptical_slice(chains=3, burn_in=5, kept=2), flat_process(6), Tilted(3), batch=4, particles=6
    )
    process, objective, _ = open_objective(flat_process(6), Tilted(3))
    start = steer.elliptical_slice(chains=3, burn_in=5, kept=2, temperature=1.0)
    alone = start(process, objective, Key(0).shifted(problem=2), 1, 6)
    assert torch.equal(batch.x[2:3], alone.x)


def test_refusals():
    vp = exact_chain(DATA, "vp", 4)
    same = replace(vp, denoiser=lambda x, t: torch.zeros_like(x) + 1.0)
    for start in STARTS.values():
        with pytest.raises(steer.StateSpaceError, match=r"same prediction for every x.*x0_predictor="):
            steer.smc(same, lambda x: x[:, 0], particles=4, start=start(burn_in=2, kept=2))
    with pytest.raises(steer.SteerError, match="b of sqrt"):
        steer.pcn(step_size=1.5)
    with pytest.raises(steer.SteerError, match="at least one point"):
        steer.elliptical_slice(tries=0)
    with pytest.raises(steer.NotDifferentiableError, match=r"start=steer\.pcn"):
        steer.psi(vp, steer.rewards.JPEGSize(), budget=100)
