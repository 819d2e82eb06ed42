"""The second-order rule: its formula, and the law of its chain of pairs. What is remembered: test_remembering.py.

Statistics are over independent problems: |z| < 4. With Gaussian data every step is affine in the state and the
remembered prediction, so `steer.models.chain_law` has the distribution of the last state. Mutants are put to the same
tests.
"""

import math
from dataclasses import replace

import pytest
import torch
from exact import LIMIT, PATHS, exact_chain, mixture_2d, worst, z_scores
from second_order_models import REWARD, gaussian, score

import steer
from steer import search
from steer.core.trajectory import Trajectory
from steer.models import chain_law
from steer.particles.path_mcmc import PathMoves
from steer.processes.second_order import ScaledNoise, SecondOrderProcess

# -- the formula


def by_the_book(x, x0, before, levels, tau):
    """The step of the docstring of second_order.py, literally: levels k - 1, k, k + 1."""
    lam = [math.log(level.alpha / level.sigma) for level in levels]
    h, r = lam[2] - lam[1], lam[1] - lam[0]
    here, there = levels[1:]
    a = (1.0 + tau**2) * h
    c = (1.0 - math.exp(-a)) * h / 2.0
    mean = math.exp(-(tau**2) * h) * there.sigma / here.sigma * x + there.alpha * (1.0 - math.exp(-a)) * x0
    mean = mean + there.alpha * c * (x0 - before) / r
    return mean, there.sigma * math.sqrt(1.0 - math.exp(-2.0 * tau**2 * h))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("path", PATHS)
def test_steps_are_those_of_the_formula(path, tau):
    process = gaussian(path, steer.second_order(tau))
    for k in range(1, process.steps - 1):
        x, x0, before = (steer.Key(k).fold(name).normal((2, 3, 2)) for name in ("x", "x0", "before"))
        step = process.transition(torch.stack([x, before], 2), x0, k)
        mean, std = by_the_book(x, x0, before, process.levels[k - 1 : k + 2], tau)
        torch.testing.assert_close(step.mean, mean, rtol=1e-12, atol=1e-12)
        assert step.std == pytest.approx(std, rel=1e-12, abs=1e-15)
        assert torch.equal(step.memory, x0)


@pytest.mark.parametrize("path", PATHS)
def test_without_a_memory_it_is_the_rule_of_first_order(path):
    """tau = 1 is ancestral sampling, tau = 0 the ODE; so are the first step, and the first after going back."""
    for tau, rule in ((1.0, steer.ddim(1.0)), (0.0, steer.ode())):
        process, plain = gaussian(path, steer.second_order(tau)), gaussian(path, rule)
        for k in range(process.steps):
            x, x0 = steer.Key(k).normal((2, 3, 2)), steer.Key(k).fold("x0").normal((2, 3, 2))
            step, first = process.transition(process.begun(x), x0, k), plain.transition(x, x0, k)
            torch.testing.assert_close(step.mean, first.mean, rtol=1e-12, atol=1e-12)
            assert step.std == pytest.approx(first.std, rel=1e-9, abs=1e-12)


def test_what_ends_at_infinity_is_of_first_order():
    """From alpha = 0, with alpha = 0 behind, and to sigma = 0; nothing is NaN."""
    flow = steer.models.gaussian(
        [0.0], 1.0, schedule=steer.RectifiedFlow(), times=[1.0, 0.8, 0.5, 0.0], transition=steer.second_order()
    )
    assert flow.levels[0].alpha == 0.0
    assert [flow._factors[k] for k in (0, 1, 2)] == [0.0, 0.0, 0.0]
    assert steer.rollout(flow, score, particles=8).x.isfinite().all()
    pure = gaussian("flow", steer.second_order(0.0)).base.with_times([1.0, 0.6, 0.0])
    x, x0 = torch.ones(1, 1, 2).double(), torch.full((1, 1, 2), 3.0).double()
    torch.testing.assert_close(pure.transition(x, x0, 0).mean, 0.6 * x + 0.4 * x0)


