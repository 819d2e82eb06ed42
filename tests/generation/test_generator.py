"""Runs of many prompts: the same bytes for any order, number of processes, and place of a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import tiny_pipelines
import torch

import steer
from steer.errors import RewardError, RunDirectoryError
from steer.generation.claims import Claim
from steer.generation.opening import opener
from steer.generation.place import Place
from steer.generation.run_directory import RunDirectory

PROMPTS = [{"prompt": f"a {what}", "guidance_scale": 2.0, "tag": what} for what in ("fox", "car", "tree", "boat")]
OPTIONS = {"model": "tiny", "reward": ["jpeg"]}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipelines.sd15()


def generator(pipe, reward="jpeg", **options):
    return steer.Generator(
        pipe, reward=reward, method="svdd", steps=2, particles=2, options={"candidates": 2}, **options
    )


def made(path, maker, *, place=None, claim=True):
    directory = RunDirectory.open(path, OPTIONS, maker.rows(PROMPTS))
    found = list(maker.run(directory, range(len(PROMPTS)), place, claim=claim))
    directory.gather()
    return directory, found


def contents(directory):
    """Pictures and metadata as bytes, and tensors."""
    files = sorted(path for kind in ("images/**/*.png", "metadata.jsonl") for path in directory.path.glob(kind))
    return {str(path.relative_to(directory.path)): path.read_bytes() for path in files}


def states(directory):
    return [steer.load_run(directory.folder(row.index)).tensors["x"] for row in directory.rows]


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_dataset(pipe, tmp_path):
    alone, _ = made(tmp_path / "alone", generator(pipe))
    assert alone.states()["finished"] == [0, 1, 2, 3]
    for world in (2, 3):
        path = tmp_path / str(world)
        for rank in reversed(range(world)):
            shared, _ = made(path, generator(pipe), place=Place(rank, world), claim=False)
        assert contents(shared) == contents(alone)
        for one, other in zip(states(shared), states(alone), strict=True):
            assert torch.equal(one, other)
    lines = [json.loads(line) for line in (alone.path / "metadata.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [entry["prompt"] for entry in PROMPTS]
    assert {"file_name", "score", "weight", "nfe", "seed", "method", "tag"} <= set(lines[0])
    assert all((alone.path / line["file_name"]).exists() for line in lines)
    assert len({path.read_bytes() for path in alone.path.glob("images/**/*.png")}) == 4


def test_the_dataset_loads_as_an_image_folder(pipe, tmp_path):
    datasets = pytest.importorskip("datasets")
    directory, _ = made(tmp_path / "run", generator(pipe, keep=2))
    loaded = datasets.load_dataset("imagefolder", data_dir=str(directory.path), cache_dir=str(tmp_path / "cache"))
    rows = loaded["train"]
    assert sorted(rows["prompt"]) == sorted(2 * [entry["prompt"] for entry in PROMPTS])
    assert {"score", "weight", "nfe", "tag"} <= set(rows.column_names)
    assert rows[0]["image"].size == (16, 16)


def test_a_row_is_its_index_and_nothing_else(pipe):
    maker = generator(pipe)
    result = maker.one(2, "a tree", guidance_scale=2.0)
    process = steer.from_pipeline(pipe, prompt="a tree", guidance_scale=2.0, steps=2)
    key = steer.Key(0).shifted(problem=2)
    from steer import rewards, search

    expected = search.svdd(process, rewards.JPEGSize(), particles=2, candidates=2, key=key)
    assert torch.equal(result.x, expected.x)
    assert not torch.equal(result.x, maker.one(1, "a tree", guidance_scale=2.0).x)


def test_a_failed_row_is_a_record_and_not_the_end(pipe, tmp_path):
    class Faulty:
        broken = True

        def __call__(self, images, prompts):
            if self.broken and "car" in prompts[0]:
                raise RuntimeError("no cars today")
            return images.flatten(1).mean(1)

    reward = Faulty()
    directory, found = made(tmp_path, generator(pipe, reward))
    assert [index for index, error in found if error] == [1]
    assert directory.states() == {"finished": [0, 2, 3], "failed": [1], "missing": []}
    record = directory.error(1)
    assert (record["type"], record["attempts"]) == (RewardError.__name__, 1)
    assert "no cars today" in record["message"]
    reward.broken = False
    again, found = made(tmp_path, generator(pipe, reward))
    assert [index for index, _ in found] == [1]
    assert again.states()["finished"] == [0, 1, 2, 3]
    assert not directory.error(1)


def digits(reward="ink", **options):
    return steer.Generator("digits", reward=reward, steps=3, **{"particles": 4, **options})


def labels(path, maker, rows=4):
    return RunDirectory.open(path, {}, maker.rows([{"label": i} for i in range(rows)]))


def test_a_failed_row_keeps_what_it_had_and_a_finished_one_only_its_result(tmp_path):
    class Faulty:
        calls, broken = 0, True

        def __call__(self, samples):
            self.calls += 1
            if self.broken and self.calls % 2 == 0:
                raise RuntimeError("no ink today")
            return samples.flatten(1).mean(1)

    maker = digits(Faulty())
    directory = labels(tmp_path, maker, 1)
    for attempt in (1, 2):
        list(maker.run(directory, [0]))
        record = directory.error(0)
        assert (record["attempts"], record["partial"]) == (attempt, True)
    state = steer.load_trajectory(directory.folder(0) / "partial/partial.safetensors", maker.process(label=0))
    assert state.x.shape == (1, 4, 1, 8, 8)
    maker.reward.broken = False
    list(maker.run(directory, [0]))
    assert {path.name for path in directory.folder(0).iterdir()} == {"result.json", "result.safetensors"}


def test_a_process_makes_its_own_rows_and_then_what_is_left(tmp_path, monkeypatch):
    maker = digits()
    monkeypatch.setattr(maker, "make", lambda directory, row: None)
    for claim, made_here in ((True, [1, 3, 0, 2]), (False, [1, 3])):
        directory = labels(tmp_path / str(claim), maker)
        assert [index for index, _ in maker.run(directory, range(4), Place(1, 2), claim=claim)] == made_here


def test_a_row_that_another_finishes_before_our_claim_is_left_as_it_is(tmp_path, monkeypatch):
    maker = digits()
    directory, take = labels(tmp_path, maker, 1), Claim.take

    def late(claim):
        assert maker.make(directory, directory.rows[0]) is None
        return take(claim)

    monkeypatch.setattr(Claim, "take", late)
    assert list(maker.run(directory, [0])) == []


@pytest.mark.parametrize("then", ["dies", "fails", "finishes"])
def test_a_row_that_another_holds_is_waited_for(tmp_path, monkeypatch, then):
    """A rank that left at once would end the others under torchrun, and tell of rows that are missing."""
    monkeypatch.setattr("steer.generation.generator.LOOK_AGAIN", 0.01)
    maker = digits()
    directory = labels(tmp_path, maker, 2)
    other = Claim(directory.claim(0))
    assert other.take()
    run = maker.run(directory, range(2))
    assert next(run) == (1, None)

    def ends():
        time.sleep(0.05)
        if then == "fails":
            directory.failed(0, RuntimeError("elsewhere"))
        if then == "finishes":
            digits().make(directory, directory.rows[0])
        other.leave()

    thread = threading.Thread(target=ends)
    thread.start()
    assert [index for index, _ in run] == ([0] if then == "dies" else [])
    thread.join()
    assert directory.state(0) == ("failed" if then == "fails" else "finished")


def test_arguments_of_a_row_win_over_those_for_all_rows():
    plain, labelled = digits(), digits(call={"label": 3})
    assert torch.equal(labelled.one(0).x, plain.one(0, label=3).x)
    assert torch.equal(labelled.one(0, label=8).x, plain.one(0, label=8).x)


def test_guidance_of_a_row_wins_over_the_models_own():
    maker = steer.Generator("emoji", reward="jpeg", steps=2)
    assert [maker.process("fox", **call).rows for call in ({}, {"guidance_scale": 1.0})] == [2, 1]


def test_a_folder_is_opened_as_asked(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("steer.generation.opening.load_pipeline", lambda _, **options: seen.update(options))
    opener(tmp_path, steps=None, device="cpu", dtype="bf16", download=False)
    assert seen == {"dtype": torch.bfloat16, "device": "cpu", "local_files_only": True}


def test_memory_and_connections_are_tried_again(pipe):
    failures = [torch.OutOfMemoryError("full"), ConnectionError("gone"), ValueError("no")]

    def flaky(images):
        if failures:
            raise failures.pop(0)
        return images.flatten(1).mean(1)

    rows = generator(pipe).rows(PROMPTS)[:2]
    first, second = generator(pipe, flaky).stream(rows)
    assert "no" in str(first.error)  # the third would come again, and is not tried again
    assert not failures
    assert second.result is not None


def test_a_directory_of_another_run_is_refused(pipe, tmp_path):
    rows = generator(pipe).rows(PROMPTS)
    RunDirectory.open(tmp_path, OPTIONS, rows)
    RunDirectory.open(tmp_path, OPTIONS, rows)
    with pytest.raises(RunDirectoryError, match="model='tiny'"):
        RunDirectory.open(tmp_path, {**OPTIONS, "model": "other"}, rows)
    with pytest.raises(RunDirectoryError, match="other prompts"):
        RunDirectory.open(tmp_path, OPTIONS, rows[:3])
    with pytest.raises(RunDirectoryError, match=r"needs run\.yaml"):
        RunDirectory(tmp_path / "nowhere")


def test_batches_of_columns(pipe):
    batch = {"index": [3, 0], "prompt": ["a boat", "a fox"], "guidance_scale": [2.0, 2.0]}
    found = generator(pipe, keep=2)(batch)
    assert found["index"] == [3, 3, 0, 0]
    assert found["image"][0].shape[-1] == 3
    assert set(found["error"]) == {""}
    one = generator(pipe).one(3, "a boat", guidance_scale=2.0)
    assert max(found["score"][:2]) == one.reward.max().item()
    with pytest.raises(steer.SteerError, match="index"):
        generator(pipe)({"prompt": ["a"]})


def test_scores_and_weights_are_of_the_samples_that_are_kept():
    maker = digits(method="importance_sampling", temperature=0.05, keep=3)
    result, found = maker.one(2), maker({"index": [2]})
    particles = found["particle"]
    assert particles != [0, 1, 2]
    assert found["score"] == result.reward[0, particles].tolist()
    assert found["weight"] == result.log_weight[0, particles].exp().tolist()


def test_a_claim_that_is_renewed_at_the_last_moment_stays(tmp_path, monkeypatch):
    first, second = Claim(tmp_path / "0"), Claim(tmp_path / "0")
    assert first.take()
    ages = iter([1000.0, 0.0])
    monkeypatch.setattr(second, "_age", lambda path: next(ages))
    assert not second.take()
    assert (tmp_path / "0").read_text() == first.name


def test_claims(tmp_path):
    first, second = Claim(tmp_path / "0"), Claim(tmp_path / "0")
    assert first.take()
    assert not second.take()
    old = time.time() - 1000.0
    os.utime(tmp_path / "0", (old, old))
    assert second.take()  # the first has died
    first.leave()  # and is not the one to give it up now
    assert (tmp_path / "0").exists()
    with second.held(every=0.01):
        time.sleep(0.05)
        assert time.time() - (tmp_path / "0").stat().st_mtime < 1.0
    assert not (tmp_path / "0").exists()


@pytest.mark.skipif(os.name != "posix", reason="asks the system about a process")
def test_a_claim_of_a_process_that_has_ended_is_free_at_once(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    claim = tmp_path / "0"
    for host, free in ((socket.gethostname(), True), ("elsewhere.example.org", False)):
        claim.write_text(f"{host}.{ended.pid}.0123456789ab")
        assert Claim(claim).take() is free
    claim.write_text("")  # of a process that has made the file, and not yet signed it
    assert not Claim(claim).take()


def test_a_claim_is_not_had_where_all_claims_are_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: None)  # as if removed right after
    assert not Claim(tmp_path / "claims" / "0").take()


SCRIPT = """
import steer
from steer.generation.run_directory import RunDirectory

maker = steer.Generator("digits", reward="digit:3", method="smc", steps=5, particles=4)
directory = RunDirectory.open({out!r}, {{}}, maker.rows([{{"label": i}} for i in range(8)]))
for _ in maker.run(directory, range(8)):
    pass
directory.gather()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL")
def test_killed_workers_lose_nothing(tmp_path):
    """Two workers on one directory, one killed on the way; the other makes its rows."""
    plain, shared = tmp_path / "plain", tmp_path / "shared"
    exec(SCRIPT.format(out=str(plain)), {})
    command = [sys.executable, "-c", SCRIPT.format(out=str(shared))]
    victim, other = (subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2))
    while len(list(shared.glob("rows/*/*/result.json"))) < 2:
        assert victim.poll() is None
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert other.wait() == 0
    assert contents(RunDirectory(shared)) == contents(RunDirectory(plain))
    for one, two in zip(states(RunDirectory(shared)), states(RunDirectory(plain)), strict=True):
        assert torch.equal(one, two)
