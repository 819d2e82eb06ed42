"""Journals that are cut by snapshots: runs killed anywhere end the same, to the last bit, and the files stay small."""

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import Killed, Paid, counts, on_network
from test_contract import METHODS, REWARD, STEPS, mixture_process

import steer
from steer import grpo, search
from steer.core import checkpoints
from steer.core.checkpoints import described
from steer.errors import JournalError
from steer.execution.segments import Segments

# One state at a time, or a generator's own variables: nothing that stands for the whole run. Docs/scale.md says so.
JOURNAL_ALONE = ("rbf", "depth_first", "noise")
every_step = functools.partial(steer.resumable, every=0.0, checkpoint=0.0)


def everything(result):
    """All that a result says, tensor by tensor, and its ledger."""
    found = [result.x, result.reward, result.log_weight, result.log_evidence, result.log_evidence_variance, result.root]
    found += [tensor for _, *record in result.seen for tensor in record]
    found += [torch.tensor([k for k, *_ in result.seen]), torch.tensor(counts(result))]
    if result.trajectory is not None:
        for event in result.trajectory.past:
            found += [
                part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in event if part is not None
            ]
        found += [result.diagnostics[name] for name in sorted(result.diagnostics)]
    if result.tree is not None:
        found += list(result.tree.parts()[0].values())
    return found


def assert_same(one, other):
    for here, there in zip(everything(one), everything(other), strict=True):
        torch.testing.assert_close(here, there, rtol=0.0, atol=0.0, equal_nan=True)


def killed_and_resumed(run, directory, process=mixture_process, kills=3, seed=0, shares=None):
    """(undisturbed, resumed, journals): the second run killed at calls drawn at random, or at shares of its life."""
    whole = Paid(process())
    plain, made, journals = run(whole), 0, []
    drawn = sorted(random.Random(seed).sample(range(2, whole.calls + 1), kills))
    for at in drawn if shares is None else [int(share * whole.calls) for share in shares]:
        paid = Paid(process(), dies_at=max(1, at - made))
        with pytest.raises(Killed), every_step(directory) as journal:
            run(paid)
        made += paid.calls - 1
        journals.append(journal)
    with every_step(directory) as journal:
        resumed = run(Paid(process()))
    return plain, resumed, [*journals, journal]


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith(JOURNAL_ALONE)])
def test_methods_go_on_from_their_snapshots(name, tmp_path):
    options = {"particles": 24, "walkers": 4} if name.startswith("dts") else {"particles": 4}
    run = lambda paid: METHODS[name](paid.process, paid, batch=2, key=5, **options)  # noqa: E731
    plain, resumed, journals = killed_and_resumed(run, tmp_path, seed=name)
    assert_same(plain, resumed)
    assert sum(journal.snapshots for journal in journals) > 0
    with every_step(tmp_path) as again:
        assert_same(run(Paid(mixture_process())), plain)
    assert again.recorded == again.snapshots == 0


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith(JOURNAL_ALONE)])
def test_other_methods_keep_their_whole_journal(name, tmp_path):
    with steer.resumable(tmp_path, checkpoint=0.0) as journal:
        METHODS[name](mixture_process(), REWARD, budget=60, key=5)
    assert journal.snapshots == 0
    assert Segments(tmp_path).calls == journal.recorded > 0


def letters():
    chain = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    return steer.models.markov_language([0.5, 0.5], chain, 2, transition=steer.unmask("random"))


def second_order():
    return mixture_process().with_rule(steer.second_order())


