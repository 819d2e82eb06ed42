"""Population searches without a tree: the methods they contain, and their child counts."""

import functools
import itertools
import math

import pytest
import torch
from exact import Linear, exact_chain, mixture_2d

import steer
from steer import search
from steer.core.trajectory import PathState
from steer.search import selection, values
from steer.search.selection import Choice

REWARD = Linear([0.7, -0.5])


def process(steps=5, **options):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=steps, **options)


@pytest.fixture(params=["ddim", "exact"])
def chain(request):
    return process() if request.param == "ddim" else exact_chain(mixture_2d(), "vp", 5)


def choice(values, key=0, **changes):
    values = torch.as_tensor(values, dtype=torch.float64)
    fields = {
        "path": PathState(),
        "particles": values.shape[1],
        "temperature": 1.0,
        "k": 5,
        "steps": 5,
        "separable": True,
    }
    return Choice(values, **{**fields, "separable": True, "key": steer.Key(key), **changes})


@pytest.mark.parametrize("block", [5, 6, 99])
def test_one_block_is_best_of_n(chain, block):
    """CoDe with B = T: bitwise, for one chain of ten candidates and for two of five."""
    best = search.best_of_n(chain, REWARD, particles=10, batch=2, key=4)
    one = search.beam(chain, REWARD, particles=1, candidates=10, block=block, select=selection.argmax(), batch=2, key=4)
    two = search.beam(chain, REWARD, particles=2, candidates=5, block=block, select=selection.argmax(), batch=2, key=4)
    for found in (one, two):
        assert torch.equal(found.best, best.best)
        assert found.cost.nfe == best.cost.nfe
    assert torch.equal(one.root[:, 0], best.reward.argmax(1))


def test_blocks_of_one_draw_are_argmax_svdd(chain):
    code = search.beam(chain, REWARD, particles=3, candidates=6, block=1, select=selection.argmax(), batch=2, key=4)
    svdd = search.svdd(chain, REWARD, particles=3, candidates=6, select="argmax", batch=2, key=4)
    assert torch.equal(code.x, svdd.x)
    assert code.cost.nfe == svdd.cost.nfe


def test_one_active_state_is_argmax_svdd(chain):
    """TreeG with A = 1."""
    tree = search.beam(chain, REWARD, particles=1, candidates=6, select=selection.top(), batch=2, key=4)
    assert torch.equal(tree.x, search.svdd(chain, REWARD, candidates=6, select="argmax", batch=2, key=4).x)
    wide = search.beam(chain, REWARD, particles=2, candidates=6, select=selection.top(), batch=2, key=4)
    chains = search.svdd(chain, REWARD, particles=2, candidates=6, select="argmax", batch=2, key=4)
    assert not torch.equal(wide.x, chains.x)
    assert bool((wide.reward[:, 0] >= wide.reward[:, 1]).all())


def test_blocks_are_counted_in_draws():
    def chosen(block):
        return [seen.k for seen in search.beam(process(10), REWARD, particles=2, block=block).seen]

    assert chosen(1) == list(range(11))
    assert chosen(2) == [1, 3, 5, 7, 10]  # the last one, of a single draw, joins the one before
    assert chosen(5) == [4, 10]
    assert chosen(10) == chosen(11) == [10]
    with pytest.raises(steer.SteerError, match="block must be at least 1"):
        chosen(0)


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_every_block_length_costs_the_same(block):
    result = search.beam(process(), REWARD, particles=2, candidates=3, block=block, select=selection.argmax(), batch=2)
    assert result.cost.nfe == 2 * 2 * 3 * 5


@pytest.mark.parametrize("resampler", [steer.ssp, steer.systematic, steer.multinomial], ids=lambda r: r.__name__)
def test_children_number_n(resampler):
    """Also where round(N softmax), the released code's rule, gives 5 and 0."""
    share = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    assert (4 * share).round().sum(1).tolist() == [5.0, 0.0]
    rule = selection.proportional(temper=selection.constant, resampler=resampler)
    index = rule(choice(share.log()))
    assert index.shape == (2, 4)
    assert int(index.min()) >= 0
    assert int(index.max()) <= 3


def test_ssp_children_are_floor_or_ceiling_and_right_on_average():
    share = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    rule = selection.proportional(temper=selection.constant)
    index = rule(choice(2.0 * share.log().expand(20_000, -1), temperature=2.0))
    copies = torch.zeros(20_000, 4, dtype=torch.float64).scatter_add_(1, index, torch.ones_like(index).double())
    assert bool(((copies - 4 * share).abs() < 1.0).all())
    torch.testing.assert_close(copies.mean(0), 4 * share, atol=0.02, rtol=0)


