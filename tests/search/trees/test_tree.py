"""Trees as data: layers, child lists, values, shares, growth from where a tree stands."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from exact import Linear, mixture_2d

import steer
from steer import search
from steer.search.trees.branching import even_levels
from steer.search.trees.dts import _soft_value
from steer.search.trees.node_table import ChildLists, Layer
from steer.search.trees.tree import Tree
from steer.search.trees.tree_policy import Descent, _categorical
from steer.search.trees.tree_search import resorted

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


def test_layers_append_where_live_and_grow():
    layer = Layer(2)
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


def test_child_lists_hold_every_child_in_order():
    lists, truth, key = ChildLists(3), {}, steer.Key(2)
    for turn in range(30):
        draw = key.at(turn).uniform((2, 12))
        problem, parent = (draw[0] * 3).long().numpy(), (draw[1] * (turn + 1)).long().numpy()
        child = np.arange(12) + 12 * turn
        lists.add(problem, parent, child, turn + 1)
        for b, p, c in zip(problem.tolist(), parent.tolist(), child.tolist(), strict=True):
            truth.setdefault((b, p), []).append(c)
    nodes = list(truth)
    child, first, length = lists.of(np.array([b for b, _ in nodes]), np.array([p for _, p in nodes]))
    assert len(child) == 30 * 12
    assert lists.used < 4 * len(child)  # blocks double; they do not move for every child
    for node, begin, count in zip(nodes, first, length, strict=True):
        assert child[begin : begin + count].tolist() == truth[node]


def test_child_lists_follow_the_layer_below():
    """Read now and then, while one tree gains nodes and the other does not."""
    lists, below = ChildLists(2), Layer(2)
    for turn in range(12):
        live = np.array([[turn % 3 != 0, True], [turn % 4 == 0, False]])
        below.append(live, np.array([[turn, turn // 2], [turn // 3, 0]]))
        if turn % 2 == 0:
            continue
        lists.read(below, turn + 1)
        for problem in range(2):
            parents = below["parent"][problem, : below.count[problem]].tolist()
            for node in range(turn + 1):
                child, _, _ = lists.of(np.array([problem]), np.array([node]))
                assert child.tolist() == [slot for slot, parent in enumerate(parents) if parent == node]


def test_counts_agree_with_the_parents(grown):
    tree = grown.tree
    for problem in range(3):
        _, children = flat(tree, problem)
        for (depth, slot), below in children.items():
            if depth < tree.depth:
                assert int(tree.layers[depth]["children"][problem, slot]) == len(below) > 0
    assert int(tree.layers[0]["visits"][0, 0]) == 1 + tree.iterations == 151
    for depth in range(tree.depth):  # every walk that expands at or above a depth adds one node to the next
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


def one_after_another(tree, descent, walks, left, key):
    """What the walks of a sweep choose, by loops: entry (B, W) and slots by depth, before they are put in order."""
    entry = [[tree.depth + 1] * walks for _ in left]
    path = [[[0] * (tree.depth + 1) for _ in range(walks)] for _ in left]
    for problem, money in enumerate(left):
        _, children = flat(tree, problem)
        going = list(range(walks)) if money >= descent.rows[-1] else []
        for depth in range(tree.depth):
            layer, met, added = tree.layers[depth], Counter(), Counter()
            uniform = key.fold("select", depth).shifted(slot=tree.iterations, problem=problem).uniform((1, walks))[0]
            stayed = []
            for walk in going:
                slot = path[problem][walk][depth]
                count = len(children[depth, slot])
                room = descent.widening[0] * (int(layer["visits"][problem, slot]) + met[slot]) ** descent.widening[1]
                always = count == 0 or (depth == tree.depth - 1 and not descent.revisit)
                met[slot] += 1
                if always or count + added[slot] < room:
                    added[slot] += 1
                    if descent.rows[depth] <= money:
                        entry[problem][walk], money = depth, money - descent.rows[depth]
                        continue
                if count:
                    stayed.append(walk)
            met, going = Counter(), stayed
            for walk in going:
                slot = path[problem][walk][depth]
                below = [child for _, child in children[depth, slot]]
                of = torch.tensor([problem] * len(below)), torch.tensor([slot] * len(below)), torch.tensor(below)
                score = torch.as_tensor(descent.score(tree, depth + 1, *(index.numpy() for index in of)))
                if descent.draw:
                    chosen = int((torch.softmax(score.double(), 0).cumsum(0) <= uniform[walk]).sum())
                else:
                    chosen = int(score.sort(descending=True, stable=True).indices[met[slot] % len(below)])
                met[slot] += 1
                path[problem][walk][depth + 1] = below[chosen]
        for walk in going if descent.revisit else ():
            entry[problem][walk] = tree.depth
    return np.array(entry), np.moveaxis(np.array(path), 2, 0)


@pytest.mark.parametrize("widening", [(1.0, 0.5), (1.1, 0.5), (1.0, 0.6)], ids=str)
@pytest.mark.parametrize("revisit", [True, False])
@pytest.mark.parametrize("draw", [True, False])
def test_a_sweep_is_its_walks_one_after_another(draw, revisit, widening):
    """Every walk sees the visits and the new children of the walks before it, and pays before those after it."""
    tree = search.dts(chain(), REWARD, build="boltzmann", batch=3, particles=150, walkers=7, widening=(1.0, 0.5)).tree
    descent = Descent(_soft_value, draw, widening, revisit, (10, 7, 5, 4, 3, 3, 2, 2, 1, 1)[: tree.depth])
    for walks, left in ((40, [10**6] * 3), (12, [33, 0, 10**6])):
        key = steer.Key(5).fold(walks)
        entry, path = one_after_another(tree, descent, walks, left, key)
        assert len(np.unique(entry)) > 2, entry
        found = descent(tree, walks, np.array(left), key)
        for one, other in zip(found, resorted(entry, path), strict=True):
            assert np.array_equal(one, other)


def test_choice_among_forbidden_children_and_at_the_edge():
    """Two nodes of two and three children: all forbidden are all alike, and rounding leaves nobody to the neighbour."""
    score, first, length = np.array([-np.inf, -np.inf, 0.0, -np.inf, 1.0]), np.array([0, 2]), np.array([2, 3])
    which, uniform = np.array([0, 0, 0, 1, 1, 1]), np.array([0.4, 0.6, 1.0, 0.26, 0.28, 1.0])
    assert _categorical(score, first, length, which, uniform).tolist() == [0, 1, 1, 2, 4, 4]


def test_values_kept_current_equal_values_recomputed():
    grown = search.dts(chain(), REWARD, build="boltzmann", batch=3, particles=150, walkers=7)
    kept = [layer["value"].clone() for layer in grown.tree.layers]
    for layer in grown.tree.layers[:-1]:
        layer["value"].fill_(math.nan)
    grown.tree.backup()
    for layer, value in zip(grown.tree.layers, kept, strict=True):
        torch.testing.assert_close(layer["value"][layer.filled], value[layer.filled], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("greedy", [False, True])
def test_low_temperature_soft_values_are_maxima(greedy):
    """T -> 0: T v(root) of log-mean-exp goes to the best reward, as the greedy backup has it."""
    grown = search.dts(chain(), REWARD, particles=60, batch=2)
    tree, temperature = grown.tree, 1e-7
    tree.set_leaf_values(grown.reward if greedy else grown.reward / temperature)
    root = tree.backup(greedy=greedy)
    best = root if greedy else root * temperature
    torch.testing.assert_close(best, grown.reward.amax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
def test_small_trees_are_best_of_n(build):
    """Walks that all expand the root are independent samples, with the very noise of best-of-N."""
    process = chain()
    for walkers, count in ((16, 16), (1, 20)):
        if build == "unbiased" and walkers == 1:
            continue  # it goes deeper from the second sweep on
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
def test_budget_is_spent_to_within_the_cheapest_walk(build, walkers):
    process = chain(20)
    cheapest = 20 - 16 - 1
    for budget in (20, 197, 150 + 150 * walkers):
        run = search.dts(process, REWARD, build=build, levels=4, batch=3, budget=budget, walkers=walkers)
        rows = np.array((20, 15, 11, 7, 3)) @ run.tree.expansions
        assert rows.sum() == run.cost.nfe
        assert (rows <= budget).all()
        assert (rows > budget - cheapest).all()
        if build != "boltzmann":  # whose walks may end at old leaves, which costs nothing; else no row, no walk
            assert np.array_equal(run.tree.layers[0]["visits"][:, 0] - 1, run.tree.expansions.sum(0))


@pytest.mark.parametrize("size", [{"particles": 90}, {"budget": 283}], ids=str)
@pytest.mark.parametrize("build", BUILDS)
def test_trees_of_a_batch_are_trees_of_their_own(build, size):
    process, options = chain(), {"build": build, "walkers": 5, "key": steer.Key(3), **size}
    together = search.dts(process, REWARD, batch=4, **options)
    for problem in range(4):
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


def test_growing_on_needs_a_budget_for_a_walk_and_a_tree_that_fits():
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


def test_a_stopped_tree_is_its_last_whole_sweep_and_grows_on():
    process, calls = chain(), []

    def stop(state):
        calls.append(state.k)
        if len(calls) == 37:
            raise steer.Stop

    options = {"walkers": 6, "batch": 2, "key": 1}
    whole = search.dts(process, REWARD, particles=48, **options)
    half = search.dts(process, REWARD, particles=48, on_step=stop, **options)
    assert half.interrupted
    assert 0 < half.x.shape[1] < 48
    assert torch.equal(half.x, whole.x[:, : half.x.shape[1]])
    torch.testing.assert_close(half.log_weight.exp().sum(1), torch.ones(2, dtype=torch.float64))
    on = search.dts(process, REWARD, particles=48 - half.tree.iterations, tree=half.tree, **options)
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
    assert even_levels(20, 4) == [4, 8, 12, 16]
    assert even_levels(3, 7) == [1, 2]
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
    """Walks that end at an old leaf cost nothing, and count as visits."""
    count = []

    def reward(x):
        count.append(len(x))
        return 40.0 * x[:, 0]

    run = search.dts(chain(4), reward, build="boltzmann", particles=400, walkers=1, widening=(1.0, 0.3))
    leaves = int(run.tree.leaves.count[0])
    assert leaves < 350
    assert sum(count) == run.cost.rewards == leaves
    assert int(run.tree.layers[0]["visits"]) == 401


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


def test_repr_and_size():
    tree = search.dts(chain(), REWARD, particles=20, batch=2).tree
    assert isinstance(tree, Tree)
    assert "2 trees" in repr(tree)
    assert tree.nbytes > tree.nodes * 8
