"""The law of trees: exact in expectation where they are built to be, and the mutants that are not."""

import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from exact import LIMIT, Linear, Quadratic, exact_chain, mixture_2d, worst, z, z_scores

import steer
from steer import search
from steer.core import population
from steer.search.trees import dts as dts_module
from steer.search.trees.dts_star import _reward_std

REWARD = Linear([0.7, -0.5])
STEPS = 10


def chain(steps=STEPS):
    return exact_chain(mixture_2d(), "vp", steps)


def quick_chain(steps=STEPS):
    """The model's usual discretised chain, for what is not about laws."""
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64)


def scores(reward=REWARD, temperature=1.0, replicates=400, **options):
    process = chain()
    options = {"particles": 96, "batch": replicates, "key": 11} | options
    run = search.dts(process, reward, temperature=temperature, **options)
    return z_scores(run, process.exact(reward, temperature), mixture_2d())


# -- laws ---------------------------------------------------------------------------------------------------------


BLIND = {
    "default": {},
    "little-defence": {"defence": 0.05},
    "all-defence": {"defence": 1.0},
    "three-walkers": {"walkers": 3},
    "one-level-cold": {"levels": [5], "temperature": 0.5},
    "quadratic": {"reward": Quadratic([1.5, 1.0], 1.0)},
    "guided": {"proposal": steer.guided(0.7), "levels": 2, "particles": 48, "replicates": 200},
    "hooks": {"proposal": steer.follow(steer.dps(REWARD, 0.3)), "levels": 2, "particles": 48, "replicates": 200},
    "uniform": {"build": "uniform"},
    "uniform-narrow": {"build": "uniform", "widening": (1.0, 0.5)},
    "budget": {"particles": None, "budget": 400},
}


@pytest.mark.parametrize("options", BLIND.values(), ids=BLIND)
def test_trees_built_blind_are_unbiased(options):
    """E[Z_hat] = Z and E[Z_hat (f_hat - E f)] = 0, for means, variances and mode masses."""
    result = scores(**options)
    assert worst(result)[0] < LIMIT, result


@pytest.mark.slow
def test_the_uniform_build_visits_siblings_alike():
    """Ceil(sqrt(visits)) children, of which the least visited is next: at 63 simulations all have had their turn."""
    tree = search.dts(
        chain(), REWARD, build="uniform", levels=[2, 5], widening=(1.0, 0.5), particles=63, walkers=1
    ).tree
    visits = tree.layers[1]["visits"][0, : int(tree.layers[1].count[0])]
    assert len(visits) == 8
    assert int(visits.max() - visits.min()) <= 2


@pytest.mark.slow
def test_the_papers_build_is_caught():
    result = scores(build="boltzmann", widening=(1.0, 0.5))
    assert result["evidence"] < -LIMIT, result
    wide = scores(build="boltzmann")
    assert wide["evidence"] < -LIMIT, wide


def looking_below(self, tree, depth, log_path_weight, more):
    """A build whose shares depend on nodes' own leaves."""
    tree.backup(temperature=1.0)
    fair = torch.softmax(log_path_weight + tree.layers[depth]["value"], 1)
    children = tree.layers[depth]["children"]
    return (fair * (children.sum(1, keepdim=True) + more) - children).clamp(min=0.0).log()


@pytest.mark.parametrize("mutant", ["log-sum-exp", "looks-below"])
def test_mutants_are_caught(mutant, monkeypatch):
    """Leaves weighted by exp(r) alone, and shares that depend on a node's own leaves: the test above sees both."""
    process = chain()
    if mutant == "looks-below":
        monkeypatch.setattr(dts_module.ProportionalAllocation, "_log_missing", looking_below)
    run = search.dts(process, REWARD, particles=96, batch=400, key=11)
    if mutant == "log-sum-exp":
        run = replace(
            run, log_weight=population.normalise(run.reward), log_evidence=population.log_mean_exp(run.reward)
        )
    found = z_scores(run, process.exact(REWARD), mixture_2d())
    assert worst(found)[0] > LIMIT, found


