"""Feynman-Kac correctors beyond their law: choices and their refusals, clocks, warnings, starts, the ledger."""

import math

import pytest
import torch
from exact import LIMIT, Linear, Quadratic, exact_chain, mixture_2d, mixture_16d, worst, z_scores

import steer
from steer.particles.birth_death import BirthDeath, birth_death
from steer.weighted_sde.composite import compose

MIXTURE = mixture_2d()
REWARD = Linear([0.7, -0.5])


def process(steps=20, mixture=MIXTURE, schedule=None, **options):
    schedule = schedule or steer.VP()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, schedule=schedule, dtype=torch.float64,
        times=steer.log_snr_times(schedule, steps), **options,
    )  # fmt: skip


def gaussian(mean, variance, steps=20, size=1):
    times = steer.log_snr_times(steer.VP(), steps)
    return steer.models.gaussian(torch.full((size,), float(mean)), variance, times=times, dtype=torch.float64)


# Laws in more dimensions.


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_tilts_in_sixteen_dimensions(reward):
    """Closed form of a mixture with full covariances. The finer of two step sizes has no bias that 256 problems see."""
    mixture = mixture_16d()
    tilt = Linear(torch.full((16,), 0.12)) if reward == "linear" else Quadratic(torch.full((16,), 0.3), 0.08)
    for steps in (150, 300):
        result = steer.fkc(process(steps, mixture), tilt, batch=256, particles=12, key=3)
        score, name = worst(z_scores(result, mixture.exact(tilt), mixture))
        if score < LIMIT:
            return
    raise AssertionError((name, score))


@pytest.mark.slow
@pytest.mark.parametrize("exponents", [(1.0, 1.0), (-0.4, 1.4), (0.5, 0.5)])
def test_products_and_guidance_of_gaussians_in_thirty_dimensions(exponents):
    """Products of Gaussians are Gaussian: means, variances and the normaliser, in closed form, by probes."""
    size, means, variances = 30, (0.3, -0.2), (1.3, 0.7)
    terms = list(zip(exponents, means, variances, strict=True))
    precision = sum(a / v for a, _, v in terms)
    mean = sum(a * m / v for a, m, v in terms) / precision
    constant = -0.5 * sum(a * (m * m / v + math.log(2.0 * math.pi * v)) for a, m, v in terms)
    log_z = size * (constant + 0.5 * precision * mean**2 + 0.5 * math.log(2.0 * math.pi / precision))

    def errors(steps):
        models = [gaussian(m, v, steps, size) for _, m, v in terms]
        result = steer.fkc(
            models, exponent=exponents, batch=100, particles=16, weight=steer.FeynmanKac(probes=2),
            transport=steer.flow_transport, key=steer.Key(4).fold(steps),
        )  # fmt: skip
        relative = (result.log_evidence - log_z).exp()
        share = relative / relative.mean()
        mean_error = result.mean(lambda x: x.mean(1) - mean)
        variance_error = result.mean(lambda x: (x - mean).square().mean(1) - 1.0 / precision)
        pooled = [relative.mean().log(), (share * mean_error).mean(), (share * variance_error).mean()]
        return torch.stack(pooled), torch.stack([share, share * mean_error, share * variance_error]).var(1) / 100

    (coarse, coarse_variance), (fine, fine_variance) = errors(40), errors(80)
    z = (2.0 * fine - coarse) / (4.0 * fine_variance + coarse_variance).sqrt()
    assert float(z.abs().max()) < LIMIT, (z, coarse, fine)


# Choices.


def test_one_model_without_reward_is_a_rollout_of_equal_weights():
    result = steer.fkc(process(), batch=2, particles=8)
    torch.testing.assert_close(result.log_weight, torch.full((2, 8), -math.log(8.0), dtype=torch.float64))
    torch.testing.assert_close(result.log_evidence, torch.zeros(2, dtype=torch.float64))
    assert result.cost.nfe == 2 * 8 * 20
    assert (result.cost.rewards, result.cost.grads) == (0, 0)
    assert [entry.k for entry in result.seen] == [*range(19), 20]


def test_the_ledger_counts_every_component_and_look_ahead():
    cost = steer.fkc(process(), REWARD, unconditional=process(), guidance=2.0, particles=4).cost
    assert (cost.nfe, cost.grads) == (2 * 4 * 20, 2 * 4 * 19)
    cost = steer.fkc(process(), REWARD, particles=4, weight=steer.FeynmanKac(probes=2)).cost
    assert (cost.nfe, cost.grads) == (4 * 39, 4 * 19 * 3)
    cost = steer.fkc(process(), exponent=2.0, particles=4, weight=steer.FeynmanKac(probes=None)).cost
    assert (cost.nfe, cost.grads) == (4 * 20, 4 * 19 * 2)
    black_box = {"transport": steer.base_transport, "look_ahead": steer.ode_steps(2)}
    budget = 4 * 40 + 3
    result = steer.fkc(process(), REWARD, budget=budget, **black_box)
    assert result.x.shape[1] == 4
    assert result.cost.nfe <= budget
    assert result.cost.grads == 0


