import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import steer
from steer import load_run, rewards, search
from steer.files import check_writable, from_archive, to_archive, to_json, write_atomically
from steer.noise.backends import name_of
from steer.results import saving
from steer.results.saving import save_partial, save_result
from steer.search.trees.backup import max_backup


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
    saved = load_run(tmp_path / "run")
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
    made_by = {"method": "smc", "reward": "score", "unit": None, "version": None, "noise": name_of("auto", "cpu")}
    assert saved.facts["made_by"] == made_by
    assert saved.facts["machine"]["threads"] == torch.get_num_threads()
    record = json.loads((tmp_path / "run" / "result.json").read_bytes())
    assert [entry["slot"] for entry in record["candidates"]] == run.trajectory.root[0].tolist()
    assert sum(entry["weight"] for entry in record["candidates"]) == pytest.approx(1.0)
    assert record["log_evidence"] == run.log_evidence.tolist()


def test_what_an_error_left_is_saved_with_its_cost_and_notes(run, tmp_path):
    assert save_partial(replace(run, interrupted=True), tmp_path, model="mixture") == tmp_path
    saved = load_run(tmp_path)
    assert saved.facts["interrupted"]
    assert saved.facts["run"] == {"model": "mixture"}
    assert saved.cost == run.cost
    state = save_partial(run.trajectory, tmp_path)
    assert torch.equal(steer.load_trajectory(state, mixture()).x, run.trajectory.x)
    assert save_partial(None, tmp_path) is None


@pytest.mark.parametrize("resampler", [steer.systematic, steer.multinomial])
def test_a_single_candidate_is_made_again_from_the_file_alone(resampler, tmp_path):
    """Multinomial resampling rearranges particles at level 0 already, between their start and their first step."""
    selection = steer.resample(resampler, threshold=1.0)
    run = steer.smc(mixture(), score, particles=12, batch=2, key=7, selection=selection)
    saved = load_run(run.save(tmp_path))
    process, slots = mixture(), saved.slots()
    assert slots.shape == (2, 12, process.steps + 1)
    assert torch.equal(slots[:, :, 0], run.trajectory.root)
    assert not torch.equal(slots[:, :, 1], slots[:, :, -1])
    assert torch.equal(slots[:, :, 0], slots[:, :, 1]) == (resampler is steer.systematic)
    for problem, particle in ((0, 0), (0, 5), (1, 11)):
        start, *steps = slots[problem, particle].tolist()
        x = process.prior(saved.key.fold("prior").shifted(problem=problem, slot=start), 1, 1)
        for k, slot in enumerate(steps):
            transition = process.transition(x, process.denoise(x, k), k)
            x = transition.sample(saved.key.fold("step").shifted(problem=problem, slot=slot).at(k))
        torch.testing.assert_close(x[0, 0], saved.tensors["x"][problem, particle])


def test_an_interrupted_run_has_the_slots_of_the_steps_that_it_took(tmp_path):
    def stop(event):
        if event.level == 3:
            raise steer.types.Stop

    saved = load_run(steer.smc(mixture(), score, particles=6, on_step=stop).save(tmp_path))
    assert saved.slots().shape == (1, 6, 3)  # the start, and two steps: the third is the prediction it ends with


def test_a_flipped_byte_is_caught(run, tmp_path):
    run.save(tmp_path)
    path = tmp_path / "result.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)
    with pytest.raises(steer.SteerError, match=r"result\.safetensors.*SHA-256"):
        load_run(tmp_path)


