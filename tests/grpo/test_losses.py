"""Advantages, clipped loss and KL as pure functions, and gradients that reach a policy."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact import Linear, mixture_2d

import steer
from steer import grpo


def batch_of(rewards, groups=2, log_w=None, **options):
    mixture = mixture_2d()
    process = steer.models.gaussian_mixture(mixture.means, mixture.covs, mixture.weights, steps=3)
    values = next(iter(rewards.values()))
    batch = grpo.collect(process, Linear([1.0, 0.0]), groups=groups, group_size=len(values) // groups)
    weights = torch.zeros(len(values)) if log_w is None else torch.tensor(log_w)
    rewards = {name: torch.tensor(value) for name, value in rewards.items()}
    return replace(batch, rewards=rewards, log_w_base=weights, **options)


def test_advantages_by_group_and_globally():
    batch = batch_of({"r": [1.0, 3.0, 10.0, 10.0]})
    got = grpo.advantages(batch, eps=0.0)
    torch.testing.assert_close(got.value, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    assert got.flat.tolist() == [False, True]
    torch.testing.assert_close(got.mean["r"], torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(got.std["r"], torch.tensor([1.0, 0.0]))
    everyone = torch.tensor([1.0, 3.0, 10.0, 10.0]).std(correction=0)
    torch.testing.assert_close(
        grpo.advantages(batch, std="global", eps=0.0).value, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / everyone
    )


def test_rewards_are_normalised_before_they_are_weighted():
    batch = batch_of({"a": [0.0, 1.0, 2.0, 3.0], "b": [0.0, 100.0, 300.0, 100.0]})
    z = {n: grpo.advantages(batch, weights={n: 1.0}, eps=0.0).value for n in ("a", "b")}
    both = grpo.advantages(batch, weights={"a": 2.0, "b": 0.5}, eps=0.0).value
    torch.testing.assert_close(both, 2.0 * z["a"] + 0.5 * z["b"])
    assert grpo.advantages(batch, weights={"a": 50.0}).value.abs().max() == 5.0
    with pytest.raises(steer.SteerError, match="got weights for"):
        grpo.advantages(batch, weights={"c": 1.0})


def test_group_statistics_are_weighted():
    """A row of weight 3 counts as three rows."""
    weighted = grpo.advantages(batch_of({"r": [1.0, 5.0, 0.0, 1.0]}, log_w=[math.log(3.0), 0.0, 0.0, 0.0]), eps=0.0)
    copies = grpo.advantages(batch_of({"r": [1.0, 1.0, 1.0, 5.0]}, groups=1), eps=0.0)
    torch.testing.assert_close(weighted.value[:2], copies.value[2:])
    nothing = grpo.advantages(batch_of({"r": [1.0, 5.0, 9.0, 1.0]}, log_w=[0.0, 0.0, -math.inf, 0.0]), eps=0.0)
    assert nothing.std["r"][1] == 0.0


def test_clipped_loss_is_ppos():
    new, old = torch.tensor([0.3, -0.3, 0.3, -0.3]), torch.zeros(4)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    expected = -torch.tensor([1.2, math.exp(-0.3), -math.exp(0.3), -0.8])
    torch.testing.assert_close(grpo.clipped_loss(new, old, advantage, clip=0.2), expected.mean())
    mask = torch.tensor([True, False, True, False])
    torch.testing.assert_close(grpo.clipped_loss(new, old, advantage, clip=0.2, mask=mask), expected[mask].mean())
    torch.testing.assert_close(
        grpo.clipped_loss(new, old, advantage, clip=0.2, weight=torch.tensor([4.0, 0.0, 0.0, 0.0])), expected[0]
    )
    assert grpo.clip_fraction(new, old, clip=0.2) == 1.0
    with pytest.raises(steer.NotStochasticError, match="the loss is NaN"):
        grpo.clipped_loss(new, old * math.nan, advantage)


def test_what_a_mask_leaves_out_touches_neither_loss_nor_gradient():
    new = torch.tensor([[math.nan, 0.3], [1000.0, -0.3]], requires_grad=True)
    old, advantage = torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), torch.tensor([[math.nan, 1.0], [-1.0, -1.0]])
    mask = torch.tensor([[False, True], [False, True]])
    weight = torch.tensor([[1.0, 1.0], [math.inf, 1.0]])
    loss = grpo.clipped_loss(new, old, advantage, clip=0.2, mask=mask, weight=weight)
    loss.backward()
    alone = torch.tensor([0.3, -0.3], requires_grad=True)
    expected = grpo.clipped_loss(alone, torch.zeros(2), torch.tensor([1.0, -1.0]), clip=0.2)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, alone.grad[0]], [0.0, alone.grad[1]]]))
    with pytest.raises(steer.SteerError, match="the mask is False for all"):
        grpo.clipped_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), mask=torch.zeros(2, dtype=torch.bool))


def test_a_loss_that_is_not_finite_names_its_cause():
    zero, one = torch.zeros(3), torch.ones(3)
    with pytest.raises(steer.NonFiniteError, match="log-probs under the policy"):
        grpo.clipped_loss(zero * math.nan, zero, one)
    with pytest.raises(steer.NonFiniteError, match="finite advantages, got 3"):
        grpo.clipped_loss(zero, zero, one * math.nan)
    with pytest.raises(steer.NonFiniteError, match="rise by up to 1000 nats"):
        grpo.clipped_loss(zero + 1000.0, zero, -one)
    new = torch.tensor([1000.0, 0.0], requires_grad=True)  # a flat group counts nothing, however far the policy went
    loss = grpo.clipped_loss(new, torch.zeros(2), torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss == -0.5
    assert new.grad.tolist() == [0.0, -0.5]


def test_rewards_and_rows_of_weight_0_count_nothing():
    rewards = {"a": [0.0, 1.0, 2.0, 3.0], "same": [0.3, 0.3, 0.3, 0.3]}
    got = grpo.advantages(batch_of(rewards), weights={"same": 1.0, "a": 0.0})
    assert got.flat.tolist() == [True, True]
    assert got.value.tolist() == [0.0] * 4
    assert set(got.mean) == {"a", "same"}
    rows = grpo.advantages(batch_of({"r": [1.0, 9.0, 3.0, 1.0]}, groups=1, log_w=[0.0, -math.inf, 0.0, 0.0]))
    assert rows.value[1] == 0.0
    for weights in ({"a": 0.0}, {"a": math.nan}, {}):
        with pytest.raises(steer.SteerError, match="not all of them 0"):
            grpo.advantages(batch_of(rewards), weights=weights)


def test_kl_is_that_of_two_normals():
    one, two = steer.Key(0).normal((2, 3, 4)), steer.Key(1).normal((2, 3, 4))
    p, q = (torch.distributions.Normal(mean, 0.3) for mean in (one, two))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(grpo.kl(one, two, 0.3, reduction="sum"), expected.sum(2))
    torch.testing.assert_close(grpo.kl(one, two, 0.3), expected.mean(2))


def test_gradients_raise_the_reward():
    """A policy of one number: the first update's gradient is the score-function estimate, and ascent follows it."""
    shift = torch.zeros(2, requires_grad=True)
    schedule, reward = steer.RectifiedFlow(), Linear([1.0, 0.0])
    policy = steer.from_denoiser(lambda x, t: shift.expand_as(x), schedule, 5, event=(2,), transition=steer.flow_sde())
    batch = grpo.collect(policy, reward, groups=4, group_size=4096)
    advantage = grpo.advantages(batch).value
    for step in grpo.by_level(batch):
        new = grpo.log_prob(policy, batch, step, reduction="mean").log_prob
        old = step.of(batch.logp("mean"))
        assert grpo.clip_fraction(new, old, clip=1e-5) == 0.0
        grpo.clipped_loss(new, old, step.of(advantage), mask=step.valid).backward()
    assert shift.grad[0] < -5 * shift.grad[1].abs()  # ascent along the first coordinate


