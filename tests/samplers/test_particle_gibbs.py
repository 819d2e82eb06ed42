"""Particle Gibbs: the law of the path is left as it is, at any number of particles, and reached from anywhere else.

An exact path of the target is drawn backwards: x_0 from the tilted data, then the forward process up to noise, of which
the exact chain is the reversal. Replicates are problems; statistics are of x_0 and of a state halfway.
"""

import math

import pytest
import torch
from exact import LIMIT, Linear, exact_chain, z

import steer
from steer.key import Key
from steer.models import GaussianMixture
from steer.samplers import particle_gibbs

DATA = GaussianMixture([[0.4]], [0.8])
REWARD, STEPS, BATCH = Linear([1.6]), 5, 4096
PROCESS = exact_chain(DATA, "vp", STEPS)
TARGET = DATA.exact(REWARD)


def exact_path(key, batch=BATCH):
    """Paths (B, K + 1, 1) of p(path) exp(r(x_0)): the tilted data noised step by step."""
    x = TARGET.mean + TARGET.cov.sqrt() * key.fold("x0").normal((batch, 1, 1))
    states = [x]
    for k in reversed(range(STEPS)):
        states.append(PROCESS.noise(states[-1], k + 1, k, key.fold("noise")))
    return torch.cat(states[::-1], 1)


def halfway():
    """Mean and variance of the target's state at level 3."""
    level = PROCESS.levels[3]
    return level.alpha * TARGET.mean, level.alpha**2 * TARGET.cov + level.sigma**2


def scores(paths):
    """z of mean and variance of the paths' ends and of the states halfway."""
    found = {}
    for name, x, mean, variance in (
        ("end", paths[:, -1], TARGET.mean, TARGET.cov),
        ("halfway", paths[:, 3], *halfway()),
    ):
        found[name] = z((x - mean)[:, 0])
        found[f"variance {name}"] = z(((x - mean) ** 2 - variance)[:, 0])
    return found


def worst(found):
    return max(abs(value) for value in found.values())


def sweep(paths, sweeps, particles, key, **options):
    """The paths after further sweeps, and the result they were drawn from."""
    result = steer.particle_gibbs(
        PROCESS, REWARD, batch=len(paths), particles=particles, sweeps=sweeps, path=paths, key=key, keep_states=True,
        **options,
    )  # fmt: skip
    return steer.draw_path(result.trajectory, key), result


OPTIONS = {
    "default": {},
    "always": {"threshold": 1.0},
    "never": {"threshold": 0.0},
    "guided": {"proposal": steer.guided(0.5)},
    "maximum": {"weight": steer.maximum()},
    "tempered": {"weight": steer.difference(tempering=steer.adaptive_tempering(0.7)), "threshold": 0.8},
}


def test_exact_paths_are_exact():
    assert worst(scores(exact_path(Key(1)))) < LIMIT


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("particles", [2, 5])
def test_the_law_is_left_as_it_is(name, particles):
    """Three sweeps from exact paths: |z| < 4 over 4096 replicates, for the path drawn and for the whole population."""
    paths, result = sweep(exact_path(Key(2).fold(name)), 3, particles, Key(3).fold(name, particles), **OPTIONS[name])
    assert float(result.trajectory.diagnostics["renewed"].mean()) > 0.005
    assert worst(scores(paths)) < LIMIT
    assert abs(z(result.mean(lambda x: x)[:, 0] - TARGET.mean)) < LIMIT
    assert abs(z(result.mean(lambda x: (x - TARGET.mean) ** 2)[:, 0] - TARGET.cov[0])) < LIMIT


def test_mutant_path_not_pinned_is_rejected(monkeypatch):
    """Free runs of few particles, and a path drawn from each: the bias of SMC."""
    monkeypatch.setattr(particle_gibbs.PinnedRule, "__call__", lambda self, *step: self.rule(*step))
    assert worst(scores(sweep(exact_path(Key(2)), 3, 2, Key(3))[0])) > 10.0