def test_missing_and_broken_files_are_named(run, tmp_path):
    with pytest.raises(steer.SteerError, match=r"result\.safetensors"):
        load_run(tmp_path)
    run.save(tmp_path)
    record = (tmp_path / "result.json").read_bytes()
    for broken in (record[: len(record) // 2], b"", b"\xff\xfe", b"[" * 100_000, b"[1]"):
        (tmp_path / "result.json").write_bytes(broken)
        with pytest.raises(steer.SteerError, match=r"result\.json .*(SHA-256|it is damaged)"):
            load_run(tmp_path)
    (tmp_path / "result.json").unlink()  # a copy for people; the run is in the other file
    load_run(tmp_path)
    blob = (tmp_path / "result.safetensors").read_bytes()
    for broken in (blob[: len(blob) // 2], b"", b"\0" * 8, blob + b"\0", blob[8:]):
        (tmp_path / "result.safetensors").write_bytes(broken)
        with pytest.raises(steer.SteerError, match=r"result\.safetensors .*(SHA-256|it is damaged)"):
            load_run(tmp_path)


def test_a_file_that_was_changed_and_given_a_digest_again_is_named(run, tmp_path):
    tensors, facts = from_archive(run.save(tmp_path) / "result.safetensors")

    def loading(tensors, facts):
        write_atomically(tmp_path / "result.safetensors", to_archive(tensors, {**facts, "sha256": "0" * 64}))
        return load_run(tmp_path).result(mixture())

    loading(tensors, facts)
    for name in ("cost", "interrupted", "key", "process", "temperature", "trajectory", "made_by", "law", "run"):
        with pytest.raises(steer.SteerError, match="contradicts itself"):
            loading(tensors, {k: v for k, v in facts.items() if k != name})
    for name in ("x", "reward", "root", "log_evidence_variance", "ancestors"):
        with pytest.raises(steer.SteerError, match="contradicts itself"):
            loading({k: v for k, v in tensors.items() if k != name}, facts)
    with pytest.raises(steer.SteerError, match="contradicts itself"):
        loading({**tensors, "reward": tensors["reward"][:, :3]}, facts)
    with pytest.raises(steer.SteerError, match="schema 2, got a result of schema 99"):
        loading(tensors, {**facts, "schema": 99})


def test_a_crash_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(steer.SteerError, match="power cut"):
            write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_crash_between_the_files_leaves_one_whole_run(run, tmp_path, monkeypatch):
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
    assert torch.equal(load_run(tmp_path).tensors["x"], other.x)
    assert not (tmp_path / "result.json").exists()  # which was the earlier run's


@pytest.mark.slow
def test_threads_save_to_one_directory_at_once(run, tmp_path):
    """Drafts once shared the process's number: 419 of 600 saves failed, and readers found parts of two runs."""
    runs = [run, steer.smc(mixture(), score, particles=12, key=8)]
    run.save(tmp_path)

    def save(i):
        runs[i % 2].save(tmp_path)
        x = load_run(tmp_path).tensors["x"]
        assert any(torch.equal(x, each.x) for each in runs)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(80)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.safetensors"]


@pytest.mark.parametrize("name", ["result.safetensors", "result.json"])
def test_every_flipped_bit_is_seen(run, tmp_path, name):
    """Anywhere: in the header, its padding, the digest, the numbers."""
    blob = (run.save(tmp_path) / name).read_bytes()
    whole = random.Random(0).sample(range(8 * len(blob)), 60)
    for bit in (*range(0, 64, 7), *range(8 * 8, 8 * 160, 37), *whole):
        broken = bytearray(blob)
        broken[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(steer.SteerError, match=name):
            load_run(tmp_path)
    (tmp_path / name).write_bytes(blob)
    load_run(tmp_path)


def test_a_saved_run_does_not_go_on_from_its_end(tmp_path):
    """Its weights hold the final reward: it would be counted twice. As in memory, whether closed or interrupted."""

    def stop(event):
        if event.level == 5:
            raise steer.Stop

    for name, on_step in (("closed", None), ("interrupted", stop)):
        run = steer.smc(mixture(), score, particles=12, key=7, on_step=on_step)
        again = load_run(run.save(tmp_path / name)).result(mixture())
        assert again.interrupted == run.interrupted == (name == "interrupted")
        for trajectory in (run.trajectory, again.trajectory):
            with pytest.raises(steer.SteerError, match="a run's end"):
                steer.smc(mixture(), score, start=trajectory)


@pytest.mark.parametrize(
    "method",
    [
        partial(search.dts, levels=3, walkers=4),
        partial(search.dts, levels=3, walkers=4, build="boltzmann"),
        partial(search.dts, levels=3, walkers=4, build="uniform", keep_states=True),
        partial(search.dts_star, levels=3, walkers=4),
    ],
    ids=["unbiased", "boltzmann", "uniform", "dts_star"],
)
def test_saved_trees_grow_on(method, tmp_path):
    run = method(mixture(), score, particles=12, batch=2, key=3)
    saved = load_run(run.save(tmp_path))
    first, second, third = (saved.result(mixture()) for _ in range(3))
    whole, on = (method(mixture(), score, particles=9, batch=2, key=3, tree=r.tree) for r in (run, first))
    for name in ("x", "reward", "log_weight", "log_evidence", "root"):
        assert torch.equal(getattr(on, name).nan_to_num(), getattr(whole, name).nan_to_num()), name
    assert (repr(on.tree), on.cost.nfe) == (repr(whole.tree), whole.cost.nfe)
    other = method(mixture(), score, particles=9, batch=2, key=3, tree=second.tree)
    assert torch.equal(other.x, on.x)  # growing one left the others alone
    assert '<div class="tree">' in third.report(tmp_path).read_text()


def test_a_tree_of_a_rule_of_ones_own_says_that_the_rule_is_not_saved(tmp_path):
    class Mine(type(max_backup)):
        pass

    run = search.dts_star(mixture(), score, particles=6, backup=Mine())
    tree = load_run(run.save(tmp_path)).result(mixture()).tree
    with pytest.raises(steer.SteerError, match="backup rule Mine"):
        tree.backup(1.0)
    search.dts_star(mixture(), score, particles=6, backup=Mine(), tree=tree)


def test_a_run_is_not_opened_on_another_process(run, tmp_path):
    saved = load_run(run.save(tmp_path))
    for other, what in (
        (mixture(steps=9), "8 steps"),
        (mixture().with_times([1.0, 0.9, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]), "times"),
        (mixture().with_rule(steer.ddim(0.5)), "rule"),
    ):
        with pytest.raises(steer.SteerError, match=what):
            saved.result(other)


def test_several_problems_without_lineage_and_forbidden_samples(tmp_path):
    result = steer.rollout(mixture(), lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), particles=6, batch=2)
    saved = load_run(result.take(result.ranked()[:, :4]).save(tmp_path))
    assert saved.tensors["x"].shape == (2, 4, 2)
    record = json.loads((tmp_path / "result.json").read_bytes())
    assert record["candidates"][0]["slot"] == int(result.ranked()[0, 0])
    assert saved.key == steer.Key(0)
    with pytest.raises(steer.SteerError, match="lineage"):
        saved.slots()


def test_a_saved_run_is_a_result_again(run, tmp_path):
    reference = steer.rollout(mixture(), score, particles=5, key=7)
    saved = load_run(run.save(tmp_path, reference=reference))
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
    again = load_run(run.save(tmp_path)).result(mixture())
    assert again.trajectory is not None
    assert [move[1].shape[1] for move in again.trajectory.past] == [3, 12, 12]
    assert torch.equal(again.trajectory.root, state.root)
    assert torch.equal(again.trajectory.resamplings(), state.resamplings())


@pytest.mark.parametrize("method", ["svdd", "rbf", "beam", "psi", "dts"])
def test_every_kind_of_run_is_saved_and_comes_back(method, tmp_path):
    run = steer.sample(mixture(), score, method=method, budget=200, batch=2, key=3)
    saved = load_run(run.save(tmp_path))
    again = saved.result(mixture())
    assert torch.equal(again.log_weight, run.log_weight)
    assert all(torch.equal(a.score, b.score) for a, b in zip(again.seen, run.seen, strict=True))
    assert {name: v.tolist() for name, v in again.diagnostics.items()} == {
        name: v.tolist() for name, v in run.diagnostics.items()
    }
    assert repr(again.tree) == repr(run.tree)
    assert (again.law, again.made_by) == (run.law, run.made_by)
    assert again.made_by.method == method
    if run.trajectory is not None:
        for name in ("k", "moved", "biased_start", "keep_states"):
            assert getattr(again.trajectory, name) == getattr(run.trajectory, name), name
        assert torch.equal(again.trajectory.log_weight, run.trajectory.log_weight)
    again.report(tmp_path)


def test_a_run_says_which_method_and_reward_made_it():
    """Also where the method is a setting of another: seven of them once said smc."""
    reward = rewards.Linear([1.0, 0.0])
    names = {name: steer.sample(mixture(4), reward, method=name, budget=80).made_by for name in steer.methods()}
    assert names == {name: (name, "Linear", "nat", None, name_of("auto", "cpu")) for name in names}


def test_json_is_strict():
    value = {"nan": float("nan"), "inf": [float("inf")], "tensor": torch.tensor([1.0, float("nan")]), "odd": {1, 2}}
    assert json.loads(to_json(value)) == {"nan": None, "inf": [None], "tensor": [1.0, None], "odd": [1, 2]}
    numbers = {
        "a": np.float32(3.5),
        "b": np.int64(7),
        "c": np.array([1, 2]),
        "d": np.bool_(True),
        "e": np.float64("inf"),
    }
    assert json.loads(to_json(numbers)) == {"a": 3.5, "b": 7, "c": [1, 2], "d": True, "e": None}
    half = {"half a pair": "\ud800", "猫": Path("a/b")}
    assert json.loads(to_json(half)) == {"half a pair": "\ud800", "猫": "a/b"}
    assert "猫" in to_json({"cat": "猫"}).decode()


def test_numbers_that_json_lacks_come_back(tmp_path):
    """NaN among the diagnostics (two chains of one state have no split R-hat), and an infinite temperature."""
    run = steer.psi(mixture(), score, particles=1, temperature=math.inf)
    assert any(bool(found.isnan().any()) for found in run.diagnostics.values())
    run.save(tmp_path)
    again = load_run(tmp_path).result(mixture())
    assert again.temperature == math.inf
    for name, found in run.diagnostics.items():
        assert torch.allclose(again.diagnostics[name], found, equal_nan=True)


def test_a_key_comes_back_with_its_slots(tmp_path):
    key = steer.Key(3, ("a",)).shifted(problem=2, slot=5)
    run = steer.smc(mixture(), score, particles=4, key=key)
    run.save(tmp_path)
    assert load_run(tmp_path).key == key
    assert torch.equal(steer.smc(mixture(), score, particles=4, key=load_run(tmp_path).key).x, run.x)


def test_a_directory_is_tried_before_a_run(tmp_path):
    assert check_writable(tmp_path / "new" / "run").is_dir()
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "run", tmp_path / "file", tmp_path / ("n" * 300), Path("a\0b")):
        with pytest.raises(steer.SteerError, match="nothing was run"):
            check_writable(bad)
        with pytest.raises(steer.SteerError, match="cannot write"):
            steer.rollout(mixture(), score, particles=2).save(bad)


def test_states_on_the_way_are_saved_where_asked(tmp_path):
    run = steer.smc(mixture(), score, particles=5, key=1, keep_states=True)
    with_states = load_run(run.save(tmp_path / "a", states=True)).result(mixture())
    assert torch.equal(with_states.trajectory.states(), run.trajectory.states())
    for after, before in zip(with_states.trajectory.transitions(), run.trajectory.transitions(), strict=True):
        assert after[0] == before[0]
        for a, b in zip(after[1:], before[1:], strict=True):  # the last step draws nothing, and has no density
            assert (a is None and b is None) or torch.equal(a, b)
    without = load_run(run.save(tmp_path / "b")).result(mixture())
    assert torch.equal(without.root, run.root)
    with pytest.raises(steer.SteerError, match="remembers no states"):
        without.trajectory.states()