def test_black_box_rewards_need_the_base_transport():
    black_box = lambda x: REWARD(x).tolist()  # noqa: E731
    assert steer.fkc(process(), black_box, particles=4, transport=steer.base_transport).x.shape == (1, 4, 2)
    with pytest.raises(steer.NotDifferentiableError, match="base_transport"):
        steer.fkc(process(), black_box, particles=4)


def test_parts_that_do_not_go_together_are_refused():
    cases = [
        ({"weight": steer.KernelRatio(), "noise": 0.5}, "quadratic variation"),
        ({"weight": steer.KernelRatio(), "transport": steer.flow_transport}, "quadratic variation"),
        ({"transport": steer.ecg(), "noise": 2.0}, "noise v = 1"),
        ({"noise": -1.0}, "v >= 0"),
        ({"exponent": -1.0}, "sum to more than 0"),
        ({"exponent": [1.0, 1.0]}, "one per process"),
        ({"guidance": 2.0}, "go together"),
    ]
    for options, message in cases:
        with pytest.raises(steer.SteerError, match=message):
            steer.fkc(process(), particles=2, **options)
    with pytest.raises(steer.NotStochasticError, match="noise > 0"):
        steer.fkc(process(), exponent=2.0, particles=2, noise=0.0)
    with pytest.raises(steer.ModelError, match="one schedule"):
        steer.fkc([process(20), process(21)], particles=2)
    with pytest.raises(steer.ModelError, match="sum to 2"):
        steer.fkc(process(), REWARD, exponent=2.0, particles=2, start=steer.pcnl(chains=1, burn_in=1, kept=1))
    with pytest.raises(steer.SteerError, match="already"):
        steer.fkc(compose(process()), exponent=2.0)


def test_laws_that_are_biased_or_may_not_exist_are_warned_of():
    with pytest.warns(UserWarning, match="no known distribution"):
        steer.fkc(process(), exponent=2.0, particles=2, active=(0.3, 0.7))
    with pytest.warns(UserWarning, match="finite variance"):
        steer.fkc(process(), exponent=3.0, particles=2, transport=steer.score_transport, noise=1.0 / 3.0)
    with pytest.warns(UserWarning, match="no finite normalizing constant") as caught:
        steer.fkc(gaussian(0, 2.0), unconditional=gaussian(0, 1.0), guidance=3.0, particles=2)
    assert caught[0].filename == __file__


def test_normalisers_are_decided_by_tails():
    def normalisable(conditional, unconditional, w):
        return compose(conditional, unconditional=unconditional, guidance=w).normalisable()

    assert normalisable(gaussian(0, 1.0), gaussian(0, 2.0), 8.0) is True
    assert normalisable(gaussian(0, 2.0), gaussian(0, 1.0), 1.9) is True  # 1.9 / 2 > .9
    assert normalisable(gaussian(0, 2.0), gaussian(0, 1.0), 2.1) is False
    learned = steer.from_denoiser(lambda x, t: x, steer.VP(), 5, event=(1,))
    assert normalisable(learned, learned, 2.0) is None
    assert compose([learned, learned]).normalisable() is True


def test_an_active_interval_biases():
    """What the warning says: the evidence of an annealed Gaussian, which is exact otherwise, is off."""
    model = gaussian(0.0, 4.0, size=4)
    options = {"exponent": 2.0, "batch": 8, "particles": 32, "sigma_data": 2.0}
    exact = -2.0 * (math.log(2.0 * math.pi * 4.0) + math.log(2.0))
    assert float((steer.fkc(model, **options).log_evidence - exact).abs().max()) < 0.1
    with pytest.warns(UserWarning, match="no known distribution"):
        biased = steer.fkc(model, active=(0.3, 1.0), **options)
    assert float((biased.log_evidence - exact).abs().min()) > 0.5


# Clocks.