def overwritten(resampler):
    """A resampler with slot 0 overwritten, as `conditional_multinomial` is of the multinomial."""

    def conditional(log_weight, key, count):
        ancestors = resampler(log_weight, key, count)
        return torch.cat([torch.zeros_like(ancestors[:, :1]), ancestors[:, 1:]], 1)

    return conditional


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "rejected"),
    [
        (overwritten(steer.multinomial), False),
        (steer.multinomial, True),  # the pinned slot may lose its ancestor
        # What is right for multinomial draws is wrong for draws that depend on one another.
        (overwritten(steer.systematic), True),
        (overwritten(steer.stratified), True),
        (overwritten(steer.residual), True),
    ],
    ids=["library", "not conditional", "systematic", "stratified", "residual"],
)
def test_mutant_resamplers_are_rejected(monkeypatch, mutant, rejected):
    """Eight sweeps of two particles, resampled at every level, over 20,000 replicates."""
    monkeypatch.setattr(particle_gibbs, "conditional_multinomial", mutant)
    found = worst(scores(sweep(exact_path(Key(2), 20_000), 8, 2, Key(3), threshold=1.0)[0]))
    assert (found > LIMIT) == rejected


@pytest.mark.slow
def test_it_comes_from_a_bad_start_to_the_target():
    """Paths that sit five standard deviations off: forgotten after 30 sweeps of 8 particles, not after one."""
    bad = torch.full(
        (BATCH // 4, STEPS + 1, 1), float(TARGET.mean) - 5.0 * math.sqrt(float(TARGET.cov)), dtype=torch.float64
    )
    once, result = sweep(bad, 1, 8, Key(4))
    assert worst(scores(once)) > LIMIT
    paths, result = sweep(bad, 30, 8, Key(4))
    assert worst(scores(paths)) < LIMIT
    assert result.log_evidence.isnan().all()


@pytest.mark.slow
def test_sweeps_repair_the_bias_of_few_particles():
    """Three particles: one plain run of SMC is off, the fortieth tied to it is not; the evidence is the first's."""
    plain = steer.particle_gibbs(PROCESS, REWARD, batch=BATCH, particles=3, sweeps=1, key=5)
    assert abs(z(plain.mean(lambda x: x)[:, 0] - TARGET.mean)) > 10.0
    tied = steer.particle_gibbs(PROCESS, REWARD, batch=BATCH, particles=3, sweeps=40, key=5)
    assert abs(z(tied.mean(lambda x: x)[:, 0] - TARGET.mean)) < LIMIT
    assert torch.equal(tied.log_evidence, plain.log_evidence)
    assert abs(z((tied.log_evidence - TARGET.log_evidence).exp() - 1.0)) < LIMIT
    assert tied.cost.nfe == 40 * plain.cost.nfe == 40 * 3 * STEPS * BATCH


def test_the_pinned_path_is_slot_0_and_survives():
    path = exact_path(Key(6), 4)
    result = steer.particle_gibbs(PROCESS, REWARD, batch=4, particles=6, sweeps=1, path=path, key=7, keep_states=True)
    assert torch.equal(result.trajectory.states()[:, 0], path)
    assert torch.equal(result.x[:, 0], path[:, -1])
    assert bool((result.trajectory.root[:, 0] == 0).all())
    assert not isinstance(result.process.rule, particle_gibbs.PinnedRule)
    assert not isinstance(result.trajectory.process.rule, particle_gibbs.PinnedRule)


def test_pinning_serves_rules_that_end_without_noise():
    """DDIM(1): the last step is deterministic, and the pinned path's own."""
    process = steer.models.gaussian([0.0, 0.0], 1.0, steps=6)
    plain = steer.smc(process, Linear([1.0, 0.0]), particles=5, batch=3, keep_states=True)
    path = steer.draw_path(plain.trajectory, 1)
    assert path.shape == (3, 7, 2)
    result = steer.particle_gibbs(process, Linear([1.0, 0.0]), particles=5, batch=3, path=path, sweeps=3)
    assert bool(result.log_weight.isfinite().all())
    assert result.x.dtype == torch.float32


def test_draw_path_follows_the_weights():
    result = steer.smc(PROCESS, REWARD, particles=4, batch=20_000, keep_states=True, key=8)
    path = steer.draw_path(result.trajectory, 9)
    drawn = (result.x[..., 0] == path[:, -1]).double().argmax(1)
    for n in range(4):
        assert abs(z((drawn == n).double() - result.log_weight[:, n].exp())) < LIMIT


def test_arguments_are_checked():
    with pytest.raises(steer.ShapeError, match=r"\(2, 6, 1\), got \(2, 5, 1\)"):
        steer.particle_gibbs(PROCESS, REWARD, batch=2, path=torch.zeros(2, 5, 1))
    with pytest.raises(steer.SteerError, match="sweeps"):
        steer.particle_gibbs(PROCESS, REWARD, sweeps=0)
    with pytest.raises(steer.BudgetError, match="raise the budget to 20"):
        steer.particle_gibbs(PROCESS, REWARD, budget=19)


@pytest.mark.parametrize("kind", ["recur", "restart", "corrector"])
def test_processes_whose_steps_cannot_be_pinned_are_refused(kind):
    """A level is reached by several steps there, or what a step has drawn is changed after it."""
    changed = {
        "recur": lambda: steer.recur(PROCESS, 2),
        "restart": lambda: steer.restart(PROCESS, [(0.3, 2.0, 1)]),
        "corrector": lambda: steer.guide(PROCESS, steer.guidance.corrector()),
    }[kind]()
    with pytest.raises(steer.StateSpaceError, match="pins the one step"):
        steer.particle_gibbs(changed, REWARD, particles=4)


NOISY = steer.Hooks(mean=(lambda step: step.mean + 1.5 * step.std * step.key.normal(step.x.shape),))


def test_a_hook_that_draws_is_refused_where_a_path_is_pinned():
    noisy = steer.guide(PROCESS, NOISY)
    for options in ({}, {"sweeps": 1, "path": exact_path(Key(1), 2)}):
        with pytest.raises(steer.StateSpaceError, match="a hook of this process draws noise"):
            steer.particle_gibbs(noisy, REWARD, batch=2, particles=3, **options)
    assert steer.particle_gibbs(noisy, REWARD, particles=3, sweeps=1).process.key is None  # plain SMC
    still = steer.guide(PROCESS, steer.Hooks(x0=(lambda step: step.x0 + 0.1,)), key=7)
    assert steer.particle_gibbs(still, REWARD, particles=3).process.key == Key(7)


def test_noise_of_hooks_in_a_proposal_is_none_of_the_path():
    paths, _ = sweep(exact_path(Key(1)), 3, 2, Key(2), threshold=1.0, proposal=steer.follow(NOISY))
    assert worst(scores(paths)) < LIMIT


@pytest.mark.slow
def test_noise_of_hooks_in_the_process_would_change_the_law(monkeypatch):
    """Six sweeps of 4000 paths of the noisy chain's own tilted distribution: what the refusal is for."""
    monkeypatch.setattr(particle_gibbs, "_with_hook_key", lambda process, key: process)
    noisy = steer.guide(steer.models.gaussian([0.4], 0.8, steps=STEPS, dtype=torch.float64), NOISY)
    many = steer.rollout(noisy, REWARD, particles=100_000, key=16, keep_states=True)
    weight = torch.softmax(many.reward[0], 0)
    mean = (weight * many.x[0, :, 0]).sum()
    of_reference = (weight * (many.x[0, :, 0] - mean)).square().sum()
    chosen = torch.multinomial(weight, 4000, True, generator=torch.Generator().manual_seed(1))
    result = steer.particle_gibbs(
        noisy, REWARD, batch=4000, particles=2, sweeps=6, path=many.trajectory.states()[0, chosen], key=18,
        threshold=1.0, proposal=steer.guided(0.5),
    )  # fmt: skip
    found = result.mean(lambda x: x[:, 0]) - mean
    assert abs(float(found.mean() / (found.var() / len(found) + of_reference).sqrt())) > LIMIT
