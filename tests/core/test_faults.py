"""Runs that a fault ends: what is left of them, when it is found, and whom it is blamed on."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch

import steer
from steer import finite, grpo, search
from steer.core.objective import Objective
from steer.cost import Meter

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "faults.py"
_spec = importlib.util.spec_from_file_location("faults", SCRIPT)
assert _spec is not None
faults = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(faults)  # pyright: ignore[reportOptionalMemberAccess]

pytestmark = pytest.mark.filterwarnings("ignore:one starting noise:UserWarning")


def hidden(x):
    """A reward in which a NaN of the network does not show."""
    return x.nan_to_num().double().tanh().mean(1)


@pytest.fixture
def late(monkeypatch):
    """As on a device: a flag is read when the next prediction is made."""

    def look(self, number, explain, allowed=math.nan):
        self._flags.append(finite._Flag(number, allowed, explain, None))

    monkeypatch.setattr(finite.FiniteWatch, "look", look)


@pytest.mark.parametrize("name", faults.METHODS)
def test_whatever_is_raised_leaves_what_was_paid_for(name):
    """At the first call and the last: an error of the user's own, Ctrl-C, and answers that are no prediction."""
    clean, calls = faults.attempt(name)
    for place, kinds in {
        "network": ("an error of its own", "None", "another device", "KeyboardInterrupt"),
        "reward": ("KeyboardInterrupt", "another device", "SystemExit"),
        "on_step": ("an error of its own", "StopIteration"),
    }.items():
        for kind in kinds:
            for at in faults.points(calls[place], 2) if calls[place] else ():
                found, _ = faults.attempt(name, place, faults.FAULTS[place][kind], at)
                assert "LOST" not in faults.outcome(found, clean), (place, kind, at, found)
                if kind == "an error of its own":
                    assert isinstance(found, faults.OurError)


