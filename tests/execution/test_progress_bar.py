"""Progress of a run: told of every paid call, and no part of the run."""

import functools

import pytest
import torch
from test_contract import METHODS, REWARD, mixture_process

import steer
from steer import search
from steer.execution.progress_bar import rows_of


@pytest.mark.parametrize("name", ["smc", "driftlite", "particle_gibbs_pinned", "best_of_n", "rbf", "dts"])
def test_a_run_that_is_watched_is_the_run(name, capsys):
    run = functools.partial(METHODS[name], mixture_process(), REWARD, particles=4, key=3)
    plain = run()
    with steer.progress(total=plain.cost.nfe) as shown:
        watched = run()
    assert torch.equal(watched.x, plain.x)
    assert shown.rows == plain.cost.nfe
    assert "rows" in capsys.readouterr().err


def test_several_runs_add_up_and_the_best_score_is_seen(monkeypatch):
    monkeypatch.setattr("steer.execution.progress_bar.DUE", -1.0)
    with steer.progress() as shown:
        first = search.best_of_n(mixture_process(), REWARD, particles=8, key=1)
        second = search.best_of_n(mixture_process(), REWARD, particles=8, key=2)
    assert shown.rows == first.cost.nfe + second.cost.nfe
    assert shown.best == pytest.approx(max(first.reward.max().item(), second.reward.max().item()))


def test_without_a_terminal_it_is_a_line_each_tenth_at_most(monkeypatch, capsys):
    monkeypatch.setattr("steer.execution.progress_bar.DUE", -1.0)
    with steer.progress(total=400):
        steer.smc(mixture_process(), REWARD, budget=400, key=1)
    rows = [line.split(" of ")[0] for line in capsys.readouterr().err.splitlines()]
    assert len(rows) == len(set(rows)) > 1


@pytest.mark.parametrize("options", [{"budget": 60}, {"particles": 4}])
def test_the_total_is_what_the_run_will_spend(options):
    process, options = mixture_process(), {"batch": 2, **options}
    assert rows_of(process, options) == steer.smc(process, REWARD, key=1, **options).cost.nfe


def test_sample_shows_it_where_asked(capsys):
    options = {"method": "smc", "budget": 100, "key": 1}
    quiet = steer.sample(mixture_process(), REWARD, **options)
    assert capsys.readouterr().err == ""
    told = steer.sample(mixture_process(), REWARD, progress=True, **options)
    assert "smc: 100 of 100 rows" in capsys.readouterr().err
    assert torch.equal(quiet.x, told.x)