def test_tau_by_level():
    """A function of the level is asked at every step, and checked."""
    process = gaussian(rule=steer.second_order(lambda here: 1.0 if here.sigma > here.alpha else 0.0))
    noisy = [process.stochastic(k) for k in range(process.steps)]
    assert noisy == [level.sigma > level.alpha for level in process.levels[:-1]]
    assert any(noisy)
    assert not all(noisy)
    with pytest.raises(steer.SteerError, match="at least 0"):
        gaussian(rule=steer.second_order(lambda here: -1.0)).stochastic(0)
    with pytest.raises(steer.SteerError, match="at least 0"):
        steer.second_order(-0.5)


def test_the_shipped_check_accepts_it():
    assert steer_check(steer.second_order(0.5)) < LIMIT


def steer_check(rule):
    from steer.testing import check_rule

    return check_rule(rule, runs=128)


# -- the law of the chain


def test_moments_of_the_pair():
    """The recursion of state and remembered prediction, written out for one dimension; ancestral steps are far off."""
    process = steer.models.gaussian([0.0], 0.75, steps=12, transition=steer.second_order(), dtype=torch.float64)
    xx = process.levels[0].sigma ** 2
    xh = hh = 0.0
    for k in range(process.steps):
        here, there = process.levels[k : k + 2]
        c = here.alpha * 0.75 / (here.alpha**2 * 0.75 + here.sigma**2)
        std = process.rule.std(here, there)
        keep = math.sqrt(there.sigma**2 - std**2) / here.sigma
        on = there.alpha - keep * here.alpha
        g = on * process._factors[k]
        u = keep + (on + g) * c
        xx, xh, hh = (
            u**2 * xx - 2 * u * g * xh + g**2 * hh + std**2,
            u * c * xx - g * c * xh,
            c**2 * xx,
        )
    assert float(chain_law(process).covs) == pytest.approx(xx, rel=1e-12)
    assert xx == pytest.approx(0.6916, abs=5e-5)
    x = steer.rollout(process, score, particles=20000, keep_states=False).x
    assert abs(float(x.var()) - xx) < LIMIT * xx * math.sqrt(2.0 / 20000)


def test_twenty_steps_do_what_eighty_ancestral_ones_do():
    """16 variances from .01 to 2 on VP: the Frechet distance of the chain's law to the data."""
    variances = torch.logspace(-2, math.log10(2.0), 16, dtype=torch.float64)

    def distance(rule, steps):
        process = steer.models.gaussian(torch.zeros(16), variances.diag(), steps=steps, transition=rule)
        law = chain_law(process).covs[0].diagonal()
        return float((law.sqrt() - variances.sqrt()).square().sum().sqrt())

    assert distance(steer.second_order(), 20) < distance(steer.ddim(1.0), 80)
    assert distance(ScaledNoise(0.5), 20) > distance(steer.ddim(1.0), 80)  # the mutant: the noise alone does not do it


def moving(at):
    return steer.resample(moves=PathMoves(frozenset(at), 4, 0.05))


RUNS = {
    "bootstrap": {},
    "guided": {"proposal": steer.guided(0.2)},
    "twisted": {"proposal": steer.twisted(0.2)},
    "tempered": {"weight": steer.difference(tempering=steer.geometric_tempering(0.1))},
    "tempered by the signal": {"weight": steer.difference(tempering=steer.snr_share)},
    "moved paths": {"selection": moving([4, 8])},
    "every step": {"selection": steer.resample(threshold=1.0)},
}


def worst_of(method, process, law, batch=512, particles=12, key=1, **options):
    return worst(z_scores(method(process, REWARD, batch=batch, particles=particles, key=key, **options), law))[0]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("path", PATHS)
def test_law_of_smc(path, run):
    process = gaussian(path)
    assert worst_of(steer.smc, process, chain_law(process).exact(REWARD), **RUNS[run]) < LIMIT


def test_law_of_a_noise_that_depends_on_the_level():
    process = gaussian(rule=steer.second_order(lambda here: here.sigma / (here.alpha + here.sigma)))
    law = chain_law(process).exact(REWARD)
    assert worst_of(steer.smc, process, law, batch=2048, particles=16) < LIMIT
    other = gaussian(rule=steer.second_order(1.0))  # the mutant: the same noise everywhere
    assert worst_of(steer.smc, other, law, batch=2048, particles=16) > LIMIT


