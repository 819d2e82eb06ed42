"""MCMC starts: the acceptance ratio against densities, stationary laws, and what they owe their users."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from exact import LIMIT, Linear, Quadratic, z
from mcmc_starts import flat_process
from mcmc_starts import run_start as run

import steer
from steer.core.diagnostics import split_rhat
from steer.core.objective import open_objective
from steer.key import Key
from steer.particles import metropolis_hastings
from steer.particles.langevin import crank_nicolson, euler
from steer.particles.metropolis_hastings import log_acceptance
from steer.particles.tilted_prior import TiltedPrior, TiltedState, prior_moments

MOVES = {"pcnl": crank_nicolson, "mala": euler}


class RankTen:
    """r(x) = -|x_1..k - 2|^2 / 2: under N(0, I), coordinates 1..k become N(1, 1/2) and the rest stay."""

    def __init__(self, rank=10):
        self.rank = rank

    def __call__(self, x):
        return -0.5 * (x.flatten(1)[:, : self.rank].double() - 2.0).square().sum(1)


def bumpy(x):
    """A smooth log-tilt of every coordinate (B, C, D), with its gradient."""
    scale = 1.0 / math.sqrt(x.shape[2])
    value = (torch.sin(x) + 0.3 * torch.tanh(x) ** 2).sum(2) * scale
    slope = (torch.cos(x) + 0.6 * torch.tanh(x) / torch.cosh(x) ** 2) * scale
    return TiltedState(x, value, slope)


# --- the acceptance ratio ---------------------------------------------------------------------------------------------


def brute_force(move, here, there):
    """log of pi(y) q(x | y) / (pi(x) q(y | x)) with every density written out and summed exactly."""

    def log_pi_q(a, b):
        keep, pull, variance = (coefficient[:, None, None] for coefficient in move)
        density = -0.5 * a.x.square() - 0.5 * (b.x - keep * a.x - pull * a.gradient).square() / variance
        return torch.tensor([[math.fsum(row) for row in p] for p in density.tolist()], dtype=torch.float64) + a.value

    return log_pi_q(there, here) - log_pi_q(here, there)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("size", [16, 4096, 65_536])
@pytest.mark.parametrize("step", [0.05, 0.5, 2.0, 4.0])
def test_log_acceptance_equals_brute_force_densities(name, size, step):
    move = MOVES[name](torch.full((1,), step, dtype=torch.float64))
    keep, pull, variance = (coefficient.item() for coefficient in move)
    key = Key(1).fold(size)
    here = bumpy(key.fold("x").normal((1, 2, size)))
    noise = key.fold("z").normal((1, 2, size))
    there = bumpy(keep * here.x + pull * here.gradient + math.sqrt(variance) * noise)
    torch.testing.assert_close(
        log_acceptance(move, here, there), brute_force(move, here, there), rtol=1e-10, atol=1e-10
    )


def test_log_acceptance_of_a_wrong_kernel_is_rejected():
    """The comparison sees a drift halved, a factor of the step in the wrong place, and the forward density alone."""
    move = crank_nicolson(torch.full((1,), 0.5, dtype=torch.float64))
    here, there = bumpy(Key(2).normal((1, 2, 4096))), bumpy(Key(3).normal((1, 2, 4096)))
    expected = brute_force(move, here, there)
    for wrong in (move._replace(pull=0.5 * move.pull), move._replace(variance=1.0 - move.keep)):
        assert bool(((log_acceptance(wrong, here, there) - expected).abs() > 1e-3).all())
    assert bool((((there.value - here.value) - expected).abs() > 1e-3).all())


@pytest.mark.parametrize("step", [0.05, 0.5, 2.0, 4.0, 9.0])
def test_pcnl_accepts_every_step_under_a_linear_reward(step):
    """log A is zero for every step size; what is left is rounding, 1e-11 of terms of size |G| |x|."""
    move, slope = crank_nicolson(torch.full((1,), step, dtype=torch.float64)), 3.0 * Key(4).normal((1, 1, 4096))
    here, there = (
        TiltedState(x, (x * slope).sum(2), slope.expand_as(x))
        for x in (Key(5).normal((1, 8, 4096)), Key(6).normal((1, 8, 4096)))
    )
    assert float(log_acceptance(move, here, there).abs().max()) < 1e-9
    assert float((there.value - here.value).abs().max()) > 10.0  # the rewards do differ
    mala = euler(torch.full((1,), step, dtype=torch.float64))
    assert float(log_acceptance(mala, here, there).abs().max()) > 1e-3  # and MALA does not


def acceptance(move, rank, size, step, count, key):
    """Stationary acceptance at a fixed step under a unit quadratic tilt of `rank` coordinates: mean and its error."""

    def tilted(x):
        slope = torch.zeros_like(x)
        slope[..., :rank] = 2.0 - x[..., :rank]
        return TiltedState(x, -0.5 * slope.square().sum(2), slope)

    move = move(torch.full((1,), step, dtype=torch.float64))
    x = key.fold("x").normal((1, count, size))
    x[..., :rank] = 1.0 + math.sqrt(0.5) * x[..., :rank]
    here, noise = tilted(x), key.fold("z").normal((1, count, size))
    keep, pull, variance = (coefficient.item() for coefficient in move)
    there = tilted(keep * x + pull * here.gradient + math.sqrt(variance) * noise)
    rate = log_acceptance(move, here, there).exp().clamp(max=1.0)
    return rate.mean().item(), rate.std().item() / math.sqrt(count)


@pytest.mark.parametrize(
    ("name", "rank", "size", "step", "expected", "count"),
    [
        ("pcnl", 10, 100, 0.05, 0.995, 1000),
        ("pcnl", 10, 100, 0.5, 0.855, 2000),
        ("pcnl", 10, 100, 2.0, 0.321, 4000),
        ("pcnl", 1000, 1000, 0.05, 0.949, 500),
        ("pcnl", 1000, 1000, 0.5, 0.084, 1000),
        ("mala", 10, 100, 0.05, 0.985, 1000),
        ("mala", 10, 100, 0.5, 0.567, 4000),
        ("mala", 1000, 1000, 0.05, 0.897, 500),
        ("mala", 1000, 1000, 0.5, 0.0, 200),
        ("pcnl", 10, 65_536, 0.5, 0.872, 24),
        ("mala", 10, 65_536, 0.5, 0.0, 8),
    ],
)
def test_stationary_acceptance(name, rank, size, step, expected, count):
    """Published to three digits, from chains whose own error is about .01."""
    mean, error = acceptance(MOVES[name], rank, size, step, count, Key(7).fold(name, rank, size))
    assert abs(mean - expected) < 0.015 + 4.0 * error


# --- stationary laws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [steer.pcnl, steer.mala])
def test_stationary_law_of_a_rank_ten_tilt(start):
    """256 problems, one particle of each: z of mean 1 and variance 1/2 of tilted, 0 and 1 of free coordinates."""
    chain = start(chains=2, burn_in=60, kept=1)
    state, _ = run(chain, flat_process(100), RankTen(), batch=256, particles=1)
    x = state.x[:, 0]
    tilted, free = x[:, :10], x[:, 10:20]
    for values in (tilted - 1.0, (tilted - 1.0) ** 2 - 0.5, free, free**2 - 1.0):
        # over coordinates of a problem first: replicates are problems
        assert abs(z(values.mean(1))) < LIMIT
    assert abs(float(state.diagnostics["acceptance"].mean()) - 0.57) < 0.1
    torch.testing.assert_close(state.path.log_potential[:, 0], RankTen()(x))


def test_stationary_law_of_a_prior_with_moments_of_its_own():
    """As image-to-image starts: N(3, 4) times exp(-(x - 2)^2 / 2) is N(2.2, .8), and free coordinates stay."""
    process = replace(flat_process(30), initial=(torch.full((1, 1, 30), 3.0), 2.0))
    state, _ = run(steer.pcnl(chains=2, burn_in=60, kept=1), process, RankTen(), batch=256, particles=1)
    tilted, free = state.x[:, 0, :10], state.x[:, 0, 10:]
    for values in (tilted - 2.2, (tilted - 2.2) ** 2 - 0.8, free - 3.0, (free - 3.0) ** 2 - 4.0):
        assert abs(z(values.mean(1))) < LIMIT


@pytest.mark.slow
def test_stationary_law_at_65536_coordinates():
    """24 float32 chains of 20 steps at epsilon = .5: 240 tilted coordinates, independent at stationarity."""
    chain = steer.pcnl(chains=24, burn_in=19, kept=1, acceptance=None)
    state, _ = run(chain, flat_process(65_536, torch.float32), RankTen(), batch=1, particles=24)
    tilted, free = state.x[0, :, :10].double().flatten(), state.x[0, :, 10:].double()
    assert state.x.dtype == torch.float32
    assert abs(z(tilted - 1.0)) < LIMIT
    assert abs(z((tilted - 1.0) ** 2 - 0.5)) < LIMIT
    assert abs(z(free[:, :10].flatten())) < LIMIT
    assert abs(float(free.square().mean()) - 1.0) < LIMIT * math.sqrt(2.0 / free.numel())
    assert 0.75 < float(state.diagnostics["acceptance"]) < 0.97


def test_ula_is_biased_and_the_test_sees_it():
    """Unadjusted Langevin at epsilon = 1: free coordinates have variance 1 / (1 - 1/4)."""
    chain = steer.ula(step_size=1.0, chains=2, burn_in=30, kept=1)
    state, _ = run(chain, flat_process(100), RankTen(), batch=256, particles=1)
    free = state.x[:, 0, 10:20] ** 2
    assert z((free - 1.0).mean(1)) > LIMIT
    assert abs(z((free - 4.0 / 3.0).mean(1))) < LIMIT
    assert float(state.diagnostics["acceptance"].min()) == 1.0


def test_clipping_keeps_the_law():
    chain = steer.pcnl(chains=2, burn_in=60, kept=1, clip=0.5)
    state, _ = run(chain, flat_process(30), RankTen(), batch=256, particles=1, key=1)
    tilted = state.x[:, 0, :10]
    assert float(state.diagnostics["gradient"].max()) <= 0.5 + 1e-9
    assert abs(z((tilted - 1.0).mean(1))) < LIMIT
    assert abs(z(((tilted - 1.0) ** 2 - 0.5).mean(1))) < LIMIT


def test_clipping_looks_at_one_state_only():
    """A gradient clipped by its neighbours' norms would not be a function of the state, and the chain not exact."""
    _, objective, _ = open_objective(flat_process(30), RankTen())
    options = {"objective": objective, "mean": None, "sigma": 1.0, "dtype": torch.float64, "temperature": 1.0}
    tilt = TiltedPrior(**options, clip=5.0)
    x = 3.0 * torch.arange(4.0)[:, None] * Key(10).normal((1, 4, 30))
    together, _ = tilt(x)
    norms = together.gradient.norm(dim=2)
    assert float(norms.max()) == pytest.approx(5.0)
    for n in range(4):
        torch.testing.assert_close(together.gradient[:, n : n + 1], tilt(x[:, n : n + 1])[0].gradient)
    free, _ = TiltedPrior(**options)(x)
    assert float(free.gradient.norm(dim=2).min()) > 5.0  # all of them are clipped


