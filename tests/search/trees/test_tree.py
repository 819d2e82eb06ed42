"""Trees as data: tables of nodes, index of children, values, path weights, growth from where a tree stands."""

import functools
import math
import pickle
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from exact import Linear, mixture_2d

import steer
from steer import search
from steer.search.trees.backup import MaxBackup, Siblings, SoftBackup
from steer.search.trees.branching import evenly_spaced_levels
from steer.search.trees.dts import _soft_value
from steer.search.trees.expansion_plan import ExpansionPlan
from steer.search.trees.node_table import ChildIndex, NodeTable
from steer.search.trees.tree import Tree
from steer.search.trees.tree_policy import TreePolicy, _categorical

REWARD = Linear([0.7, -0.5])
BUILDS = ("unbiased", "uniform", "boltzmann")


def chain(steps=10):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps, dtype=torch.float64)


def flat(tree, problem):
    """One tree as (depth, slot) -> parent key, children keys: read from the parents alone."""
    parent, children = {}, {(0, 0): []}
    for depth, layer in enumerate(tree.layers):
        for slot in range(int(layer.count[problem])):
            node = (depth, slot)
            children.setdefault(node, [])
            if depth:
                parent[node] = (depth - 1, int(layer["parent"][problem, slot]))
                children[parent[node]].append(node)
    return parent, children


@pytest.fixture(params=BUILDS)
def grown(request):
    return search.dts(chain(), REWARD, build=request.param, batch=3, particles=150, walkers=7, key=5)


def test_tables_append_where_live_and_grow():
    layer = NodeTable(2)
    for turn in range(20):
        live = np.array([[True, True], [True, turn % 2 == 0]])
        fact = np.full((2, 2), turn, dtype=np.int32)
        slots = layer.append(live, fact.astype(np.int64), x=torch.full((2, 2, 3), float(turn)), visits=fact, value=turn)
    assert layer.count.tolist() == [40, 30]
    assert slots.tolist()[0] == [38, 39]
    assert layer["x"][0, :, 0].tolist() == [t for t in range(20) for _ in range(2)]
    assert layer["x"][1, :30, 2].tolist() == [t for t in range(20) for _ in range(2 - t % 2)]
    assert torch.equal(layer["visits"].float(), layer["x"][..., 1])
    assert layer.filled.sum(1).tolist() == [40, 30]


def test_the_index_holds_every_child_in_order():
    index, truth, key = ChildIndex(3), {}, steer.Key(2)
    for turn in range(30):
        draw = key.at(turn).uniform((2, 12))
        problem, parent = (draw[0] * 3).long().numpy(), (draw[1] * (turn + 1)).long().numpy()
        child = np.arange(12) + 12 * turn
        index.add(problem, parent, child, turn + 1)
        for b, p, c in zip(problem.tolist(), parent.tolist(), child.tolist(), strict=True):
            truth.setdefault((b, p), []).append(c)
    nodes = list(truth)
    child, first, length = index.of(np.array([b for b, _ in nodes]), np.array([p for _, p in nodes]))
    assert len(child) == 30 * 12
    assert index.used < 4 * len(child)  # blocks double; they do not move for every child
    for node, begin, count in zip(nodes, first, length, strict=True):
        assert child[begin : begin + count].tolist() == truth[node]


