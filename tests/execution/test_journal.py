"""Runs that are killed and go on from their journal: the same bits, the same ledger, and nothing paid twice."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from killed_runs import Killed, Paid, counts
from test_contract import METHODS, REWARD, mixture_process

import steer
from steer import grpo, search
from steer.errors import JournalError
from steer.execution.journal import Journal


def assert_same(one, other):
    for name in ("x", "reward", "log_weight", "log_evidence"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0.0, atol=0.0, equal_nan=True)
    assert counts(one) == counts(other)


def killed_and_resumed(run, directory, at=(0.3, 0.7)):
    """(undisturbed, resumed) results of `run(paid)`, the second killed at these shares of its calls on the way."""
    whole = Paid(mixture_process())
    plain = run(whole)
    made = 0
    for share in at:
        paid = Paid(mixture_process(), dies_at=max(1, int(share * whole.calls)) - made)
        with pytest.raises(Killed), steer.resumable(directory, every=0.0) as journal:
            run(paid)
        made += paid.calls - 1
    last = Paid(mixture_process())
    with steer.resumable(directory, every=0.0) as journal:
        resumed = run(last)
    assert journal.replayed > 0
    return plain, resumed, whole.calls, made + last.calls


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_to_the_same_result(name, tmp_path):
    budget = 120 if name.startswith(("depth_first", "noise")) else None
    options = {"budget": budget} if budget else {"particles": 4}
    plain, resumed, *_ = killed_and_resumed(
        lambda paid: METHODS[name](paid.process, paid, batch=2, key=5, **options), tmp_path
    )
    assert_same(plain, resumed)


def test_nothing_is_paid_twice(tmp_path):
    """Calls over three starts are those of one run, and one check of either kind a resumed start."""
    run = lambda paid: search.svdd(paid.process, paid, particles=4, candidates=2, key=5)  # noqa: E731
    *_, once, in_all = killed_and_resumed(run, tmp_path)
    assert once < in_all <= once + 2 * 2
    again = Paid(mixture_process())
    with steer.resumable(tmp_path, check=False) as journal:
        run(again)
    assert again.calls == 0
    assert journal.recorded == 0
    assert journal.replayed == once


def test_hooks_that_take_gradients_through_the_network_are_told_too(tmp_path):
    def run(paid):
        hooks = steer.dps(paid, 0.3)
        proposal = steer.follow(hooks)
        result = steer.smc(paid.process, paid, particles=4, key=2, proposal=proposal)
        run.tables.append(proposal.log.table())
        return result

    run.tables = []
    plain, resumed, *_ = killed_and_resumed(run, tmp_path)
    assert_same(plain, resumed)
    assert run.tables[0] == run.tables[-1]
    assert len(run.tables[0]) > 2


def test_collectors_and_comparisons_go_on(tmp_path):
    def collect(paid):
        return grpo.collect(paid.process, {"r": paid}, groups=2, group_size=4, key=3)

    plain, resumed, *_ = killed_and_resumed(collect, tmp_path / "collect")
    for name in (field.name for field in fields(plain) if isinstance(getattr(plain, field.name), torch.Tensor)):
        torch.testing.assert_close(getattr(plain, name), getattr(resumed, name), rtol=0.0, atol=0.0, equal_nan=True)

    def compare(paid):
        return steer.compare(paid.process, paid, methods=["smc"], budget=60, keys=2)

    plain, resumed, *_ = killed_and_resumed(compare, tmp_path / "compare")
    rewards = [[row.reward for row in table.rows] for table in (plain, resumed)]
    assert rewards[0] == rewards[1]


def written(directory, **options):
    """The journal of a run of ten segments or more."""
    with steer.resumable(directory, every=0.0):
        run(**options)
    return sorted(directory.glob("*.safetensors"))


def run(process=None, reward=REWARD, key=5, particles=4):
    return steer.smc(process or mixture_process(), reward, particles=particles, key=key)


def test_another_run_model_or_reward_is_refused_by_name(tmp_path):
    written(tmp_path)
    others = {
        "another run": [{"key": 6}, {"particles": 5}],
        "another model or reward": [
            {"process": replace(mixture_process(), denoiser=lambda x, t: 0.9 * x)},
            {"reward": lambda x: 1.01 * REWARD(x)},
        ],
    }
    for words, changes in others.items():
        for change in changes:
            with pytest.raises(JournalError, match=f"of {words}"), steer.resumable(tmp_path):
                run(**change)
    with steer.resumable(tmp_path) as journal:  # and none of them has harmed it
        run()
    assert journal.recorded == 0


def test_damage_is_found_before_anything_is_replayed(tmp_path):
    paths = written(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        path = paths[int(torch.randint(len(paths), (), generator=generator))]
        blob = bytearray(path.read_bytes())
        bit = int(torch.randint(8 * len(blob), (), generator=generator))
        blob[bit // 8] ^= 1 << bit % 8
        whole = path.read_bytes()
        path.write_bytes(blob)
        with pytest.raises(JournalError, match="is damaged"), steer.resumable(tmp_path):
            raise AssertionError("a damaged journal was opened")
        path.write_bytes(whole)
    middle = paths[len(paths) // 2]
    whole = middle.read_bytes()
    middle.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(JournalError, match="is damaged"), steer.resumable(tmp_path):
        pass
    middle.unlink()
    with pytest.raises(JournalError, match="has a gap before"), steer.resumable(tmp_path):
        pass
    for path in paths[len(paths) // 2 + 1 :]:  # the cure that the message names
        path.unlink()
    with steer.resumable(tmp_path) as journal:
        resumed = run()
    assert_same(resumed, run())
    assert journal.replayed
    assert journal.recorded


def test_a_segment_of_another_journal_is_noticed(tmp_path):
    ours, theirs = written(tmp_path / "ours"), written(tmp_path / "theirs", key=6)
    ours[2].unlink()
    shutil.copy(theirs[2], tmp_path / "ours")
    with pytest.raises(JournalError, match="has a gap before 000002"), steer.resumable(tmp_path / "ours"):
        pass


def test_a_journal_of_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as then:
        then.setattr("steer.execution.segments.__version__", "0.0.1")
        written(tmp_path)
    with pytest.raises(JournalError, match=r"written by steer 0\.0\.1"), steer.resumable(tmp_path):
        pass


def test_another_strength_of_a_gradient_is_another_run(tmp_path):
    follow = functools.partial(steer.tds, mixture_process(), REWARD, particles=4, key=5)
    with steer.resumable(tmp_path):
        follow()
    with pytest.raises(JournalError, match=r"strength 1\.0, and .* strength 0\.5 instead"), steer.resumable(tmp_path):
        follow(temperature=2.0)


def test_answers_are_written_before_they_fill_the_memory(tmp_path):
    with steer.resumable(tmp_path, every=3600.0, memory=1) as journal:
        run()
        assert len(list(tmp_path.glob("*.safetensors"))) == journal.recorded > 1


def test_a_cut_keeps_exactly_the_first_calls(tmp_path):
    with steer.resumable(tmp_path, every=3600.0) as journal:
        plain = run()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    for calls in (journal.recorded, 3):
        shorter = Journal(tmp_path, every=3600.0, memory=1 << 20, check=True)
        shorter.cut(calls)
        shorter.close()
        with steer.resumable(tmp_path) as again:
            assert_same(run(), plain)
        assert again.replayed == calls


def test_a_journal_has_one_writer(tmp_path):
    with steer.resumable(tmp_path), pytest.raises(JournalError, match="in use"), steer.resumable(tmp_path):
        pass
    with steer.resumable(tmp_path) as journal:
        run()
    assert journal.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 0
    journal.discard()
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_is_discarded_is_not_written_at_the_end(tmp_path):
    with steer.resumable(tmp_path, every=3600.0) as journal:
        run()
        journal.discard()
    assert not list(tmp_path.glob("*.safetensors"))


def test_sample_takes_a_journal(tmp_path):
    sample = functools.partial(steer.sample, mixture_process(), method="smc", particles=4, journal=tmp_path)
    first = sample(REWARD)
    assert list(tmp_path.glob("*.safetensors"))
    assert_same(first, sample(REWARD))


SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
import steer
from steer import search
from test_contract import REWARD, mixture_process

def slow(x):
    time.sleep(0.02)
    return REWARD(x)

with steer.resumable({journal!r}, every=0.02):
    result = search.dts(mixture_process(), slow, budget=300, key=5)
torch.save([result.x, result.reward, result.log_weight, result.log_evidence], {out!r})
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills by SIGKILL")
def test_sigkill(tmp_path):
    journal, out, source = tmp_path / "journal", tmp_path / "result.pt", tmp_path / "run.py"
    source.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), journal=str(journal), out=str(out)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, str(source)], env=environment)
    while len(list(journal.glob("*.safetensors"))) < 3:
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not out.exists()
    subprocess.run([sys.executable, str(source)], env=environment, check=True)
    plain = search.dts(mixture_process(), REWARD, budget=300, key=5)
    for here, there in zip(torch.load(out), [plain.x, plain.reward, plain.log_weight, plain.log_evidence], strict=True):
        torch.testing.assert_close(here, there, rtol=0.0, atol=0.0)
