"""Waste-free moves on the noise of paths: laws against closed form, with mutants, and what they are for.

Chains are affine with Gaussian data, so `steer.models.chain_law` is what they sample at their few steps. Evidence and
weighted means are exactly unbiased with moves too, at any number of particles: |z| < 4 over 512 problems.
"""

import math
from dataclasses import replace

import pytest
import torch
from exact import LIMIT, PATHS, Linear, Quadratic, exact_chain, mixture_2d, times, worst, z_scores

import steer
from steer.core import diagnostics
from steer.particles.path_mcmc import PathMoves

STEPS = 8
REWARDS = {"linear": Linear([0.9, -0.6]), "quadratic": Quadratic([0.8, 0.6], 0.8)}


def moving(at, chain=4, smallest=0.05, threshold=0.5, kind=PathMoves, resampler=steer.systematic):
    """A selection with moves at these levels."""
    return steer.resample(resampler, threshold, moves=kind(frozenset(at), chain, smallest))


RUNS = {
    "half way and at the end": {"selection": moving([4, 8])},
    "at the start": {"selection": moving([0])},
    "beside resampling": {"selection": moving([2, 5, 8], threshold=1.0)},
    "without resampling": {"selection": moving([8], threshold=0.0)},
    "small moves": {"selection": moving([3, 6], 3, smallest=0.01)},
    "last chain shorter": {"selection": moving([4, 8], 5)},
    "multinomial": {"selection": moving([4, 8], resampler=steer.multinomial)},
    "guided": {"selection": moving([4, 8]), "proposal": steer.guided(0.2)},
    "tempered": {"selection": moving([3, 6]), "weight": steer.difference(tempering=steer.geometric_tempering(0.1))},
    "no potentials": {"selection": moving([8]), "weight": steer.final_only()},
}


def gaussian(path="vp", rule=None, steps=STEPS):
    grid = steer.uniform_times(PATHS[path], steps, start=0.8) if path == "flow" else times(path, steps)
    return steer.models.gaussian(
        [0.5, -0.3], [[0.8, 0.3], [0.3, 0.5]], schedule=PATHS[path], times=grid, transition=rule or steer.ddim(1.0),
        dtype=torch.float64,
    )  # fmt: skip


def score(process, reward, *, batch=512, particles=12, **options):
    result = steer.smc(process, reward, batch=batch, particles=particles, **options)
    return worst(z_scores(result, steer.models.chain_law(process).exact(reward)))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("path", PATHS)
def test_law(path, run):
    for name, reward in REWARDS.items():
        z, column = score(gaussian(path), reward, key=steer.Key(1).fold(path, run), **RUNS[run])
        assert z < LIMIT, (name, column, z)


@pytest.mark.parametrize("rule", [steer.ddim(0.5), steer.flow_sde(0.5), steer.churn(0.3)], ids=str)
def test_law_under_other_rules(rule):
    z, column = score(gaussian("flow", rule), REWARDS["quadratic"], key=2, selection=moving([4, 8]))
    assert z < LIMIT, (column, z)


def test_deterministic_steps_are_moved_by_their_start():
    process = gaussian("flow", steer.ode())
    for reward in REWARDS.values():
        z, column = score(process, reward, key=3, selection=moving([4, 8], threshold=0.0))
        assert z < LIMIT, (column, z)


class Everything(PathMoves):
    """Accepts every move."""

    def __call__(self, state, value, judge, key):
        def judged(at, key):
            at, found = judge(at, key)
            return at, torch.full_like(found, 1e9)

        return super().__call__(state, value, judged, key)


class Inflating(PathMoves):
    """Proposes noise + beta xi, which does not leave the normal as it is."""

    def _proposed(self, state, judge, key):
        def judged(at, key):
            grown = {name: t * 1.1 for name, t in at.path.driving_noise.items()}
            return judge(replace(at.with_path_state(driving_noise=grown), x=at.x * 1.05), key)

        return super()._proposed(state, judged, key)


class Halved(PathMoves):
    """Compares half the log-potentials, as where a temperature is applied twice."""

    def __call__(self, state, value, judge, key):
        def judged(at, key):
            at, found = judge(at, key)
            return at, 0.5 * found

        return super().__call__(state, 0.5 * value, judged, key)


class Slots(PathMoves):
    """Lets the slot that a resampler gave an ancestor say how long its chain is."""

    def ancestors(self, log_weight, resampler, key):
        particles = log_weight.shape[1]
        return resampler(log_weight, key, self.chains(particles)).repeat(1, self.chain)[:, :particles]


