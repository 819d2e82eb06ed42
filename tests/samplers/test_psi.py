"""Ψ: the law after a start that already counts the reward, where everything is in closed form.

The data is one Gaussian, the chain exact (`ExactStep`), and the predictor of the start the model's own flow map, which
is affine. The tilted prior is then Gaussian too, and its normaliser known. Tests hand it to the start as the evidence
it cannot know, and every estimate is exactly unbiased again (see `exact.z_scores`) as far as the chains are stationary:
under a linear reward pCNL at step size 4 is after one step, elsewhere 30 steps leave less than 1e-4 of the beginning.
"""

import dataclasses
import math

import pytest
import torch
from exact import LIMIT, PATHS, Linear, Quadratic, exact_chain, worst, z_scores

import steer
from steer.models import GaussianMixture
from steer.particles import mcmc_start, metropolis_hastings

MEAN, SD = torch.tensor([0.5, -0.3], dtype=torch.float64), 0.9
DATA = GaussianMixture(MEAN[None], torch.tensor([SD**2]))
REWARDS = {"linear": Linear([1.1, -0.6]), "quadratic": Quadratic([1.5, 0.5], 1.2)}
BATCH, PARTICLES, STEPS = 512, 12, 6


def flow_map(process):
    """x0 the probability-flow ODE leads to from x at the first level, and the law of x0 over the prior."""
    level = process.levels[0]
    spread = math.hypot(level.alpha * SD, level.sigma)

    def predict(x):
        return MEAN + (SD / spread) * (x - level.alpha * MEAN)

    offset = predict(torch.zeros(2, dtype=torch.float64))
    return predict, GaussianMixture(offset[None], torch.tensor([(SD * level.sigma / spread) ** 2]))


def chains(predict, reward, temperature):
    """pCNL whose kept states follow the tilted prior: at once under a linear reward, else after burn-in."""
    options = {"temperature": temperature, "x0_predictor": predict, "chains": 6, "kept": 2, "acceptance": None}
    if reward == "linear":
        return steer.pcnl(step_size=4.0, burn_in=1, **options)
    return steer.pcnl(step_size=1.0, burn_in=30, **options)


def known(monkeypatch, log_normaliser, spoil=lambda state: state):
    """From here on MCMC starts carry the log-normaliser of the law they sample; `spoil` makes a mutant of them."""
    run = mcmc_start.MCMCStart.__call__

    def start(self, *args):
        state = run(self, *args)
        assert state.log_evidence.isnan().all()
        return spoil(dataclasses.replace(state, log_evidence=torch.full_like(state.log_evidence, log_normaliser)))

    monkeypatch.setattr(mcmc_start.MCMCStart, "__call__", start)


