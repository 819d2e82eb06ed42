"""Modes of torch and of networks that make densities those of another network: autocast and train()."""

import functools

import pytest
import torch
from torch import nn

import steer
from steer import grpo
from steer.grpo.evaluation_mode import networks


class Net(nn.Module):
    """A velocity of 2 numbers, with dropout, or with batch statistics, or with neither."""

    def __init__(self, middle):
        super().__init__()
        self.one, self.middle, self.two = nn.Linear(3, 8), middle, nn.Linear(8, 2)

    def forward(self, x, t):
        hidden = self.one(torch.cat([x, torch.full_like(x[..., :1], t)], -1))
        return self.two(self.middle(hidden.flatten(0, 1)).view(hidden.shape))


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.05, self.training)


def policy(net):
    return steer.from_velocity(
        lambda x, t: net(x, t), steer.RectifiedFlow(), 4, event=(2,), transition=steer.flow_sde(0.7)
    )


def first(x):
    return x[:, 0]


def made(middle):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(middle)


@pytest.mark.parametrize("middle", [nn.Dropout(0.1), FunctionalDropout(), nn.BatchNorm1d(8)], ids=repr)
def test_a_policy_left_in_train_is_noticed(middle):
    net = made(middle).eval()
    process = policy(net)
    batch = grpo.collect(process, first, group_size=4)
    net.train()
    for call in (
        lambda: grpo.collect(process, first, group_size=4),
        lambda: grpo.collect(process, first, group_size=4, method=steer.smc),
        lambda: grpo.log_probs(process, batch),
    ):
        with pytest.raises(steer.SteerError, match=r"left in train\(\)"):
            call()
    assert net.training
    assert middle.training


def test_train_that_changes_nothing_passes():
    net = made(nn.Dropout(0.0)).train()
    batch = grpo.collect(policy(net), first, group_size=4)
    torch.testing.assert_close(grpo.log_probs(policy(net), batch).float(), batch.logp_old)
    assert net.training


def test_networks_are_found_wherever_they_are_held():
    net = nn.Linear(1, 1)

    class Holder:
        def __init__(self):
            self.kept = {"nets": [net]}

        def call(self, x, t):
            return x

    for held_by in (net, lambda x: net(x), functools.partial(lambda n: n, net), Holder(), Holder().call, (1, [net])):
        assert networks(held_by) == [net]
    assert networks(lambda x: x) == []


def test_rollout_and_update_under_another_autocast_are_told_apart():
    process = policy(made(nn.Identity()).eval())
    plain = grpo.collect(process, first, group_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        half = grpo.collect(process, first, group_size=4)
        torch.testing.assert_close(grpo.log_probs(process, half).float(), half.logp_old, rtol=1e-4, atol=1e-4)
        with pytest.raises(steer.SteerError, match="ran with autocast off, and here it is bfloat16"):
            grpo.log_probs(process, plain)
    with pytest.raises(steer.SteerError, match="ran with autocast bfloat16, and here it is off"):
        grpo.log_probs(process, half)
    assert half.kernel["hash"] != plain.kernel["hash"]


def test_batches_are_float32_whatever_the_default():
    process = policy(made(nn.Identity()).eval())
    expected = grpo.collect(process, first, group_size=4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch = grpo.collect(process, first, group_size=4)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(batch, name), value), name
            assert getattr(batch, name).dtype == value.dtype, name
