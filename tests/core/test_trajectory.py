"""The population value: fields that move together, evidence that is not lost, and lineages told right."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from exact import LIMIT, z

import steer
from steer.core.population import gather, log_mean_exp
from steer.core.trajectory import PathState, ResamplingRecord, StepCache, StepRecord, Trajectory, required
from steer.key import Key
from steer.models import gaussian
from steer.processes.transitions import Normal

EVENT = (2, 3)
PROCESS = steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), 6, event=EVENT, dtype=torch.float64)


def population(problems: int = 3, particles: int = 5) -> Trajectory:
    """Particles that carry their own name (100 b + n) in every field."""
    names = 100.0 * torch.arange(problems)[:, None] + torch.arange(particles)
    names = names.double()
    x = names[..., None, None].expand(problems, particles, *EVENT).clone()
    state = Trajectory.begin(PROCESS, x, k=2).reweight(-0.01 * names)
    state = state.with_step_cache(x0=2.0 * x, score=3.0 * names, mine=5.0 * names)
    pair = torch.stack([names, -names], 2)
    return state.with_path_state(log_potential=4.0 * names, pair=pair, driving_noise={"start": 6.0 * x})


def names(state: Trajectory) -> dict[str, torch.Tensor]:
    """The name of each particle as every field tells it, (B, N) each."""
    return {
        "x": state.x[..., 0, 0],
        "x0": required(state.cache.x0)[..., 1, 2] / 2.0,
        "score": required(state.cache.score) / 3.0,
        "mine": state.cache.extra["mine"] / 5.0,
        "log_potential": required(state.path.log_potential) / 4.0,
        "pair": -state.path.extra["pair"][..., 1],
        "driving_noise": state.path.driving_noise["start"][..., 1, 2] / 6.0,
        "root": 100.0 * torch.arange(len(state.x))[:, None] + state.root,
    }


def snapshot(state: Trajectory) -> dict[str, torch.Tensor]:
    return {
        **{name: value.clone() for name, value in names(state).items()},
        "log_weight": state.log_weight.clone(),
        "log_evidence": state.log_evidence.clone(),
        "log_normaliser": state.log_normaliser,
        "whole x": state.x.clone(),
    }


def check_unchanged(state: Trajectory, before: dict[str, torch.Tensor], events: int) -> None:
    for name, value in snapshot(state).items():
        assert torch.equal(value, before[name]), name
    assert len(state.past) == events


def filled(kind: type) -> dict[str, object]:
    """A value for every field of a kind: tensors that name their particle, everything else as it is by default."""
    names = population().log_weight
    values: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        if "Tensor" in str(field.type):
            values[field.name] = {"a": 1.0 * names, "b": 2.0 * names} if "Mapping" in str(field.type) else names
    return values


INDEX = torch.tensor([[4, 4, 0, 1, 1], [0, 1, 2, 3, 4], [3, 2, 3, 0, 3]])


def test_begin():
    x = Key(0).normal((2, 4, *EVENT))
    state = Trajectory.begin(PROCESS, x, k=1)
    assert state.k == 1
    assert torch.equal(state.x, x)
    assert state.log_weight.dtype == torch.float64
    assert state.log_weight.tolist() == [[0.0] * 4] * 2
    assert state.log_normaliser.tolist() == [0.0, 0.0]
    assert state.root.tolist() == [[0, 1, 2, 3]] * 2
    assert state.resamplings().tolist() == [0, 0]
    assert "2 problems x 4 particles at level 1 of 6" in repr(state)
    for shape in ((2, 4), (2, 4, 3, 2), (4,), (2, 4, 2)):
        with pytest.raises(steer.ShapeError, match=r"event \(2, 3\), got"):
            Trajectory.begin(PROCESS, torch.zeros(shape))


@pytest.mark.parametrize("verb", ["resample", "select", "branch"])
def test_every_field_moves_with_its_particle(verb):
    state = population()
    before = snapshot(state)
    moved = state.branch(3) if verb == "branch" else getattr(state, verb)(INDEX)
    index = torch.arange(5).repeat_interleave(3).expand(3, -1) if verb == "branch" else INDEX
    expected = 100.0 * torch.arange(3)[:, None] + index
    for name, value in names(moved).items():
        assert torch.equal(value, expected.to(value.dtype)), name
    assert moved.x.shape == (3, index.shape[1], *EVENT)
    assert moved.k == state.k
    # fields that a future version adds must be listed here and in `names`, or be of the whole problem
    fields = {field.name for field in dataclasses.fields(Trajectory)}
    assert fields == {
        "process",
        "x",
        "k",
        "log_weight",
        "log_evidence",
        "cache",
        "path",
        "past",
        "keep_states",
        "diagnostics",
        "moved",
        "biased_start",
    }
    check_unchanged(state, before, 0)


@pytest.mark.parametrize(("kind", "others"), [(StepCache, set()), (PathState, {"final_applied"})])
def test_every_field_of_caches_and_paths_moves(kind, others):
    """Also those that nobody has set yet in this file: a field added later is moved, or this test says so."""
    values = filled(kind)
    assert set(values) | others == {field.name for field in dataclasses.fields(kind)}
    bare = Trajectory.begin(PROCESS, population().x)
    state = bare.with_step_cache(**values) if kind is StepCache else bare.with_path_state(**values)
    moved = state.select(INDEX)
    holder, was = (moved.cache, state.cache) if kind is StepCache else (moved.path, state.path)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(holder, name), getattr(was, name).gather(1, INDEX)), name
        else:
            for key in ("a", "b"):
                assert torch.equal(getattr(holder, name)[key], getattr(was, name)[key].gather(1, INDEX)), name


def test_reset_weights_keeps_states_and_what_is_cached_at_them():
    moved = dataclasses.replace(population(), keep_states=True, diagnostics={"acceptance": torch.ones(3)}, moved=True)
    moved = moved.resample(torch.zeros(3, 5, dtype=torch.int64)).reweight(torch.ones(3, 5))
    fresh = moved.reset_weights()
    begun = dataclasses.replace(Trajectory.begin(PROCESS, moved.x, k=2, keep_states=True), cache=moved.cache)
    assert fresh.__dict__.keys() == begun.__dict__.keys()
    for field in dataclasses.fields(Trajectory):
        one, other = getattr(fresh, field.name), getattr(begun, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name


def test_gather():
    tensor = Key(1).normal((3, 5, 2, 4))
    index = torch.tensor([[0, 4], [2, 2], [1, 3]])
    expected = torch.stack([tensor[b, index[b]] for b in range(3)])
    assert torch.equal(gather(tensor, index), expected)
    assert torch.equal(gather(tensor[..., 0, 0], index), expected[..., 0, 0])
    assert torch.equal(gather(tensor[:1], index[:1]), expected[:1])
    assert torch.equal(gather(tensor[..., 0], index), expected[..., 0])
    integers = (10 * tensor).long()
    assert gather(integers, index).dtype == torch.int64


# --- evidence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5, 9])
def test_resampling_keeps_the_normaliser(count):
    state = population()
    moved = state.resample((Key(2).uniform((3, count)) * 5).long())
    torch.testing.assert_close(moved.log_normaliser, state.log_normaliser, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moved.log_evidence, log_mean_exp(state.log_weight))
    assert moved.log_weight.tolist() == [[0.0] * count] * 3
    again = moved.reweight(torch.full((3, count), 0.7, dtype=torch.float64)).resample(INDEX[:, :2] % count)
    torch.testing.assert_close(again.log_normaliser, state.log_normaliser + 0.7)
    assert again.resamplings().tolist() == [2, 2, 2]


def test_reweight_adds_and_branch_keeps_weights():
    state = population()
    increment = Key(3).normal((3, 5))
    weighted = state.reweight(increment)
    torch.testing.assert_close(weighted.log_weight, state.log_weight + increment, rtol=0, atol=0)
    branched = weighted.branch(4)
    assert torch.equal(branched.log_weight, weighted.log_weight.repeat_interleave(4, 1))
    torch.testing.assert_close(branched.log_normaliser, weighted.log_normaliser)
    selected = weighted.select(INDEX[:, :2])
    assert torch.equal(selected.log_weight, weighted.log_weight.gather(1, INDEX[:, :2]))
    assert torch.equal(selected.log_evidence, weighted.log_evidence)


def test_resampling_some_problems_leaves_the_others_bitwise_alone():
    state = population().reweight(Key(4).normal((3, 5)))
    where = torch.tensor([True, False, True])
    index = torch.tensor([[4, 4, 0, 1, 1], [3, 3, 3, 3, 3], [3, 2, 3, 0, 3]])
    moved = state.resample(index, where)
    kept, was = snapshot(moved), snapshot(state)
    for name, value in kept.items():
        assert torch.equal(value[1], was[name][1]), name
    whole = snapshot(state.resample(index))
    for name, value in kept.items():
        assert torch.equal(value[[0, 2]], whole[name][[0, 2]]), name
    assert moved.resamplings().tolist() == [1, 0, 1]
    event = moved.past[0]
    assert isinstance(event, ResamplingRecord)
    assert event.k == 2
    assert event.parent[1].tolist() == [0, 1, 2, 3, 4]
    nowhere = state.resample(index, torch.zeros(3, dtype=torch.bool))
    for name, value in snapshot(nowhere).items():
        assert torch.equal(value, was[name]), name


def test_resampling_some_problems_cannot_change_the_number_of_particles():
    """The others have nothing to be filled up with: the fields would disagree in length."""
    with pytest.raises(steer.ShapeError, match="5"):
        population().resample(INDEX[:, :3], torch.tensor([True, False, True]))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_step_draws_from_the_transition_at_its_level():
    state, law = population(), Normal(Key(5).normal((3, 5, *EVENT)), 0.3)
    stepped = state.step(law, Key(6))
    assert torch.equal(stepped.x, law.sample(Key(6).at(2)))
    assert stepped.k == 3
    assert stepped.cache.tensors() == {}
    assert set(stepped.path.tensors()) == {"log_potential", "pair"}
    assert set(stepped.path.driving_noise) == {"start"}
    assert torch.equal(stepped.log_weight, state.log_weight)
    assert stepped.past == ()
    assert set(state.cache.tensors()) == {"x0", "score", "mine"}
    assert state.k == 2


def test_step_from_another_proposal_weighs_the_ratio():
    """log-weight gains log N(x'; model) - log N(x'; proposal); the mean weight is 1 (z over 4000 particles)."""
    state = Trajectory.begin(PROCESS, torch.zeros(1, 4000, *EVENT, dtype=torch.float64))
    model = Normal(torch.zeros(1, 4000, *EVENT, dtype=torch.float64), 0.5)
    proposal = model.shift(torch.full((1, 1, *EVENT), 0.1, dtype=torch.float64))
    stepped = state.step(proposal, Key(7), model=model)
    expected = (stepped.x - 0.1).square().sum((2, 3)) / 0.5 - stepped.x.square().sum((2, 3)) / 0.5
    torch.testing.assert_close(stepped.log_weight, expected)
    assert abs(z(stepped.log_weight[0].exp() - 1.0)) < LIMIT
    assert abs(z((stepped.log_weight[0] / 6).exp() - 1.0)) > LIMIT  # densities averaged over coordinates


def test_step_without_noise_has_no_density_to_weigh():
    still = Normal(torch.zeros(3, 5, *EVENT, dtype=torch.float64), 0.0)
    state = dataclasses.replace(population(), keep_states=True)
    stepped = state.step(still, Key(0), model=still)
    assert torch.equal(stepped.log_weight, state.log_weight)
    record = stepped.past[0]
    assert isinstance(record, StepRecord)
    assert record.log_prob is None
    assert record.log_behaviour is None
    assert stepped.transitions()[0][3:] == (None, None)


def test_renoise_goes_back_by_the_forward_process():
    process = gaussian([0.0, 0.0], 1.0, steps=6, dtype=torch.float64)
    x = Key(8).normal((2, 3, 2))
    state = Trajectory.begin(process, x, k=4).reweight(Key(9).normal((2, 3)), log_potential=x[..., 0])
    state = state.with_step_cache(x0=x)
    back = state.renoise(1, Key(10))
    assert torch.equal(back.x, process.noise(x, 4, 1, Key(10)))
    assert back.k == 1
    assert back.cache.tensors() == {}
    assert torch.equal(required(back.path.log_potential), required(state.path.log_potential))
    assert torch.equal(back.log_weight, state.log_weight)
    assert torch.equal(back.root, state.root)
    assert state.k == 4
    assert torch.equal(state.x, x)


# --- lineages ---------------------------------------------------------------------------------------------------------


def tracked(problems: int = 2, particles: int = 4, levels: int = 6):
    """A run with crossing ancestors, and the same run told particle by particle in plain lists.

    history[b][n] = [(k, x, x', log p(x'), log q(x')), ...] of the particle that is now n of problem b.
    """
    key = Key(11)
    state = Trajectory.begin(PROCESS, key.normal((problems, particles, *EVENT)), keep_states=True)
    history = [[[] for _ in range(particles)] for _ in range(problems)]
    for k in range(levels):
        if k % 2 == 1:
            parent = (key.fold("parent").at(k).uniform((problems, particles)) * particles).long()
            where = torch.tensor([True, k != 3])[:problems]
            state = state.resample(parent, where)
            history = [
                [list(line[parent[b, n]] if where[b] else line[n]) for n in range(particles)]
                for b, line in enumerate(history)
            ]
        model = Normal(0.9 * state.x, 0.2)
        proposal = model.shift(torch.full_like(state.x, 0.05))
        before = state.x
        state = state.step(proposal, key.fold("step"), model=model)
        densities = model.log_prob(state.x), proposal.log_prob(state.x)
        for b in range(problems):
            for n in range(particles):
                history[b][n].append((k, before[b, n], state.x[b, n], *(d[b, n] for d in densities)))
    return state, history


def test_states_and_transitions_follow_the_lineages():
    state, history = tracked()
    states, transitions = state.states(), state.transitions()
    assert states.shape == (2, 4, 7, *EVENT)
    assert [step[0] for step in transitions] == list(range(6))
    for b in range(2):
        for n in range(4):
            line = [x for _, x, _, _, _ in history[b][n]] + [state.x[b, n]]
            assert torch.equal(states[b, n], torch.stack(line))
            for told, step in zip(history[b][n], transitions, strict=True):
                assert told[0] == step[0]
                for a, c in zip(told[1:], step[1:], strict=True):
                    assert torch.equal(a, c[b, n])
    # consecutive steps of a lineage meet, and its densities are those of its own states
    for step, following in itertools.pairwise(transitions):
        assert torch.equal(step[2], following[1])
    for _, x, after, log_prob, log_behaviour in transitions:
        torch.testing.assert_close(log_prob, Normal(0.9 * x, 0.2).log_prob(after))
        torch.testing.assert_close(log_behaviour, Normal(0.9 * x + 0.05, 0.2).log_prob(after))


def test_states_through_branching_and_selection():
    key = Key(12)
    state = Trajectory.begin(PROCESS, key.normal((1, 2, *EVENT)), keep_states=True)
    start = state.x
    state = state.step(Normal(0.9 * state.x, 0.2), key).branch(3)
    middle = state.x
    state = state.step(Normal(0.9 * state.x, 0.2), key)
    end = state.x
    state = state.select(torch.tensor([[5, 0, 4]]))
    states = state.states()
    for n, (last, first) in enumerate([(5, 1), (0, 0), (4, 1)]):
        assert torch.equal(states[0, n], torch.stack([start[0, first], middle[0, last], end[0, last]]))
    assert state.root.tolist() == [[1, 0, 1]]
    assert state.resamplings().tolist() == [2]


def test_unique_roots_and_root_against_sets():
    """Against sets of starting particles followed by hand, over 8 random rearrangements of 12."""
    key, problems, particles = Key(13), 3, 12
    state = Trajectory.begin(PROCESS, torch.zeros(problems, particles, *EVENT))
    roots = [list(range(particles)) for _ in range(problems)]
    counted = []
    for i in range(8):
        parent = (key.at(i).uniform((problems, particles)) * particles).long()
        where = torch.tensor([True, i % 2 == 0, i > 5])
        state = state.resample(parent, where).step(Normal(state.x, 0.1), key)
        roots = [[r[p] for p in parent[b].tolist()] if where[b] else r for b, r in enumerate(roots)]
        counted.append((i, [len(set(r)) for r in roots]))
    assert state.root.tolist() == roots
    assert [(k, count.tolist()) for k, count in state.unique_roots()] == counted
    assert counted[-1][1][0] < 6
    assert state.resamplings().tolist() == [8, 4, 2]


def test_a_trajectory_without_states_says_how_to_get_one():
    state = population().step(Normal(torch.zeros(3, 5, *EVENT), 0.1), Key(0))
    for ask in (state.states, state.transitions):
        with pytest.raises(steer.SteerError, match="remembers no states; run the sampler with keep_states=True"):
            ask()
    assert state.unique_roots() == []


def test_methods_leave_the_original_as_it_was():
    state = population()
    before = snapshot(state)
    law = Normal(torch.zeros(3, 5, *EVENT, dtype=torch.float64), 0.3)
    state.with_step_cache(x0=state.x), state.with_path_state(log_potential=state.log_weight)
    state.with_step_cache(other=state.x), state.with_path_state(other=state.x), state.reweight(torch.ones(3, 5))
    state.resample(INDEX), state.resample(INDEX, torch.tensor([True, False, True]))
    state.branch(2), state.select(INDEX), state.step(law, Key(0)), state.renoise(0, Key(0))
    check_unchanged(state, before, 0)
    assert set(state.cache.tensors()) == {"x0", "score", "mine"}
    assert set(state.path.tensors()) == {"log_potential", "pair"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.k = 3
    assert math.isfinite(float(state.log_normaliser.sum()))