class Table:
    """An enumerable chain over three symbols with categorical transitions, and nothing else: no score, no density."""

    steps, event, problems, prompts, rows, meter = 4, (1,), None, None, 1, None
    device, dtype, text, hooks, prior_moments, visits = "cpu", torch.int64, None, None, None, range(5)

    def __init__(self):
        self.first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        raw = steer.Key(8).normal((self.steps, 3, 3))
        self.kernel = torch.softmax(1.5 * raw, 2)

    def prior(self, key, batch, particles):
        return self._draw(self.first.log().expand(batch, particles, 3), key)

    def denoise(self, x, k, key=None):
        with self.meter.network(x.numel()):
            return self.kernel[k][x[..., 0]]

    def complete(self, x, x0):
        return x0.argmax(-1, keepdim=True)

    def transition(self, x, x0, k):
        return Choice(x0.log())

    def stochastic(self, k):
        return True

    def decode(self, x):
        return x.flatten(0, 1)

    def metered(self, meter):
        twin = Table()
        twin.meter = meter
        return twin

    @staticmethod
    def _draw(logits, key):
        return (logits + key.gumbel(logits.shape)).argmax(-1, keepdim=True)

    def law(self):
        final = self.first
        for k in range(self.steps):
            final = final @ self.kernel[k]
        return final


class Choice:
    stochastic = True

    def __init__(self, logits):
        self.logits = logits

    def sample(self, key):
        return Table._draw(self.logits, key)

    def log_prob(self, x):
        return self.logits.gather(-1, x)[..., 0]


SCORE = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("build", ["unbiased", "uniform"])
def test_an_enumerable_chain_has_its_tilted_table_in_expectation(build):
    process = Table()
    run = search.dts(process, lambda x: SCORE[x[:, 0]], build=build, batch=2000, particles=40, walkers=8, key=2)
    tilted = process.law() * SCORE.exp()
    total = tilted.sum()
    share = run.mean(lambda x: torch.nn.functional.one_hot(x[:, 0], 3).double())
    assert run.x.dtype == torch.int64
    evidence = run.log_evidence.exp()[:, None]
    for symbol in range(3):
        assert abs(z((evidence * share)[:, symbol] - tilted[symbol])) < LIMIT
    assert abs(z(evidence[:, 0] - total)) < LIMIT


@pytest.mark.slow
def test_the_paper_on_the_enumerable_chain_is_caught_and_guidance_is_refused():
    process = Table()
    reward = lambda x: SCORE[x[:, 0]]  # noqa: E731
    run = search.dts(process, reward, build="boltzmann", batch=2000, particles=80, walkers=1, widening=(1.0, 0.5))
    assert z(run.log_evidence.exp() - (process.law() * SCORE.exp()).sum()) < -LIMIT
    assert search.dts_star(process, reward, particles=30).best.item() == 2
    with pytest.raises(steer.StateSpaceError, match="bootstrap"):
        search.dts(process, reward, proposal=steer.guided(1.0))