SETTINGS = {
    "second order": (second_order, functools.partial(steer.smc, particles=6, proposal=steer.guided(0.5))),
    "second order, searched": (second_order, functools.partial(search.svdd, particles=2, candidates=3)),
    "second order, trees": (second_order, functools.partial(search.dts, particles=24, walkers=4)),
    "states kept": (mixture_process, functools.partial(steer.smc, particles=6, keep_states=True)),
    "trees, states kept": (mixture_process, functools.partial(search.dts, particles=24, walkers=4, keep_states=True)),
    "a temperature that is chosen": (mixture_process, functools.partial(steer.smc, particles=6, temperature="auto")),
    "several passes": (mixture_process, functools.partial(steer.driftlite, particles=6, passes=2)),
    "a product": (mixture_process, functools.partial(steer.fkc, exponent=2.0, particles=6)),
    "blocks of a beam": (mixture_process, functools.partial(search.beam, particles=2, candidates=3, block=3)),
    "tokens": (letters, functools.partial(steer.smc, particles=6)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_a_state_holds_goes_on(name, tmp_path):
    process, method = SETTINGS[name]
    run = lambda paid: method(paid.process, paid, key=5)  # noqa: E731
    plain, resumed, _ = killed_and_resumed(run, tmp_path, process, kills=2, seed=name)
    assert_same(plain, resumed)


def test_what_guidance_notes_goes_on(tmp_path):
    """Of a proposal by hooks, and of a guided process, whose log is in neither state nor ledger."""
    for name, guided in (("proposal", False), ("process", True)):

        def run(paid, guided=guided):
            hooks = steer.dps(paid.reward, 0.3)
            proposal = steer.follow(hooks)
            if guided:
                result = steer.smc(steer.guide(paid.process, hooks), paid, particles=4, key=2)
                run.tables.append(result.process.log.table())
            else:
                result = steer.smc(paid.process, paid, particles=4, key=2, proposal=proposal)
                run.tables.append(proposal.log.table())
            return result

        run.tables = []
        plain, resumed, journals = killed_and_resumed(run, tmp_path / name)
        assert_same(plain, resumed)
        assert run.tables[0] == run.tables[-1]
        assert len(run.tables[0]) == STEPS - 1
        assert journals[-1].replayed < STEPS


MUTANTS = {
    "second order": "state.x",
    "second order, searched": "seen",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_snapshot_without_its_memory_or_history_would_be_noticed(name, tmp_path, monkeypatch):
    """The same comparison rejects snapshots that leave out what a step remembers, or what the run has seen."""
    process, method = SETTINGS[name]
    restore, restored = checkpoints.Checkpoints._restore, []

    def forgetful(self, tensors, facts):
        restore(self, tensors, facts)
        restored.append(self)
        if MUTANTS[name] == "seen":
            del self.seen[0]
        else:
            self.state.x[:, :, 1] = torch.nan

    monkeypatch.setattr(checkpoints.Checkpoints, "_restore", forgetful)
    run = lambda paid: method(paid.process, paid, key=5)  # noqa: E731
    with pytest.raises((AssertionError, ValueError, JournalError)):
        assert_same(*killed_and_resumed(run, tmp_path, process, shares=(0.7,))[:2])
    assert restored


def test_comparisons_and_collectors_go_on(tmp_path):
    """Several runs in one journal: finished ones keep their last snapshot and the calls after it."""

    def compare(paid):
        return steer.compare(paid.process, paid, methods=["smc", "svdd", "dts"], budget=60, keys=1)

    plain, resumed, journals = killed_and_resumed(compare, tmp_path / "compare")
    rows = [[(row.reward, row.method) for row in table.rows] for table in (plain, resumed)]
    assert rows[0] == rows[1]
    assert sum(journal.snapshots for journal in journals) > 3

    def collect(paid):
        return grpo.collect(paid.process, {"r": paid}, groups=2, group_size=4, key=3)

    plain, resumed, _ = killed_and_resumed(collect, tmp_path / "collect")
    for name, tensor in vars(plain).items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor, getattr(resumed, name), rtol=0.0, atol=0.0, equal_nan=True)


def wide(steps):
    """16 particles of it are 16 KiB."""
    return steer.models.gaussian_mixture(torch.zeros(1, 256), [1.0], steps=steps, dtype=torch.float32)


BOUNDED = {
    "smc": (8, functools.partial(steer.smc, particles=16)),
    "guided": (10, functools.partial(steer.smc, particles=16, proposal=steer.guided(0.5))),
    "fkc": (24, functools.partial(steer.fkc, particles=16)),  # float64, with scores and gradients
    "best_of_n": (8, functools.partial(search.best_of_n, particles=16, chunk=4)),
    "svdd": (10, functools.partial(search.svdd, particles=16, candidates=1)),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_kept_does_not_grow_with_the_steps(name, tmp_path):
    """Below so many populations, beside 1 KiB of scores, ancestors and names a step."""
    state, reward, (most, method) = 16 * 256 * 4, lambda x: x.mean(1), BOUNDED[name]
    for steps in (10, 40):
        with steer.resumable(tmp_path / str(steps), checkpoint=0.0) as journal:
            method(wide(steps), reward, key=1)
        assert journal.bytes < most * state + 1024 * steps
    with steer.resumable(tmp_path / "whole", checkpoint=None) as journal:
        method(wide(40), reward, key=1)
    assert journal.bytes > 38 * state


def written(directory, run, dies_at=14, **how):
    """The files of a run that was killed when it had snapshots."""
    with pytest.raises(Killed), every_step(directory):
        run(Paid(mixture_process(), dies_at=dies_at))
    return sorted(directory.glob("*.safetensors"))


def sampled(paid, **options):
    return steer.smc(paid.process, paid, **{"particles": 4, "key": 5, **options})


def test_every_flipped_bit_is_found(tmp_path):
    paths = written(tmp_path, sampled, dies_at=8)
    generator = random.Random(0)
    assert any(b'"snapshot"' in path.read_bytes() for path in paths)
    for _ in range(50):
        path = generator.choice(paths)
        whole = path.read_bytes()
        bit = generator.randrange(8 * len(whole))
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(JournalError, match="is damaged"), every_step(tmp_path):
            raise AssertionError("a damaged journal was opened")
        path.write_bytes(whole)
    with every_step(tmp_path) as journal:
        assert_same(sampled(Paid(mixture_process())), sampled(Paid(mixture_process())))
    assert journal.replayed


def test_another_run_is_refused_by_what_differs(tmp_path):
    written(tmp_path, sampled, dies_at=8)
    others = {
        "key": {"key": 6},
        "beginning": {"particles": 5},
        "temperature": {"temperature": 2.0},
        "options": {"selection": steer.resample(threshold=0.4)},
        "process": {},
    }
    for name, change in others.items():
        process = mixture_process().with_rule(steer.ddim(0.9)) if name == "process" else mixture_process()
        with pytest.raises(JournalError, match=f"of another run: there {name} was"), every_step(tmp_path):
            sampled(Paid(process), **change)
    with pytest.raises(JournalError, match="there smc began, and now call 0 is denoise"), every_step(tmp_path):
        search.rbf(mixture_process(), REWARD, budget=60, key=5)
    with every_step(tmp_path):  # and none of them has harmed it
        assert_same(sampled(Paid(mixture_process())), sampled(Paid(mixture_process())))


LATE = {  # runs that ask the reward early, and then not again for long
    "smc": functools.partial(steer.smc, particles=4, weight=steer.difference(at=[1])),
    "best_of_n": functools.partial(search.best_of_n, particles=4, chunk=2),
    "fkc": functools.partial(steer.fkc, particles=4),
    "guided": functools.partial(steer.smc, particles=4, weight=steer.final_only(), proposal=steer.guided(0.5)),
    "dts": functools.partial(search.dts, particles=12, walkers=4),
}


@pytest.mark.parametrize("name", LATE)
def test_another_model_or_reward_is_noticed_after_a_snapshot(name, tmp_path):
    run = lambda paid: LATE[name](paid.process, paid, key=5)  # noqa: E731
    whole = Paid(mixture_process())
    plain = run(whole)
    written(tmp_path, run, dies_at=whole.calls)
    other = mixture_process()
    with pytest.raises(JournalError, match="another model or reward"), every_step(tmp_path):
        run(Paid(on_network(other, lambda network: lambda *args: 0.9 * network(*args))))
    with pytest.raises(JournalError, match="another model or reward"), every_step(tmp_path):
        run(Paid(other, lambda x: 1.01 * REWARD(x)))
    with every_step(tmp_path) as journal:
        assert_same(run(Paid(other)), plain)
    assert journal.replayed + journal.recorded < whole.calls


@pytest.mark.parametrize("after", range(4))
def test_a_cut_half_made_is_finished(after, tmp_path, monkeypatch):
    """Killed after some of the segments were deleted that a snapshot stands in for."""
    unlink, deleted = Path.unlink, []

    def dying(path, *args, **options):
        if path.suffix == ".safetensors":
            if len(deleted) == after + 3:
                raise Killed
            deleted.append(path)
        unlink(path, *args, **options)

    with monkeypatch.context() as then:
        then.setattr(Path, "unlink", dying)
        with pytest.raises(Killed), every_step(tmp_path):
            sampled(Paid(mixture_process()))
    with every_step(tmp_path):
        assert_same(sampled(Paid(mixture_process())), sampled(Paid(mixture_process())))


class Others:
    """The other ranks of a group, as far as a journal asks them."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def least(self, number):
        return min(number, self.numbers.pop(0)) if self.numbers else number


def test_ranks_go_on_from_the_snapshot_that_one_of_them_has_cut_at(tmp_path):
    """One was killed before it deleted what its snapshot stands in for; another had done so."""
    from steer.execution.journal import Journal

    copies = []
    cut_before = Segments.cut_before

    def copied(self, number):
        copies.append({path.name: path.read_bytes() for path in self.paths})
        cut_before(self, number)

    with pytest.MonkeyPatch.context() as then:
        then.setattr(Segments, "cut_before", copied)
        written(tmp_path / "one", sampled, dies_at=8)
    (tmp_path / "other").mkdir()
    for name, blob in copies[-1].items():
        (tmp_path / "other" / name).write_bytes(blob)
    one, other = (Segments(tmp_path / name) for name in ("one", "other"))
    assert one.cut > other.cut
    calls, ahead_at, behind_at = min(one.calls, other.calls), one.cut, other.cut
    one.close()
    other.close()
    behind = Journal(tmp_path / "other", ranks=Others(-ahead_at, calls))
    behind.close()
    assert behind._segments.cut == ahead_at
    ahead = Journal(tmp_path / "one", ranks=Others(-behind_at, calls))
    ahead.close()
    assert (behind.calls, ahead.calls) == (calls, calls)
    with every_step(tmp_path / "other"):
        assert_same(sampled(Paid(mixture_process())), sampled(Paid(mixture_process())))


def test_snapshots_come_when_it_is_time(tmp_path):
    with steer.resumable(tmp_path / "short") as journal:
        sampled(Paid(mixture_process()))
    assert journal.snapshots == 0  # of a run below a minute
    with pytest.raises(steer.SteerError, match="checkpoint are in seconds"), steer.resumable(tmp_path, checkpoint=-1.0):
        pass
    result = steer.sample(mixture_process(), REWARD, particles=4, key=5, journal=tmp_path / "sample", checkpoint=0.0)
    assert Segments(tmp_path / "sample").cut > 0
    assert_same(result, sampled(Paid(mixture_process())))


def test_the_ledger_goes_on_with_its_seconds(tmp_path):
    written(tmp_path, sampled, dies_at=8)
    (snapshot,) = [stored.item for stored in Segments(tmp_path).stored() if hasattr(stored.item, "facts")]
    before = snapshot.facts["own"]["of"]["ledger"]["of"]["seconds"]["of"]["total"]["float"]
    with every_step(tmp_path):
        assert sampled(Paid(mixture_process())).cost.seconds["total"] > float(before)


def test_runs_are_told_apart_by_their_options():
    weights = (lambda x: x + 1, lambda x: x + 2, functools.partial(max, 1), functools.partial(max, 2))
    tempering = [steer.adaptive_tempering(share) for share in (0.5, 0.6)]
    assert (
        len({described(each) for each in (*weights, *tempering, torch.ones(2), torch.zeros(2), {1, 2}, {2, 3})}) == 10
    )
    assert described(steer.adaptive_tempering(0.5)) == described(tempering[0])


@pytest.mark.slow
def test_options_are_described_alike_in_another_process():
    code = """
import steer
from steer.core.checkpoints import described
print(described((steer.resample(steer.ssp, at={3, 1, 2}), steer.difference(tempering=steer.adaptive_tempering()),
    steer.guided(0.5), steer.dps(lambda x: x.sum(1) in {"a", "b"}, 0.3), {"a": 1, "b": 2})))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**environment, "PYTHONHASHSEED": seed}, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    assert told.pop()
