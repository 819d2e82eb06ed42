"""Guidance hooks: in every sampler, and exact as the proposal of sequential Monte Carlo.

Laws are put to `exact.z_scores`: every statistic is exactly unbiased over the problems of a run, its standard error is
their spread over the square root of their number, |z| < 4. References: `chain_law` of a linear-Gaussian chain, and
`ExactStep` on a mixture, so no limit of small steps is involved.
"""

import math

import pytest
import torch
from exact import LIMIT, Linear, Quadratic, exact_chain, mixture_2d, worst, z, z_scores

import steer
from steer import guidance, search
from steer.core.population import per_particle
from steer.cost import Meter
from steer.guidance import Hooks, follow, guide
from steer.guidance import restart_sampling as restart
from steer.models import chain_law
from steer.models.mixture import GaussianMixture

MIXTURE = mixture_2d()
EVIDENCE = Quadratic([1.0, 0.3], 1.0)  # log-likelihood of an observation of both coordinates, noise 1
SETTINGS = {
    "dps": lambda f: guidance.dps(f, 0.2),
    "lgd": lambda f: guidance.lgd(f, 0.2, samples=2),
    "freedom": lambda f: guidance.freedom(f, 0.2),
    "mpgd": lambda f: guidance.mpgd(f, 0.2),
    "ugd": lambda f: guidance.ugd(f, 0.1, 0.1, iterations=2),
    "tfg": lambda f: guidance.tfg(f, rho=0.1, mu=0.1, iterations=2, samples=2),
    "native": lambda f: guidance.dps(f, guidance.native(0.05), halvings=0),
}


def gaussian(steps=8, **options):
    return steer.models.gaussian([0.3, -0.2], 0.8, steps=steps, dtype=torch.float64, **options)


def ones(x):
    return torch.zeros(len(x), dtype=torch.float64)


# --- the seam ---------------------------------------------------------------------------------------------------------


def test_no_hooks_change_nothing():
    process = gaussian()
    for sampler in (steer.rollout, steer.smc, steer.tds):
        plain, hooked = (sampler(p, EVIDENCE, particles=6, key=1) for p in (process, guide(process, Hooks())))
        assert torch.equal(plain.x, hooked.x)
        assert torch.equal(plain.log_weight, hooked.log_weight)
        assert plain.cost.nfe == hooked.cost.nfe
    assert torch.equal(
        steer.smc(process, EVIDENCE, particles=6, proposal=follow(Hooks())).x,
        steer.smc(process, EVIDENCE, particles=6).x,
    )


def test_score_x0_and_mean_hooks_are_three_coordinates_of_one_displacement():
    process = gaussian()
    push = torch.tensor([0.4, -0.1], dtype=torch.float64)

    def on_x0(at):
        return at.x0 + push

    def on_score(at):
        return at.score + push * at.here.alpha / at.here.sigma**2

    def on_mean(at):
        return at.mean + at.coefficient * push

    runs = [
        steer.rollout(guide(process, hooks), EVIDENCE, particles=5, key=2)
        for hooks in (Hooks(x0=(on_x0,)), Hooks(score=(on_score,)), Hooks(mean=(on_mean,)))
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run.x, runs[0].x, rtol=1e-9, atol=1e-9)
        found, first = ([mean for mean, _ in r.process.log.table().values()] for r in (run, runs[0]))
        assert found == pytest.approx(first)
    here, there = process.levels[3:5]
    std = process.rule.std(here, there)
    expected = guidance.hooks.coefficient(here, there, std) * float(push.norm()) / std
    assert runs[0].process.log.table()[3] == pytest.approx((expected, expected))
    assert process.steps - 1 not in runs[0].process.log.table()  # no noise, no unit