@pytest.mark.parametrize("method", [steer.importance_sampling, steer.smc, search.dts], ids=lambda m: m.__name__)
def test_error_falls_with_the_root_of_the_budget(method):
    """Total variation to the exact tilted law of a masked language at 16 times the rows is a quarter."""
    process = steer.models.markov_language(
        [0.5, 0.3, 0.2], [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.1, 0.4]], 3, transition=steer.unmask("random")
    )

    def reward(x):
        return 0.8 * (x == 1).double().sum(1) + (x[:, 1:] == x[:, :-1]).double().sum(1)

    law = process.exact(reward)

    def variation(budget):
        options = {"walkers": budget // 8} if method is search.dts else {}
        run = method(process, reward, batch=60, budget=budget, key=3, **options)
        return law.total_variation(run.x, run.log_weight).mean().item()

    assert 2.9 < variation(300) / variation(4800) < 5.5


@pytest.mark.slow
@pytest.mark.parametrize("particles", [200, 1200])
def test_growth_keeps_up_with_path_weights(particles):
    """sum s^2 / |C|, what multiplies a depth's variance, stays a constant times 1 / (defence n): it is consistent."""
    tree = search.dts(chain(), Quadratic([1.5, 1.0], 9.0), particles=particles, walkers=30, defence=0.5).tree
    for depth in range(1, tree.depth):
        children = tree.layers[depth]["children"].double()
        factor = (tree.log_path_weight(depth).mul(2.0).exp() / children).sum() * 0.5 * children.sum()
        assert 0.4 < float(factor) < 3.0


# -- expectations without sampling ----------------------------------------------------------------------------------


class Coins(Table):
    """A chain of two symbols whose trees are listed: in problem b, walk m draws at level k bit 3 m + k of b.

    Levels 0 and 1 keep nodes and the last step stands still, so a walk draws at most three symbols.
    """

    steps, event = 3, (1,)

    def __init__(self, meter=None):
        self.meter = meter
        self.first = torch.tensor([0.7, 0.3], dtype=torch.float64)
        self.kernel = torch.tensor(
            [[[0.8, 0.2], [0.3, 0.7]], [[0.6, 0.4], [0.1, 0.9]], [[1, 0], [0, 1]]], dtype=torch.float64
        )

    def prior(self, key, batch, particles):
        return _bits(key, 0, batch, particles)

    def transition(self, x, x0, k):
        return Scripted(x0.log(), x) if k < 2 else Still(x0.log(), x)

    def stochastic(self, k):
        return k < 2

    def metered(self, meter):
        return Coins(meter)

    def log_law(self, tree, walks):
        """Log-probability of every listed tree: of its nodes given their parents, and half for each bit unused."""
        total, unused, above = torch.zeros(tree.problems, dtype=torch.float64), 3 * walks, None
        for layer, table in zip(tree.layers[1:], (self.first, *self.kernel[:2]), strict=True):
            x = layer["x"][..., 0]
            chance = table[x] if above is None else table[above.gather(1, layer["parent"]), x]
            total = total + torch.where(layer.filled, chance.log(), 0.0).sum(1)
            unused, above = unused - torch.from_numpy(layer.count), x
        return total - unused.double() * math.log(2.0)


def _bits(key, level, batch, particles):
    place = 3 * (key.slot + torch.arange(particles)) + level
    return (torch.arange(batch)[:, None] >> place & 1)[..., None]


class Scripted(Choice):
    stochastic = True

    def __init__(self, logits, x):
        super().__init__(logits)
        self.x = x

    def sample(self, key):
        return _bits(key, key.step + 1, *self.x.shape[:2])


class Still(Scripted):
    stochastic = False

    def sample(self, key):
        return self.x


def expectations(monkeypatch, walks=5, **options):
    """E[Z_hat] and E[Z_hat P_hat(symbol)] less the truth: sums over all trees that five walks can make."""
    draw = steer.Key._draw  # the build's own uniforms, the same in every tree: exactness holds given them

    def shared(self, kind, shape, *rest, **named):
        return draw(self, kind, (1, *shape[1:]), *rest, **named).expand(shape)

    monkeypatch.setattr(steer.Key, "_draw", shared)
    process, score = Coins(), torch.tensor([0.0, 1.5], dtype=torch.float64)
    run = search.dts(
        process, lambda x: score[x[:, 0]], batch=8**walks, particles=walks, levels=[0, 1], walkers=1, **options
    )
    mass = process.log_law(run.tree, walks).exp()
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-12)
    if options.get("build") != "boltzmann":
        assert all(int(made[0]) for made in run.tree.expansions)  # at every depth
    found = mass * run.log_evidence.exp()
    share = run.mean(lambda x: x[:, 0].double())
    tilted = process.first @ process.kernel[0] @ process.kernel[1] * score.exp()
    return torch.stack([found.sum() - tilted.sum(), (found * share).sum() - tilted[1]])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", [{}, {"defence": 0.1}, {"build": "uniform", "widening": (1.0, 0.3)}])
def test_expectations_equal_dynamic_programming(options, seed, monkeypatch):
    assert float(expectations(monkeypatch, key=seed, **options).abs().max()) < 1e-12


