"""Journals that are cut by snapshots: runs killed anywhere end the same, to the last bit, and what is kept is bounded."""

import functools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import Killed, Paid, counts
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
            found += [part if isinstance(part, torch.Tensor) else torch.tensor(part) for part in event if part is not None]
        found += [result.diagnostics[name] for name in sorted(result.diagnostics)]
    if result.tree is not None:
        found += list(result.tree.parts()[0].values())
    return found


def assert_same(one, other):
    for here, there in zip(everything(one), everything(other), strict=True):
        torch.testing.assert_close(here, there, rtol=0.0, atol=0.0, equal_nan=True)


def killed_and_resumed(run, directory, process=mixture_process, kills=3, seed=0):
    """(undisturbed, resumed, journals): the second run killed at calls that are drawn at random, over its life."""
    whole = Paid(process())
    plain, made, journals = run(whole), 0, []
    for at in sorted(random.Random(seed).sample(range(2, whole.calls + 1), kills)):
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
