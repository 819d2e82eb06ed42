"""The enumerable language: its conditionals, the distribution of its chains, and samplers against exact tables."""

import math

import pytest
import torch
from exact import LIMIT, worst, z

import steer
from steer.models import MarkovLanguage, markov_language, masked_chain_law
from steer.models.markov import enumerate_strings

INITIAL = [0.5, 0.3, 0.2]
MATRIX = [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.1, 0.4]]
VOCABULARY = 3


def alternating(x, log_prob):
    """The model's own order: odd places first."""
    return (torch.arange(x.shape[2]) % 2).expand(x.shape).double()


ORDERS = {"random": "random", "confidence": "confidence", "own": alternating}


def language(length, steps=None, order: object = "random", matrix=MATRIX):
    return markov_language(INITIAL, matrix, length, steps=steps, transition=steer.unmask(order))  # pyright: ignore


def count_of_ones(x):
    return 0.8 * (x == 1).double().sum(1)


def repeats(x):
    """Rewards equal neighbours and forbids strings that start and end with token 0."""
    score = (x[:, 1:] == x[:, :-1]).double().sum(1)
    return score.masked_fill((x[:, 0] == 0) & (x[:, -1] == 0), -math.inf)


# -- the exact denoiser


def brute_force(table, x):
    """p(token i = v | visible) by summing the table over the strings that agree with a partly masked string."""
    agrees = ((table.strings == x) | (x == VOCABULARY)).all(1)
    mass = table.mass * agrees
    hot = torch.nn.functional.one_hot(table.strings, VOCABULARY).double()
    return (mass[:, None, None] * hot).sum(0) / mass.sum()


def test_conditionals_equal_sums_over_the_table():
    model = language(4).reference
    states = enumerate_strings(VOCABULARY + 1, 4)
    computed = model.log_marginals(states).exp()
    for x, row in zip(states, computed, strict=True):
        torch.testing.assert_close(row, brute_force(model.table, x), rtol=1e-12, atol=1e-14)


def test_states_the_data_never_shows_have_uniform_conditionals_and_impossible_tokens_none():
    model = MarkovLanguage(torch.tensor([1.0, 0.0]).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), 3)
    never = model.log_marginals(torch.tensor([[1, 2, 2]])).exp()
    torch.testing.assert_close(never, torch.full((1, 3, 2), 0.5).double())
    only = model.log_marginals(torch.tensor([[2, 2, 2]])).exp()[0]
    assert only.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]


def test_a_table_is_a_law():
    table = language(5).reference.table
    assert abs(float(table.mass.sum()) - 1.0) < 1e-12
    assert torch.equal(table.index(table.strings), torch.arange(3**5))
    half = table.total_variation(table.strings[None, :1], torch.zeros(1, 1).double())
    torch.testing.assert_close(half, 1.0 - table.mass[:1])


def test_tilted_evidence_equals_a_product_of_matrices():
    """For a reward that is a sum over tokens, E[exp(r)] is a product of L tilted transition matrices."""
    for temperature in (1.0, 0.5):
        tilt = torch.tensor([1.0, math.exp(0.8 / temperature), 1.0], dtype=torch.float64)
        vector = torch.tensor(INITIAL, dtype=torch.float64) * tilt
        for _ in range(6):
            vector = (vector @ torch.tensor(MATRIX, dtype=torch.float64)) * tilt
        target = language(7).exact(count_of_ones, temperature)
        assert abs(target.log_evidence - float(vector.sum().log())) < 1e-12
        assert abs(float(target.mass.sum()) - 1.0) < 1e-12


# -- the law of the chain


@pytest.mark.parametrize("order", ORDERS)
def test_one_token_a_step_has_the_law_of_the_data_exactly(order):
    process = language(4, order=ORDERS[order])
    torch.testing.assert_close(masked_chain_law(process).mass, process.reference.table.mass, rtol=1e-12, atol=1e-15)


def test_several_tokens_a_step_have_another_law():
    """What the test above would say if it could not fail; and independent revealing tends to the data."""
    for order in ("random", "confidence", None):
        process = language(4, 2, order)
        distance = 0.5 * (masked_chain_law(process).mass - process.reference.table.mass).abs().sum()
        assert distance > 0.1
    distances = []
    for steps in (4, 8, 16):
        process = language(4, steps, None)
        distances.append(0.5 * float((masked_chain_law(process).mass - process.reference.table.mass).abs().sum()))
    assert distances[1] < 0.6 * distances[0]
    assert distances[2] < 0.6 * distances[1]