class ByTally(BirthDeath):
    """The released rule: destinations by gains since the particle that dies was last replaced."""

    def __call__(self, state, key):
        excess = state.log_weight - state.log_weight.mean(1, keepdim=True)
        batch, particles = excess.shape
        if state.path.deadline is None:
            state = state.with_path_state(
                clock=torch.zeros_like(excess), tally=excess.new_zeros(batch, particles, particles),
                deadline=self._deadline(state, key.fold("first")),
            )  # fmt: skip
        clock = state.path.clock + (-excess).clamp(min=0.0)
        tally = state.path.extra["tally"] + excess.clamp(min=0.0)[:, None]
        dies = (clock >= state.path.deadline) & (tally.sum(2) > 0.0)
        source = (tally.log() + key.at(state.k).gumbel(tally.shape)).argmax(2)
        deadline = torch.where(dies, self._deadline(state, key.at(state.k).fold("next")), state.path.deadline)
        state = state.resample(torch.where(dies, source, torch.arange(particles).expand(batch, particles)))
        return state.with_path_state(
            clock=clock.masked_fill(dies, 0.0), tally=tally.masked_fill(dies[..., None], 0.0), deadline=deadline
        )


@pytest.mark.parametrize(("selection", "kept"), [(BirthDeath(), True), (ByTally(), False)])
def test_birth_death_clocks_keep_the_law(selection, kept):
    """A tilt of one Gaussian by kernel ratios: at sigma_data its own, no step bias is left, and 16 particles do."""
    model, reward = gaussian(0.0, 1.0, 60), Linear([1.0])
    result = steer.fkc(
        model, reward, batch=512, particles=16, transport=steer.base_transport, selection=selection, key=2
    )
    relative = (result.log_evidence - 0.5).exp()
    columns = [relative - 1.0, relative * (result.mean(lambda x: x)[:, 0] - 1.0)]
    scores = [float(c.mean() / c.std() * math.sqrt(512)) for c in columns]
    assert (max(map(abs, scores)) < LIMIT) == kept, scores


def test_a_clock_kills_at_its_deadline_and_not_before():
    state = steer.Trajectory.begin(process(), torch.arange(8.0, dtype=torch.float64).view(1, 4, 2), k=0)
    weights = torch.tensor([[0.5, 1.0, 1.0, 1.5]], dtype=torch.float64)  # of mean 1
    state = state.with_path_state(clock=torch.zeros(1, 4).double(), deadline=torch.full((1, 4), 1.0).double())
    once = birth_death()(state.reweight((3.0 * weights).log()), steer.Key(0))
    assert torch.equal(once.x, state.x)
    torch.testing.assert_close(once.path.clock, torch.tensor([[math.log(2.0), 0.0, 0.0, 0.0]]).double())
    twice = birth_death()(once.reweight(weights.log()), steer.Key(0))
    assert torch.equal(twice.x[0, 0], state.x[0, 3])  # the only one above the mean
    assert torch.equal(twice.x[0, 1:], state.x[0, 1:])
    assert float(twice.path.clock.abs().max()) < 1e-12
    assert float(twice.path.deadline[0, 0]) != 1.0
    assert twice.path.deadline[0, 1:].tolist() == [1.0, 1.0, 1.0]
    assert float(twice.log_weight.abs().max()) == 0.0
    assert float(twice.log_evidence) == pytest.approx(math.log(3.0))


# Composition.


def test_a_start_that_knows_the_reward_control_and_tempering_in_one_call():
    result = steer.driftlite(
        process(30), REWARD, start=steer.pcnl(chains=4, burn_in=10, kept=10), batch=64, particles=24,
        tempering=steer.geometric_tempering(0.08), look_ahead=steer.x0_hat(),
    )  # fmt: skip
    exact = MIXTURE.exact(REWARD)
    means = result.mean(lambda x: x.double())
    error = (means.mean(0) - exact.mean) / (means.std(0) / 8.0)
    assert float(error.abs().max()) < LIMIT
    assert bool(result.log_evidence.isnan().all())  # MCMC does not know the normaliser


@pytest.mark.slow
def test_tempering_leaves_the_law():
    """Exponents fixed and adaptive, with either weight: the evidence of a linear tilt."""
    exact = MIXTURE.exact(REWARD).log_evidence
    for weight in (steer.KernelRatio(), steer.FeynmanKac(probes=None)):
        for tempering in (steer.geometric_tempering(0.04), steer.adaptive_tempering(0.7)):
            result = steer.fkc(process(60), REWARD, weight=weight, tempering=tempering, batch=200, particles=16)
            assert float((result.log_evidence - exact).exp().mean().log()) == pytest.approx(0.0, abs=0.06)


def test_a_run_goes_on_from_where_it_stood():
    for options in ({}, {"weight": steer.FeynmanKac(probes=1)}, {"exponent": 2.0}):
        events = []
        whole = steer.fkc(process(), REWARD, particles=8, key=3, on_step=events.append, **options)
        resumed = steer.fkc(process(), REWARD, key=3, start=events[9].state, **options)
        assert torch.equal(resumed.x, whole.x)
        assert torch.equal(resumed.log_weight, whole.log_weight)
        assert torch.equal(resumed.log_evidence, whole.log_evidence)