def test_the_temperature_is_the_starts_own_or_the_runs():
    """r / T with T = 2 pulls half as hard: mean 2/3, variance 2/3."""
    for chain in (steer.pcnl(chains=2, burn_in=40, kept=1), steer.pcnl(temperature=2.0, chains=2, burn_in=40, kept=1)):
        state, _ = run(chain, flat_process(20), RankTen(), batch=256, particles=1, temperature=2.0)
        tilted = state.x[:, 0, :10]
        assert abs(z((tilted - 2.0 / 3.0).mean(1))) < LIMIT
        assert abs(z(((tilted - 2.0 / 3.0) ** 2 - 2.0 / 3.0).mean(1))) < LIMIT
    own, runs = (
        steer.rollout(flat_process(2), RankTen(1), temperature=t, start=steer.pcnl(temperature=own, burn_in=3, kept=4))
        for t, own in ((1.0, 2.0), (2.0, None))
    )
    assert torch.equal(own.x, runs.x)
    assert own.log_evidence.isnan().all()


def test_units_of_a_prior_that_is_not_standard():
    """VE with sigma = 80 and a prediction that undoes it: the same posterior, in units of 80."""
    schedule = steer.VE()
    process = steer.from_denoiser(lambda x, t: x / 80.0, schedule, 4, event=(20,), dtype=torch.float64)
    state, _ = run(steer.pcnl(chains=2, burn_in=40, kept=1), process, RankTen(), batch=256, particles=1)
    tilted = state.x[:, 0, :10] / 80.0
    assert abs(z((tilted - 1.0).mean(1))) < LIMIT
    assert abs(z(((tilted - 1.0) ** 2 - 0.5).mean(1))) < LIMIT