def chi_square_z(table, x):
    """(chi^2 - df) / sqrt(2 df) of samples (1, N, L) against a table, strings expected below 5 times pooled."""
    expected = table.mass * x.shape[1]
    counts = torch.bincount(table.index(x).flatten(), minlength=len(expected)).double()
    rare = expected < 5
    expected, counts = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = len(expected) - 1
    return float((((counts - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_samples_of_a_longer_chain_have_the_law_of_the_data(order):
    process = language(6, order=ORDERS[order])
    x = steer.rollout(process, count_of_ones, particles=20_000, keep_states=False, key=1).x
    assert abs(chi_square_z(process.reference.table, x)) < LIMIT
    coarse = language(6, 3, ORDERS[order])
    x = steer.rollout(coarse, count_of_ones, particles=20_000, keep_states=False, key=1).x
    assert chi_square_z(process.reference.table, x) > 2 * LIMIT  # the same test, on a chain with another law


@pytest.mark.parametrize("order", [None, "random", "confidence", alternating])
def test_samples_of_a_coarse_chain_have_the_law_that_is_computed(order):
    process = language(4, 2, order)
    x = steer.rollout(process, count_of_ones, particles=20_000, keep_states=False, key=1).x
    assert abs(chi_square_z(masked_chain_law(process), x)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", None])
def test_masking_data_again_and_running_back_keeps_the_law(order):
    """The reverse chain from a re-masked sample of the data ends in the data again, if both kernels are right."""
    process = language(4, 4 if order else 60, order)
    table = process.reference.table
    start = steer.multinomial(table.log_mass[None], steer.Key(2), 20_000)
    state = steer.Trajectory.begin(process, table.strings[start], k=process.steps).renoise(
        process.steps // 2, steer.Key(3)
    )
    assert 1.5 < float((state.x == VOCABULARY).double().sum(2).mean()) < 2.5
    for k in range(state.k, process.steps):
        state = state.step(process.transition(state.x, process.denoise(state.x, k), k), steer.Key(4))
    assert abs(chi_square_z(table, state.x)) < LIMIT


# -- samplers against exact tables

POTENTIALS = {
    "difference": steer.difference(),
    "difference_everywhere": steer.difference(at=range(5)),  # also before the last step, which draws a token here
    "maximum": steer.maximum(),
    "total": steer.total(),
    "final_only": steer.final_only(),
    "geometric": steer.difference(tempering=steer.geometric_tempering(0.3)),
    "adaptive": steer.difference(tempering=steer.adaptive_tempering()),
}
RESAMPLERS = ["systematic", "stratified", "multinomial", "residual", "ssp", "killing"]


def z_of_table(result, target):
    """z of the evidence, of each token's mean count at each place, and of the share of equal neighbours.

    As in exact.z_scores: E[Z_hat / Z - 1] = 0 and E[Z_hat (f_hat - E f)] = 0 exactly, over independent problems.
    """

    def features(x):
        hot = torch.nn.functional.one_hot(x, VOCABULARY)[..., 1:].flatten(1)
        return torch.cat([hot, (x[:, 1:] == x[:, :-1]).sum(1, keepdim=True)], 1).double()

    relative = (result.log_evidence - target.log_evidence).exp()
    centred = relative[:, None] * (result.mean(features) - target.mean(features))
    return {"evidence": z(relative - 1.0)} | {f"feature{i}": z(centred[:, i]) for i in range(centred.shape[1])}


def resampled(process, resampler, potential="difference"):
    """A run on 400 problems that resamples at every weighted level.

    At temperature 1: at a half, `total` sums to evidences of standard deviation 5 to 10 and maxima of several
    hundred times Z, for which 400 problems, or 10,000, are no normal limit.
    """
    return steer.smc(
        process,
        count_of_ones,
        batch=400,
        particles=8,
        weight=POTENTIALS[potential],
        key=5,
        selection=steer.resample(resampler, threshold=1.0),
    )


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_smc_is_unbiased_for_every_potential_and_resampler(potential, resampler):
    process = language(5)
    result = resampled(process, getattr(steer, resampler), potential)
    assert potential == "final_only" or float(result.trajectory.resamplings().double().mean()) > 2
    assert worst(z_of_table(result, process.exact(count_of_ones)))[0] < LIMIT


@pytest.mark.parametrize("order", [None, "random", "confidence", alternating])
@pytest.mark.parametrize("reward", [count_of_ones, repeats])
def test_smc_targets_the_tilted_law_of_a_coarse_chain(order, reward):
    """Several tokens a step: what is tilted is the chain's distribution, also where the reward forbids strings."""
    process = language(4, 2, order)
    result = steer.smc(process, reward, batch=1000, particles=32, key=6)
    right, other = masked_chain_law(process).tilted(reward), process.exact(reward)
    assert worst(z_of_table(result, right))[0] < LIMIT
    assert worst(z_of_table(result, other))[0] > LIMIT


def test_importance_sampling_is_unbiased():
    process = language(6)
    result = steer.importance_sampling(process, repeats, batch=400, particles=16, key=7)
    assert worst(z_of_table(result, process.exact(repeats)))[0] < LIMIT


def test_mutants_are_rejected():
    """Weights dropped; another temperature; the last prediction's value for the sample's; a resampler that favours."""
    process = language(5)
    target = process.exact(count_of_ones)
    dropped = steer.rollout(process, count_of_ones, batch=300, particles=8, key=5)
    cold = steer.smc(process, count_of_ones, batch=300, particles=8, key=5, temperature=0.5)
    open_ended = steer.smc(process, count_of_ones, batch=300, particles=8, key=5, weight=NotClosed())
    assert worst({name: score for name, score in z_of_table(dropped, target).items() if name != "evidence"})[0] > LIMIT
    for mutant in (cold, open_ended):
        assert worst(z_of_table(mutant, target))[0] > 2 * LIMIT
    favouring = resampled(process, lambda log_weight, key, count: steer.multinomial(2.5 * log_weight, key, count))
    assert worst(z_of_table(favouring, target))[0] > LIMIT


def NotClosed():
    """A weight that ends on the last prediction's value, as released code does."""
    plain = steer.difference()

    class Open(type(plain)):
        def close(self, state, value):
            return state

    return Open(plain.combine, plain.at, plain.tempering)


def slope_of(points):
    """Slope of log mean against log budget with its standard error, from (budget, values of problems)."""
    x = torch.tensor([math.log(budget) for budget, _ in points]).double()
    y = torch.stack([values.mean().log() for _, values in points])
    error = torch.stack([values.std() / values.mean() / math.sqrt(len(values)) for _, values in points])
    lever = (x - x.mean()) / (x - x.mean()).square().sum()
    return float(lever @ y), float((lever * error).square().sum().sqrt())


def resampling_smc(process, reward, **options):
    """SMC that resamples whenever weights differ, so that it is not importance sampling."""
    result = steer.smc(process, reward, selection=steer.resample(threshold=1.0), **options)
    assert int(result.trajectory.resamplings().min()) >= 2
    return result


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [resampling_smc, steer.importance_sampling])
def test_distance_to_the_exact_table_falls_as_one_over_the_root_of_the_budget(sampler):
    process = language(4)
    target = process.exact(count_of_ones, 0.5)
    points = []
    for particles, problems in ((500, 64), (2000, 32), (8000, 16)):
        budget = particles * process.steps
        result = sampler(process, count_of_ones, batch=problems, budget=budget, temperature=0.5, key=8)
        points.append((particles, target.total_variation(result.x, result.log_weight)))
    slope, error = slope_of(points)
    assert error < 0.03
    assert abs(slope + 0.5) < LIMIT * error, (slope, error)


@pytest.mark.slow
def test_without_weights_the_distance_does_not_fall():
    process = language(4)
    target = process.exact(count_of_ones, 0.5)
    points = []
    for particles in (500, 8000):
        result = steer.rollout(process, count_of_ones, batch=16, particles=particles, keep_states=False)
        points.append((particles, target.total_variation(result.x, result.log_weight)))
    assert slope_of(points)[0] > -0.1


# -- errors


def test_bad_arguments_say_what_is_wanted():
    with pytest.raises(steer.ShapeError, match=r"matrix \(3, 3\)"):
        markov_language(INITIAL, [[1.0]], 3)
    with pytest.raises(steer.ModelError, match="summing to 1"):
        markov_language(INITIAL, [[0.5, 0.3, 0.1]] * 3, 3)
    with pytest.raises(steer.ModelError, match="too large"):
        masked_chain_law(language(12))
    with pytest.raises(steer.ModelError, match="too many to list"):
        language(30).exact(count_of_ones)
    with pytest.raises(steer.ShapeError, match=r"\(81,\)"):
        language(4).exact(lambda x: x)