@pytest.mark.parametrize("name", faults.METHODS)
def test_a_nan_of_the_network_is_found_in_its_step_and_blamed_on_the_network(name, monkeypatch):
    monkeypatch.setattr(faults, "score", hidden)
    _, calls = faults.attempt(name)
    for at in {0, calls["network"] // 2, calls["network"] - 1}:
        found, spent = faults.attempt(name, "network", faults.FAULTS["network"]["one NaN"], at)
        assert isinstance(found, steer.NonFiniteError)
        assert "the network gave nan at level" in str(found)
        assert spent["network"] == at + 1


@pytest.mark.parametrize("name", faults.METHODS)
def test_on_a_device_it_is_found_one_step_later_and_never_returned(name, monkeypatch, late):
    monkeypatch.setattr(faults, "score", hidden)
    _, calls = faults.attempt(name)
    for at in {0, calls["network"] // 2, calls["network"] - 1}:
        found, spent = faults.attempt(name, "network", faults.FAULTS["network"]["one NaN"], at)
        assert isinstance(found, steer.NonFiniteError), found
        assert "the network gave nan at level" in str(found)
        assert spent["network"] <= at + 2
        partial = found.partial
        assert not bool(partial.x.isnan().any())
        assert not bool(partial.log_weight.isnan().any())
    found, _ = faults.attempt(name, "reward", faults.FAULTS["reward"]["one NaN"], calls["reward"] - 1)
    assert isinstance(found, steer.NonFiniteError), found


@pytest.mark.parametrize("at", [1, 3, 5])
def test_what_is_left_of_a_late_nan_can_be_gone_on_from(late, at):
    whole, _ = faults.attempt("smc")
    broken, _ = faults.attempt("smc", "network", faults.FAULTS["network"]["NaN"], at)
    assert broken.partial.k == at
    rest = steer.smc(faults.process(), faults.score, start=broken.partial)
    assert torch.equal(rest.x, whole.x)
    assert torch.equal(rest.log_evidence, whole.log_evidence)


def test_a_bad_state_and_a_bad_decoder_are_told_from_a_bad_network():
    def runs_away(state, model):
        return model.shift(torch.full_like(model.mean, math.inf if state.k == 2 else 0.0))

    with pytest.raises(steer.NonFiniteError, match="a state is inf at level 3 of 6, before the net") as found:
        steer.smc(faults.process(), hidden, proposal=runs_away, weight=steer.final_only())
    assert bool(found.value.partial.x.isfinite().all())
    black = steer.from_denoiser(
        lambda x, t: 0.5 * x, steer.VP(), 3, event=(2,), decoder=lambda x: torch.full_like(x, math.nan)
    )
    with pytest.raises(steer.NonFiniteError, match="the decoder gave nan for a finite state"):
        search.best_of_n(black, hidden, particles=2)
    tokens = steer.from_logits(lambda x, t: torch.full((*x.shape, 3), math.nan), 2, length=2, vocabulary=3)
    with pytest.raises(steer.NonFiniteError, match="the network gave nan at level 0 of 2"):
        steer.smc(tokens, lambda x: x.double().mean(1), particles=2)


def test_large_numbers_that_are_finite_are_none_of_its_business():
    watch, x = finite.FiniteWatch(), torch.full((1, 4, 1024), 3e38)
    watch.prediction(x, x, 0, 1)  # their sum is infinite in float32
    watch.prediction(torch.zeros(1, 2, 1, dtype=torch.int64), torch.tensor([[[[0.0, -math.inf]]] * 2]), 0, 1)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda x: None, steer.ModelError, "a tensor; got NoneType"),
        (lambda x: (x,), steer.ModelError, "got tuple; return its first entry"),
        (lambda x: x[:, :1], steer.ShapeError, r"\(1, 4, 2\) = \(B, N, \*event\), got \(1, 1, 2\)"),
        (lambda x: x[..., :1], steer.ShapeError, r"\(1, 4, 2\) = \(B, N, \*event\), got \(1, 4, 1\)"),
        (lambda x: x.long(), steer.ModelError, "floating-point numbers .* got torch.int64"),
        (lambda x: x.to("meta"), steer.ModelError, "device of x, cpu; got torch.float32 on meta"),
    ],
)
@pytest.mark.parametrize("opened", [steer.from_denoiser, steer.from_eps, steer.from_velocity])
def test_a_networks_answer_is_checked_before_it_can_be_broadcast(opened, answer, error, words):
    process = opened(lambda x, t: answer(x), steer.VP(), 3, event=(2,))
    with pytest.raises(error, match=words) as found:
        steer.smc(process, hidden, particles=4)
    assert found.value.partial.x.shape == (1, 4, 2)


def test_the_last_whole_sweep_pass_and_chunk_are_left():
    network = faults.FAULTS["network"]["an error of its own"]
    for name, calls_of_one in {"particle_gibbs": 6, "driftlite": 0, "best_of_n": 6}.items():
        _, calls = faults.attempt(name)
        found, _ = faults.attempt(name, "network", network, calls["network"] - 1)
        assert isinstance(found.partial, steer.Result)
        assert found.partial.interrupted
        assert bool(found.partial.reward.isfinite().all())
        if calls_of_one:
            early, _ = faults.attempt(name, "network", network, calls_of_one - 1)
            assert isinstance(early.partial, steer.Trajectory)


def test_chains_of_a_start_are_left_where_they_are():
    found, _ = faults.attempt("psi", "network", faults.FAULTS["network"]["RuntimeError"], 5)
    first, _ = faults.attempt("psi", "network", faults.FAULTS["network"]["RuntimeError"], 0)
    assert found.partial.x.shape == first.partial.x.shape == (1, 2, 2)
    assert not torch.equal(found.partial.x, first.partial.x)
    rest = steer.smc(faults.process(), faults.score, start=found.partial)
    assert rest.law == "none"
    assert bool(rest.log_evidence.isnan().all())