@pytest.mark.parametrize("mutant", ["boltzmann", "looks-below", "log-sum-exp"])
def test_expectations_of_mutants_do_not(mutant, monkeypatch):
    options = {}
    if mutant == "boltzmann":
        options = {"build": "boltzmann", "widening": (1.0, 0.3)}
    elif mutant == "looks-below":
        monkeypatch.setattr(dts_module.ProportionalAllocation, "_log_missing", looking_below)
    else:  # every leaf counts the same, however many siblings its ancestors have

        def path_weight(self, depth):
            return torch.full((self.problems, self.layers[depth].size), -math.log(self.layers[depth].size)).double()

        def backup(self, temperature):
            return torch.logsumexp(self.log_path_weight(self.depth) + self.leaves["value"], 1)

        monkeypatch.setattr(search.Tree, "log_path_weight", path_weight)
        monkeypatch.setattr(search.Tree, "backup", backup)
    assert float(expectations(monkeypatch, **options).abs().max()) > 1e-3


def pushed(state, model):
    """A plain function, with no needs_gradient: it moves the model's step by half of its noise."""
    return model.shift(torch.full_like(model.mean, 0.5 * model.std))


@pytest.mark.parametrize("proposal", [steer.guided(0.7), pushed], ids=["guided", "function"])
def test_a_proposal_is_corrected_on_every_edge(proposal):
    """Its children are no draws of the model: leaf weights carry p / q, and without it fail."""
    process = chain()
    run = search.dts(process, REWARD, particles=48, batch=200, proposal=proposal, levels=2, key=4)
    assert (run.cost.grads > 0) == (proposal is not pushed)
    depth = run.tree.depth
    for layer in run.tree.layers[1:]:
        assert float(layer["log_importance_ratio"].abs().max()) > 0.1
        layer["log_importance_ratio"].zero_()
    bare = run.tree.log_path_weight(depth) + run.reward
    wrong = replace(run, log_weight=population.normalise(bare), log_evidence=torch.logsumexp(bare, 1))
    target = process.exact(REWARD)
    assert worst(z_scores(run, target, mixture_2d()))[0] < LIMIT
    assert worst(z_scores(wrong, target, mixture_2d()))[0] > LIMIT


class Refusing:
    """A proposal that fails when it is called, and that asks for nothing."""

    scale, needs_gradient = 0.0, False

    def __call__(self, state, model):
        raise ArithmeticError("called")


@pytest.mark.parametrize("build", ["unbiased", "uniform", "boltzmann"])
def test_a_proposal_is_always_called(build):
    with pytest.raises(ArithmeticError, match="called"):
        search.dts(quick_chain(), REWARD, particles=4, build=build, proposal=Refusing())


@pytest.mark.parametrize("unknown", [False, True])
def test_what_a_start_has_multiplied_in_and_normalized_by_counts(unknown):
    """A tree of one level is importance sampling, to the last weight."""

    def start(process, objective, key, batch, particles):
        state = steer.prior(process, objective, key, batch, particles)
        state = state.with_path_state(log_potential=state.x.double().sum(2)).reweight(0.5 * state.x[..., 0].double())
        return replace(state, log_evidence=state.log_evidence + (math.nan if unknown else 3.0))

    options = {"particles": 12, "batch": 2, "start": start, "key": 3}
    tree = search.dts(quick_chain(), REWARD, levels=0, **options)
    plain = steer.importance_sampling(quick_chain(), REWARD, **options)
    torch.testing.assert_close(tree.log_weight, plain.log_weight)
    torch.testing.assert_close(tree.log_evidence, plain.log_evidence, equal_nan=True)


@pytest.mark.parametrize("steps", [2, 5, 9])
@pytest.mark.parametrize("how", ["start", "guided"])
def test_stopped_in_its_first_batch_it_keeps_its_weights(how, steps):
    """Predictions with the weights their chains had: those of importance sampling, stopped at the same step."""

    def start(process, objective, key, batch, particles):
        state = steer.prior(process, objective, key, batch, particles)
        return state.reweight(torch.arange(particles).double().expand(batch, -1))

    def stopping(event):
        if event.level == steps:
            raise steer.Stop

    options = {"particles": 5, "batch": 2, "on_step": stopping, "key": 3}
    options |= {"start": start} if how == "start" else {"proposal": steer.guided(0.7)}
    tree = search.dts(quick_chain(), REWARD, levels=3, **options)
    plain = steer.smc(
        quick_chain(), REWARD, weight=steer.final_only(), selection=steer.resample(threshold=0.0), **options
    )
    assert tree.interrupted
    torch.testing.assert_close(tree.log_weight, plain.log_weight)
    torch.testing.assert_close(tree.log_evidence, plain.log_evidence)
    assert float((tree.log_weight - tree.reward).std()) > 0.01  # not the reward alone


