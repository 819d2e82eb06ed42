"""Ray workers: what one process makes, also where one of them is killed on the way."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import steer
from steer.generation import workers
from steer.generation.run_directory import RunDirectory

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ROWS = 6


class Slow:
    """A reward that leaves its process's number, kills it where asked to, and takes its time."""

    def __init__(self, folder, fatal=""):
        self.folder, self.fatal = folder, fatal

    def __call__(self, samples):
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(0.05)
        if self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return samples.flatten(1).mean(1)


def opened(path, reward):
    maker = steer.Generator("digits", reward=reward, method="smc", steps=4, particles=4)
    return maker, RunDirectory.open(path, {}, maker.rows([{"label": i} for i in range(ROWS)]))


def bytes_of(directory):
    directory.gather()
    files = [*directory.path.glob("images/**/*.png"), directory.path / "metadata.jsonl"]
    return {str(path.relative_to(directory.path)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL")
def test_a_killed_worker_is_replaced_and_nothing_is_lost(cluster, tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    alone, plain = opened(tmp_path / "plain", Slow(str(pids)))
    list(alone.run(plain, range(ROWS)))
    for path in pids.iterdir():
        path.unlink()
    maker, shared = opened(tmp_path / "shared", Slow(str(pids)))
    maker._opener = maker._reward = None
    found = []
    for index, error in workers.run(maker, shared, range(ROWS), workers=5):  # for which there is no room
        found.append((index, error))
        if len(found) == 2:
            os.kill(int(next(iter(pids.iterdir())).name), signal.SIGKILL)
    assert sorted(found) == [(index, "") for index in range(ROWS)]
    assert len(list(pids.iterdir())) == 3  # two, and the one that took over
    assert bytes_of(shared) == bytes_of(plain)


@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL")
def test_a_row_that_kills_its_workers_is_an_error_record(cluster, tmp_path):
    maker, directory = opened(tmp_path / "run", Slow(str(tmp_path), fatal="yes"))
    maker._opener = maker._reward = None
    ((index, error),) = workers.run(maker, directory, [0], workers=1)
    assert index == 0
    assert "ActorDied" in error or "ActorUnavailable" in error
    assert json.loads((directory.folder(0) / "error.json").read_text())["attempts"] == 1


def test_a_worker_does_not_make_a_row_again(tmp_path):
    maker, directory = opened(tmp_path / "run", Slow(str(tmp_path)))
    worker = workers._Worker(maker, str(directory.path))
    assert worker.make(0) == (0, "")
    maker.make = None
    assert worker.make(0) == (0, "")


def test_a_cluster_without_what_a_worker_needs_is_told_so(cluster, tmp_path):
    maker, directory = opened(tmp_path / "run", Slow(str(tmp_path)))
    with pytest.raises(steer.SteerError, match="needs 1 CPU and 1 GPUs, and the cluster has 2 and 0"):
        list(workers.run(maker, directory, [0], workers=1, gpus_per_worker=1))