def score(
    monkeypatch, path, reward, temperature, start_temperature, *, batch=BATCH, key=1, spoil=lambda s: s, start=None,
    **options,
):  # fmt: skip
    """Worst |z| of evidence, mean and variance over the problems of a run of psi."""
    process, tilt = exact_chain(DATA, path, STEPS), REWARDS[reward]
    predict, image = flow_map(process)
    start = start(predict) if start else chains(predict, reward, start_temperature)
    with monkeypatch.context() as patch:
        known(patch, image.exact(tilt, temperature=start_temperature or temperature).log_evidence, spoil)
        result = steer.psi(
            process, tilt, batch=batch, particles=PARTICLES, temperature=temperature, key=key, start=start, **options
        )
    return worst(z_scores(result, DATA.exact(tilt, temperature=temperature)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(
    ("temperature", "start_temperature"), [(1.0, None), (1.0, 1.0), (1.0, 2.5), (1.0, 0.7), (0.5, 1.0)]
)
def test_law(monkeypatch, path, reward, temperature, start_temperature):
    found, name = score(monkeypatch, path, reward, temperature, start_temperature)
    assert found < LIMIT, (name, found)


@pytest.mark.parametrize(
    "options",
    [
        {"proposal": steer.bootstrap},
        {"proposal": steer.twisted(0.5)},
        {"weight": steer.maximum()},
        {"weight": steer.total(at=[1, 3])},
        {"weight": steer.final_only()},
        {"weight": steer.difference(tempering=steer.geometric_tempering(0.2))},
        {"weight": steer.difference(tempering=steer.geometric_tempering(0.2, lowest=0.5))},
        {"weight": steer.difference(tempering=steer.adaptive_tempering(0.7, lowest=0.5))},
        {"selection": steer.resample(steer.multinomial, threshold=1.0)},
        {"selection": steer.resample(threshold=0.0)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_law_with_every_part_exchanged(monkeypatch, options):
    found, name = score(monkeypatch, "vp", "quadratic", 1.0, 2.0, **options)
    assert found < LIMIT, (name, found)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [steer.pcn, steer.elliptical_slice])
@pytest.mark.parametrize("start_temperature", [None, 2.5])
def test_law_from_starts_without_a_gradient(monkeypatch, path, kind, start_temperature):
    def start(predict):
        return kind(temperature=start_temperature, x0_predictor=predict, chains=6, burn_in=40, kept=2)

    found, name = score(monkeypatch, path, "quadratic", 1.0, start_temperature, start=start)
    assert found < LIMIT, (name, found)


def test_weights_of_the_first_level():
    """Nothing is due there at T_m = T, however strong the reward, and r / T - r / T_m at another temperature."""
    process = dataclasses.replace(exact_chain(DATA, "vp", 2), denoiser=lambda x, t: 0.8 * x)
    for start_temperature, share in ((None, 0.0), (0.5, 0.0), (1.0, 0.5), (0.25, -1.0)):
        events = []
        steer.smc(
            process, lambda x: 30.0 * x[:, 0], start=steer.pcnl(temperature=start_temperature), particles=8,
            temperature=0.5, on_step=events.append, selection=steer.resample(threshold=0.0),
        )  # fmt: skip
        state = events[0].state
        value = state.path.log_potential  # r / T, now that it has been weighted by
        assert float(value.std()) > 1.0
        torch.testing.assert_close(state.log_weight, share * value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 2.5)])
def test_mutant_reward_counted_twice_is_rejected(monkeypatch, temperatures):
    """Released Ψ-Sampler (init_weight_method: reward): weight exp(r / T) after MCMC on exp(r / T_m)."""

    def forgetful(state):
        return state.with_path_state(log_potential=None)

    assert score(monkeypatch, "vp", "linear", *temperatures, spoil=forgetful)[0] > LIMIT


def test_mutant_uniform_first_weights_are_rejected(monkeypatch):
    """Released Ψ-Sampler (init_weight_method: original) where T_m != T: as if the start had been at T."""

    def pretending(state):
        return state.with_path_state(log_potential=2.5 * state.path.log_potential)

    assert score(monkeypatch, "vp", "linear", 1.0, 2.5, spoil=pretending)[0] > LIMIT


def test_mutant_chain_that_accepts_everything_is_rejected(monkeypatch):
    always = lambda move, here, there: torch.full_like(here.value, torch.inf)  # noqa: E731
    monkeypatch.setattr(metropolis_hastings, "log_acceptance", always)
    assert score(monkeypatch, "vp", "quadratic", 1.0, None, batch=2048)[0] > LIMIT


# --- budgets and what is reported -------------------------------------------------------------------------------------


def process_and_start(**options):
    process = exact_chain(DATA, "vp", STEPS)
    return process, steer.pcnl(x0_predictor=flow_map(process)[0], **options)


@pytest.mark.parametrize("budget", [16, 17, 100, 301])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_budget_is_split(budget, share):
    process, start = process_and_start()
    cost = steer.psi(process, REWARDS["linear"], budget=budget, share=share, start=start).cost
    smc_rows = STEPS * max(1, min(int((1 - share) * budget), budget - 10) // STEPS)
    assert cost.nfe <= budget
    assert cost.nfe - smc_rows == (budget - smc_rows) // 5 * 5  # MCMC, in steps of five chains


def test_particles_set_the_budget_and_lengths_given_are_kept():
    process, start = process_and_start(chains=4)
    half = steer.psi(process, REWARDS["linear"], particles=20, start=start)
    assert half.cost.nfe == 2 * 20 * STEPS
    process, start = process_and_start(chains=4, burn_in=3, kept=6)
    given = steer.psi(process, REWARDS["linear"], budget=100, start=start)
    assert given.cost.nfe == 4 * 10 + STEPS * ((100 - 40) // STEPS)
    assert given.x.shape[1] == 10
    both = steer.psi(process, REWARDS["linear"], budget=100, particles=5, start=steer.pcnl(chains=2))
    assert both.x.shape[1] == 5
    assert both.cost.nfe == 100
    rows = steer.psi(
        process, REWARDS["linear"], budget=400, start=steer.pcnl(x0_predictor=lambda x: x, predictor_rows=4)
    )
    assert rows.cost.nfe <= 400


def test_a_start_is_paid_for_by_every_samplers_budget():
    process, start = process_and_start(chains=4, burn_in=3, kept=6)
    for sampler in (steer.smc, steer.fk_steering, steer.tds, steer.das, steer.importance_sampling):
        result = sampler(process, REWARDS["linear"], budget=100, start=start)
        assert result.cost.nfe == 100
        assert result.x.shape == (1, 10, 2)
    with pytest.raises(steer.BudgetError, match=r"after 40 for their start.* raise the budget to 46"):
        steer.smc(process, REWARDS["linear"], budget=45, start=start)


def test_share_is_checked_and_small_budgets_say_what_is_needed():
    process, start = process_and_start()
    for share in (0.0, 1.0):
        with pytest.raises(steer.SteerError, match="share"):
            steer.psi(process, REWARDS["linear"], share=share)
    with pytest.raises(steer.BudgetError, match="raise the budget to 16"):
        steer.psi(process, REWARDS["linear"], budget=15, start=start)


def test_diagnostics_are_found_in_the_result():
    process, start = process_and_start()
    result = steer.psi(process, REWARDS["quadratic"], particles=40, batch=3, start=start)
    diagnostics = result.trajectory.diagnostics
    assert set(diagnostics) == {"acceptance", "step_size", "split_rhat", "gradient"}
    assert all(value.shape == (3,) and bool(value.isfinite().all()) for value in diagnostics.values())
    assert result.log_evidence.isnan().all()
    assert bool(result.log_weight.isfinite().all())


def test_a_start_on_a_process_with_mean_hooks_asks_about_the_prediction():
    """Its predictions are stacked with what the hooks add; at high temperature the gradient is checked to be there."""
    process = exact_chain(DATA, "vp", STEPS)
    guided = steer.guide(process, steer.guidance.Hooks(mean=(lambda at: at.mean,)))
    options = {"particles": 4, "temperature": 1e5}
    plain, hooked = (steer.psi(chain, REWARDS["linear"], **options) for chain in (process, guided))
    torch.testing.assert_close(plain.x, hooked.x)