def forbid(x):
    return torch.full((len(x),), -math.inf)


def test_collapsed_trees_are_kept_and_hide_no_other_error():
    for options in ({"on_step": stop}, {}):
        with pytest.raises(steer.CollapsedWeightsError) as caught:
            search.dts(quick_chain(), forbid, particles=4, **options)
        assert caught.value.partial.x.shape == (1, 4, 2)
        assert (caught.value.partial.log_weight == -math.inf).all()
    tree = caught.value.partial.tree
    assert search.dts(quick_chain(), REWARD, particles=4, tree=tree).x.shape[1] == 8
    calls = []

    def worse_and_worse(x):
        calls.append(1)
        return torch.full((len(x),), -math.inf if len(calls) < 12 else math.nan)

    with pytest.raises(steer.NonFiniteError) as caught:
        search.dts(quick_chain(), worse_and_worse, particles=60, walkers=4)
    assert caught.value.partial.x.shape[1] > 1
    best = search.dts_star(quick_chain(), forbid, particles=4)  # a search claims no law
    assert best.reward.max() == -math.inf


def stop(event):
    raise steer.Stop


@pytest.mark.slow
@pytest.mark.parametrize("walkers", [1, 2])
def test_a_start_that_forbids_roots_leaves_a_tree_to_grow(walkers):
    def half(process, objective, key, batch, particles):
        state = steer.prior(process, objective, key, batch, particles)
        return state.reweight(torch.where(state.x[..., 0] > 0, 0.0, -math.inf).double())

    found = []
    for key in range(6):
        with suppress(steer.CollapsedWeightsError):  # few simulations are for roots, and all of those may be forbidden
            found.append(search.dts(quick_chain(), REWARD, particles=40, walkers=walkers, start=half, key=key))
    assert len(found) > 2
    assert all(math.isfinite(run.log_evidence.item()) for run in found)


def test_a_search_ranks_by_reward_alone():
    def start(process, objective, key, batch, particles):
        state = steer.prior(process, objective, key, batch, particles)
        return state.reweight(10.0 * torch.arange(particles).double().expand(batch, -1))

    run = search.dts_star(quick_chain(), REWARD, particles=60, walkers=3, start=start)
    root = run.tree.layers[0]["value"].item()
    assert root == run.reward.max()
    assert run.tree.backup(temperature=1.0).item() == root


@pytest.mark.slow
def test_a_tree_grows_on_at_another_temperature_as_if_it_had_been_asked_before():
    options = {"build": "boltzmann", "particles": 60, "walkers": 3, "widening": (1.0, 0.5)}
    runs = []
    for refreshed in (False, True):
        tree = search.dts(quick_chain(), REWARD, temperature=0.01, **options).tree
        if refreshed:
            tree.backup(temperature=1.0)
        runs.append(search.dts(quick_chain(), REWARD, tree=tree, **options))
    assert torch.equal(runs[0].x, runs[1].x)