def test_a_trainer_gets_no_rows_that_are_not_finite(late):
    for collector in (
        partial(grpo.collect, group_size=4),
        partial(grpo.branch, splits=(0, 2)),
        partial(grpo.granular, group_size=4, level=2),
    ):
        calls = faults.Planted(faults.process().denoiser, None, None)
        collector(faults.process(lambda network, calls=calls: calls), hidden)
        broken = faults.Planted(faults.process().denoiser, faults.FAULTS["network"]["one NaN"], calls.calls - 1)
        with pytest.raises(steer.NonFiniteError, match="the network gave nan") as found:
            collector(faults.process(lambda network, broken=broken: broken), hidden)
        assert found.value.partial is not None


# --- rewards without a gradient ---------------------------------------------------------------------------------------

BLACK_BOXES = {"detaches": lambda x: x.detach()[:, 0], "a list": lambda x: x[:, 0].tolist()}
GUIDED = {
    "smc": partial(steer.smc, proposal=steer.guided()),
    "tds": steer.tds,
    "das": steer.das,
    "psi": steer.psi,
    "pcnl": partial(steer.smc, start=steer.pcnl()),
    "mala": partial(steer.rollout, start=steer.mala()),
    "dts": partial(search.dts, proposal=steer.guided()),
}


@pytest.mark.parametrize("reward", BLACK_BOXES.values(), ids=BLACK_BOXES)
@pytest.mark.parametrize("method", GUIDED.values(), ids=GUIDED)
def test_the_cure_for_a_reward_without_a_gradient_works(method, reward):
    with pytest.raises(steer.NotDifferentiableError) as found:
        method(faults.process(), reward, particles=4)
    assert "steer.smc with its default proposal, and its default start or start=steer.pcn(), " in str(found.value)
    assert "steer.fk_steering, search.svdd" in str(found.value)
    pcn = partial(steer.smc, start=steer.pcn(chains=2, burn_in=2, kept=2))
    for cure in (steer.smc, pcn, steer.fk_steering, search.svdd):
        cure(faults.process(), reward, particles=4)


@pytest.mark.parametrize("method", [steer.driftlite, partial(steer.fkc, weight=steer.FeynmanKac())])
def test_the_cure_of_weighted_sdes_works(method):
    with pytest.raises(steer.NotDifferentiableError) as found:
        method(faults.process(), BLACK_BOXES["detaches"], particles=4)
    assert "steer.fkc with transport=steer.base_transport and weight=steer.KernelRatio()" in str(found.value)
    cure = partial(steer.fkc, transport=steer.base_transport, weight=steer.KernelRatio())
    cure(faults.process(), BLACK_BOXES["detaches"], particles=4)


def test_a_reward_must_return_real_numbers():
    process = faults.process().metered(Meter())
    with pytest.raises(steer.RewardError, match="real numbers, got torch"):
        Objective(process, lambda x: x[:, 0].to(torch.complex128), "")(torch.zeros(1, 2, 2))


# --- one root ---------------------------------------------------------------------------------------------------------


def test_an_evidence_that_rests_on_one_starting_noise_has_no_error_estimate():
    """Four particles, a reward of hundreds of nats: the truth is 2 T^-2 .3 + ... away, and the estimate said +- 1."""
    tilt = partial(steer.smc, faults.process(), lambda x: 30.0 * x[:, 0], particles=4, key=1)
    with pytest.warns(UserWarning, match="one starting noise has all of the weight of problem 0's 4 particles") as seen:
        result = tilt()
    assert seen[0].filename == __file__
    assert bool(result.log_evidence.isfinite().all())
    assert bool(result.log_evidence_variance.isnan().all())


@pytest.mark.filterwarnings("error:one starting noise")
def test_others_say_nothing():
    result = steer.importance_sampling(faults.process(), faults.score, particles=64)
    assert bool(result.log_evidence_variance.isfinite().all())
    steer.smc(faults.process(), faults.score, particles=1)
    steer.psi(faults.process(), lambda x: 30.0 * x[:, 0], particles=4)  # its evidence is NaN