def test_a_forbidden_sample_has_no_advantage():
    with pytest.raises(steer.NonFiniteError, match="from 'r' in row 1"):
        grpo.advantages(batch_of({"r": [1.0, -math.inf, 0.0, 1.0]}))
    dropped = batch_of({"r": [1.0, -math.inf, 0.0, 1.0]}, log_w=[0.0, -math.inf, 0.0, 0.0])
    assert grpo.advantages(dropped).value.isfinite().all()


def test_the_reference_loop_runs(monkeypatch, capsys):
    """examples/grpo_digits.py, two small updates: under a hundred lines, and the judge reads beside the reward."""
    path = Path(__file__).parents[2] / "examples" / "grpo_digits.py"
    assert len(path.read_text().splitlines()) < 100
    spec = importlib.util.spec_from_file_location("grpo_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = "--updates 2 --groups 1 --rows 6 --samples 8 --steps 4 --beta 0.01 --window first-half"
    monkeypatch.setattr(sys, "argv", ["grpo_digits.py", *options.split()])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "2"]
    assert all("judge" in line for line in lines)


def test_a_global_spread_counts_rows_by_their_weights():
    """A row of weight 3 counts as three rows and one of weight 0 as none; every group counts by its number of rows."""
    rewards, log_w = [1.0, 5.0, 90.0, 1.0], [math.log(3.0), 0.0, -math.inf, 0.0]
    found = grpo.advantages(batch_of({"r": rewards}, log_w=log_w), std="global", eps=0.0)
    everyone = torch.tensor([1.0, 1.0, 1.0, 5.0, *[1.0] * 4]).std(correction=0)
    torch.testing.assert_close(found.value[:2], torch.tensor([-1.0, 3.0]) / everyone)


def test_a_group_is_flat_by_the_statistics_that_its_batch_brings():
    """Rows kept of a group may be equal where the group was not, and the other way round: `grpo.keep` says which."""
    batch = batch_of({"r": [2.0, 2.0, 1.0, 3.0]})
    brought = replace(
        batch, reward_mean={"r": torch.tensor([1.0, 2.0])}, reward_std={"r": torch.tensor([2.0, 0.0])}
    )  # fmt: skip
    found = grpo.advantages(brought, eps=0.0)
    assert found.flat.tolist() == [False, True]
    torch.testing.assert_close(found.value, torch.tensor([0.5, 0.5, 0.0, 0.0]))
    assert grpo.advantages(batch).flat.tolist() == [True, False]