def test_the_index_follows_the_table_below():
    """Read now and then, while one tree gains nodes and the other does not."""
    index, below = ChildIndex(2), NodeTable(2)
    for turn in range(12):
        live = np.array([[turn % 3 != 0, True], [turn % 4 == 0, False]])
        below.append(live, np.array([[turn, turn // 2], [turn // 3, 0]]))
        if turn % 2 == 0:
            continue
        index.read(below, turn + 1)
        for problem in range(2):
            parents = below["parent"][problem, : below.count[problem]].tolist()
            for node in range(turn + 1):
                child, _, _ = index.of(np.array([problem]), np.array([node]))
                assert child.tolist() == [slot for slot, parent in enumerate(parents) if parent == node]


def test_counts_agree_with_the_parents(grown):
    tree = grown.tree
    for problem in range(3):
        _, children = flat(tree, problem)
        for (depth, slot), below in children.items():
            if depth < tree.depth:
                assert int(tree.layers[depth]["children"][problem, slot]) == len(below) > 0
    assert int(tree.layers[0]["visits"][0, 0]) == 1 + tree.simulations == 151
    for depth in range(tree.depth):  # every simulation that expands at or above a depth adds one node to the next
        assert np.array_equal(tree.layers[depth + 1].count, tree.expansions[: depth + 1].sum(0))


def test_leaf_weights_are_the_telescoped_form_and_the_law_of_the_papers_readout(grown):
    """exp(r / T) prod 1 / |C| / Z_hat, and what descending by softmax of values draws: Algorithm 2."""
    tree = grown.tree
    torch.testing.assert_close(grown.log_weight.exp().sum(1), torch.ones(3, dtype=torch.float64))
    for problem in range(3):
        parent, children = flat(tree, problem)
        leaf_count = int(tree.leaves.count[problem])

        def value(node, problem=problem, children=children):
            if node[0] == tree.depth:
                return grown.reward[problem, node[1]].item()
            below = [value(child) for child in children[node]]
            top = max(below)
            return top + math.log(sum(math.exp(v - top) for v in below) / len(below))

        root = value((0, 0))
        assert grown.log_evidence[problem].item() == pytest.approx(root, abs=1e-12)
        for slot in range(0, leaf_count, 7):
            node, telescoped, readout = (tree.depth, slot), grown.reward[problem, slot].item() - root, 0.0
            while node in parent:
                above = parent[node]
                telescoped -= math.log(len(children[above]))
                readout += value(node) - value(above) - math.log(len(children[above]))
                node = above
            assert grown.log_weight[problem, slot].item() == pytest.approx(telescoped, abs=1e-12)
            assert grown.log_weight[problem, slot].item() == pytest.approx(readout, abs=1e-10)


def one_after_another(tree, policy, simulations, left, key):
    """What the simulations of a batch choose, by loops: a plan before it is put in order."""
    expanded = [[tree.depth + 1] * simulations for _ in left]
    path = [[[0] * (tree.depth + 1) for _ in range(simulations)] for _ in left]
    for problem, money in enumerate(left):
        _, children = flat(tree, problem)
        going = list(range(simulations)) if money >= policy.rows[-1] else []
        for depth in range(tree.depth):
            layer, met, added = tree.layers[depth], Counter(), Counter()
            here = key.fold("select", depth).shifted(slot=tree.simulations, problem=problem)
            uniform = here.uniform((1, simulations))[0]
            stayed = []
            for one in going:
                slot = path[problem][one][depth]
                count = len(children[depth, slot])
                room = policy.widening[0] * (int(layer["visits"][problem, slot]) + met[slot]) ** policy.widening[1]
                always = count == 0 or (depth == tree.depth - 1 and not policy.revisit)
                met[slot] += 1
                if always or count + added[slot] < room:
                    added[slot] += 1
                    if policy.rows[depth] <= money:
                        expanded[problem][one], money = depth, money - policy.rows[depth]
                        continue
                if count:
                    stayed.append(one)
            met, going = Counter(), stayed
            for one in going:
                slot = path[problem][one][depth]
                below = [child for _, child in children[depth, slot]]
                of = torch.tensor([problem] * len(below)), torch.tensor([slot] * len(below)), torch.tensor(below)
                score = torch.as_tensor(policy.score(tree, depth + 1, *(index.numpy() for index in of)))
                if policy.draw:
                    chosen = int((torch.softmax(score.double(), 0).cumsum(0) <= uniform[one]).sum())
                else:
                    chosen = int(score.sort(descending=True, stable=True).indices[met[slot] % len(below)])
                met[slot] += 1
                path[problem][one][depth + 1] = below[chosen]
        for one in going if policy.revisit else ():
            expanded[problem][one] = tree.depth
    return ExpansionPlan(np.array(expanded), np.moveaxis(np.array(path), 2, 0))


@functools.cache
def ragged():
    """Three trees of the paper's build, which the policies below only read."""
    return search.dts(chain(), REWARD, build="boltzmann", batch=3, particles=150, walkers=7, widening=(1.0, 0.5)).tree


@pytest.mark.parametrize("widening", [(1.0, 0.5), (1.1, 0.5), (1.0, 0.6)], ids=str)
@pytest.mark.parametrize("revisit", [True, False])
@pytest.mark.parametrize("draw", [True, False])
def test_a_batch_is_its_simulations_one_after_another(draw, revisit, widening):
    """Each sees the visits and the new children of those before it, and pays before those after it."""
    tree = ragged()
    rows = (10, 7, 5, 4, 3, 3, 2, 2, 1, 1)[: tree.depth]
    policy = TreePolicy(score=_soft_value, draw=draw, widening=widening, revisit=revisit, rows=rows)
    for simulations, left in ((40, [10**6] * 3), (12, [33, 0, 10**6])):
        key = steer.Key(5).fold(simulations)
        plan = one_after_another(tree, policy, simulations, left, key)
        assert len(np.unique(plan.depth)) > 2, plan
        found = policy(tree, simulations, np.array(left), key)
        for one, other in zip(found, plan.in_order(), strict=True):
            assert np.array_equal(one, other)


def test_choice_among_forbidden_children_and_at_the_edge():
    """Two nodes of two and three children: all forbidden are all alike, and rounding leaves nobody to the neighbour."""
    score, first, length = np.array([-np.inf, -np.inf, 0.0, -np.inf, 1.0]), np.array([0, 2]), np.array([2, 3])
    which, uniform = np.array([0, 0, 0, 1, 1, 1]), np.array([0.4, 0.6, 1.0, 0.26, 0.28, 1.0])
    assert _categorical(score, first, length, which, uniform).tolist() == [0, 1, 1, 2, 4, 4]


class MeanBackup:
    """A rule of one's own: the mean reward below a node, every child counting the same."""

    def leaf_value(self, reward, temperature):
        return reward / temperature

    def child_value(self, value, log_importance_ratio):
        return value

    def pool(self, value, siblings):
        return siblings.sum(value) / siblings.size


LIVE = {
    "soft": partial(search.dts, build="boltzmann", widening=(1.0, 0.5)),
    "guided": partial(search.dts, build="boltzmann", widening=(1.0, 0.5), proposal=steer.guided(0.5)),
    "maximum": search.dts_star,
    "mean": partial(search.dts_star, backup=MeanBackup()),
}


@pytest.mark.parametrize("method", LIVE.values(), ids=LIVE)
def test_values_kept_current_equal_values_recomputed(method, monkeypatch):
    """Those on the paths of every batch, against all of them anew in the end."""
    backup, kept = Tree.backup, []

    def recorded(tree, temperature):
        kept.append([layer["value"].clone() for layer in tree.layers])
        return backup(tree, temperature)

    monkeypatch.setattr(Tree, "backup", recorded)
    tree = method(chain(), REWARD, batch=3, budget=700, walkers=7, temperature=0.5).tree
    for layer, value in zip(tree.layers, kept[-1], strict=True):
        torch.testing.assert_close(layer["value"][layer.filled], value[layer.filled], rtol=1e-12, atol=1e-12)
    assert len(kept) == 1
    assert len(tree.layers[1]["value"].unique()) > 3


@pytest.mark.parametrize("rule", [SoftBackup(), MaxBackup()], ids=lambda rule: type(rule).__name__)
def test_low_temperature_soft_values_are_maxima(rule):
    """T -> 0: T v(root) of log-mean-exp goes to the best reward, as the maximum has it."""
    grown = search.dts(chain(), REWARD, particles=60, batch=2)
    tree, temperature = grown.tree, 1e-7
    tree.rule = rule
    root = tree.backup(temperature)
    best = root if isinstance(rule, MaxBackup) else root * temperature
    torch.testing.assert_close(best, grown.reward.amax(1), rtol=0, atol=1e-5)


def test_a_rule_of_ones_own_is_one_class():
    """Node by node as its definition has it."""
    options = {"batch": 2, "particles": 80, "walkers": 5, "temperature": 0.5}
    tree = search.dts_star(chain(), REWARD, backup=MeanBackup(), **options).tree
    assert isinstance(tree.rule, MeanBackup)
    for problem in range(2):
        _, children = flat(tree, problem)

        def value(node, problem=problem, children=children):
            if node[0] == tree.depth:
                return tree.leaves["reward"][problem, node[1]].item() / 0.5
            below = [value(child) for child in children[node]]
            return sum(below) / len(below)

        for depth, slot in children:
            assert tree.layers[depth]["value"][problem, slot].item() == pytest.approx(value((depth, slot)), abs=1e-12)
    grown = search.dts_star(chain(), REWARD, particles=20, tree=tree, batch=2)
    assert isinstance(tree.rule, MaxBackup)  # the rule of the search that grows on, for every node
    assert torch.equal(tree.layers[0]["value"][:, 0], grown.reward.amax(1))
    below = tree.layers[1]["value"].masked_fill(~tree.layers[1].filled, -math.inf)
    assert torch.equal(below.amax(1), grown.reward.amax(1))


def test_pooling_is_of_each_parents_own_children():
    siblings = Siblings(np.array([1, 0, 1, 2]), np.array([1, 2, 1]))
    value = np.array([0.5, -np.inf, 2.0, -1.0])
    assert siblings.max(value).tolist() == [-np.inf, 2.0, -1.0]
    assert siblings.sum(value).tolist() == [-np.inf, 2.5, -1.0]
    assert MaxBackup().pool(value, siblings).tolist() == [-np.inf, 2.0, -1.0]
    mean = math.log((math.exp(0.5) + math.exp(2.0)) / 2)
    assert SoftBackup().pool(value, siblings).tolist() == pytest.approx([-np.inf, mean, -1.0])
    ratio = np.array([0.1, 0.2, 0.3, 0.4])
    assert SoftBackup().child_value(value, ratio).tolist() == (value + ratio).tolist()
    assert MaxBackup().child_value(value, ratio).tolist() == value.tolist()
    assert SoftBackup().leaf_value(np.array([1.0, -np.inf]), math.inf).tolist() == [0.0, -np.inf]


@pytest.mark.parametrize("build", BUILDS)
def test_small_trees_are_best_of_n(build):
    """Simulations that all expand the root are independent samples, with the very noise of best-of-N."""
    process = chain()
    for walkers, count in ((16, 16), (1, 20)):
        if build == "unbiased" and walkers == 1:
            continue  # it goes deeper from the second batch on
        tree = search.dts(process, REWARD, build=build, particles=count, walkers=walkers, batch=2, key=4)
        best = search.best_of_n(process, REWARD, particles=count, batch=2, key=4)
        torch.testing.assert_close(tree.x, best.x, rtol=1e-12, atol=1e-12)
        assert torch.equal(tree.best, tree.x[torch.arange(2), best.reward.argmax(1)])
        torch.testing.assert_close(tree.log_evidence, best.reward.logsumexp(1) - math.log(count))
        assert tree.cost.nfe == best.cost.nfe


def test_the_papers_widening_is_best_of_36():
    run = search.dts(chain(), REWARD, build="boltzmann", levels=4, particles=37, walkers=1)
    assert [int(made[0]) for made in run.tree.expansions] == [36, 1, 0, 0, 0]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("walkers", [1, 6])
def test_budget_is_spent_to_within_the_cheapest_simulation(build, walkers):
    process = chain(20)
    cheapest = 20 - 16 - 1
    for budget in (20, 197, 150 + 150 * walkers):
        run = search.dts(process, REWARD, build=build, levels=4, batch=3, budget=budget, walkers=walkers)
        rows = np.array((20, 15, 11, 7, 3)) @ run.tree.expansions
        assert rows.sum() == run.cost.nfe
        assert (rows <= budget).all()
        assert (rows > budget - cheapest).all()
        if build != "boltzmann":  # which may end at old leaves at no cost; else no row, no simulation
            assert np.array_equal(run.tree.layers[0]["visits"][:, 0] - 1, run.tree.expansions.sum(0))


@pytest.mark.parametrize("size", [{"particles": 45}, {"budget": 143}], ids=str)
@pytest.mark.parametrize("build", BUILDS)
def test_trees_of_a_batch_are_trees_of_their_own(build, size):
    process, options = chain(), {"build": build, "walkers": 5, "key": steer.Key(3), **size}
    together = search.dts(process, REWARD, batch=3, **options)
    for problem in range(3):
        options["key"] = steer.Key(3).shifted(problem=problem)
        alone = search.dts(process, REWARD, **options)
        count = alone.x.shape[1]
        torch.testing.assert_close(together.x[problem, :count], alone.x[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.log_weight[problem, :count], alone.log_weight[0], rtol=1e-9, atol=1e-9)
        assert bool((together.log_weight[problem, count:] == -torch.inf).all())


@pytest.mark.parametrize("method", [*BUILDS, "star"])
def test_a_tree_grows_on_from_where_it_stands(method):
    process = chain()
    run = search.dts_star if method == "star" else lambda *a, **kw: search.dts(*a, build=method, **kw)
    whole = run(process, REWARD, particles=60, walkers=6, batch=2, key=1)
    first = run(process, REWARD, particles=24, walkers=6, batch=2, key=1)
    before = first.x.clone()
    second = run(process, REWARD, particles=36, walkers=6, batch=2, key=1, tree=first.tree)
    assert torch.equal(second.x, whole.x)
    torch.testing.assert_close(second.log_weight, whole.log_weight)
    assert first.cost.nfe + second.cost.nfe == whole.cost.nfe
    assert torch.equal(first.x, before)
    assert torch.equal(second.x[:, : first.x.shape[1]], first.x)


def test_growing_on_needs_a_budget_for_a_simulation_and_a_tree_that_fits():
    process = chain(20)
    tree = search.dts(process, REWARD, levels=4, particles=16).tree
    assert search.dts(process, REWARD, budget=3, tree=tree).cost.nfe == 3
    with pytest.raises(steer.BudgetError, match="raise the budget to 3"):
        search.dts(process, REWARD, budget=2, tree=tree)
    for other in (chain(10), None):
        with pytest.raises(steer.SteerError, match="a tree to grow on"):
            search.dts(other or process, REWARD, batch=1 if other else 2, tree=tree)
    with pytest.raises(steer.SteerError, match="another rule"):
        search.dts(process, REWARD, tree=search.dts(process, REWARD, build="uniform", particles=40).tree)


def test_a_stopped_tree_is_its_last_whole_batch_and_grows_on():
    process, calls = chain(), []

    def stop(event):
        calls.append(event.level)
        if len(calls) == 37:
            raise steer.Stop

    options = {"walkers": 6, "batch": 2, "key": 1}
    whole = search.dts(process, REWARD, particles=48, **options)
    half = search.dts(process, REWARD, particles=48, on_step=stop, **options)
    assert half.interrupted
    assert 0 < half.x.shape[1] < 48
    assert torch.equal(half.x, whole.x[:, : half.x.shape[1]])
    torch.testing.assert_close(half.log_weight.exp().sum(1), torch.ones(2, dtype=torch.float64))
    on = search.dts(process, REWARD, particles=48 - half.tree.simulations, tree=half.tree, **options)
    assert torch.equal(on.x, whole.x)


def test_a_reward_that_fails_late_loses_nothing():
    def broken(x):
        broken.calls += 1
        return REWARD(x) if broken.calls < 12 else torch.full((len(x),), math.nan)

    broken.calls = 0
    with pytest.raises(steer.NonFiniteError) as caught:
        search.dts(chain(), broken, particles=100, walkers=6)
    assert isinstance(caught.value.partial, steer.Result)
    assert caught.value.partial.x.shape[1] >= 6
    assert caught.value.partial.interrupted


@pytest.mark.parametrize("method", [search.dts, search.dts_star], ids=lambda m: m.__name__)
def test_a_reward_that_fails_at_once_leaves_the_chains_under_way(method):
    with pytest.raises(steer.NonFiniteError) as caught:
        method(chain(), lambda x: math.nan * x[:, 0], particles=10)
    assert isinstance(caught.value.partial, steer.Trajectory)
    assert caught.value.partial.cache.x0 is not None


def test_states_can_live_elsewhere():
    process = chain()
    here = search.dts(process, REWARD, particles=40)
    there = search.dts(process, REWARD, particles=40, store="cpu")
    assert torch.equal(here.x, there.x)
    assert {layer["x"].device.type for layer in there.tree.layers[1:]} == {"cpu"}


def test_networks_for_people(grown):
    networkx = pytest.importorskip("networkx")
    graph = grown.tree.to_networkx(1)
    assert networkx.is_arborescence(graph)
    assert graph.number_of_nodes() == sum(int(layer.count[1]) for layer in grown.tree.layers)
    leaves = [node for node in graph if graph.out_degree(node) == 0]
    assert all(graph.nodes[node]["level"] == 10 for node in leaves)
    assert graph.nodes[(grown.tree.depth, 0)]["reward"] == grown.reward[1, 0].item()


def test_levels_are_checked():
    process = chain(20)
    assert evenly_spaced_levels(20, 4) == [4, 8, 12, 16]
    assert evenly_spaced_levels(3, 7) == [1, 2]
    assert search.dts(process, REWARD, levels=[5, 9], particles=3).tree.levels == (5, 9, 20)
    assert search.dts(process, REWARD, levels=0, particles=3).tree.levels == (20,)
    assert search.dts(chain(3), REWARD, particles=3).tree.levels == (1, 3)  # a child of level 2 would cost nothing
    for bad in ([9, 5], [5, 19], [-1, 4], [5, 5]):
        with pytest.raises(steer.SteerError, match="branching levels must rise"):
            search.dts(process, REWARD, levels=bad, particles=3)


def test_children_need_noise():
    still = chain().with_rule(steer.ode())
    for method in (search.dts, search.dts_star):
        with pytest.raises(steer.NotStochasticError, match=r"with_rule\(steer.ddim"):
            method(still, REWARD, particles=3)


def test_terminal_states_are_scored_once():
    """Simulations that end at an old leaf cost nothing, and count as visits."""
    count = []

    def reward(x):
        count.append(len(x))
        return 40.0 * x[:, 0]

    run = search.dts(chain(4), reward, build="boltzmann", particles=200, walkers=1, widening=(1.0, 0.3))
    leaves = int(run.tree.leaves.count[0])
    assert leaves < 175
    assert sum(count) == run.cost.rewards == leaves
    assert int(run.tree.layers[0]["visits"]) == 201


def test_conditioned_networks_pay_for_idle_columns():
    """Axis 0 is conditioning there: rows of every problem are computed, counted, and kept within the budget."""
    plain = chain(20)
    seen = []

    def denoise(x, t):
        seen.append(tuple(x.shape[:2]))
        return plain.denoiser(x, t)

    process = steer.from_denoiser(
        denoise, plain.schedule, plain.times, event=(2,), transition=plain.rule, problems=3, dtype=torch.float64
    )
    for build in BUILDS:
        seen.clear()
        run = search.dts(process, REWARD, build=build, budget=500, walkers=5, widening=(1.0, 0.5), key=2)
        assert {rows[0] for rows in seen} == {3}
        assert run.cost.nfe == 3 * sum(rows[1] for rows in seen) <= 1500
        if build == "unbiased":
            free = search.dts(plain, REWARD, budget=500, walkers=5, key=2, batch=3)
            torch.testing.assert_close(run.x, free.x, rtol=1e-9, atol=1e-9)
            assert run.cost.nfe > 1500 - 9


class Conditioned:
    """Predictions of Gaussians, a mean for each problem; can be asked about one."""

    def __init__(self, means, rows):
        self.means, self.rows = torch.tensor(means, dtype=torch.float64), rows

    def __call__(self, x, t):
        assert x.shape[0] == len(self.means)
        self.rows.append(x.shape[0] * x.shape[1])
        alpha, sigma = steer.VP()(float(t))[:2]
        return self.means.view(-1, 1, 1) + 0.5 * alpha / (0.5 * alpha**2 + sigma**2) * (
            x - alpha * self.means.view(-1, 1, 1)
        )

    def only(self, problem):
        return Conditioned(self.means[problem : problem + 1].tolist(), self.rows)


@pytest.mark.parametrize("method", ["star", "boltzmann", "unbiased"])
def test_a_tree_of_several_prompts_is_what_it_is_alone(method):
    """The same leaves at the same budget: no tree pays for columns that idle because another one differs."""

    def grown(means, key):
        rows = []
        options = {"event": (1,), "problems": len(means), "dtype": torch.float64}
        process = steer.from_denoiser(Conditioned(means, rows), steer.VP(), 12, **options)
        run = search.dts_star if method == "star" else partial(search.dts, build=method, widening=(1.0, 0.5))
        result = run(process, lambda x: torch.sin(3.0 * x[:, 0]) + 0.3 * x[:, 0], budget=400, walkers=5, key=key)
        assert result.cost.nfe == sum(rows) <= 400 * len(means)
        return result

    means = [-1.0, 0.0, 3.0]
    together = grown(means, steer.Key(3))
    for problem, mean in enumerate(means):
        alone = grown([mean], steer.Key(3).shifted(problem=problem))
        count = alone.x.shape[1]
        assert int(together.tree.leaves.count[problem]) == count
        torch.testing.assert_close(together.x[problem, :count], alone.x[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.reward[problem, :count], alone.reward[0], rtol=1e-9, atol=1e-9)
    assert method != "star" or len(set(together.tree.leaves.count.tolist())) > 1  # trees did differ


@pytest.mark.parametrize("method", [*BUILDS, "star"])
def test_a_tree_grown_on_with_another_reward_holds_its_scores(method):
    """Rewards of old leaves, and of the predictions that "unbiased" goes by, as if it had been asked for that one."""
    run = search.dts_star if method == "star" else partial(search.dts, build=method)
    options = {"walkers": 5, "batch": 2, "levels": 3}

    def other(x):
        return -2.0 * REWARD(x)

    tree = run(chain(), REWARD, particles=30, key=1, **options).tree
    again = run(chain(), other, particles=10, key=2, tree=tree, **options)
    scores = other(again.x.flatten(0, 1)).view(again.reward.shape)
    torch.testing.assert_close(again.reward, scores, rtol=1e-12, atol=1e-12)
    if method == "unbiased":
        for layer in tree.layers[1:-1]:
            found = other(layer["x0"].flatten(0, 1)).view(layer.filled.shape)
            torch.testing.assert_close(
                layer["predicted_reward"][layer.filled], found[layer.filled], rtol=1e-12, atol=1e-12
            )
    rewards = run(chain(), other, particles=5, tree=pickle.loads(pickle.dumps(tree)), key=3, **options).cost.rewards
    kept = run(chain(), other, particles=5, tree=tree, key=3, **options).cost.rewards
    assert kept < rewards - 60  # a copy does not know whose scores it holds, and asks again


def test_a_tree_that_holds_gradients_of_another_reward_is_refused():
    options = {"particles": 20, "levels": 2, "proposal": steer.guided(0.5)}
    tree = search.dts(chain(), REWARD, **options).tree
    with pytest.raises(steer.SteerError, match="gradients of the reward it was grown with"):
        search.dts(chain(), lambda x: -REWARD(x), tree=tree, **options)
    search.dts(chain(), REWARD, tree=tree, **options)


def test_batches_of_a_blind_build_widen_with_the_tree():
    """Half as many calls at 64 chains' rows; the law of such trees does not depend on where batches end."""
    process, calls = chain(20), {}
    for walkers in (None, 16):
        events: list[steer.Event] = []
        run = search.dts(process, REWARD, budget=64 * 20, walkers=walkers, on_step=events.append)
        assert run.cost.nfe == 64 * 20
        calls[walkers] = len(events)
    assert calls[None] < 0.6 * calls[16]
    for build in ("uniform", "boltzmann"):
        options = {"build": build, "particles": 50}
        assert torch.equal(
            search.dts(process, REWARD, **options).x, search.dts(process, REWARD, walkers=16, **options).x
        )


def test_repr_and_size():
    tree = search.dts(chain(), REWARD, particles=20, batch=2).tree
    assert isinstance(tree, Tree)
    assert "2 trees" in repr(tree)
    assert tree.nbytes > tree.nodes * 8


# -- paths of leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", [steer.bootstrap, steer.guided(0.5)], ids=["bootstrap", "guided"])
def test_leaf_paths_are_the_chains_that_made_the_leaves(proposal):
    """Every step from the prior to the data, its states joined end to end, its densities those of the process."""
    process = chain()
    options = {"batch": 3, "budget": 150, "walkers": 5, "proposal": proposal}
    run = search.dts(process, REWARD, levels=[3, 6], keep_states=True, **options)
    tree, paths = run.tree, run.tree.leaf_paths()
    assert [step.k for step in paths.steps] == list(range(10))
    assert len(paths.ancestors) == tree.depth + 1 == 4
    assert torch.equal(paths.steps[-1].x_next, run.x)
    assert torch.equal(paths.ancestors[1], run.root)
    for before, after in zip(paths.steps, paths.steps[1:], strict=False):
        assert torch.equal(before.x_next, after.x)
    for depth, (level, slots) in enumerate(zip(tree.levels, paths.ancestors[1:], strict=True), start=1):
        assert torch.equal(tree.states(depth, slots)["x"], paths.steps[level - 1].x_next)
        assert torch.equal(paths.steps[level - 1].node, slots)
        assert torch.equal(tree.layers[depth]["parent"].gather(1, slots), paths.ancestors[depth - 1])
    ratio = torch.zeros(run.reward.shape, dtype=torch.float64)
    for step in paths.steps:
        transition = process.transition(step.x, process.denoise(step.x, step.k), step.k)
        if transition.stochastic:
            torch.testing.assert_close(step.log_prob, transition.log_prob(step.x_next), rtol=1e-6, atol=1e-6)
            ratio += step.log_prob - step.log_behaviour
        else:
            assert bool(step.log_prob.isnan().all())
    kept = sum(
        layer["log_importance_ratio"].gather(1, slots)
        for layer, slots in zip(tree.layers[1:], paths.ancestors[1:], strict=True)
    )
    torch.testing.assert_close(ratio, kept, rtol=1e-9, atol=1e-9)
    assert bool((ratio != 0.0).any()) == (proposal is not steer.bootstrap)


def test_leaf_paths_of_a_tree_without_states_are_its_nodes_alone():
    run = search.dts(chain(), REWARD, particles=20)
    paths = run.tree.leaf_paths()
    assert paths.steps == ()
    assert torch.equal(paths.ancestors[-1], torch.arange(20)[None])
