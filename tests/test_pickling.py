"""Processes, results and errors go to other processes, of a pool of workers say."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import steer
from steer import rewards, search
from steer.errors import keep_partial


def score(x):
    return x.flatten(1).double().mean(1)


def broken(x):
    return score(x) * torch.nan


def mixture():
    return steer.models.gaussian_mixture([[0.0, 0.0], [3.0, 1.0]], [0.1, 0.2], steps=4)


PROCESSES = {
    "digits": lambda: steer.load("digits", steps=3),
    "labels": lambda: steer.load("digits", steps=3, labels=[1, 2], guidance_scale=2.0),
    "digits-flow": lambda: steer.load("digits-flow", steps=3),
    "letters": lambda: steer.load("letters", steps=3),
    "mixture": mixture,
    "markov": lambda: steer.models.markov_language([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], length=3),
    "power": lambda: steer.compose(mixture(), exponent=2.0),
    "guided": lambda: steer.guide(steer.load("digits", steps=3), steer.dps(rewards.DigitLogProb(3))),
    "lgd": lambda: steer.guide(steer.load("digits", steps=3), steer.lgd(rewards.DigitLogProb(3))),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_and_results_are_pickled(name):
    run = steer.rollout(PROCESSES[name](), score, particles=2, key=1)
    again = pickle.loads(pickle.dumps(run))
    assert torch.equal(again.x, run.x)
    assert torch.equal(again.trajectory.states(), run.trajectory.states())
    assert torch.equal(steer.rollout(again.process, score, particles=2, key=1).x, run.x)


def test_a_tree_goes_along_and_grows_on():
    run = search.dts(mixture(), score, particles=8, levels=2, key=2)
    again = pickle.loads(pickle.dumps(run))
    ends = [search.dts(mixture(), score, particles=4, levels=2, key=2, tree=each.tree) for each in (run, again)]
    assert torch.equal(ends[0].x, ends[1].x)


def failing(name):
    reward = broken
    process = steer.load("digits", steps=3)
    if name == "lambda":
        process = steer.from_denoiser(lambda x, t: 0 * x, steer.VP(), 3, event=(2,))
    steer.smc(process, reward, particles=2)


def test_errors_come_out_of_a_pool_with_what_was_paid_for():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        with pytest.raises(steer.NonFiniteError, match="level 0 of 3") as caught:
            pool.submit(failing, "digits").result(timeout=60)
        assert isinstance(caught.value.partial, steer.Trajectory)
        with pytest.raises(steer.NonFiniteError, match=r"level 0 of 3.*\.partial.* stayed behind") as caught:
            pool.submit(failing, "lambda").result(timeout=60)
        assert caught.value.partial is None


@pytest.mark.parametrize("kind", [error for name, error in vars(steer).items() if name.endswith("Error")])
def test_every_error_is_pickled(kind):
    error = keep_partial(kind("what came"), steer.rollout(mixture(), score, particles=2))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, "what came")
    assert torch.equal(again.partial.x, error.partial.x)
