"""User code that works in place, or answers with one buffer again and again, changes nothing outside itself."""

import pytest
import torch

import steer
from steer import grpo, rewards, search
from steer.evaluation.methods import methods, resolve
from steer.guidance import GuidedProcess, Hooks

EVENT = (3, 4, 4)
PIXELS = torch.rand(3, *EVENT, generator=torch.Generator().manual_seed(0))


def mixture():
    return steer.models.gaussian_mixture([[1.0, 0.0], [-1.0, 0.0]], [0.1, 0.1], [0.5, 0.5], steps=6)


def pure(x):
    return x.clamp(-0.5, 0.5)[:, 0].double()


def in_place(x):
    return x.clamp_(-0.5, 0.5)[:, 0].double()


def by_numpy(x):
    """A write that torch's version counter does not see."""
    array = x.numpy()
    array.clip(-0.5, 0.5, out=array)
    return array[:, 0].astype("float64")


class Buffer:
    """A reward that answers in one buffer."""

    def __init__(self):
        self.buffer = torch.zeros(4096, dtype=torch.float64)

    def __call__(self, x):
        out = self.buffer[: len(x)]
        out.copy_(pure(x))
        return out


def called(name):
    return getattr(steer, name, None) or getattr(search, name, None) or resolve(name)


def assert_same(result, expected):
    for field in ("x", "reward", "log_weight", "log_evidence"):
        torch.testing.assert_close(
            getattr(result, field), getattr(expected, field), rtol=0, atol=0, equal_nan=True, msg=field
        )


NEEDS_GRADIENT = {"das", "driftlite", "fkc", "psi", "tds"}


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_are_not_changed_by_rewards_and_callbacks_that_work_in_place(name):
    def wreck(event):
        for tensor in (event.state.x, event.state.log_weight, event.x0, event.scores):
            if tensor is not None:
                tensor.zero_()
        for kept in (event.state.cache, event.state.path):
            for tensor in kept.tensors().values():
                tensor.zero_()

    expected = called(name)(mixture(), pure, budget=192, key=0)
    assert_same(called(name)(mixture(), in_place, budget=192, key=0), expected)
    assert_same(called(name)(mixture(), Buffer(), budget=192, key=0, on_step=wreck), expected)
    if name not in NEEDS_GRADIENT:
        assert_same(called(name)(mixture(), by_numpy, budget=192, key=0), expected)


def brighten(x):
    return x.mul_(255).flatten(1).mean(1)


def bright(x):
    return (x * 255).flatten(1).mean(1)


class TestRewardsThatShareSamples:
    def test_of_a_rollout(self):
        process = steer.load("digits-flow", steps=3).with_rule(steer.flow_sde(0.7))
        of = [
            grpo.collect(process, {"mine": mine, "ink": rewards.Ink()}, group_size=3, key=1).rewards["ink"]
            for mine in (brighten, bright)
        ]
        assert torch.equal(*of)

    def test_of_a_rollout_without_a_decoder(self):
        network = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
        process = steer.from_velocity(
            lambda x, t: network(x.flatten(0, 1)).view_as(x),
            steer.RectifiedFlow(),
            4,
            event=EVENT,
            transition=steer.flow_sde(0.7),
        )
        batch = grpo.collect(process, lambda x: x.add_(1).div_(2).clamp_(0, 1).mean((1, 2, 3)), group_size=3, key=0)
        torch.testing.assert_close(grpo.log_probs(process, batch).float(), batch.logp_old, rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize(
        "combine",
        [
            lambda mine: rewards.weighted((1.0, mine, "1"), (1.0, rewards.Ink())),
            lambda mine: rewards.product(mine, rewards.Ink()),
            lambda mine: rewards.gate(rewards.Ink(), mine, 0.0),
            lambda mine: rewards.chunked(mine, 2),
        ],
    )
    def test_of_a_combination(self, combine):
        mine = PIXELS.clone()
        assert torch.equal(combine(brighten)(mine), combine(bright)(PIXELS))
        assert torch.equal(mine, PIXELS)

    def test_in_one_buffer(self):
        class Row:
            buffer = torch.zeros(1)

            def __call__(self, x):
                return self.buffer.copy_(x.flatten(1).mean(1))

        assert torch.equal(rewards.chunked(Row(), 1)(PIXELS), PIXELS.flatten(1).mean(1))

    def test_with_a_trainer(self):
        images = PIXELS.clone()
        scores, _ = rewards.as_flow_grpo_scores({"mine": brighten, "ink": rewards.Ink()})(images, [""] * 3)
        assert torch.equal(images, PIXELS)
        assert scores["ink"] == pytest.approx(PIXELS.mean((1, 2, 3)).tolist())


def scaled(x, t):
    return 0.3 * x


class OneAnswer:
    """A network that writes every prediction into the same memory, as CUDA graphs do."""

    def __init__(self):
        self.answer = torch.zeros(1, 512, *EVENT)

    def __call__(self, x, t):
        out = self.answer[:, : x.shape[1]]
        return out.copy_(scaled(x, t))


@pytest.mark.parametrize(
    ("denoiser", "decoder"),
    [
        (lambda x, t: x.mul_(0.3), lambda x: (x + 1) / 2),
        (OneAnswer(), lambda x: (x + 1) / 2),
        (scaled, lambda x: x.add_(1).div_(2)),
    ],
    ids=["network in place", "network with one answer", "decoder in place"],
)
@pytest.mark.parametrize("name", ["smc", "svdd", "dts"])
def test_networks_and_decoders(name, denoiser, decoder):
    def run(denoiser, decoder):
        process = steer.from_denoiser(denoiser, steer.RectifiedFlow(), 4, event=EVENT, decoder=decoder)
        return called(name)(process, lambda x: x.mean((1, 2, 3)), budget=48, key=0)

    assert_same(run(denoiser, decoder), run(scaled, lambda x: (x + 1) / 2))


def test_predictions_in_chunks_of_a_network_with_one_answer():
    process = steer.from_denoiser(OneAnswer(), steer.RectifiedFlow(), 4, event=EVENT)
    x = process.prior(steer.Key(0), 1, 2)
    first, second = (process.denoise(x[:, i : i + 1], 0) for i in range(2))
    assert torch.equal(torch.cat([first, second], 1), scaled(x, 1.0))


def test_hooks():
    def at_work(step):
        out = step.x0.mul(2.0)
        step.x0.zero_(), step.x.zero_(), step.raw.zero_()
        return out

    hooked = [GuidedProcess(mixture(), Hooks(x0=(hook,))) for hook in (at_work, lambda step: step.x0 * 2.0)]
    assert_same(*(steer.smc(process, pure, particles=6, key=0) for process in hooked))
    followed = [steer.follow(process.hooks) for process in hooked]
    assert_same(*(steer.smc(mixture(), pure, particles=6, key=0, proposal=proposal) for proposal in followed))


def test_masked_networks():
    def process(network):
        return steer.from_logits(network, 3, length=3, vocabulary=4)

    def network(x, t):
        return torch.nn.functional.one_hot((x + 1) % 4, 4).double()

    def wrecking(x, t):
        out = network(x, t)
        x.zero_()
        return out

    scores = [steer.smc(process(each), lambda x: x.double().sum(1), particles=6, key=0) for each in (network, wrecking)]
    assert_same(*scores)
