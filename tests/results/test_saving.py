import json
import math
import os
from dataclasses import replace

import pytest
import torch

import steer
from steer.files import to_json, write_atomically
from steer.results import saving
from steer.results.saved import load_result
from steer.results.saving import save_result


def score(x):
    return -(x - 1.0).square().sum(1)


def mixture(steps=8):
    return steer.models.gaussian_mixture([[0.0, 0.0], [3.0, 1.0]], [0.1, 0.2], steps=steps)


@pytest.fixture
def run():
    return steer.smc(mixture(), score, particles=12, key=7, selection=steer.resample(threshold=1.0))


def test_what_is_saved_comes_back(run, tmp_path):
    reference = steer.rollout(mixture(), score, particles=5, key=7)
    assert run.save(tmp_path / "run", reference=reference, model="mixture", options={"steps": 8}) == tmp_path / "run"
    saved = load_result(tmp_path / "run")
    for name in ("x", "reward", "log_weight", "log_evidence"):
        assert torch.equal(saved.tensors[name], getattr(run, name)), name
    assert torch.equal(saved.tensors["root"].long(), run.trajectory.root)
    assert torch.equal(saved.tensors["reference_x"], reference.x)
    assert torch.equal(saved.tensors["scores"], torch.stack([seen.score for seen in run.seen]))
    assert saved.tensors["ancestors"].shape[0] == len(saved.tensors["ancestor_levels"]) > 1
    assert saved.cost == run.cost
    assert saved.key == steer.Key(7)
    assert saved.facts["run"] == {"model": "mixture", "options": {"steps": 8}}
    assert saved.facts["versions"]["torch"]
    assert not saved.facts["interrupted"]
    assert [entry["slot"] for entry in saved.facts["candidates"]] == run.trajectory.root[0].tolist()
    assert sum(entry["weight"] for entry in saved.facts["candidates"]) == pytest.approx(1.0)


def test_a_single_candidate_is_made_again_from_the_file_alone(run, tmp_path):
    saved = load_result(run.save(tmp_path))
    process, slots = mixture(), saved.slots()
    assert torch.equal(slots[:, :, 0], run.trajectory.root)
    assert not torch.equal(slots[:, :, 0], slots[:, :, -1])
    for particle in (0, 5, 11):
        line = slots[0, particle].tolist()
        x = process.prior(saved.key.fold("prior").shifted(slot=line[0]), 1, 1)
        for k, slot in enumerate(line):
            transition = process.transition(x, process.denoise(x, k), k)
            x = transition.sample(saved.key.fold("step").shifted(slot=slot).at(k))
        torch.testing.assert_close(x[0, 0], saved.tensors["x"][0, particle])


def test_a_flipped_byte_is_caught(run, tmp_path):
    run.save(tmp_path)
    path = tmp_path / "result.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)
    with pytest.raises(steer.SteerError, match=r"result\.safetensors.*SHA-256"):
        load_result(tmp_path)


def test_missing_and_broken_files_are_named(run, tmp_path):
    with pytest.raises(steer.SteerError, match=r"result\.json"):
        load_result(tmp_path)
    run.save(tmp_path)
    facts = (tmp_path / "result.json").read_bytes()
    (tmp_path / "result.json").write_bytes(facts[: len(facts) // 2])
    with pytest.raises(steer.SteerError, match="not JSON"):
        load_result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({**json.loads(facts), "schema": 99}))
    with pytest.raises(steer.SteerError, match="schema 1, got 99"):
        load_result(tmp_path)


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_json_comes_last_so_that_a_crash_between_files_shows(run, tmp_path, monkeypatch):
    run.save(tmp_path)
    other = steer.smc(mixture(), score, particles=12, key=8)
    written = []

    def first_only(path, blob):
        if written:
            raise OSError("power cut")
        written.append(path.name)
        return write_atomically(path, blob)

    monkeypatch.setattr(saving, "write_atomically", first_only)
    with pytest.raises(OSError, match="power cut"):
        save_result(other, tmp_path)
    assert written == ["result.safetensors"]
    with pytest.raises(steer.SteerError, match="SHA-256"):
        load_result(tmp_path)


def test_several_problems_without_lineage_and_forbidden_samples(tmp_path):
    result = steer.rollout(mixture(), lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), particles=6, batch=2)
    saved = load_result(result.take(result.ranked()[:, :4]).save(tmp_path))
    assert saved.tensors["x"].shape == (2, 4, 2)
    assert saved.facts["candidates"][0]["slot"] == int(result.ranked()[0, 0])
    assert saved.key == steer.Key(0)
    with pytest.raises(steer.SteerError, match="lineage"):
        saved.slots()


