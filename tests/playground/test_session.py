"""Runs of the playground without its page: progress, Stop, errors, two visitors, code that makes the same samples."""

import re
import shlex
import subprocess
import sys
import threading
import zipfile
from functools import partial
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import steer
from steer.cli.app import app
from steer.errors import SteerError
from steer.playground import views
from steer.playground.lineage import Lineage
from steer.playground.options import Options
from steer.playground.session import Ended, Moment, Session
from steer.playground.shelf import Shelf, Turns

SMALL = Options(budget=400)


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def every_step(monkeypatch):
    """A moment for every step, instead of a few a second."""
    monkeypatch.setattr("steer.playground.session.DUE", -1.0)


def ended(session, options):
    *_, last = session.run(options)
    assert isinstance(last, Ended)
    return last


@pytest.mark.slow
def test_a_run_seen_from_outside(shelf, every_step, tmp_path):
    session = Session(shelf)
    moments = list(session.run(SMALL))
    last = moments.pop()
    assert all(isinstance(moment, Moment) for moment in moments)
    assert [m.nfe for m in moments] == sorted({m.nfe for m in moments})
    assert all(0 < m.nfe <= m.budget == 400 and m.samples[0].picture is not None for m in moments)
    assert [m.best for m in moments] == sorted(m.best for m in moments)
    assert last.error == ""
    assert last.verdict in repr(last.result)
    assert [each.reward for each in last.samples] == sorted((each.reward for each in last.samples), reverse=True)
    assert last.report.read_text().startswith("<!doctype html>")
    with zipfile.ZipFile(last.archive) as archive:
        assert {"result.safetensors", "result.json", "report.html"} <= set(archive.namelist())
        archive.extractall(tmp_path)
    assert torch.equal(steer.load_run(tmp_path).tensors["x"], last.result.x)


@pytest.mark.parametrize(
    "options",
    [
        Options(budget=400, seed=5, temperature=0.5),
        pytest.param(Options(budget=1000, label=3, temperature="auto"), marks=pytest.mark.slow),
        Options(method="svdd", budget=400, reward=("0.5*digit:3", "digit:8"), model="digits-flow"),
        Options(method="best_of_n", model="letters", reward=("letters:e",), budget=80),
        pytest.param(
            Options(model="emoji", prompt='a "red" heart', reward=("clip-emoji",), budget=160), marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: f"{options.model}-{options.method}",
)
def test_the_python_text_makes_the_same_samples(shelf, options):
    own = ended(Session(shelf), options)
    assert own.error == ""
    names = {}
    exec(options.python(), names)
    for field in ("x", "reward", "log_weight"):
        assert torch.equal(getattr(names["result"], field), getattr(own.result, field))


@pytest.mark.slow
@pytest.mark.parametrize("options", [SMALL, Options(method="best_of_n", budget=800, label=7, seed=2)])
def test_the_command_makes_the_same_samples(shelf, options, tmp_path):
    own = ended(Session(shelf), options)
    words = shlex.split(options.command())
    words[words.index("--out") + 1] = str(tmp_path)
    done = CliRunner().invoke(app, [*words[1:], "--quiet", "--reference", "0"])
    assert done.exit_code == 0, done.output
    again = steer.load_run(tmp_path).result(own.result.process)
    assert torch.equal(again.x, own.result.x)
    assert torch.equal(again.log_weight, own.result.log_weight)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "beam", "depth_first"])
def test_methods_that_select_and_branch_can_be_watched(shelf, every_step, method):
    last = ended(Session(shelf), Options(method=method, budget=1200))
    assert last.error == ""
    assert last.verdict


def test_stop_keeps_what_there_is(shelf, every_step):
    session = Session(shelf)
    for seen in session.run(Options(budget=4000)):
        if isinstance(seen, Moment) and seen.level >= 2:
            session.stop()
    assert seen.result.interrupted
    assert seen.result.cost.nfe < 2000
    assert seen.samples
    assert seen.archive.exists()
    assert "Stopped; this is what there was. " in views.status(seen)


def test_a_visitor_who_leaves_ends_the_run(shelf, every_step):
    session = Session(shelf)
    moments = session.run(Options(budget=10_000))
    next(moments)
    run = session._run
    moments.close()
    run.thread.join(20)
    assert not run.thread.is_alive()
    assert run._newest.result.interrupted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(model="nothing"), "embedded are emoji, digits"),
        (Options(reward=("digit:x",)), "must have the form"),
        (Options(reward=("letters:e",)), "reads text"),
        (Options(prompt="a fox"), "digits takes no prompt; leave it empty"),
        (Options(model="letters", label=3), "letters takes no label"),
        (Options(label=12), "12"),
        (Options(budget=3), "budget"),
        (Options(reward=("steer.playground.nowhere:Mine",)), "can be imported"),
    ],
)
def test_errors_are_sentences(shelf, options, message):
    session = Session(shelf)
    last = ended(session, options)
    assert message in last.error
    assert "Traceback" not in last.error
    assert last.result is None
    assert ended(session, SMALL).error == ""  # and the next run goes on


