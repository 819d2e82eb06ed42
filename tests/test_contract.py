"""What every sampler owes, in one file: each row of METHODS runs every case."""

import functools
import inspect
import itertools
import math

import pytest
import torch
from exact import Linear, mixture_2d

import steer
from steer import search


@functools.wraps(search.depth_first)
def depth_first(process, reward, *, particles=None, budget=None, **options):
    """With rows for three samples where none are asked for, and not for sixteen: it moves a row at a time."""
    if budget is None and isinstance(particles, int) and particles > 0:
        budget = 3 * process.steps * process.rows * particles
    return search.depth_first(process, reward, particles=particles, budget=budget, **options)


METHODS = {
    "rollout": steer.rollout,
    "importance_sampling": steer.importance_sampling,
    "smc": steer.smc,
    "smc_guided": functools.partial(steer.smc, proposal=steer.guided(0.5)),
    "smc_max": functools.partial(steer.smc, weight=steer.maximum(at=[1, 2])),
    "smc_tempered": functools.partial(steer.smc, weight=steer.difference(tempering=steer.adaptive_tempering())),
    "smc_pcnl": functools.partial(steer.smc, start=steer.pcnl(chains=3, burn_in=2, kept=2)),
    "smc_top_k": functools.partial(steer.smc, start=steer.top_k_of_n(9)),
    "psi": functools.partial(steer.psi, start=steer.pcnl(chains=3)),
    "fk_steering": steer.fk_steering,
    "tds": steer.tds,
    "das": steer.das,
    "fkc": steer.fkc,
    "fkc_birth_death": functools.partial(steer.fkc, selection=steer.birth_death(), transport=steer.base_transport),
    "fkc_feynman_kac": functools.partial(steer.fkc, weight=steer.FeynmanKac(), look_ahead=steer.at_state()),
    "driftlite": functools.partial(steer.driftlite, look_ahead=steer.at_state()),
    "particle_gibbs": functools.partial(steer.particle_gibbs, sweeps=1),
    "particle_gibbs_pinned": functools.partial(steer.particle_gibbs, sweeps=2),
    "waste_free": functools.partial(steer.waste_free, chain=2),
    "waste_free_early": functools.partial(steer.waste_free, chain=2, levels=[0, 2]),
    "best_of_n": search.best_of_n,
    "best_of_n_chunked": functools.partial(search.best_of_n, chunk=3, keep=2),
    "svdd": functools.partial(search.svdd, candidates=2),
    "svdd_replacing": functools.partial(search.svdd, candidates=2, select="argmax", replace=0.3, chunk=5),
    "beam": search.beam,
    "beam_blocks": functools.partial(search.beam, block=2, keep=2),
    "beam_top": functools.partial(search.beam, candidates=3, select=search.selection.top()),
    "rbf": functools.partial(search.rbf, quota=1),
    "depth_first": depth_first,
    "dts": search.dts,
    "dts_uniform": functools.partial(search.dts, build="uniform"),
    "dts_boltzmann": functools.partial(search.dts, build="boltzmann"),
    "dts_guided": functools.partial(search.dts, proposal=steer.guided(0.5)),
    "dts_star": functools.partial(search.dts_star, walkers=16),
    "noise_zero_order": search.noise_search,
    "noise_paths": functools.partial(search.noise_search, strategy=search.paths()),
    "noise_epsilon_greedy": functools.partial(search.noise_search, strategy=search.epsilon_greedy()),
}
SEARCHES = ("best_of", "svdd", "beam", "rbf", "depth_first", "noise", "dts_star")
SAMPLERS = [name for name in METHODS if not name.startswith(SEARCHES)]
STEPS = 5
REWARD = Linear([0.7, -0.5])