def test_scores():
    values = torch.tensor([[1.0, -math.inf, 2.0]], dtype=torch.float64)
    path = PathState(
        value=torch.tensor([[3.0, 0.0, -math.inf]], dtype=torch.float64),
        highest=torch.tensor([[3.0, 0.5, 1.5]], dtype=torch.float64),
    )
    assert selection.current(values, path).tolist() == [[1.0, -math.inf, 2.0]]
    assert selection.difference(values, path).tolist() == [[-2.0, -math.inf, 2.0]]
    assert selection.highest(values, path).tolist() == [[3.0, 0.5, 2.0]]
    assert torch.equal(selection.difference(values, PathState()), values)
    assert torch.equal(selection.highest(values, PathState()), values)


def test_tempers():
    assert [selection.constant(k, 10) for k in (0, 10)] == [1.0, 1.0]
    rising = [selection.increase(k, 100) for k in range(101)]
    assert rising[0] == 0.0
    assert rising[87] == pytest.approx(1.0)
    assert rising[1] == pytest.approx(0.008, rel=0.01)
    assert all(a <= b for a, b in itertools.pairwise(rising))


def test_no_strength_keeps_everyone_and_infinite_strength_the_best():
    values = torch.tensor([[1.0, 5.0, 2.0, -math.inf]])
    assert selection.proportional(temper=selection.infinite)(choice(values)).tolist() == [[1, 1, 1, 1]]
    kept = selection.proportional(temper=selection.increase)(choice(values, k=0))[0].tolist()
    assert set(kept) <= {0, 1, 2}
    assert len(set(kept)) == 3  # equal weights for what is not forbidden
    assert selection.proportional()(choice(values, separable=False)).tolist() == [[0, 1, 2, 3]]


def test_memory_follows_the_lineage():
    """The highest value on each survivor's own path, recomputed from the lineage."""
    events = []
    result = search.beam(process(6, dtype=torch.float64), REWARD, particles=8, key=2, on_step=events.append)
    last = events[-1].state
    best = last.path.highest.new_full((1, 8), -torch.inf)
    moves = [event.parent for event in last.past]
    index = torch.arange(8)[None]
    for k in range(5, -1, -1):  # newest first; the scores at level k belong to the particles before its move
        index = moves[k].gather(1, index)
        best = torch.maximum(best, result.seen[k].score.gather(1, index))
    torch.testing.assert_close(last.path.highest, best)


@pytest.mark.parametrize("score", [selection.current, selection.difference, selection.highest])
def test_breadth_first_beats_unsteered_chains(score):
    run = functools.partial(search.beam, process(20), REWARD, particles=8, batch=40, temperature=0.3, keep=8)
    steered = run(select=selection.proportional(score=score))
    plain = run(block=99)
    assert steered.mean_reward.mean() > plain.mean_reward.mean() + 0.5
    assert steered.cost.nfe == plain.cost.nfe


def test_look_ahead_is_paid_for():
    result = search.beam(
        process(), REWARD, particles=2, candidates=None, select=selection.top(), value=values.look_ahead(6), budget=200
    )
    assert 190 < result.cost.nfe <= 200
    assert result.cost.rewards < result.cost.nfe / 2


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_a_budget_is_used_to_the_row(particles):
    run = functools.partial(search.beam, process(), REWARD, particles=particles, candidates=None)
    for budget in (97, 100, 104):
        assert budget - particles < run(select=selection.argmax(), budget=budget).cost.nfe <= budget
    assert 100 - 3 * particles < run(select=selection.argmax(), budget=100, block=3).cost.nfe <= 100


def test_the_best_share_the_weight():
    result = search.beam(process(), REWARD, particles=6, keep=2, batch=2)
    chosen = result.log_weight > -torch.inf
    assert bool((chosen.sum(1) == 2).all())
    assert bool((result.reward[chosen].view(2, 2).amin(1) >= result.reward.masked_fill(chosen, -9.0).amax(1)).all())
    assert bool(result.log_evidence.isnan().all())


@pytest.mark.parametrize("keep", [1, 3, 50])
def test_the_best_of_n_share_the_weight_and_the_ess_says_how_many(keep):
    result = search.best_of_n(process(), REWARD, particles=6, keep=keep, batch=2)
    shown = result.log_weight.isfinite()
    assert shown.sum(1).tolist() == [min(keep, 6)] * 2
    assert bool((result.reward[shown].view(2, -1).amin(1) >= result.reward.masked_fill(shown, -math.inf).amax(1)).all())
    torch.testing.assert_close(result.seen[-1].ess, torch.full((2,), float(min(keep, 6)), dtype=torch.float64))


def test_an_exception_keeps_what_was_paid_for():
    def fails_late(x):
        fails_late.calls += 1
        if fails_late.calls == 4:
            raise RuntimeError("out of memory")
        return REWARD(x)

    fails_late.calls = 0
    with pytest.raises(steer.RewardError) as caught:
        search.beam(process(), fails_late, particles=6)
    assert caught.value.partial.k == 2
    assert caught.value.partial.x.shape == (1, 6, 2)