def test_an_error_of_a_reward_is_a_sentence_too(shelf, monkeypatch, caplog):
    def broken(samples):
        raise ZeroDivisionError("no ink <left>")

    monkeypatch.setattr(shelf, "_reward", lambda options, process: broken)
    last = ended(Session(shelf), SMALL)
    assert "no ink <left>" in last.error
    assert "no ink &lt;left&gt;" in views.status(last)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (("digits", "", "", "digit:3", "smc", 0, 1.0, 0), "budget must be a whole number of at least 1, got 0"),
        (("digits", "", "", "digit:3", "smc", 400, "warm", 0), "temperature must be a positive number"),
        (("digits", "", "", "digit:3", "smc", 400, "nan", 0), "temperature must be a positive number"),
        (("digits", "", "", "digit:3", "smc", 400, 1, 0.5), "seed must be a whole number"),
        (("digits", "", "x", "digit:3", "smc", 400, 1, 0), "label must be a whole number"),
        (("digits", "", "", " \n", "smc", 400, 1, 0), "the field reward is empty"),
        (("digits", "", "", "digit:3", "smcc", 400, 1, 0), "no method is called 'smcc'"),
        (("digits", "", "", "digit:3", "smc", None, 1, 0), "budget must be"),
    ],
)
def test_a_form_is_read_or_refused(form, message):
    with pytest.raises(SteerError, match=re.escape(message)):
        Options.read(*form)


def test_a_form_is_read():
    read = Options.read(" digits ", " ", "3", "digit:3\n0.1*ink", "smc", 400.0, "auto", "7")
    assert read == Options("digits", ("digit:3", "0.1*ink"), "smc", 400, "auto", 7, None, 3)


@pytest.mark.slow
def test_two_visitors_at_once_do_not_mix(shelf, every_step):
    """Each gets what it would get alone, though both use one model, and their steps alternate."""
    asked = [Options(budget=400, seed=1), Options(budget=400, seed=2, reward=("digit:8",))]
    alone = [ended(Session(shelf), options).result for options in asked]
    together, order = [None, None], []

    def visit(i):
        for seen in Session(shelf).run(asked[i]):
            order.append(i)
            together[i] = seen

    threads = [threading.Thread(target=partial(visit, i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for single, seen in zip(alone, together, strict=True):
        assert torch.equal(seen.result.x, single.x)
        assert torch.equal(seen.result.reward, single.reward)
    assert sum(a != b for a, b in pairwise(order)) > 10
    assert len(shelf._models) == 1


def test_one_run_at_a_time_for_each_visitor(shelf, every_step):
    session = Session(shelf)
    moments = session.run(Options(budget=10_000))
    next(moments)
    with pytest.raises(SteerError, match="a run of yours goes on"):
        next(session.run(SMALL))
    session.stop()
    assert isinstance(list(moments)[-1], Ended)
    session.close()


def test_turns_go_to_whoever_waited_longest():
    turns, seen = Turns(), []

    def work(name):
        with turns.held():
            for _ in range(3):
                seen.append(name)
                turns.pass_on()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    with turns.held():
        for thread in threads:
            thread.start()
        while len(turns._waiting) < 3:
            pass
    for thread in threads:
        thread.join(5)
    assert sorted(seen[:2]) == ["a", "b"]
    assert all(one != other for one, other in pairwise(seen))


def test_lineage_follows_the_ancestors():
    """Of particles whose ancestors are known, and as `Trajectory.root` and `unique_roots` say."""
    process = steer.load("digits", steps=4)
    state = steer.Trajectory.begin(process, process.prior(steer.Key(0), 1, 4))
    assert Lineage.of(state).words == "nothing was resampled: 4 particles at step 0 of 4"
    state = state.resample(torch.tensor([[2, 2, 3, 0]])).moved_to(state.x)
    state = state.resample(torch.tensor([[1, 1, 2, 0]])).moved_to(state.x)
    drawn = Lineage.of(state)
    assert drawn.levels == (0, 0, 1, 2)
    assert drawn.slots == ((2, 1, 0, 0), (2, 1, 1, 1), (3, 2, 2, 2), (2, 0, 3, 3))
    assert [line[0] for line in drawn.slots] == state.root[0].tolist()
    assert drawn.alive[1:-1] == tuple(int(count) for _, count in state.unique_roots())
    assert drawn.words == "2 of 4 starting particles have descendants at step 2 of 4"
    assert drawn.ended == ((0, 0, 0), (0, 1, 1), (1, 3, 0))
    assert drawn.figure().count("<path") == 4 + len(drawn.ended)
    branched = steer.Trajectory.begin(process, process.prior(steer.Key(0), 1, 2)).branch(3)
    fewer = steer.Trajectory.begin(process, process.prior(steer.Key(0), 1, 4)).select(torch.tensor([[3, 1]]))
    assert [line[0] for line in Lineage.of(fewer).slots] == [3, 1]
    assert Lineage.of(branched).words == "2 starting particles have descendants at step 0 of 4"


def test_texts_of_visitors_are_no_markup():
    assert "<b>" not in views.error("<b>bold</b>")


def test_the_extra_is_named_where_gradio_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["play", "--no-browser"])
    assert done.exit_code == 1
    assert "steer-diffusion[play]" in done.output


@pytest.mark.slow
def test_the_session_needs_no_gradio():
    script = "import sys; sys.modules['gradio'] = None; import steer.playground.session, steer.playground.page"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