def test_hooks_add_up_in_order():
    def double(at):
        return 2.0 * at.x0

    def shift(at):
        return at.x0 + 1.0

    process = gaussian()
    x = steer.Key(1).normal((1, 3, 2))
    x0 = process.denoise(x, 2)
    both = Hooks(x0=(double,)) + Hooks(x0=(shift,))
    torch.testing.assert_close(guide(process, both).denoise(x, 2), 2.0 * x0 + 1.0)
    nested = guide(guide(process, Hooks(x0=(double,))), Hooks(x0=(shift,)))
    torch.testing.assert_close(nested.denoise(x, 2), 2.0 * x0 + 1.0)


@pytest.mark.parametrize(
    "sampler",
    [steer.smc, steer.tds, steer.das, search.best_of_n, search.svdd, search.dts, search.rbf, search.beam],
    ids=lambda f: f.__name__,
)
def test_every_sampler_runs_on_a_guided_process(sampler):
    """Prior, score, x0, mean and a gradient through the network at once; the ledger is a spy's count."""
    hooks = (
        guidance.prior_guidance(gaussian(5))
        + Hooks(score=(lambda at: 1.02 * at.score,), x0=(lambda at: at.x0 + 0.1,))
        + guidance.tfg(EVIDENCE, rho=0.1, mu=0.1, iterations=1)
    )
    plain = gaussian(5)
    rows = []

    def spy(x, t):
        rows.append(x.shape[0] * x.shape[1])
        return plain.denoiser(x, t)

    from dataclasses import replace

    result = sampler(guide(replace(plain, denoiser=spy), hooks), EVIDENCE, budget=60, key=3)
    assert bool(result.x.isfinite().all())
    assert result.x.shape[2:] == (2,)
    assert result.cost.nfe == sum(rows) <= 60
    assert 0 < result.cost.grads <= 2 * result.cost.nfe


def test_smc_on_a_guided_process_samples_the_guided_law():
    """The guided chain is a chain like any other: tilted exactly, here with an affine hook."""
    process = guide(gaussian(), Hooks(x0=(lambda at: 0.9 * at.x0 + 0.2,)))
    target = chain_law(process).exact(EVIDENCE)
    result = steer.smc(process, EVIDENCE, batch=256, particles=16, key=1)
    found, name = worst(z_scores(result, target))
    assert found < LIMIT, (name, found)
    plain = steer.smc(process.base, EVIDENCE, batch=256, particles=16, key=1)
    assert worst(z_scores(plain, target))[0] > LIMIT


def test_errors_of_the_seam():
    process = gaussian(4)
    with pytest.raises(steer.ShapeError, match="x0 hook"):
        guide(process, Hooks(x0=(lambda at: at.x0[:, :, 0],))).denoise(torch.zeros(1, 2, 2).double(), 0)
    with pytest.raises(steer.StateSpaceError, match="Gaussian path"):
        guide(steer.load("letters"), Hooks())
    with pytest.raises(steer.SteerError, match="density"):
        follow(guidance.corrector())
    with pytest.raises(steer.SteerError, match="limit"):
        follow(Hooks(), limit=0.0)
    with pytest.raises(steer.NotDifferentiableError, match="potential"):
        steer.rollout(guide(process, guidance.dps(ones)), ones)
    with pytest.raises(steer.NotStochasticError, match="after hook"):
        steer.tds(guide(process, guidance.corrector()), EVIDENCE, particles=2)
    guided = guide(process, guidance.mpgd(EVIDENCE, 0.1))
    with pytest.raises(steer.StateSpaceError, match="mean hooks"):
        steer.smc(guided, EVIDENCE, proposal=follow(guidance.mpgd(EVIDENCE, 0.1)))
    with pytest.raises(steer.SteerError, match="rho"):
        guidance.dps(EVIDENCE, -1.0)
    with pytest.raises(steer.SteerError, match="samples"):
        guidance.tfg(EVIDENCE, samples=0)


# --- training-free guidance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("target", ["gaussian", "mixture"])
def test_training_free_guidance_is_exact_as_a_proposal(setting, target):
    process = gaussian() if target == "gaussian" else exact_chain(MIXTURE, "vp", 6)
    law = chain_law(process) if target == "gaussian" else MIXTURE
    proposal = follow(SETTINGS[setting](EVIDENCE))
    result = steer.smc(process, EVIDENCE, batch=400, particles=16, key=7, proposal=proposal)
    found, name = worst(z_scores(result, law.exact(EVIDENCE), law if target == "mixture" else None))
    assert found < LIMIT, (name, found)
    moved = [mean for mean, _ in proposal.log.table().values()]
    assert max(moved) > 0.05