@pytest.mark.parametrize("mutant", [Everything, Inflating, Halved])
def test_mutants_are_rejected(mutant):
    z, _ = score(gaussian(), REWARDS["linear"], batch=2048, key=4, selection=moving([4, 8], kind=mutant))
    assert z > LIMIT


def test_a_chain_shorter_by_its_slot_is_rejected():
    """ResamplingRecord in the order of their weights, then one chain of two and one of one."""

    def ordered(log_weight, key, count):
        drawn = steer.multinomial(log_weight, key, count)
        return drawn.gather(1, log_weight.gather(1, drawn).argsort(1))

    process, reward = gaussian(), REWARDS["linear"]
    for kind, rejected in ((PathMoves, False), (Slots, True)):
        selection = moving([5], 2, kind=kind, resampler=ordered)
        z, column = score(process, reward, batch=4096, particles=3, key=5, selection=selection)
        assert (z > LIMIT) == rejected, (kind, column, z)


class Leaving(PathMoves):
    """Lets chains leave states whose predictions are forbidden."""

    def __call__(self, state, value, judge, key):
        return super().__call__(state, value.clamp(min=-1e9), judge, key)


def standard(**options):
    """N(0, I), of 6 steps where nothing else is said."""
    return steer.models.gaussian([0.0, 0.0], torch.eye(2), dtype=torch.float64, **{"steps": 6, **options})


def half_plane(x):
    return torch.where(x[:, 0] > -0.5, REWARDS["linear"](x), -torch.inf)


def forbidding(weight, kind, batch):
    """z of the evidence under a reward of -inf beyond x_0 = -.5: the tilted probability of the rest."""
    process = standard()
    target = steer.models.chain_law(process).exact(REWARDS["linear"])
    allowed = 0.5 * (1.0 + math.erf(float((target.mean[0] + 0.5) / (2.0 * target.cov[0, 0]).sqrt())))
    selection = moving([1, 2, 3, 4], 8, kind=kind)
    result = steer.smc(process, half_plane, batch=batch, particles=32, key=6, weight=weight, selection=selection)
    relative = (result.log_evidence - target.log_evidence).exp() / allowed - 1.0
    return abs(float(relative.mean() / (relative.std() / math.sqrt(batch))))


@pytest.mark.parametrize("tempering", [None, steer.geometric_tempering(0.2)], ids=["none", "geometric"])
def test_law_where_predictions_may_be_forbidden(tempering):
    assert forbidding(steer.difference(tempering=tempering), PathMoves, 2048) < LIMIT


def test_mutant_that_leaves_forbidden_predictions_is_rejected():
    assert forbidding(None, Leaving, 2048) > LIMIT


def test_a_bad_score_of_a_moved_path_is_named():
    calls = []

    def reward(x):
        calls.append(len(x))
        return torch.full((len(x),), math.nan) if len(calls) == 9 else REWARDS["linear"](x)

    # seven levels are weighted, and the end; the ninth call is of the first move there
    with pytest.raises(steer.NonFiniteError, match="of paths moved to level 8"):
        steer.smc(gaussian(), reward, particles=8, key=11, selection=moving([8]))


def test_a_prior_with_a_mean_is_left_as_it_is():
    """Image-to-image starts from N(3, 2^2): under a constant reward, moves change no law, at the start or after."""
    process = standard(schedule=PATHS["flow"], times=steer.uniform_times(PATHS["flow"], 4, start=0.3))
    process = replace(process, initial=(torch.full((1, 1, 2), 3.0, dtype=torch.float64), 2.0))
    runs = [
        steer.smc(process, lambda x: 0.0 * x[:, 0], batch=1024, particles=8, key=key, selection=selection).x
        for key, selection in ((12, moving([0, 4], 8, smallest=1.0)), (13, None))
    ]
    for power in (1, 2):
        means = [(x**power).flatten(1).mean(1) for x in runs]
        error = math.sqrt(sum(float(mean.var()) for mean in means) / 1024)
        assert abs(float(means[0].mean() - means[1].mean())) < LIMIT * error