def test_law_of_trees():
    process = gaussian()
    assert worst_of(search.dts, process, chain_law(process).exact(REWARD), particles=16) < LIMIT


def test_law_of_a_chain_that_goes_back():
    """Restarts around the rule, and the rule on restarts, are one process; after going back a step is of order 1."""
    spans = [(0.5, 2.0, 1)]
    process = steer.restart(gaussian(), spans)
    assert isinstance(process, SecondOrderProcess)
    other = steer.restart(gaussian(rule=steer.ddim(1.0)), spans).with_rule(steer.second_order())
    assert process._factors == other._factors
    for k in process.returns:
        assert process._factors[k + 1] == 0.0
        assert process._factors[k] > 0.0
    law = chain_law(process)
    torch.testing.assert_close(law.covs, chain_law(other).covs)
    assert worst_of(steer.smc, process, law.exact(REWARD)) < LIMIT


def stays_behind(monkeypatch):
    """Resampling moves the noisy state, and leaves what it remembers with the particle that is in its place now."""
    take = Trajectory._take

    def mutant(self, index, *args, **options):
        moved = take(self, index, *args, **options)
        if self.x.ndim < 4:
            return moved
        return moved._with(x=torch.stack([moved.x[:, :, 0], self.x[:, : index.shape[1], 1]], 2))

    monkeypatch.setattr(Trajectory, "_take", mutant)


def of_factor(change):
    def mutant(monkeypatch):
        factor = SecondOrderProcess._factor
        monkeypatch.setattr(SecondOrderProcess, "_factor", lambda self, k: change(factor(self, k)))

    return mutant


def tau_for_its_square(monkeypatch):
    """In the noise that is drawn, beside the right mean."""
    step = ScaledNoise.__call__

    def mutant(self, x, x0, *levels):
        return replace(step(self, x, x0, *levels), std=replace(self, tau=self.tau**0.5).std(*levels))

    monkeypatch.setattr(ScaledNoise, "__call__", mutant)


MUTANTS = {
    "the memory stays behind": stays_behind,
    "r taken for h": of_factor(lambda factor: 0.5 if factor else 0.0),
    "the slope forgotten": of_factor(lambda factor: 0.0),
    "the slope's sign": of_factor(lambda factor: -factor),
    "tau for tau^2": tau_for_its_square,
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_mutants_are_rejected(mutant, monkeypatch):
    """The law's test on a process of steps of uneven length."""
    process = gaussian(steps=12)
    law = chain_law(process).exact(REWARD)
    if mutant is not None:
        MUTANTS[mutant](monkeypatch)
    z = worst_of(steer.smc, gaussian(steps=12), law, batch=2048, particles=16, selection=steer.resample(threshold=1.0))
    assert (z < LIMIT) == (mutant is None), z


@pytest.mark.parametrize("behind", [False, True])
def test_a_tree_keeps_the_memory_of_every_node(behind, monkeypatch):
    """The mutant: nodes are expanded with the memory of their neighbours."""
    from steer.search.trees.tree import Tree

    process = gaussian(steps=12)
    if behind:
        states = Tree.states

        def mutant(self, depth, *args):
            held = states(self, depth, *args)
            if depth < self.depth:
                held["x"] = torch.stack([held["x"][:, :, 0], held["x"][:, :, 1].roll(1, 0)], 2)
            return held

        monkeypatch.setattr(Tree, "states", mutant)
    z = worst_of(search.dts, process, chain_law(process).exact(REWARD), batch=1024, particles=32)
    assert (z < LIMIT) != behind, z


def test_exact_steps_stay_what_they_are():
    """A process with exact transitions takes the rule as any other."""
    process = exact_chain(mixture_2d(), "vp", 5).with_rule(steer.second_order())
    assert steer.rollout(process, score, particles=3).x.shape == (1, 3, 2)