def test_a_limited_proposal_is_exact():
    """Strong guidance, cut to a displacement of a third of the noise."""
    process = exact_chain(MIXTURE, "flow", 6)
    proposal = follow(guidance.dps(EVIDENCE, 3.0, halvings=0), limit=0.3)
    result = steer.smc(process, EVIDENCE, batch=400, particles=16, key=8, proposal=proposal)
    found, name = worst(z_scores(result, MIXTURE.exact(EVIDENCE), MIXTURE))
    assert found < LIMIT, (name, found)
    assert max(share for share, _ in proposal.log.table("limited").values()) == 1.0


def test_companions_and_chunks_do_not_matter():
    """A particle's step is a function of itself: alone, in company, permuted and in chunks it is the same."""
    guided = guide(gaussian(6), guidance.tfg(EVIDENCE, rho=0.2, mu=0.1, samples=2))
    alone, together = (steer.rollout(guided, EVIDENCE, batch=b, particles=5, key=3).x for b in (1, 4))
    torch.testing.assert_close(alone[0], together[0], rtol=1e-12, atol=1e-12)
    few, many = (steer.rollout(guided, EVIDENCE, particles=n, key=3).x for n in (3, 40))
    torch.testing.assert_close(few, many[:, :3], rtol=1e-12, atol=1e-12)
    whole, parts = (search.best_of_n(guided, EVIDENCE, particles=10, chunk=c, key=3).x for c in (10, 3))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    order = steer.Key(5).uniform((1, 40))[0].argsort()
    quiet = guide(gaussian(6), guidance.ugd(EVIDENCE, 0.2, 0.1))
    x = steer.Key(1).normal((1, 40, 2))
    before, after = (quiet.denoise(states, 2) for states in (x, x[:, order]))
    torch.testing.assert_close(before[:, order], after, rtol=1e-12, atol=1e-12)


def test_mutant_strength_averaged_over_companions_is_rejected(monkeypatch):
    monkeypatch.setattr(guidance.training_free.TrainingFree, "_move", averaged_move)
    with pytest.raises(AssertionError):
        test_companions_and_chunks_do_not_matter()


def averaged_move(self, at, strength, gradient, size, ratio):
    """As it was: the mean norm of the particles of a problem is what is moved by `size` units."""
    length = guidance.hooks.norms(gradient).mean(1, keepdim=True)
    return gradient * per_particle((size * at.unit / length).expand(gradient.shape[:2]), gradient)


DRAWING = {
    "lgd": lambda process: guidance.lgd(EVIDENCE, 0.2, samples=2),
    "density": lambda process: guidance.density_guidance(process, -1.0, noise=0.3),
    "self-guided": lambda process: steer.self_guided(3.0, every=1),
}


