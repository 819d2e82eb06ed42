"""One population over two and three processes: the results of one process, and no rank left waiting for another."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import steer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gloo over a file, and signals")
SCRIPT = Path(__file__).parents[1] / "distributed_run.py"


def started(case, world, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    (folder / "store").unlink(missing_ok=True)
    return [
        subprocess.Popen([sys.executable, str(SCRIPT), case, str(rank), str(world), str(folder)], env=environment)
        for rank in range(world)
    ]


def ended(ranks, codes=None):
    """Waits for all; none may hang."""
    found = [rank.wait(timeout=240) for rank in ranks]
    assert found == (codes or [0] * len(ranks))


@pytest.mark.slow
def test_all_methods_give_what_one_process_gives(tmp_path):
    """5 particles on 3 ranks: some rows are computed and dropped, and the ledger has none of them."""
    world = 3
    ranks = started("methods", world, tmp_path)
    from distributed_run import facts, runs

    alone = {name: facts(result) for name, result in runs().items()}
    ended(ranks)
    first, *others = (torch.load(tmp_path / f"methods-{rank}.pt") for rank in range(world))
    for name, expected in alone.items():
        for *states, counts in (first[name], *(other[name] for other in others)):
            assert counts.tolist() == expected[-1].tolist(), name
            for found, one in zip(states, expected[:-1], strict=True):  # rounding of a matrix product in another shape
                torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    for other in others:
        for name, found in other.items():
            for here, there in zip(found, first[name], strict=True):
                torch.testing.assert_close(here, there, rtol=0.0, atol=0.0, equal_nan=True, msg=name)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """One pair of processes meets all faults, one after another; the last kills rank 1."""
    folder = tmp_path_factory.mktemp("faults")
    ended(started("faults", 2, folder), [0, -signal.SIGKILL])
    return folder


def test_an_error_at_one_rank_ends_all_with_it(faults):
    for name in ("smc", "dts", "rbf"):
        for rank in range(2):
            kind, message, partial = torch.load(faults / f"fails-{name}-{rank}.pt")
            assert kind == "DistributedError"
            assert "rank 1 of 2 failed in" in message
            assert "disk is on fire" in message
            assert partial or name == "dts"


def test_ctrl_c_at_one_rank_ends_all_with_the_same_result(faults):
    for name in ("smc", "dts", "rbf"):
        one, other = (torch.load(faults / f"interrupted-{name}-{rank}.pt") for rank in range(2))
        assert one[0] == other[0] == "interrupted", name
        for here, there in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(here, there, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_killed_rank_leaves_none_waiting(faults):
    kind, message, partial = torch.load(faults / "killed-smc-0.pt")
    assert kind == "DistributedError"
    assert "lost touch" in message
    assert partial


def test_ranks_that_drift_apart_are_told_so(faults):
    for rank in range(2):
        kind, message, _ = torch.load(faults / f"drifted-{rank}.pt")
        assert kind == "DistributedError"
        assert "drifted apart" in message


@pytest.mark.slow
def test_killed_ranks_go_on_from_their_journals(tmp_path):
    ranks = started("journal", 2, tmp_path)
    while len(list(tmp_path.glob("journal/1-of-2/*.safetensors"))) < 5:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()
    newest = sorted(tmp_path.glob("journal/0-of-2/*.safetensors"))[-1]
    newest.unlink()  # one rank wrote less than the other
    ended(started("journal", 2, tmp_path))
    from distributed_run import REWARD, facts, hooked

    alone = facts(steer.smc(hooked(), REWARD, particles=5, key=5))
    for rank in range(2):
        *found, calls = torch.load(tmp_path / f"journal-{rank}.pt")
        for here, one in zip(found, alone, strict=True):
            torch.testing.assert_close(here, one, rtol=1e-5, atol=1e-5)
        assert calls < 6


@pytest.mark.slow
def test_killed_ranks_go_on_from_the_snapshot_that_both_have(tmp_path):
    """All ranks cut at one step; of what one of them wrote last, calls or a snapshot, the other can do without."""
    ranks = started("snapshots", 2, tmp_path)
    while len(list(tmp_path.glob("journal/1-of-2/*.safetensors"))) < 4:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    time.sleep(0.1)
    for rank in ranks:
        rank.kill()
        rank.wait()
    files = [sorted(tmp_path.glob(f"journal/{rank}-of-2/*.safetensors")) for rank in range(2)]
    assert all(b'"snapshot"' in path.read_bytes() for path in (files[0][0], files[1][0]))
    for path in files[0][1:][::-1][:2]:
        path.unlink()
    ended(started("snapshots", 2, tmp_path))
    from distributed_run import REWARD, facts, mixture_process

    alone = facts(steer.smc(mixture_process(), REWARD, particles=5, key=5, proposal=steer.guided(0.5)))
    for rank in range(2):
        *found, calls = torch.load(tmp_path / f"snapshots-{rank}.pt")
        for here, one in zip(found, alone, strict=True):
            torch.testing.assert_close(here, one, rtol=1e-5, atol=1e-5)
        assert calls < 6


@pytest.fixture
def alone():
    """A group of this process."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_seconds_are_of_all_exchanges(alone):
    with steer.distributed.together() as ranks:
        seconds = [ranks.seconds for _ in range(10) if ranks.least(1)]
    assert seconds == sorted(set(seconds))


def test_without_a_group_it_says_what_to_do():
    with pytest.raises(steer.DistributedError, match="torchrun"), steer.distributed.together():
        pass