def test_a_saved_run_is_a_result_again(run, tmp_path):
    reference = steer.rollout(mixture(), score, particles=5, key=7)
    saved = load_result(run.save(tmp_path, reference=reference))
    again = saved.result(mixture())
    for name in ("x", "reward", "log_weight", "log_evidence", "log_evidence_variance", "root", "ess", "decoded"):
        torch.testing.assert_close(getattr(again, name), getattr(run, name), rtol=0.0, atol=0.0, equal_nan=True)
    assert (again.cost, again.key, again.temperature) == (run.cost, run.key, run.temperature)
    assert again.trajectory is not None
    counts = [(k, n.tolist()) for k, n in run.trajectory.unique_roots()]
    assert [(k, n.tolist()) for k, n in again.trajectory.unique_roots()] == counts
    assert [seen.k for seen in again.seen] == [seen.k for seen in run.seen]
    beside = saved.reference(mixture())
    assert beside is not None
    assert torch.equal(beside.x, reference.x)
    assert "Surviving ancestors" in again.report(tmp_path).read_text()
    with pytest.raises(steer.SteerError, match="8 steps"):
        saved.result(mixture(steps=9))


def test_lineages_of_varying_width_come_back(tmp_path):
    state = steer.Trajectory.begin(mixture(), torch.randn(2, 6, 2))
    state = state.resample(torch.tensor([[0, 0, 1], [5, 4, 3]])).branch(4)
    state = state.resample(torch.randint(0, 12, (2, 12)), torch.tensor([True, False]))
    run = steer.rollout(mixture(), score, batch=2, particles=12, key=1)
    run = replace(run, trajectory=state, root=state.root)
    again = load_result(run.save(tmp_path)).result(mixture())
    assert again.trajectory is not None
    assert [move[1].shape[1] for move in again.trajectory.past] == [3, 12, 12]
    assert torch.equal(again.trajectory.root, state.root)
    assert torch.equal(again.trajectory.resamplings(), state.resamplings())


@pytest.mark.parametrize("method", ["svdd", "rbf", "beam", "psi", "dts"])
def test_every_kind_of_run_is_saved_and_comes_back(method, tmp_path):
    run = steer.sample(mixture(), score, method=method, budget=200, batch=2, key=3)
    saved = load_result(run.save(tmp_path))
    again = saved.result(mixture())
    assert torch.equal(again.log_weight, run.log_weight)
    assert all(torch.equal(a.score, b.score) for a, b in zip(again.seen, run.seen, strict=True))
    assert {name: v.tolist() for name, v in again.diagnostics.items()} == {
        name: v.tolist() for name, v in run.diagnostics.items()
    }
    tree = saved.facts["tree"]
    assert tree is None if run.tree is None else tree == {"saved": False, "was": repr(run.tree)}
    assert again.tree is None
    again.report(tmp_path)


def test_json_is_strict():
    value = {"nan": float("nan"), "inf": [float("inf")], "tensor": torch.tensor([1.0, float("nan")]), "odd": {1, 2}}
    assert json.loads(to_json(value)) == {"nan": None, "inf": [None], "tensor": [1.0, None], "odd": [1, 2]}


def test_numbers_that_json_lacks_come_back(tmp_path):
    """NaN among the diagnostics (two chains of one state have no split R-hat), and an infinite temperature."""
    run = steer.psi(mixture(), score, particles=1, temperature=math.inf)
    assert any(bool(found.isnan().any()) for found in run.diagnostics.values())
    run.save(tmp_path)
    again = load_result(tmp_path).result(mixture())
    assert again.temperature == math.inf
    for name, found in run.diagnostics.items():
        assert torch.allclose(again.diagnostics[name], found, equal_nan=True)


def test_a_key_comes_back_with_its_slots(tmp_path):
    key = steer.Key(3, ("a",)).shifted(problem=2, slot=5)
    run = steer.smc(mixture(), score, particles=4, key=key)
    run.save(tmp_path)
    assert load_result(tmp_path).key == key
    assert torch.equal(steer.smc(mixture(), score, particles=4, key=load_result(tmp_path).key).x, run.x)