@pytest.mark.parametrize("kind", DRAWING)
def test_hook_noise_is_the_runs(kind):
    """One run's draws are named by its key: another run's are others, a set key's the same, and a chunk's its own."""
    process = gaussian(6)
    guided = guide(process, DRAWING[kind](process))
    x = steer.Key(1).normal((1, 6, 2))

    def moved(key, process=guided):
        return process.metered(Meter()).denoise(x, 3, key)

    assert torch.equal(moved(steer.Key(1)), moved(steer.Key(1)))
    assert not torch.allclose(moved(steer.Key(1)), moved(steer.Key(2)))
    assert torch.equal(moved(None), guided.denoise(x, 3))
    fixed = guide(process, guided.hooks, key=7)
    assert torch.equal(moved(steer.Key(1), fixed), moved(steer.Key(2), fixed))
    assert guide(fixed, Hooks()).key == steer.Key(7)
    whole, parts = (search.best_of_n(guided, EVIDENCE, particles=10, chunk=c, key=3).x for c in (10, 3))
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)
    children, some = (search.svdd(guided, EVIDENCE, particles=2, key=3, chunk=c).x for c in (256, 3))
    torch.testing.assert_close(children, some, rtol=1e-9, atol=1e-9)
    still = guided.with_rule(steer.ode())  # nothing else draws
    for sampler in (steer.rollout, search.best_of_n):
        first, second = (sampler(still, EVIDENCE, particles=4, key=k, start=standing).x for k in (1, 2))
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("sampler", [steer.smc, steer.rollout, search.svdd, search.dts, search.dts_star, search.beam])
def test_every_sampler_names_hook_noise_by_its_key(sampler):
    """As a process everywhere, as a proposal in smc; walks of a tree have slots of their own."""
    seen = []

    def noting(at):
        seen.append((at.key.seed, at.key.slot))
        return at.mean

    hooks = Hooks(mean=(noting,))
    for key in (1, 2):
        sampler(guide(gaussian(4), hooks), EVIDENCE, budget=400, key=key)
    assert {seed for seed, _ in seen} == {1, 2}
    assert sampler is not search.dts or len({slot for _, slot in seen}) > 1
    if sampler is steer.smc:
        seen.clear()
        sampler(gaussian(4), EVIDENCE, particles=2, key=3, proposal=follow(hooks))
        assert {seed for seed, _ in seen} == {3}


def standing(process, objective, key, batch, particles):
    """All particles at one state, whatever the key."""
    return steer.Trajectory.begin(process, torch.full((batch, particles, 2), 0.3, dtype=torch.float64))


def test_two_hooks_of_one_kind_draw_apart():
    seen = []

    def drawing(at):
        seen.append(at.key.normal(at.x.shape))
        return at.mean

    guide(gaussian(4), Hooks(mean=(drawing, drawing))).denoise(torch.zeros(1, 2, 2).double(), 1)
    assert not torch.equal(*seen)


class Uncorrected(guidance.Follow):
    """Mutant: the same proposal, taken for the model's own step."""

    def __call__(self, state, model):
        return _Unweighted(super().__call__(state, model), model)


class _Unweighted:
    stochastic = True

    def __init__(self, drawn, model):
        self.drawn, self.model = drawn, model

    def sample(self, key):
        return self.drawn.sample(key)

    def log_prob(self, x):
        return self.model.log_prob(x)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("target", ["gaussian", "mixture"])
def test_mutant_without_the_density_correction_is_rejected(setting, target):
    process = gaussian() if target == "gaussian" else exact_chain(MIXTURE, "vp", 6)
    law = chain_law(process) if target == "gaussian" else MIXTURE
    mutant = Uncorrected(SETTINGS[setting](EVIDENCE))
    result = steer.smc(process, EVIDENCE, batch=400, particles=16, key=7, proposal=mutant)
    assert worst(z_scores(result, law.exact(EVIDENCE), law if target == "mixture" else None))[0] > LIMIT


@pytest.mark.parametrize("setting", ["dps", "mpgd", "tfg"])
def test_guidance_alone_does_not_sample_the_posterior(setting):
    """What the weights are for: the guided chain's mean or variance is off by far more than 4 standard errors."""
    process = gaussian(30)
    target = chain_law(process).exact(EVIDENCE)
    x = steer.rollout(guide(process, SETTINGS[setting](EVIDENCE)), EVIDENCE, particles=1000, key=1).x[0]
    off = [z(x[:, 0] - target.mean[0]), z((x[:, 0] - target.mean[0]).square() - target.cov[0, 0])]
    assert max(map(abs, off)) > LIMIT


