"""Trackers: what they log is what the run was, and the run is the same with and without."""

import functools
import math

import pytest
import torch
from test_contract import METHODS, REWARD, mixture_process

import steer
from steer.cost import Cost
from steer.report.run_report import summary


class Tracker:
    """A run object of Weights & Biases or trackio."""

    def __init__(self):
        self.lines, self.steps = [], []

    def log(self, values, step):
        self.lines.append(values)
        self.steps.append(step)


class Writer:
    """A SummaryWriter."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


ALWAYS = {"ess", "surviving_seeds", "level", "nfe", "seconds"}
SCORED = {"reward_mean", "reward_best", "forbidden"}


def names(line):
    return {name.removeprefix("steer/") for name in line}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_tracked_and_not_changed(name):
    run = functools.partial(METHODS[name], mixture_process(), REWARD, particles=4, key=3)
    plain, tracker = run(), Tracker()
    tracked = run(on_step=steer.trackers.wandb(tracker))
    assert torch.equal(tracked.x, plain.x)
    assert torch.equal(tracked.log_weight, plain.log_weight)
    assert tracked.cost.nfe == plain.cost.nfe
    assert tracker.steps == list(range(1, len(tracker.steps) + 1))  # a tracker refuses to go back
    assert all(names(line) - SCORED == ALWAYS for line in tracker.lines)
    spent = [line["steer/nfe"] for line in tracker.lines]
    assert spent == sorted(spent)
    assert spent[-1] <= plain.cost.nfe


def test_what_is_logged_of_smc():
    tracker, events, process = Tracker(), [], mixture_process()
    total, options = 2 * 16 * process.steps, {"particles": 16, "batch": 2, "temperature": 0.1, "key": 1}
    on_step = [steer.trackers.trackio(tracker, total=total), events.append]
    result = steer.smc(process, REWARD, on_step=on_step, **options)
    for line, event in zip(tracker.lines, events, strict=True):
        if event.scores is not None:
            assert line["steer/reward_mean"] == pytest.approx(REWARD(event.x0.flatten(0, 1)).mean().item(), rel=1e-5)
            assert line["steer/reward_best"] == pytest.approx(event.scores.amax(1).mean().item())
        assert line["steer/ess"] == pytest.approx(event.state.ess.mean().item())
        assert line["steer/nfe"] == event.cost.nfe
        assert line["steer/seconds_left"] == pytest.approx(line["steer/seconds"] * (total / event.cost.nfe - 1.0))
    assert sum(names(line) >= SCORED for line in tracker.lines) == process.steps - 1  # the last draws nothing
    assert [line["steer/level"] for line in tracker.lines] == tracker.steps == list(range(1, process.steps + 1))
    last = tracker.lines[-1]
    assert last["steer/surviving_seeds"] == summary(result)["unique_roots"] < 16
    assert (last["steer/nfe"], last["steer/seconds_left"]) == (result.cost.nfe, 0.0)


def test_forbidden_samples_are_told_apart():
    tracker = Tracker()

    def positive(x):
        return torch.where(x[:, 0] > 0, x[:, 0], -torch.inf)

    steer.smc(mixture_process(), positive, particles=64, key=1, on_step=steer.trackers.wandb(tracker))
    shares = [line["steer/forbidden"] for line in tracker.lines if "steer/forbidden" in line]
    assert 0.0 < max(shares) < 1.0
    assert all(math.isfinite(line["steer/reward_mean"]) for line in tracker.lines if "steer/reward_mean" in line)


def test_tensorboard_gets_scalars_and_several_callbacks_are_called_in_turn():
    writer, tracker, called = Writer(), Tracker(), []
    on_step = [
        steer.trackers.tensorboard(writer),
        lambda event: called.append(event.level),
        steer.trackers.wandb(tracker),
    ]
    run = functools.partial(steer.sample, mixture_process(), REWARD, method="smc", particles=4)
    listed = run(on_step=on_step)
    levels = [(value, step) for name, value, step in writer.scalars if name == "steer/level"]
    assert levels == [(level, level) for level in called]
    assert tracker.steps == called
    assert torch.equal(listed.x, run().x)
    assert torch.equal(run(on_step=[]).x, run().x)

    def stop(event):
        raise steer.Stop

    assert run(on_step=[lambda event: called.clear(), stop, on_step[1]]).interrupted
    assert not called  # what comes after a Stop is not called


def test_a_list_is_called_by_methods_of_several_passes():
    tracker, runs = Tracker(), []
    on_step = [steer.trackers.wandb(tracker), lambda event: runs.append(event.run)]
    steer.particle_gibbs(mixture_process(), REWARD, particles=4, sweeps=2, on_step=on_step)
    assert {"particle_gibbs, sweep 1", "particle_gibbs, sweep 2"} <= set(runs)
    assert len(runs) == len(tracker.lines)


def test_a_real_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        steer.smc(mixture_process(), REWARD, particles=4, on_step=steer.trackers.tensorboard(writer))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in found.Scalars("steer/ess")] == list(range(1, mixture_process().steps + 1))


def test_seconds_left():
    cost = Cost(nfe=100, seconds={"total": 5.0})
    assert cost.seconds_left(300) == pytest.approx(10.0)
    assert cost.seconds_left(50) == 0.0
    assert math.isnan(Cost(seconds={"total": 1.0}).seconds_left(10))
