"""What the second-order rule remembers: where it goes with its particle, where it is forgotten, and who sees it."""

import math
from dataclasses import replace

import pytest
import torch
from second_order_models import REWARD, gaussian, mixture, score

import steer
from steer import grpo, search
from steer.core import population
from steer.core.loop import _is_finite
from steer.core.trajectory import Trajectory
from steer.processes.second_order import Remembering, SecondOrderProcess
from steer.samplers.particle_gibbs import _tied

# -- what goes back remembers nothing


def test_noising_back_forgets():
    """The mutant of zeros in place of nothing would take a slope from 0 to the prediction."""
    process = gaussian()
    x = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.3)], 2).double()
    back = process.noise(x, 5, 3, steer.Key(0))
    assert back[:, :, 1].isnan().all()
    assert torch.equal(process.noise(x, 5, 5, steer.Key(0)), x)
    assert process.noise(x[:, :, 0], process.steps, 3, steer.Key(0))[:, :, 1].isnan().all()
    x0 = process.denoise(back, 3)
    first = process.base.transition(back[:, :, 0], x0, 3).mean
    assert torch.equal(process.transition(back, x0, 3).mean, first)
    zeros = torch.stack([back[:, :, 0], torch.zeros_like(back[:, :, 0])], 2)
    assert float((process.transition(zeros, x0, 3).mean - first).abs().max()) > 1e-2


def test_a_hook_decides_what_is_remembered():
    """The prediction after x0 hooks, and that of the model under a proposal by hooks."""
    hooks = steer.Hooks(x0=(lambda at: 0.5 * at.x0,))
    process = steer.guide(gaussian(), hooks)
    assert isinstance(process, SecondOrderProcess)
    x = process.prior(steer.Key(0), 1, 2)
    x0 = process.denoise(x, 0)
    torch.testing.assert_close(process.transition(x, x0, 0).memory, 0.5 * gaussian().denoise(x, 0))
    shifted = steer.guide(gaussian(), steer.Hooks(mean=(lambda at: at.mean + 1.0,)))
    both = shifted.denoise(x, 0)
    moved = shifted.transition(x, both, 0)
    torch.testing.assert_close(moved.mean, gaussian().transition(x, both[:, :, 0], 0).mean + 1.0)
    assert torch.equal(moved.memory, both[:, :, 0])
    seen = []

    def spy(state, model):
        seen.append((state.k, model.shift(torch.ones_like(state.x)).memory, state.cache.x0))
        return model.shift(torch.ones_like(state.x))

    steer.smc(gaussian(), REWARD, particles=4, proposal=spy)
    assert all(torch.equal(memory, x0) for k, memory, x0 in seen)


def test_a_pinned_path_remembers_what_it_predicts():
    """Particle Gibbs pins noisy states; what is remembered of them follows."""
    process = gaussian()
    path = steer.rollout(process, REWARD, particles=1, batch=3).trajectory.states()[:, 0]
    assert path.shape == (3, process.steps + 1, 2)
    tied, _, _ = _tied(process, path)
    state = tied.begun(path[:, :1].expand(-1, 2, -1) * 0.9)
    state[:, 0, 0] = path[:, 0]
    for k in range(process.steps):
        x0 = tied.denoise(state, k)
        state = tied.transition(state, x0, k).sample(steer.Key(k))
        if k + 1 < process.steps:
            torch.testing.assert_close(state[:, 0, 0], path[:, k + 1])
            torch.testing.assert_close(state[:, 0, 1], process.denoise(path[:, k : k + 1], k)[:, 0])
    result = steer.particle_gibbs(process, REWARD, particles=4, sweeps=3, batch=2)
    assert result.process.rule == process.rule
    assert result.process.base.rule == process.base.rule


# -- resuming, chunks, shards