# What differs from one chain of STEPS rows per particle. Rows of the start: psi gives its MCMC as much as its SMC, in
# whole steps of 3 chains and at least 2 of them.
START_ROWS = {
    "smc_pcnl": lambda particles: 15,
    "smc_top_k": lambda particles: 9,
    "psi": lambda n: max(6, n * STEPS // 3 * 3),
}
# Half of them are moved: by 5 rows at the end, or by 1 at level 0 and 3 at level 2.
MOVED = {"waste_free": lambda n: 5 * (n // 2), "waste_free_early": lambda n: 4 * (n // 2)}
SWEEPS = {"particle_gibbs_pinned": 2}
CANDIDATES = {"svdd": 2, "svdd_replacing": 2, "beam_top": 3}  # rows per particle and level
WITHOUT_BUDGET = {name: 16 for name in METHODS if name.startswith("noise")} | {
    "depth_first": 3
}  # samples' worth of rows
GRADIENTS = {"fkc", "fkc_feynman_kac", "driftlite", "smc_guided", "dts_guided", "smc_pcnl", "psi", "tds", "das"}
NO_EVIDENCE = {"rollout", "smc_pcnl", "smc_top_k", "psi"}


def rows(name, particles):
    """Network rows of a run, per problem."""
    start = START_ROWS.get(name, lambda particles: 0)(particles) + MOVED.get(name, lambda particles: 0)(particles)
    return start + SWEEPS.get(name, 1) * CANDIDATES.get(name, 1) * STEPS * particles


def mixture_process(dtype=torch.float32, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, steps=STEPS, dtype=dtype, **options
    )


class Spy:
    """Counts what reaches the network and the reward."""

    def __init__(self, process, reward):
        self.rows = self.scored = self.decoded = self.grads = 0
        self.denoiser, self.reward = process.denoiser, reward
        self.process = steer.from_denoiser(
            self.denoise, process.schedule, process.times, event=process.event, decoder=self.decode
        )

    def denoise(self, x, t):
        self.rows += x.shape[0] * x.shape[1]
        x0 = self.denoiser(x, t)
        if x0.requires_grad:  # a backward pass reaches the network through its output, whatever it comes from
            x0.register_hook(lambda grad: setattr(self, "grads", self.grads + grad.shape[0] * grad.shape[1]))
        return x0

    def decode(self, x):
        self.decoded += len(x)
        return x

    def score(self, x):
        self.scored += len(x)
        return self.reward(x)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def method(name):
    return METHODS[name]


def test_ledger_equals_a_spys_count(method, name):
    spy = Spy(mixture_process(), REWARD)
    cost = method(spy.process, spy.score, particles=7, batch=2).cost
    assert (cost.nfe, cost.rewards, cost.decodes, cost.grads) == (spy.rows, spy.scored, spy.decoded, spy.grads)
    assert cost.nfe == 2 * rows(name, 7) * WITHOUT_BUDGET.get(name, 1)
    assert cost.seconds["total"] > 0


def test_seconds_add_up_also_of_calls_that_fail(monkeypatch):
    clock = itertools.count(start=10.0, step=0.5)
    monkeypatch.setattr(steer.cost.time, "perf_counter", lambda: next(clock))
    meter = steer.cost.Meter()  # at 10
    for _ in range(3):
        with meter.network(4):
            pass
    with pytest.raises(KeyError), meter.gradient(2), meter.scoring(1):
        raise KeyError
    cost = meter.cost()
    assert cost.seconds == {"network": 1.5, "gradient": 1.5, "reward": 0.5, "decode": 0.0, "total": 5.5}
    assert (cost.nfe, cost.grads, cost.rewards) == (12, 2, 1)


@pytest.mark.parametrize("more", [0, 6 * STEPS + 3])
def test_budget_is_never_exceeded_and_used_up_to_a_particle(method, name, more):
    budget = rows(name, 1) + more
    result = method(mixture_process(), REWARD, budget=budget, batch=2)
    spare = SWEEPS.get(name, 1) * CANDIDATES.get(name, 1) * STEPS + MOVED.get(name, lambda n: 0)(2)
    assert budget - spare < result.cost.nfe / 2 <= budget


COUNTS = ["particles", "batch", "keep", "chunk", "walkers", "quota", "every", "candidates"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (name, count)
        for name, method in METHODS.items()
        for count in inspect.signature(getattr(method, "func", method)).parameters
        if count in COUNTS
    ],
)
def test_counts_are_checked_before_anything_is_paid_for(name, count):
    method = METHODS[name]
    function, options = getattr(method, "func", method), getattr(method, "keywords", {})
    for value in (0, -1, 1.5):
        given = options | ({} if count == "particles" else {"budget": rows(name, 4)}) | {count: value}
        with pytest.raises(steer.SteerError, match=rf"{count} (must be at least 1|is a whole number), .*{value}"):
            function(mixture_process(), REWARD, **given)


def test_a_budget_of_another_type_is_named(method):
    with pytest.raises(steer.SteerError, match=r"budget is a whole number, got 1000.0 of type float"):
        method(mixture_process(), REWARD, budget=1e3)


def test_budget_too_small_says_what_is_needed(method, name):
    least = rows(name, 1)
    with pytest.raises(steer.BudgetError, match=rf"budget of {least - 1} .* raise the budget to {least}"):
        method(mixture_process(), REWARD, budget=least - 1)


def test_same_key_same_result_other_key_other_result(method):
    process = mixture_process()
    first, again, other = (method(process, REWARD, particles=6, key=key) for key in (3, 3, 4))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.log_weight, again.log_weight)
    assert not torch.equal(first.x, other.x)


def test_the_global_generator_is_left_alone(method):
    before = torch.get_rng_state()
    method(mixture_process(), REWARD, particles=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_graph_is_built_or_kept(method, name):
    """A network in training, whose weights ask for gradients: it runs without autograd where none is asked for."""
    process, weight, building = mixture_process(), torch.nn.Parameter(torch.ones(())), []

    def network(x, t):
        building.append(torch.is_grad_enabled())
        return weight * process.denoiser(x, t)

    trained = steer.from_denoiser(network, process.schedule, process.times, event=process.event)
    result = method(trained, REWARD, particles=6)
    assert any(building) == (name in GRADIENTS)
    assert not any(part.requires_grad for part in (result.x, result.reward, result.log_weight, result.log_evidence))
    if result.tree is not None:
        assert not any(state.requires_grad for layer in result.tree.layers for state in layer.states.values())


def test_other_problems_do_not_matter(method):
    process = mixture_process(torch.float64)
    alone, together = (method(process, REWARD, particles=6, batch=batch, key=2) for batch in (1, 4))
    # Noise and decisions are the same; sums over coordinates may round differently in a larger batch.
    torch.testing.assert_close(together.x[:1], alone.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together.log_evidence[:1], alone.log_evidence, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert not torch.equal(together.x[0], together.x[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_constant_reward_leaves_weights_equal_and_evidence_exact(name):
    def constant(x):
        return 0.0 * x.sum(1) + 2.0

    result = METHODS[name](mixture_process(), constant, particles=8, batch=2)
    torch.testing.assert_close(result.log_weight, torch.full((2, 8), -math.log(8.0), dtype=torch.float64))
    if name not in NO_EVIDENCE:
        torch.testing.assert_close(result.log_evidence, torch.full((2,), 2.0, dtype=torch.float64))


def test_weights_sum_to_one_and_shapes_are_right(method):
    result = method(mixture_process(), REWARD, particles=7, batch=3)
    assert result.x.shape == (3, 7, 2)
    assert result.reward.shape == result.log_weight.shape == (3, 7)
    assert result.log_evidence.shape == (3,)
    assert result.reward.dtype == result.log_weight.dtype == result.log_evidence.dtype == torch.float64
    torch.testing.assert_close(result.log_weight.exp().sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(result.reward, REWARD(result.x.flatten(0, 1)).view(3, 7))
    assert result.best.shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_keep_their_dtype(method, dtype):
    assert method(mixture_process(dtype), REWARD, particles=3).x.dtype == dtype


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_bad_score_is_named(method, bad, word):
    def reward(x):
        scores = REWARD(x)
        return torch.where(torch.arange(len(scores)) == 2, bad, scores)

    for batch in (1, 2):
        with pytest.raises(steer.NonFiniteError, match=f"{word} for problem 0, particle 2"):
            method(mixture_process(), reward, particles=6, batch=batch)


def test_a_reward_of_wrong_shape_is_named(method):
    with pytest.raises(steer.ShapeError, match=r"must return shape \((\d+),\).*got \(\1, 2\)"):
        method(mixture_process(), lambda x: 1.0 * x, particles=3)


def test_a_reward_that_raises_is_named(method):
    def broken(x):
        raise KeyError("prompt")

    with pytest.raises(steer.RewardError, match="broken raised KeyError"):
        method(mixture_process(), broken, particles=2)


def test_a_reward_of_another_type_is_named(method):
    with pytest.raises(steer.RewardError, match="one number per sample, got dict"):
        method(mixture_process(), lambda x: {"score": 1}, particles=2)
    with pytest.raises(steer.RewardError, match="callable"):
        method(mixture_process(), 3.0, particles=2)


def test_a_network_of_wrong_shape_is_named(method):
    process = steer.from_denoiser(lambda x, t: x[..., :1], steer.VP(), 4, event=(2,))
    with pytest.raises(steer.ShapeError, match="denoiser must return"):
        method(process, REWARD, particles=2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(method, temperature):
    with pytest.raises(steer.SteerError, match="temperature"):
        method(mixture_process(), REWARD, particles=2, temperature=temperature)


def test_lists_and_arrays_are_rewards(method, name):
    if name in GRADIENTS:
        pytest.skip("guidance needs a gradient")
    as_list = method(mixture_process(), lambda x: REWARD(x).tolist(), particles=4)
    as_array = method(mixture_process(), lambda x: REWARD(x).numpy(), particles=4)
    torch.testing.assert_close(as_list.reward, as_array.reward)


def test_every_step_is_reported_and_stop_keeps_what_was_paid_for(method, name):
    seen = []

    def watch(event):
        seen.append(event.level)
        if len(seen) == 3:
            raise steer.Stop

    result = method(mixture_process(), REWARD, particles=3, on_step=watch)
    assert seen == [1, 2, 3]
    assert result.interrupted
    assert result.x.shape == (1, 3, 2)
    assert bool(result.reward.isfinite().all())
    wide = 16 if name == "noise_epsilon_greedy" else CANDIDATES.get(name, 1)
    early = 4 if name == "waste_free_early" else 0  # one of three particles moved, by 1 and 3 rows
    ahead = 3 if name in ("fkc_feynman_kac", "driftlite") else 0  # a state's value is settled when it is reached
    assert result.cost.nfe == early + ahead + 3 * 3 * wide + START_ROWS.get(name, lambda particles: 0)(3)


def test_half_a_best_of_n_is_a_result():
    def watch(state):
        watch.calls += 1
        if watch.calls == STEPS + 2:
            raise steer.Stop

    watch.calls = 0
    result = search.best_of_n(mixture_process(), REWARD, particles=8, chunk=4, key=1, on_step=watch)
    whole = search.best_of_n(mixture_process(), REWARD, particles=8, chunk=4, key=1)
    assert result.interrupted
    assert result.x.shape == (1, 8, 2)  # four samples, and four predictions of the chunk under way
    assert torch.equal(result.x[:, :4], whole.x[:, :4])


def test_best_of_n_does_not_depend_on_chunks():
    runs = [search.best_of_n(mixture_process(), REWARD, particles=10, chunk=chunk, key=1) for chunk in (3, 10)]
    torch.testing.assert_close(runs[0].x, runs[1].x, rtol=1e-6, atol=1e-6)
    assert torch.equal(runs[0].best[0], runs[0].x[0, runs[0].reward[0].argmax()])
    assert runs[0].log_weight[0].exp().argmax() == runs[0].reward[0].argmax()
