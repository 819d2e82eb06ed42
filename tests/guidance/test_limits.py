"""What bounds a guided step: the limit of a proposal, backtracking; and the noise of going back and of corrections."""

from types import SimpleNamespace

import torch
from exact import LIMIT, mixture_2d, z

import steer
from steer.guidance import Hooks, Log, corrector, follow, mpgd, native, settled

MIXTURE = mixture_2d()


def process(steps=6):
    return steer.models.gaussian_mixture(MIXTURE.means, MIXTURE.covs, MIXTURE.weights, steps=steps, dtype=torch.float64)


def test_a_proposal_is_cut_to_its_limit_and_where_it_is_shorter_left_alone():
    size = torch.tensor([0.01, 0.4, 3.0, 100.0], dtype=torch.float64)

    def push(at):
        return at.mean + at.std * size[:, None] * torch.tensor([0.6, 0.8], dtype=torch.float64)

    model = process()
    state = steer.Trajectory.begin(model, model.prior(steer.Key(0), 1, 4))

    moved, _ = follow(Hooks(mean=(push,)), limit=0.5).evaluate(state, None, False, steer.Key(1))  # pyright: ignore
    std = model.rule.std(*model.levels[:2])
    torch.testing.assert_close(moved.cache.displacement.norm(dim=2)[0] / std, size.clamp(max=0.5))


def test_backtracking_wants_a_quarter_of_what_the_slope_promises():
    """On a parabola, f rises by 1 - h / 2 of its promise for step times curvature h: a quarter is h = 3/2. Beyond it a
    step is cut to the top, 1 / h of it."""
    share = torch.tensor([0.5, 1.4, 1.6, 1.9, 2.5, 10.0], dtype=torch.float64)
    (hook,) = mpgd(lambda x: x[:, 0], native(1.0)).mean
    z = torch.ones(1, 6, 1, dtype=torch.float64)
    at = SimpleNamespace(there=SimpleNamespace(alpha=0.5), note=lambda *_: None)

    def parabola(z):
        return -0.5 * z[..., 0].square()

    gradient = -z
    move = 0.5 * share[None, :, None] * gradient  # of the mean; alpha = 1/2 makes it share * gradient of x0
    kept = hook._kept(at, parabola, parabola(z), z, gradient, move)[0, :, 0]
    torch.testing.assert_close(kept, torch.where(share < 1.5, 1.0, (1.0 / share).clamp(max=0.5)))


def test_two_visits_of_a_restart_have_noise_of_their_own():
    """Under one key, going back to the same level at another visit draws anew."""
    model = process(8).with_rule(steer.ode())
    ratios = [level.sigma / level.alpha for level in model.levels]
    chain = steer.restart(model, [(ratios[6], ratios[2], 2)])
    visits = [k for k, level in enumerate(chain.visits) if level == 2]
    assert len(visits) == 3
    end, x = chain.steps, torch.zeros(1, 4, 2, dtype=torch.float64)
    draws = [chain.noise(x, end, k, steer.Key(0)) for k in visits]
    for i in range(3):
        for j in range(i):
            assert not bool((draws[i] == draws[j]).any())


def test_a_correction_is_a_langevin_step():
    """From 0, where the score of N(0, I) is 0, it adds noise of variance 2 size sigma^2; standard error 1.6%."""
    model = steer.models.gaussian(torch.zeros(2), 1.0, steps=6, dtype=torch.float64)
    (hook,) = corrector(1, 0.2).after
    for k in (1, 4):
        moved = hook(model, torch.zeros(1, 4000, 2, dtype=torch.float64), k, steer.Key(0))
        assert abs(z(moved.square().mean(2)[0] - 2.0 * 0.2 * model.levels[k].sigma ** 2)) < LIMIT
        away = torch.full((1, 4000, 2), 3.0, dtype=torch.float64)
        there = hook(model, away, k, steer.Key(0)) - moved  # the same noise: what the score of N(0, I) at 3 adds
        torch.testing.assert_close(there, away * (1.0 - 0.2 * model.levels[k].sigma ** 2))


def test_guidance_settles_after_the_last_level_below_the_threshold():
    log = Log()
    for k, similarity in enumerate((0.9, 0.995, 0.98, 0.992, 0.999)):
        log.add("similarity", k, torch.full((1, 4), similarity, dtype=torch.float64))
    assert [settled(log, similar) for similar in (0.5, 0.95, 0.991, 0.993, 0.9999)] == [0, 1, 3, 4, 5]