def test_a_composite_is_a_process_for_other_samplers():
    """Guidance without correction is the composite's own transition: a rollout of it."""
    target = compose(process(), unconditional=process(), guidance=2.0)
    result = steer.rollout(target, REWARD, particles=4)
    assert result.cost.nfe == 2 * 4 * 20
    exact = exact_chain(MIXTURE, "vp", 4)
    assert compose(exact).rows == 1


def test_a_grid_from_pure_noise_starts_a_little_below():
    """As flow pipelines' do: at alpha = 0 the path's own drift is infinite, and every other sampler starts there."""
    times = steer.uniform_times(steer.RectifiedFlow(), 8, start=1.0)
    model = steer.from_denoiser(lambda x, t: 0.0 * x, steer.RectifiedFlow(), times, event=(2,))
    target = steer.compose(model)
    assert (model.times[0], target.levels[0].t) == (1.0, steer.RectifiedFlow().start)
    assert target.components[0].times[1:] == model.times[1:]
    assert bool(steer.fkc(model, exponent=2.0, particles=4).log_weight.isfinite().all())
    kept = steer.compose(model.with_times(times[1:]))
    assert kept.components[0].times == times[1:]


def test_what_has_no_noised_laws_is_refused():
    guided = steer.guide(process(4), steer.dps(lambda x: -x.square().sum(1), 0.1))
    for model in (guided, [process(4), guided], steer.load("letters")):
        with pytest.raises(steer.StateSpaceError, match="not known of a"):
            steer.fkc(model, exponent=2.0, particles=2)


@pytest.mark.parametrize("weight", [steer.KernelRatio(), steer.FeynmanKac()], ids=["ratio", "feynman-kac"])
def test_what_an_error_leaves_can_be_gone_on_from(weight):
    """The state of before the step that failed: its gain is not in it twice."""
    process = steer.models.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.2], steps=5, dtype=torch.float64)
    slope = torch.tensor([2.8, -2.0], dtype=torch.float64)
    whole = steer.fkc(process, lambda x: x @ slope, particles=40, weight=weight)
    for calls in range(2, 9):
        left = [calls]

        def failing(x, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise ValueError
            return x @ slope

        try:
            steer.fkc(process, failing, particles=40, weight=weight)
        except steer.SteerError as error:
            rest = steer.fkc(process, lambda x: x @ slope, start=error.partial, weight=weight)
            torch.testing.assert_close(rest.log_weight, whole.log_weight, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(rest.log_evidence, whole.log_evidence, rtol=1e-9, atol=1e-9)
        else:
            assert calls > 5


@pytest.mark.parametrize("options", [{}, {"weight": steer.FeynmanKac()}, {"transport": steer.half_transport}])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_flow_maps_network_is_in_the_ledger_and_the_budget(options, rows):
    called = {"model": 0, "map": 0}

    class Counted(torch.nn.Module):
        def forward(self, x, t):
            called["model"] += x.numel() // 2
            return 0.5 * x

    def flow(x, t):
        called["map"] += rows * x.shape[0] * x.shape[1]
        return x / (1.0 + t)

    model = steer.from_denoiser(Counted(), steer.VP(), 6, event=(2,))
    look = steer.flow_map(flow, rows=rows)
    cost = steer.fkc(model, Quadratic([0.8, -0.4], 0.5), look_ahead=look, budget=200, **options).cost
    assert cost.nfe == called["model"] + called["map"]
    assert called["map"] > 0
    assert 100 < cost.nfe <= 200


def test_what_a_value_is_differentiated_through_is_in_the_ledger():
    """Half transport follows the value: through the prediction, through the steps of a look-ahead, or the map alone."""
    model = steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), 6, event=(2,))

    def grads(look):
        options = {"transport": steer.half_transport, "weight": steer.KernelRatio()}
        return steer.fkc(model, Quadratic([0.8, -0.4], 0.5), look_ahead=look, particles=4, **options).cost.grads

    one = grads(None)  # x0_hat, one prediction
    assert one == 4 * 5  # at every level but the last, where steps draw no noise
    assert grads(steer.flow_map(lambda x, t: x, rows=3)) == 3 * one
    assert grads(steer.ode_steps(2)) == 2 * one


def test_rows_of_a_flow_map_are_checked():
    with pytest.raises(steer.SteerError, match="network rows that the function costs"):
        steer.flow_map(lambda x, t: x, rows=-1)