def test_what_a_tree_cannot_be_grown_on_with_is_said():
    process = quick_chain()

    def grown(tree=None, **options):
        return search.dts(process, REWARD, particles=40, levels=3, tree=tree, **options).tree

    with pytest.raises(steer.SteerError, match=r"caches no displacement.*grow a tree with the proposal"):
        grown(grown(proposal=steer.guided(0.5)), proposal=steer.follow(steer.dps(REWARD, 0.2)))
    with pytest.raises(steer.SteerError, match="keeps no predicted rewards"):
        grown(grown(grown(), build="uniform"))

    def late(process, objective, key, batch, particles):
        return steer.Trajectory.begin(process, process.prior(key.fold("prior"), batch, particles), k=1)

    with pytest.raises(steer.SteerError, match="begins at another level"):
        grown(grown(start=late, keep_states=True), keep_states=True, build="uniform")
    options = {"build": "uniform", "particles": 9, "keep_states": True}
    tree = search.dts(process, REWARD, start=late, levels=[1, 5], **options).tree
    with pytest.raises(steer.SteerError, match=r"keeps 0 steps .* now take 1"):
        search.dts(process, REWARD, tree=tree, **options)
    with pytest.raises(steer.SteerError, match="store is a device"):
        grown(store="nowhere")
    for widening in ((1.0, 0.0), (0.0, 0.5), (1.0, 1.5), 2.0):
        with pytest.raises(steer.SteerError, match="widening"):
            grown(build="boltzmann", widening=widening)


@pytest.mark.parametrize("method", [search.dts, search.dts_star, search.rbf], ids=lambda m: m.__name__)
def test_budgets_hold_where_drawing_a_step_costs_network_rows(method):
    """A corrector evaluates the network on every state that is drawn, also on those that nobody asked for."""
    process, uneven = steer.guide(quick_chain(), steer.guidance.corrector()), {}
    if method is not search.rbf:
        uneven = {"batch": 4, "walkers": 5, "widening": (1.0, 0.5)}
    if method is search.dts:
        uneven["build"] = "boltzmann"
    for more in ({}, {"particles": 4}) if method is search.rbf else ({},):
        run = method(process, REWARD, budget=400, **uneven, **more)
        assert 300 < run.cost.nfe / run.x.shape[0] <= 400


class Sideways:
    """Proposes the model's step moved by a fifth of its noise, and asks for the reward's gradient."""

    needs_gradient = True

    def __init__(self):
        self.levels = []

    def __call__(self, state, model):
        self.levels.append(state.k)
        return model.shift(torch.full_like(model.mean, 0.2 * model.std))


@pytest.mark.parametrize("build", ["unbiased", "boltzmann"])
def test_hooks_propose_in_trees_as_any_proposal(build):
    """Their displacement is kept at nodes, for simulations that join there, and where trees of a batch differ."""
    process, hooks = quick_chain(), steer.guidance.Hooks(mean=(lambda at: at.mean + 0.2 * at.std,))
    options = {"build": build, "batch": 3, "particles": 60, "walkers": 4, "levels": 3, "widening": (1.0, 0.5)}
    sideways, taken = Sideways(), []
    one = search.dts(process, REWARD, proposal=sideways, on_step=lambda event: taken.append(event.level - 1), **options)
    assert sideways.levels == [k for k in taken if process.stochastic(k)]
    other = search.dts(process, REWARD, proposal=steer.follow(hooks), **options)
    torch.testing.assert_close(one.x, other.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.log_weight, other.log_weight, rtol=1e-10, atol=1e-10)
    assert float(one.tree.layers[2]["log_importance_ratio"].abs().max()) > 0.05
    assert other.cost.grads == 0 < one.cost.grads


def test_a_weighted_start_is_carried():
    def shifted(process, objective, key, batch, particles):
        state = steer.prior(process, objective, key, batch, particles)
        x = state.x + 0.3
        sigma = process.levels[0].sigma
        density = ((x - 0.3).square() - x.square()).double().sum(2) / (2 * sigma**2)
        return replace(state, x=x).reweight(density)

    assert worst(scores(start=shifted))[0] < LIMIT
    with pytest.raises(steer.SteerError, match="spends network rows"):
        scores(start=steer.pcnl(chains=2))


# -- Algorithm 1 --------------------------------------------------------------------------------------------------


class Node:
    def __init__(self, x, depth):
        self.x, self.depth, self.value, self.visits, self.children = x, depth, 0.0, 1, []


