"""A trajectory on disk: everything it carries comes back to the bit, and goes on as the one in memory."""

import math
from dataclasses import fields
from functools import partial

import pytest
import torch

import steer
from steer.core.snapshot import trajectory_from, trajectory_parts
from steer.core.trajectory import PathState, StepCache, Trajectory
from steer.files import from_archive


def score(x):
    return -(x - 1.0).square().sum(1)


def count_of_a(x):
    return (x == 0).double().sum(1)


def mixture(steps=6):
    return steer.models.gaussian_mixture([[0.0, 0.0], [3.0, 1.0]], [0.1, 0.2], steps=steps)


def same(a, b):
    return torch.equal(a, b) or (a.shape == b.shape and torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)))


METHODS = {
    "smc": steer.smc,
    "two problems": partial(steer.smc, batch=2),
    "states kept": partial(steer.smc, keep_states=True),
    "guided": partial(steer.smc, proposal=steer.guided(0.5)),
    "maximum": partial(steer.smc, weight=steer.maximum()),
    "total": partial(steer.smc, weight=steer.total()),
    "tempered": partial(steer.smc, weight=steer.difference(tempering=steer.adaptive_tempering())),
    "tds": steer.tds,
    "fkc": steer.fkc,
    "fkc, birth and death": partial(steer.fkc, selection=steer.birth_death()),
    "driftlite": steer.driftlite,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_state_goes_on_as_the_one_in_memory(name, tmp_path):
    """From every level."""
    method, paths = partial(METHODS[name], particles=6, key=4, temperature=0.7), []

    def keep(event):
        paths.append(steer.save_trajectory(event.state, tmp_path / f"{event.level}.safetensors"))

    process = mixture()
    whole = method(process, score, on_step=keep)
    assert len(paths) == process.steps
    own = whole.process  # of fkc and driftlite a composite
    for path in paths:
        end = method(process, score, start=steer.load_trajectory(path, own))
        for part in ("x", "reward", "log_weight", "log_evidence", "root"):
            assert same(getattr(end, part), getattr(whole, part)), (path.name, part)


def test_tokens_go_on_too(tmp_path):
    process, paths = steer.load("letters", steps=4), []
    whole = steer.smc(
        process, count_of_a, particles=4, key=1,
        on_step=lambda event: paths.append(steer.save_trajectory(event.state, tmp_path / str(event.level))),
    )  # fmt: skip
    state = steer.load_trajectory(paths[1], process)
    assert state.x.dtype == torch.int64
    assert torch.equal(steer.smc(process, count_of_a, key=1, start=state).x, whole.x)


def test_nothing_that_a_trajectory_carries_is_forgotten():
    """Every field of every part, set to something of its own; a field that is added later is asked for too."""
    state = Trajectory.begin(mixture(), torch.randn(1, 3, 2))
    full = torch.arange(3.0)[None]
    cache = {f.name: full + i for i, f in enumerate(fields(StepCache)) if f.name != "extra"}
    path = {f.name: full - i for i, f in enumerate(fields(PathState)) if f.name not in ("extra", "driving_noise")}
    path |= {"final_applied": True, "driving_noise": {"prior": full, "step.3": full * 2}, "mine": full * 3}
    state = state.with_step_cache(**cache, own=full * 4).with_path_state(**path).resample(torch.tensor([[2, 2, 0]]))
    state = state._with(keep_states=True, diagnostics={"a": full[0]}, moved=True, biased_start=True)
    for f in fields(Trajectory):
        if f.name not in ("process", "x", "k", "log_weight", "log_evidence", "cache", "path", "past"):
            assert getattr(state, f.name) != f.default, f"set {f.name} above, so that this test sees whether it travels"
    state = state._with(path=state.path.replace(third=1 / 3, worst=-math.inf, count=2, name="a"))
    again = trajectory_from(*trajectory_parts(state), state.process)
    own = {name: value for name, value in again.path.extra.items() if name != "mine"}
    assert own == {"third": 1 / 3, "worst": -math.inf, "count": 2, "name": "a"}
    for part in ("cache", "path"):
        before, after = getattr(state, part), getattr(again, part)
        assert before.tensors().keys() == after.tensors().keys()
        pairs = [(tensor, after.tensors()[name]) for name, tensor in before.tensors().items() if name not in own]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert again.path.final_applied
    assert {k: v.tolist() for k, v in again.path.driving_noise.items()} == {
        k: v.tolist() for k, v in state.path.driving_noise.items()
    }
    assert (again.k, again.keep_states, again.moved, again.biased_start) == (0, True, True, True)
    assert torch.equal(again.diagnostics["a"], full[0])
    assert torch.equal(again.root, state.root)


def test_what_cannot_be_saved_is_refused(tmp_path):
    state = Trajectory.begin(mixture(), torch.randn(1, 3, 2)).with_path_state(mine=object())
    with pytest.raises(steer.SteerError, match=r"path\.extra\.mine is a object"):
        steer.save_trajectory(state, tmp_path / "state")
    path = steer.save_trajectory(Trajectory.begin(mixture(), torch.randn(1, 3, 2)), tmp_path / "state")
    with pytest.raises(steer.SteerError, match="6 steps"):
        steer.load_trajectory(path, mixture(steps=7))
    steer.rollout(mixture(), score, particles=2).save(tmp_path)
    with pytest.raises(steer.SteerError, match="holds a result"):
        steer.load_trajectory(tmp_path / "result.safetensors", mixture())
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(steer.SteerError, match="SHA-256"):
        steer.load_trajectory(path, mixture())


def test_tensors_that_are_the_same_are_held_once(tmp_path):
    run = steer.smc(mixture(), score, particles=4)
    tensors, _ = from_archive(run.save(tmp_path) / "result.safetensors")
    assert not any(name.startswith("trajectory.") and torch.equal(t, run.x) for name, t in tensors.items())