def test_strength_is_the_expected_displacement():
    """rho is every particle's displacement over transition noise, whatever the scale of the potential."""
    process = gaussian(20)
    for scale in (1.0, 1000.0):
        hooks = guidance.dps(lambda x, s=scale: s * EVIDENCE(x), 0.3, halvings=0)
        log = steer.rollout(guide(process, hooks), EVIDENCE, particles=50).process.log
        assert [mean for mean, _ in log.table().values()] == pytest.approx([0.3] * 19)
        assert [most for _, most in log.table().values()] == pytest.approx([0.3] * 19)  # every particle's
    rising = guidance.freedom(EVIDENCE, 0.3, halvings=0)
    steps = [mean for mean, _ in steer.rollout(guide(process, rising), EVIDENCE).process.log.table().values()]
    assert steps[0] < steps[-1]
    assert sum(steps) / 19 == pytest.approx(0.3)  # the step to sigma = 0 is the twentieth


def test_backtracking_where_step_times_curvature_exceeds_two():
    """Curvature 11: native steps of 1 iterate with factor 1 - 11. Backtracking stops at the observation."""
    sharp = Quadratic([1.0, 1.0], 11.0)
    process = gaussian(20)

    def furthest(**options):
        hooks = guidance.mpgd(sharp, guidance.native(1.0), iterations=6, **options)
        result = steer.rollout(guide(process, hooks), sharp, particles=200)
        return float((result.x - 1.0).abs().max()), result.process.log

    wild, _ = furthest(halvings=0)
    tame, log = furthest()
    clipped, short = furthest(halvings=0, limit=1.0)
    assert wild > 1e3
    assert tame < 2.0
    assert clipped < 10.0
    assert all(mean <= 1.0 + 1e-9 for mean, _ in short.table().values())
    assert max(share for share, _ in log.table("backtracked").values()) > 0.9 / 6  # the first iteration of six, or more
    gentle = Quadratic([1.0, 1.0], 1.0)  # step times curvature 1 < 3/2: nothing to do
    hooks = guidance.mpgd(gentle, guidance.native(1.0), mu_profile=guidance.constant)
    log = steer.rollout(guide(process, hooks), gentle, particles=50).process.log
    assert all(share == 0.0 for share, _ in log.table("backtracked").values())


def test_costs_of_the_settings():
    process, n, k = gaussian(10), 4, 10
    plain = {"halvings": 0}
    for hooks, grads, potentials in [
        (guidance.dps(EVIDENCE, guidance.native(0.1), **plain), 1, 1),
        (guidance.lgd(EVIDENCE, guidance.native(0.1), samples=3, **plain), 1, 3),
        (guidance.mpgd(EVIDENCE, guidance.native(0.1), **plain), 0, 1),
        (guidance.ugd(EVIDENCE, guidance.native(0.1), guidance.native(0.1), iterations=3, **plain), 1, 4),
    ]:
        cost = steer.rollout(guide(process, hooks), ones, particles=n).cost
        assert (cost.nfe, cost.grads, cost.rewards) == (n * k, grads * n * k, potentials * n * k + n)
    travelling = guide(guidance.recur(process, 3), guidance.freedom(EVIDENCE))
    assert steer.rollout(travelling, ones, particles=n).cost.nfe == 3 * n * k


def test_hyper_parameter_search():
    """Finds the strength that a closed-form optimum asks for, and survives trials that run away."""
    process = gaussian(10)

    def closeness(result):
        return -abs(float(result.x[..., 0].mean()) - 0.7)

    def build(mu):
        return guidance.mpgd(EVIDENCE, guidance.native(mu), halvings=0)

    tuned = guidance.tune(
        build, process, EVIDENCE, start=(0.01,), factors=(2.0,), most=(1e4,), rounds=12, score=closeness, key=1
    )
    assert tuned.trials[0].strengths == tuned.best
    assert tuned.trials[0].score > -0.1
    assert tuned.cost.nfe == len(tuned.trials) * 64 * 10
    assert [t.score for t in tuned.trials] == sorted((t.score for t in tuned.trials), reverse=True)
    with pytest.raises(steer.SteerError, match="start, factors"):
        guidance.tune(build, process, EVIDENCE, start=(0.01, 0.02))


# --- restarts ---------------------------------------------------------------------------------------------------------