def algorithm_1(process, reward, levels, simulations, widening, key, select, search=False):
    """The paper's pseudo-code, one object a node, drawing noise by the names that the library gives it.

    search: values are maxima, and the last branching level always expands, as `dts_star` has it.
    """
    ends, scale, power = [*levels, process.steps], *widening
    root, leaves = Node(None, 0), []
    for m in range(simulations):
        here, path = key.shifted(slot=m), [root]
        while (node := path[-1]).depth < len(ends):
            if len(node.children) < scale * node.visits**power or (search and node.depth == len(ends) - 1):
                break
            path.append(node.children[select(node, here.fold("select", node.depth), leaves)])
        fresh = path[-1].depth < len(ends)
        while path[-1].depth < len(ends):
            node = path[-1]
            x = process.prior(here.fold("prior"), 1, 1) if node.depth == 0 else node.x
            for k in range(0 if node.depth == 0 else ends[node.depth - 1], ends[node.depth]):
                x = process.transition(x, process.denoise(x, k), k).sample(here.fold("step").at(k))
            node.children.append(Node(x, node.depth + 1))
            path.append(node.children[-1])
        if fresh:
            path[-1].value = reward(path[-1].x[0]).item()
            leaves.append(path[-1])
        for node in path[-2::-1]:
            values = torch.tensor([child.value for child in node.children], dtype=torch.float64)
            node.value = float(values.max() if search else torch.logsumexp(values, 0) - math.log(len(values)))
            node.visits += 1
    return root, leaves


def boltzmann(node, key, leaves):
    values = torch.tensor([child.value for child in node.children], dtype=torch.float64)
    return int((torch.softmax(values, 0).cumsum(0) <= key.uniform((1, 1)).item()).sum())


@pytest.mark.parametrize("widening", [(2.0, 0.8), (1.0, 0.5)], ids=["paper", "narrow"])
def test_one_walker_is_algorithm_1(widening):
    process, levels, key = quick_chain(), [2, 5, 8], steer.Key(6)
    run = search.dts(
        process, REWARD, build="boltzmann", levels=levels, walkers=1, particles=60, widening=widening, key=key
    )
    root, leaves = algorithm_1(process, REWARD, levels, 60, widening, key, boltzmann)
    torch.testing.assert_close(run.x[0], torch.cat([leaf.x[0] for leaf in leaves]), rtol=1e-12, atol=1e-12)
    assert run.log_evidence.item() == pytest.approx(root.value, abs=1e-12)
    for node, slot in ((root, 0), *((child, i) for i, child in enumerate(root.children))):
        layer = run.tree.layers[node.depth]
        assert int(layer["visits"][0, slot]) == node.visits
        assert int(layer["children"][0, slot]) == len(node.children)
        assert layer["value"][0, slot].item() == pytest.approx(node.value, abs=1e-12)


def test_one_walker_of_the_search_is_algorithm_1_with_uct():
    process, levels, key, explore = quick_chain(), [2, 5, 7], steer.Key(6), 0.6

    def uct(node, key, leaves):
        spread = torch.tensor([leaf.value for leaf in leaves], dtype=torch.float64).std(correction=0).item()
        values = [c.value + explore * spread * math.sqrt(math.log(node.visits) / c.visits) for c in node.children]
        return max(range(len(values)), key=values.__getitem__)

    run = search.dts_star(
        process, REWARD, levels=levels, walkers=1, particles=100, widening=(1.0, 0.7), key=key, explore=explore
    )
    root, leaves = algorithm_1(process, REWARD, levels, 100, (1.0, 0.7), key, uct, search=True)
    torch.testing.assert_close(run.x[0], torch.cat([leaf.x[0] for leaf in leaves]), rtol=1e-12, atol=1e-12)
    assert run.tree.layers[0]["value"].item() == root.value == run.reward.max()


# -- the search ---------------------------------------------------------------------------------------------------


def test_the_search_finds_more_than_best_of_n():
    process = quick_chain(20)
    star = search.dts_star(process, REWARD, budget=1000, batch=40)
    best = search.best_of_n(process, REWARD, budget=1000, batch=40)
    gain = star.reward.amax(1) - best.reward.amax(1)
    assert z(gain) > LIMIT
    assert bool(star.log_evidence.isnan().all())
    assert torch.equal(star.log_weight.exp().sum(1), torch.ones(40, dtype=torch.float64))