def same(a, b):
    for name in ("x", "reward", "log_weight", "log_evidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0.0, atol=0.0, equal_nan=True)
    return True


@pytest.mark.parametrize("method", [steer.smc, steer.tds])
def test_a_saved_state_goes_on_with_its_memory(method, tmp_path):
    """To the bit, from every level; without its memory it is refused, and with another one it goes elsewhere."""
    process, states = mixture(), []
    run = {"particles": 6, "key": 4, "temperature": 0.7}

    def keep(event):
        steer.save_trajectory(event.state, tmp_path / f"{event.level}.safetensors")
        states.append(event.state)

    whole = method(process, score, on_step=keep, **run)
    for state in states:
        loaded = steer.load_trajectory(tmp_path / f"{state.k}.safetensors", process)
        end = method(process, score, start=loaded, **run)
        assert same(end, whole)
    middle = states[2]
    bare = replace(middle, x=middle.x[:, :, 0])
    with pytest.raises(steer.ShapeError, match="event"):
        method(process, score, start=bare, **run)
    forgot = replace(middle, x=process.begun(middle.x[:, :, 0]))
    assert not torch.equal(method(process, score, start=forgot, **run).x, whole.x)
    with pytest.raises(steer.SteerError, match="rule"):
        steer.load_trajectory(tmp_path / "3.safetensors", mixture(steer.second_order(0.4)))


def test_a_killed_run_goes_on_from_its_journal(tmp_path):
    """Of a method that branches and one that moves each chain at its own pace."""
    for name, run in {
        "dts": lambda reward: search.dts(mixture(), reward, particles=12, key=3),
        "rbf": lambda reward: search.rbf(mixture(), reward, budget=60, key=3),
    }.items():
        whole, calls = run(score), []

        class Dies(BaseException):
            pass

        def dying(x, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise Dies
            return score(x)

        with pytest.raises(Dies), steer.resumable(tmp_path / name, every=0.0):
            run(dying)
        with steer.resumable(tmp_path / name, every=0.0) as journal:
            assert same(run(score), whole)
        assert journal.replayed > 0


def test_chunks_change_nothing():
    for method, options in ((search.best_of_n, {}), (search.svdd, {"candidates": 3})):
        runs = [method(mixture(), score, particles=6, key=2, chunk=chunk, **options) for chunk in (256, 2)]
        torch.testing.assert_close(runs[0].x, runs[1].x)


class Halves:
    """A caller of paid calls that evaluates two halves of the particles apart, as two ranks do."""

    def __call__(self, meter, kind, k, function, *tensors, named=""):
        before, parts = meter.counts, []
        for half in (slice(0, 3), slice(3, None)):
            parts.append(function(*(tensor[:, half] for tensor in tensors)))
        del before
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


@pytest.mark.parametrize("behind", [False, True])
def test_shards_give_the_whole(behind, monkeypatch):
    """The mutant: every particle remembers the prediction of its neighbour, at the seam one of the other shard."""
    from steer.calls import through

    run = {"particles": 6, "key": 3, "proposal": steer.guided(0.5)}
    whole = steer.smc(mixture(), score, **run)
    if behind:
        init = Remembering.__init__
        monkeypatch.setattr(Remembering, "__init__", lambda self, law, memory: init(self, law, memory.roll(1, 1)))
    with through(Halves()):
        found = steer.smc(mixture(), score, **run)
    assert torch.allclose(found.x, whole.x, atol=1e-5) != behind


def test_a_population_keeps_pairs_together():
    """branch, select, resample and renoise of a trajectory, entry by entry."""
    process = gaussian()
    x = torch.arange(3.0).double()[None, :, None, None] + torch.tensor([0.0, 10.0]).double()[:, None].expand(2, 2)
    state = Trajectory.begin(process, x.expand(1, 3, 2, 2).contiguous(), k=2)
    for moved in (state.branch(2), state.select(torch.tensor([[2, 0]])), state.resample(torch.tensor([[1, 1, 0]]))):
        assert torch.equal(moved.x[:, :, 1], moved.x[:, :, 0] + 10.0)
    assert state.renoise(1, steer.Key(0)).x[:, :, 1].isnan().all()
    assert population.gather(state.x, torch.tensor([[2]])).shape == (1, 1, 2, 2)


# -- what samples are


def test_samples_have_no_memory():
    process = mixture()
    result = steer.smc(process, score, particles=4, keep_states=True)
    assert result.x.shape == (1, 4, 2)
    assert result.cost.nfe == 4 * process.steps
    assert result.trajectory.states().shape == (1, 4, process.steps + 1, 2)
    assert [x.shape[2:] for _, x, *_ in result.trajectory.transitions()] == [(2, 2)] * process.steps
    assert search.dts(process, score, particles=8, keep_states=True).x.shape == (1, 8, 2)

    shapes = []
    learned = search.values.learned(lambda x, k: (shapes.append(x.shape), x[:, 0])[1])
    search.svdd(process, score, particles=2, candidates=3, value=learned)
    assert set(shapes) == {(6, 2)}

    def stop(event):
        if event.level == 3:
            raise steer.Stop

    early = steer.smc(process, score, particles=4, on_step=stop)
    assert early.interrupted
    assert early.x.shape == (1, 4, 2)
    assert early.x.isfinite().all()


def test_an_error_leaves_a_state_that_remembers_nothing_yet():
    """NaN is no memory, and no sign of a broken state: the run goes on from the level before the network failed."""
    process, calls = mixture(), []

    def broken(x, t):
        calls.append(t)
        return process.denoiser(x, t) * (math.nan if len(calls) == 2 else 1.0)

    failing = process.around(lambda base: replace(base, denoiser=broken))
    with pytest.raises(steer.NonFiniteError) as error:
        steer.smc(failing, score, particles=4, key=3)
    assert error.value.partial.k == 1
    whole = steer.smc(process, score, particles=4, key=3)
    assert torch.equal(steer.smc(process, score, start=error.value.partial, key=3).x, whole.x)
    state = Trajectory.begin(process, process.prior(steer.Key(0), 1, 2))

    def fails(x):
        raise ValueError("disk is on fire")

    with pytest.raises(steer.RewardError) as error:
        steer.smc(process, fails, particles=4, start=steer.pcnl(temperature=1.0))
    assert steer.smc(process, score, start=error.value.partial).x.shape == (*error.value.partial.x.shape[:2], 2)
    assert _is_finite(state)
    assert not _is_finite(replace(state, x=state.x * math.nan))


def test_what_cannot_be_honoured_is_refused():
    process = gaussian()
    with pytest.raises(steer.StateSpaceError, match="with_rule"):
        replace(process.base, rule=steer.second_order())
    with pytest.raises(steer.ShapeError, match=r"model\.shift"):
        steer.smc(process, REWARD, particles=4, proposal=lambda state, model: steer.Normal(model.mean, model.std))
    with pytest.raises(steer.ShapeError, match="remember"):
        Trajectory.begin(process, torch.zeros(1, 2, 2), k=3)
    for method in (steer.fkc, steer.driftlite):
        with pytest.raises(steer.StateSpaceError, match="SecondOrderProcess"):
            method(process, REWARD, particles=4)
    with pytest.raises(steer.NotStochasticError):
        steer.smc(gaussian(rule=steer.second_order(0.0)), REWARD, particles=4)
    assert isinstance(process.with_rule(steer.ddim(0.5)), steer.GaussianProcess)


# -- GRPO


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_ratios_before_the_first_update_are_one(storage):
    """To float32, in which old densities are stored; also of steered rows and branches."""
    policy = mixture(steps=8)

    def reward(x):
        return x[:, 0]

    for batch in (
        grpo.collect(policy, reward, groups=2, group_size=8, storage=storage),
        grpo.collect(policy, reward, groups=2, group_size=8, storage=storage, window=grpo.per_row(3)),
        grpo.collect(policy, reward, group_size=16, method=steer.smc, temperature=4.0, storage=storage),
        grpo.collect(policy, reward, group_size=16, method=search.dts, temperature=4.0, storage=storage),
        grpo.branch(policy, reward, groups=2, splits=[1, 4], ways=2, spread=0.5, storage=storage),
    ):
        assert batch.x_t.shape == batch.x_next.shape == batch.x_before.shape
        off = (grpo.log_probs(policy, batch) - batch.logp_old.double())[batch.mask]
        assert float(off.abs().max()) < 1e-6 * float(batch.logp_old.abs().max())
        stale = replace(batch, x_before=batch.x_before.roll(1, 0))  # the mutant: another row's past
        assert float((grpo.log_probs(policy, stale) - batch.logp_old.double())[batch.mask].abs().max()) > 1e-2


def test_gradients_are_those_of_the_whole_density():
    """Through both predictions of a step; the mutant takes the remembered one for data."""
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    policy = steer.from_denoiser(
        lambda x, t: weight * x.tanh(), steer.VP(), 5, event=(2,), dtype=torch.float64, transition=steer.second_order()
    )
    batch = grpo.collect(policy, lambda x: x[:, 0], group_size=4, storage=torch.float64, path=True)
    (found,) = torch.autograd.grad(grpo.log_probs(policy, batch).sum(), weight)

    def density(at, forget=False):
        total, path = 0.0, batch.path[None]
        for k in range(policy.steps - 1):
            state = policy.begun(path[:, :, k])
            if k > 0:
                memory = (0.8 if forget else at) * path[:, :, k - 1].tanh()
                state = torch.stack([path[:, :, k], torch.as_tensor(memory)], 2)
            total = total + policy.transition(state, at * path[:, :, k].tanh(), k).log_prob(path[:, :, k + 1]).sum()
        return total

    at = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(density(at), at)
    (part,) = torch.autograd.grad(density(at, forget=True), at)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-8)
    assert abs(float(part - whole)) > 1e-2 * abs(float(whole))
    with pytest.raises(steer.StateSpaceError, match="SecondOrderProcess"):
        grpo.granular(policy, lambda x: x[:, 0], level=0)