# --- adaptation, thinning, diagnostics --------------------------------------------------------------------------------


def test_step_size_adapts_per_problem_and_then_stays():
    chain = steer.pcnl(chains=5, burn_in=50, kept=20, step_size=0.01)
    state, _ = run(chain, flat_process(1000), RankTen(1000), batch=3, particles=5)
    assert bool(((state.diagnostics["acceptance"] - 0.57).abs() < 0.2).all())
    longer = dataclasses.replace(chain, kept=40)
    again, _ = run(longer, flat_process(1000), RankTen(1000), batch=3, particles=5)
    assert torch.equal(again.diagnostics["step_size"], state.diagnostics["step_size"])
    still = steer.pcnl(chains=5, burn_in=50, kept=20, step_size=0.01, acceptance=None)
    fixed, _ = run(still, flat_process(50), RankTen(), batch=2, particles=5)
    torch.testing.assert_close(fixed.diagnostics["step_size"], torch.full((2,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("particles", [1, 4, 6, 7, 23, 24, 60])
def test_particles_are_thinned_evenly(particles):
    """Every chain gives as many particles as any other, from evenly spaced steps, the last among them."""
    chains, kept = 4, 6
    every, _ = run(steer.pcnl(chains=chains, burn_in=3, kept=kept), flat_process(3), RankTen(2), batch=2, particles=24)
    assert len(torch.unique(every.x[0, :, 2])) > 12  # steps differ, so that what is taken can be told
    some, _ = run(
        steer.pcnl(chains=chains, burn_in=3, kept=kept), flat_process(3), RankTen(2), batch=2, particles=particles
    )
    rounds = math.ceil(particles / chains)
    for n in range(particles):
        step = math.ceil((n // chains + 1) * kept / rounds) - 1
        assert torch.equal(some.x[:, n], every.x[:, chains * step + n % chains])
        assert torch.equal(some.path.log_potential[:, n], every.path.log_potential[:, chains * step + n % chains])


def test_split_rhat():
    """Against the textbook's formula in plain Python, and on cases whose value is known."""
    traces = Key(8).normal((3, 9, 4))
    for b in range(3):
        chains = [traces[b, half, c].tolist() for c in range(4) for half in (slice(0, 4), slice(5, 9))]
        means = [sum(chain) / 4 for chain in chains]
        within = sum(sum((v - m) ** 2 for v in chain) / 3 for chain, m in zip(chains, means, strict=True)) / 8
        grand = sum(means) / 8
        between = 4 * sum((m - grand) ** 2 for m in means) / 7
        expected = math.sqrt((3 / 4 * within + between / 4) / within)
        assert float(split_rhat(traces)[b]) == pytest.approx(expected)
    apart = Key(9).normal((1, 200, 4)) + 3.0 * torch.arange(4)
    drifting = Key(9).normal((1, 200, 4)) + torch.linspace(0, 6, 200)[:, None]
    assert float(split_rhat(apart)) > 2.0
    assert float(split_rhat(drifting)) > 1.5
    assert abs(float(split_rhat(Key(9).normal((1, 2000, 4)))) - 1.0) < 0.01
    assert bool(split_rhat(torch.zeros(2, 3, 4)).isnan().all())


def test_chains_that_disagree_show():
    """Two deep modes that no chain crosses in 100 steps: R-hat says so; with one mode it is near 1."""

    def two(x):
        return torch.logaddexp(-40.0 * (x[:, 0] - 1.0).square(), -40.0 * (x[:, 0] + 1.0).square()) + 10.0 * x[:, 0]

    chain = steer.pcnl(chains=6, burn_in=50, kept=50, step_size=0.05)
    torn, _ = run(chain, flat_process(1), two, batch=20, particles=6)
    agree, _ = run(chain, flat_process(1), lambda x: -40.0 * (x[:, 0] - 1.0).square(), batch=20, particles=6)
    both = (torn.x > 0).any(1) & (torn.x < 0).any(1)
    assert int(both.sum()) >= 15
    assert float(torn.diagnostics["split_rhat"][both[:, 0]].min()) > 2.0
    assert float(agree.diagnostics["split_rhat"].median()) < 1.1


def test_ledger_counts_every_chain_and_the_users_predictor():
    chain = steer.pcnl(chains=3, burn_in=4, kept=5)
    _, cost = run(chain, flat_process(2), RankTen(1), batch=2, particles=4)
    assert cost.nfe == cost.grads == cost.rewards == 2 * 3 * 10
    assert chain.prepare(flat_process(2), 1.0)[1] == 30
    chain = dataclasses.replace(chain, x0_predictor=lambda x: 0.5 * x, predictor_rows=8)
    _, cost = run(chain, flat_process(2), RankTen(1), batch=2, particles=4)
    assert cost.nfe == cost.grads == 8 * 2 * 3 * 10
    assert cost.rewards == 2 * 3 * 10
    assert chain.prepare(flat_process(2), 1.0)[1] == 8 * 30


def test_bf16_states_run_their_chains_in_float32(monkeypatch):
    process = flat_process(40, torch.bfloat16)
    seen, decided = set(), set()
    ratio = metropolis_hastings.log_acceptance

    def log_acceptance(move, here, there):
        decided.update((here.x.dtype, there.x.dtype))
        return ratio(move, here, there)

    monkeypatch.setattr(metropolis_hastings, "log_acceptance", log_acceptance)

    def predictor(x):
        seen.add(x.dtype)
        return x

    chain = steer.pcnl(chains=2, burn_in=40, kept=1, x0_predictor=predictor)
    state, _ = run(chain, process, RankTen(), batch=256, particles=1)
    assert seen == {torch.bfloat16}  # the network has the model's dtype
    assert decided == {torch.float32}
    assert state.x.dtype == torch.bfloat16
    torch.testing.assert_close(state.path.log_potential[:, 0], RankTen()(state.x[:, 0]))
    assert abs(z((state.x[:, 0, :10].double() - 1.0).mean(1))) < LIMIT


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_gradient_that_vanishes_at_the_start_is_named_with_the_cure():
    """An exact posterior mean on a flow at alpha = 0 is E[x_0] for every x."""
    times = steer.uniform_times(steer.RectifiedFlow(), 4, start=1.0)
    process = steer.models.gaussian_mixture(
        [[1.0, 0.0], [-1.0, 0.5]], [0.3, 0.2], schedule=steer.RectifiedFlow(), times=times
    )
    for chain in (steer.pcnl(), steer.mala(), steer.ula(), steer.pcnl(chains=1)):
        with pytest.raises(steer.NotDifferentiableError, match="x0_predictor= a few-step model"):
            steer.smc(process, Linear([1.0, 0.0]), start=chain)
    steer.smc(process, Linear([1.0, 0.0]), start=steer.pcnl(x0_predictor=lambda x: x))
    steer.smc(process, lambda x: 0.0 * x.sum(1), start=steer.pcnl())  # a flat reward is not the predictor's fault
    steer.smc(process.with_times([0.9, 0.5, 0.0]), Linear([1.0, 0.0]), start=steer.pcnl(), temperature=1e5)


def test_a_gradient_that_is_not_finite_is_named():
    with pytest.raises(steer.NonFiniteError, match=r"gradient .* problem 0, particle 0 at level 0"):
        run(steer.pcnl(), flat_process(2), lambda x: (0.0 * x[:, 0]).sqrt() - x[:, 1] ** 2, batch=1, particles=2)


def test_forbidden_predictions_are_left_and_never_entered():
    def reward(x):
        return torch.where(x[:, 0] > 0.0, -0.5 * (x[:, 0] - 1.0).square(), -torch.inf)

    state, _ = run(steer.pcnl(chains=4, burn_in=30, kept=20), flat_process(1), reward, batch=64, particles=40)
    assert bool((state.x > 0.0).all())
    assert bool((state.log_weight == 0.0).all())
    half, _ = run(
        steer.pcnl(chains=4, burn_in=0, kept=1), flat_process(1), lambda x: reward(x - 4.0), batch=64, particles=4
    )
    outside = half.x[..., 0] <= 4.0
    assert bool(outside.any())
    assert torch.equal(half.log_weight == -torch.inf, outside)
    with pytest.raises(steer.CollapsedWeightsError):
        steer.smc(flat_process(1), lambda x: reward(x) - torch.inf, start=steer.pcnl(burn_in=1, kept=1))


def test_arguments_are_checked():
    for options in ({"chains": 0}, {"kept": 0}, {"burn_in": -1}, {"step_size": 0.0}):
        with pytest.raises(steer.SteerError, match=r"MCMC needs|step_size"):
            steer.pcnl(**options)
    with pytest.raises(steer.ShapeError, match="x0_predictor must return"):
        steer.smc(flat_process(2), RankTen(1), start=steer.pcnl(x0_predictor=lambda x: x[..., :1]))
    with pytest.raises(steer.SteerError, match="draw more"):
        steer.smc(flat_process(2), RankTen(1), start=steer.top_k_of_n(3), particles=4)


def test_a_process_without_a_gaussian_prior_is_refused():
    tokens = steer.from_logits(lambda x, t: torch.zeros(*x.shape, 3), 2, length=2, vocabulary=3)
    with pytest.raises(steer.StateSpaceError, match="Gaussian prior, which MaskedProcess does not have"):
        prior_moments(tokens)
    with pytest.raises(steer.StateSpaceError, match="starts from given latents"):
        prior_moments(replace(flat_process(2), initial=(torch.zeros(1, 1, 2), 0.0)))


def test_a_reward_that_breaks_in_the_chains_leaves_what_there_is():
    with pytest.raises(steer.RewardError) as caught:
        steer.smc(flat_process(2), lambda x: 1 / 0, start=steer.pcnl())
    assert caught.value.partial.x.shape == (1, 5, 2)


# --- top k of n -------------------------------------------------------------------------------------------------------


def test_top_k_takes_the_best_draws():
    process, reward = flat_process(2), Quadratic([1.0, 1.0], 1.0)
    state, cost = run(steer.top_k_of_n(50), process, reward, batch=3, particles=10)
    draws = process.prior(Key(0).fold("prior"), 3, 50)
    scores = reward(draws.flatten(0, 1)).view(3, 50)
    torch.testing.assert_close(state.path.log_potential, scores.topk(10, dim=1).values)
    torch.testing.assert_close(reward(state.x.flatten(0, 1)).view(3, 10), state.path.log_potential)
    assert (cost.nfe, cost.rewards, cost.grads) == (150, 150, 0)