def test_the_search_leaves_the_root_within_the_first_simulations():
    run = search.dts_star(quick_chain(20), REWARD, particles=36, walkers=1)
    assert int(run.tree.expansions[0, 0]) < 12
    paper = search.dts_star(quick_chain(20), REWARD, particles=36, walkers=1, widening=(2.0, 0.8))
    assert int(paper.tree.expansions[0, 0]) == 36


def test_the_best_leaves_share_the_weight():
    """Those of each tree: not slots that a smaller tree does not fill, and not forbidden leaves."""

    def half(x):
        return torch.where(x[:, 0] > 0, REWARD(x), -torch.inf)

    run = search.dts_star(quick_chain(), half, budget=130, batch=4, walkers=3, keep=9)
    assert run.tree.leaves.count.min() < run.x.shape[1]  # trees differ in leaves
    for problem, (reward, log_weight) in enumerate(zip(run.reward, run.log_weight, strict=True)):
        own = reward[: run.tree.leaves.count[problem]]
        allowed = own[own.isfinite()].sort(descending=True).values[:9]
        shown = log_weight.isfinite()
        assert sorted(reward[shown].tolist(), reverse=True) == allowed.tolist()
        torch.testing.assert_close(log_weight[shown].exp(), torch.full_like(allowed, 1.0 / len(allowed)))


def test_a_search_stopped_in_its_first_batch_shows_its_best_predictions():
    run = search.dts_star(quick_chain(), REWARD, particles=9, walkers=9, batch=2, keep=2, on_step=stop)
    assert run.interrupted
    assert bool(run.log_evidence.isnan().all())
    for reward, log_weight in zip(run.reward, run.log_weight, strict=True):
        assert sorted(log_weight.topk(2).indices.tolist()) == sorted(reward.topk(2).indices.tolist())
        torch.testing.assert_close(log_weight.exp().sort().values[-3:], torch.tensor([0.0, 0.5, 0.5]).double())


def test_forbidden_leaves_do_not_count_in_the_spread_of_rewards():
    def half(x):
        return torch.where(x[:, 0] > 0, REWARD(x), -torch.inf)

    run = search.dts_star(quick_chain(), half, particles=60, batch=3)
    for reward, spread in zip(run.reward, _reward_std(run.tree), strict=True):
        allowed = reward[reward.isfinite()]
        assert 0 < len(allowed) < 60
        assert spread == pytest.approx(allowed.std(correction=0).item())


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "law"), [(search.dts, "target"), (search.dts_star, "none")])
def test_seed_is_the_key_and_the_result_says_what_it_estimates(method, law):
    options = {"particles": 8, "walkers": 3}
    one = method(quick_chain(), REWARD, key=4, **options)
    assert one.law == law
    assert torch.equal(one.x, method(quick_chain(), REWARD, seed=4, **options).x)
    assert not torch.equal(one.x, method(quick_chain(), REWARD, seed=5, **options).x)
    with pytest.raises(steer.SteerError, match="seed"):
        method(quick_chain(), REWARD, key=4, seed=4, **options)


def test_arguments_are_checked():
    with pytest.raises(steer.SteerError, match='build is "unbiased"'):
        search.dts(quick_chain(), REWARD, build="best")
    for defence in (0.0, 1.1):
        with pytest.raises(steer.SteerError, match="defence"):
            search.dts(quick_chain(), REWARD, defence=defence)


def test_forbidden_samples_weigh_nothing_and_all_forbidden_is_an_error():
    def half(x):
        return torch.where(x[:, 0] > 0, REWARD(x), -torch.inf)

    for build in ("unbiased", "uniform", "boltzmann"):
        run = search.dts(quick_chain(), half, build=build, particles=60, batch=3)
        assert bool((run.log_weight[run.x[..., 0] <= 0] == -torch.inf).all())
        assert bool(run.log_evidence.isfinite().all())
        with pytest.raises(steer.CollapsedWeightsError, match="forbids"):
            search.dts(quick_chain(), lambda x: 0.0 * x[:, 0] - torch.inf, build=build, particles=40)