def test_moves_bring_back_what_resampling_lost():
    """A reward under which 32 particles are worth 7: after moves draws are distinct, and no further from the truth."""
    process, reward = gaussian(), Linear([6.0, 0.0])
    exact = steer.models.chain_law(process).exact(reward).mean[0]
    errors, worth, distinct = {}, {}, {}
    for name, moves in (("plain", None), ("moved", steer.path_moves([STEPS], chain=4, smallest=0.2))):
        result = steer.smc(process, reward, batch=512, particles=32, key=7, selection=steer.resample(moves=moves))
        errors[name] = float((result.mean(lambda x: x)[:, 0] - exact).square().mean().sqrt())
        worth[name] = float(result.ess.mean())
        distinct[name] = float(torch.tensor([len(set(row.tolist())) for row in result.x[..., 0]]).double().mean())
    assert errors["moved"] < errors["plain"], errors  # .63 and .64, on the same keys
    assert worth["plain"] < 8 < worth["moved"] == pytest.approx(32), worth
    assert distinct["moved"] > 2 * worth["plain"], (distinct, worth)


def test_waste_free_is_smc_with_moves():
    process, reward = gaussian(), REWARDS["linear"]
    ours = steer.waste_free(process, reward, particles=12, batch=2, key=8, chain=3, levels=[4, 8])
    same = steer.smc(process, reward, particles=12, batch=2, key=8, selection=moving([4, 8], 3))
    assert torch.equal(ours.x, same.x)
    rates = {name: rate for name, rate in ours.diagnostics.items() if "acceptance" in name}
    assert list(rates) == ["acceptance of moves at level 4", "acceptance of moves at level 8"]
    assert all(bool(((rate > 0) & (rate <= 1)).all()) for rate in rates.values())
    assert torch.equal(ours.log_evidence_variance, diagnostics.variance_between(ours.log_evidence))
    alone = steer.waste_free(process, reward, particles=12, key=8, chain=3, levels=[4, 8])
    assert bool(alone.log_evidence_variance.isnan().all())  # ancestors do not tell where moved particles come from
    assert ours.trajectory.path.driving_noise == {}
    assert ours.cost.nfe == 2 * (12 * 8 + 8 * (5 + 8))
    torch.testing.assert_close(ours.log_weight, torch.full((2, 12), -math.log(12.0), dtype=torch.float64))
    torch.testing.assert_close(ours.reward, reward(ours.x.flatten(0, 1)).view(2, 12))


def test_moves_go_with_a_start_that_knows_the_reward():
    result = steer.psi(
        gaussian(), REWARDS["linear"], particles=12, batch=2, key=9, start=steer.pcnl(chains=3),
        selection=moving([0, 4]),
    )  # fmt: skip
    assert bool(result.reward.isfinite().all())
    assert set(result.diagnostics) >= {"acceptance", "acceptance of moves at level 0", "acceptance of moves at level 4"}


def test_what_cannot_be_moved_is_said():
    process, reward = gaussian(), REWARDS["linear"]
    with pytest.raises(steer.SteerError, match="chain >= 2"):
        steer.path_moves([4], chain=1)
    with pytest.raises(steer.SteerError, match="takes levels"):
        steer.path_moves([])
    with pytest.raises(steer.SteerError, match=r"\[7, 9\] of path_moves are neither"):
        steer.smc(process, reward, selection=moving([2, 7, 9]))
    with pytest.raises(steer.SteerError, match="function of the latest state"):
        steer.smc(process, reward, weight=steer.maximum(), selection=moving([4]))
    with pytest.raises(steer.SteerError, match="connect to nothing"):
        steer.smc(process, reward, keep_states=True, selection=moving([4]))
    with pytest.raises(steer.StateSpaceError, match=r"must be steer\.Normal, got MixtureTransition"):
        steer.smc(exact_chain(mixture_2d(), "vp", 4), reward, selection=moving([2]))
    begun = steer.Trajectory.begin(process, torch.zeros(1, 4, 2, dtype=torch.float64), k=2)
    with pytest.raises(steer.StateSpaceError, match="begins at level 0"):
        steer.smc(process, reward, start=begun, selection=moving([4]))
    with pytest.raises(steer.SteerError, match="weights that are a function"):
        steer.fkc(process, reward, selection=moving([4]))


def test_moved_paths_draw_anew_what_hooks_draw():
    """Draws of a hook are part of a path: those of a move are none of the population's, nor of another move's."""

    def drawing(at):
        seen.append(at.key.normal(at.x.shape).sum())
        return at.x0

    seen: list[torch.Tensor] = []
    process = steer.guide(gaussian(), steer.Hooks(x0=(drawing,)))
    steer.smc(process, REWARDS["linear"], particles=4, key=10, selection=moving([8]))
    assert len(seen) == 8 * 4
    assert len({round(float(total), 9) for total in seen}) == 8 * 4
    steer.smc(process, REWARDS["linear"], particles=4, key=10, selection=moving([8]))
    assert seen[:32] == seen[32:]