def moments(x, law):
    """z of means and variances of independent samples."""
    centred = x.double() - law.mean
    columns = [centred[:, i] for i in range(2)]
    columns += [centred[:, i].square() - law.cov[i, i] for i in range(2)]
    columns += [(GaussianMixture(law.means, law.covs, law.weights).responsibilities(x) - law.weights)[:, 0]]
    return max(abs(z(column)) for column in columns)


BACK = {
    "restart": lambda process: guidance.restart(process, [(0.3, 2.0, 2)]),
    "recur": lambda process: guidance.recur(process, 3),
    "corrector": lambda process: guide(process, guidance.corrector(3, 0.02)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACK)
def test_going_back_and_forth_keeps_the_law(kind):
    law = MIXTURE.exact(Linear([0.0, 0.0]))
    x = steer.rollout(BACK[kind](exact_chain(MIXTURE, "vp", 8)), ones, particles=20000, key=4).x[0]
    assert moments(x, law) < LIMIT


def test_mutant_restart_with_too_much_noise_is_rejected(monkeypatch):
    own = restart.renoised
    monkeypatch.setattr(restart, "renoised", lambda step, scale, noise: own(step, scale, 1.3 * noise))
    x = steer.rollout(BACK["restart"](exact_chain(MIXTURE, "vp", 8)), ones, particles=20000, key=4).x[0]
    assert moments(x, MIXTURE.exact(Linear([0.0, 0.0]))) > LIMIT


@pytest.mark.parametrize("rule", [steer.ddim(1.0), steer.ode(), steer.flow_sde(0.5)])
def test_a_step_back_is_the_step_and_then_the_forward_process(rule):
    process = gaussian(6, transition=rule)
    back = guidance.recur(process, 2)
    x = steer.Key(1).normal((1, 40000, 2)) * 0.0 + 0.4
    x0 = process.denoise(x, 3)
    law = back.transition(x, x0, 6)  # at level 3, to level 4 and back
    after = process.noise(process.transition(x, x0, 3).sample(steer.Key(2)), 4, 3, steer.Key(3))[0, :, 0]
    assert abs(z(after - law.mean[0, 0, 0])) < LIMIT
    assert abs(z((after - law.mean[0, 0, 0]).square() - law.std**2)) < LIMIT
    assert law.std == back.rule.std(back.levels[6], back.levels[7])


@pytest.mark.parametrize("kind", ["restart", "recur"])
def test_proposals_on_a_chain_that_goes_back_are_exact(kind):
    """Time travel under weights: FreeDoM and UGD with recurrences, whose released forms are heuristic."""
    process = BACK[kind](gaussian(6))
    target = chain_law(process).exact(EVIDENCE)
    proposal = follow(guidance.ugd(EVIDENCE, 0.1, 0.05, iterations=2))
    result = steer.smc(process, EVIDENCE, batch=400, particles=16, key=7, proposal=proposal)
    found, name = worst(z_scores(result, target))
    assert found < LIMIT, (name, found)
    mutant = Uncorrected(proposal.hooks)
    wrong = steer.smc(process, EVIDENCE, batch=400, particles=16, key=7, proposal=mutant)
    assert worst(z_scores(wrong, target))[0] > LIMIT


def test_restart_costs_what_its_span_has_steps():
    process = gaussian(20)
    back = guidance.restart(process, [(0.3, 1.5, 2)])
    extra = back.steps - 20
    (first, second) = back.returns
    assert extra == 2 * (second - first)
    assert steer.rollout(back, ones, particles=3).cost.nfe == 3 * (20 + extra)
    assert search.best_of_n(back, EVIDENCE, budget=200).cost.nfe <= 200
    assert len(steer.rollout(back, ones).trajectory.transitions()) == back.steps
    with pytest.raises(steer.SteerError, match="distinct levels"):
        guidance.restart(process, [(0.3, 0.301, 1)])
    with pytest.raises(steer.SteerError, match="span"):
        guidance.restart(process, [(2.0, 0.3, 1)])
    with pytest.raises(steer.StateSpaceError, match="other way round"):
        guidance.recur(guide(process, Hooks()), 2)
    with pytest.raises(steer.SteerError, match="gone back"):
        back.noise(torch.zeros(1, 1, 2), first + 1, first, steer.Key(0))


@pytest.mark.parametrize(
    "sampler", [steer.smc, steer.tds, search.svdd, search.dts, search.rbf], ids=lambda f: f.__name__
)
def test_samplers_run_on_chains_that_go_back(sampler):
    process = guide(guidance.restart(gaussian(8), [(0.3, 2.0, 1)]), guidance.mpgd(EVIDENCE, 0.1))
    result = sampler(process, EVIDENCE, budget=120, key=1)
    assert result.cost.nfe <= 120
    assert bool(result.x.isfinite().all())


def test_restart_is_where_resampling_belongs_on_an_ode():
    """Copies are separated by the restart's noise alone; without one the ODE refuses to resample."""
    process = gaussian(20, transition=steer.ode())
    with pytest.raises(steer.NotStochasticError):
        steer.smc(process, EVIDENCE, particles=8)
    back = guidance.restart(process, [(0.3, 2.0, 2)])
    assert [k for k in range(back.steps) if back.stochastic(k)] == back.returns
    options = {
        "selection": steer.resample(threshold=1.0, at=back.returns), "weight": steer.difference(at=back.returns)
    }  # fmt: skip
    result = steer.smc(back, EVIDENCE, particles=64, key=1, **options)
    assert [k for k, _ in result.trajectory.unique_roots()] == back.returns
    assert len(result.x[0].unique(dim=0)) == 64
    assert int(result.root.unique().numel()) < 64
    many = steer.smc(back, EVIDENCE, particles=16, batch=400, key=2, **options)
    found, name = worst(z_scores(many, chain_law(back).exact(EVIDENCE)))
    assert found < LIMIT, (name, found)


# --- rewards that correct ---------------------------------------------------------------------------------------------


def test_missing_objects():
    def detector(x):
        return torch.sigmoid(4.0 * x[:, :2])

    reward = guidance.missing_objects(detector, [0.5, 0.25])
    x = torch.tensor([[9.0, 9.0], [0.0, 9.0], [-9.0, 9.0]], dtype=torch.float64)
    q = 0.5 * 0.8 / (0.2 + 0.5 * 0.8)
    values = reward(x)
    assert float(values[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(values[1]) == pytest.approx(math.log(0.5) - math.log(0.5 + 0.5 * q), abs=1e-6)
    assert float(values[2]) < -30.0
    fitted = reward.calibrated(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]))
    assert fitted.missing == pytest.approx((0.4, 0.6))
    process = gaussian(20)
    shown, corrected = (
        float(sampler(process, reward, particles=512, key=1).mean(lambda x: (detector(x) > 0.5).all(1).double()))
        for sampler in (steer.rollout, steer.smc)
    )
    assert corrected > shown + 0.1
    with pytest.raises(steer.RewardError, match="probabilities"):
        guidance.missing_objects(lambda x: 3.0 * x, 2)(x)
    with pytest.raises(steer.RewardError, match="objects"):
        guidance.missing_objects(detector, 3)(x)
    with pytest.raises(steer.SteerError, match="shares"):
        guidance.missing_objects(detector, [0.0])


# --- classifier-free guidance -----------------------------------------------------------------------------------------


def pair(steps=20):
    options = {"steps": steps, "dtype": torch.float64}
    return (
        steer.models.gaussian([1.0, 0.5], 0.3, **options),
        steer.models.gaussian_mixture([[1.0, 0.5], [-1.0, -0.5]], [0.3, 0.3], **options),
    )


def test_classifier_free_guidance_mixes_and_counts():
    conditional, unconditional = pair()
    guided = guidance.classifier_free(conditional, unconditional, 2.5)
    x = steer.Key(1).normal((1, 5, 2))
    c, u = conditional.denoise(x, 7), unconditional.denoise(x, 7)
    torch.testing.assert_close(guided.denoise(x, 7), u + 2.5 * (c - u))
    assert steer.rollout(guided, ones, particles=4).cost.nfe == 4 * 20 * 2
    assert guided.rows == 2
    with pytest.raises(steer.ShapeError, match="same times"):
        guidance.classifier_free(conditional, pair(10)[1], 2.0)


def test_tangential_damping_is_the_projection_on_the_first_singular_vector():
    from steer.guidance.cfg import shared_part

    c, u = steer.Key(1).normal((2, 3, 5)), steer.Key(2).normal((2, 3, 5))
    found = shared_part(c, u)
    for b in range(2):
        for n in range(3):
            direction = torch.linalg.svd(torch.stack([u[b, n], c[b, n]])).Vh[0]
            torch.testing.assert_close(found[b, n], (u[b, n] @ direction) * direction)
    torch.testing.assert_close(shared_part(c, c), c)  # nothing is lost where the two agree
    conditional, unconditional = pair()
    damped = guidance.classifier_free(conditional, unconditional, 2.5, damped=True)
    plain = guidance.classifier_free(conditional, unconditional, 2.5)
    assert not torch.allclose(steer.rollout(damped, ones).x, steer.rollout(plain, ones).x)


def test_adaptive_guidance_drops_the_unconditional_pass():
    """The two agree once the mode is decided; the ledger shows what is saved, and the samples barely move."""
    conditional, unconditional = pair(40)
    full = guidance.classifier_free(conditional, unconditional, 2.0)
    adaptive, pilot = guidance.adaptive(conditional, unconditional, 2.0, similar=0.99)
    until = adaptive.hooks.x0[0].until
    assert 0 < until < 40
    assert pilot.nfe == 16 * 40 * 2
    before, after = (steer.rollout(p, ones, particles=200, key=5) for p in (full, adaptive))
    assert before.cost.nfe == 200 * 80
    assert after.cost.nfe == 200 * (40 + until)
    assert float((before.x - after.x).abs().mean()) < 0.05
    never, _ = guidance.adaptive(conditional, unconditional, 2.0, similar=1.0)
    assert never.hooks.x0[0].until == 40
    assert 0 < guidance.settled(before.process.log, 0.99) < 40  # any full run tells, without a pilot
    with pytest.raises(steer.SteerError, match="similarity"):
        guidance.settled(guidance.Log())


def test_a_chain_of_one_noisy_step_can_be_guided():
    """No step leads to noise there, by which strengths are spread over a chain."""
    chain = gaussian(1).with_rule(steer.euler_maruyama(lambda level: 0.5))
    moved = steer.rollout(guide(chain, guidance.dps(EVIDENCE, 0.2)), EVIDENCE, particles=3)
    assert bool(moved.x.isfinite().all())


def test_two_openings_of_sdxl_guide_as_the_pipeline_does_or_not_at_all():
    """Its own guidance is from zeros in place of an empty prompt's embeddings: guided from those, 3 % off."""
    diffusers = pytest.importorskip("diffusers")
    del diffusers
    import tiny_pipelines

    pipe, shape = tiny_pipelines.sdxl(), {"height": 16, "width": 16, "steps": 4}
    own = steer.from_pipeline(pipe, prompt="a cat", guidance_scale=5.0, **shape)
    conditional = steer.from_pipeline(pipe, prompt="a cat", guidance_scale=1.0, **shape)
    empty = steer.from_pipeline(pipe, prompt="", guidance_scale=1.0, **shape)
    with pytest.raises(steer.ModelError, match="guides itself from embeddings of zeros"):
        steer.classifier_free(conditional, empty, 5.0)
    embeds, _, pooled, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
    zeros = {"prompt_embeds": torch.zeros_like(embeds), "pooled_prompt_embeds": torch.zeros_like(pooled)}
    unconditional = steer.from_pipeline(pipe, guidance_scale=1.0, **zeros, **shape)
    x = own.prior(steer.Key(0), 1, 2)
    guided = steer.classifier_free(conditional, unconditional, 5.0)
    torch.testing.assert_close(guided.denoise(x, 1), own.denoise(x, 1), rtol=1e-5, atol=1e-5)
