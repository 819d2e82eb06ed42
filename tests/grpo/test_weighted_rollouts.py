"""Steered rows, weighted back to the policy, against closed form; and the bias of leaving the weights out."""

import dataclasses
import functools
import math

import pytest
import torch
from exact import LIMIT, Linear, exact_chain, mixture_2d, z

import steer
from steer import grpo, search
from steer.grpo.kernels import Windowed
from steer.models import gaussian

REWARD = Linear([0.7, -0.5])
MIXTURE = mixture_2d()
GROUPS, ROWS, STEPS = 400, 16, 6
LAWFUL = {
    "smc": functools.partial(steer.smc, selection=steer.resample(threshold=1.0)),
    "guided smc": functools.partial(steer.smc, proposal=steer.guided(0.4)),
    "fk steering": steer.fk_steering,
    "tds": functools.partial(steer.tds, scale=0.4),
    "dts": functools.partial(search.dts, levels=range(STEPS - 1), walkers=4),  # few at a time, so that trees branch
    "guided dts": functools.partial(search.dts, levels=[1, 4], walkers=4, proposal=steer.guided(0.4)),
    "importance sampling": steer.importance_sampling,
}


def worst(batch, weight):
    """Worst |z| over groups of mean(w f) - E_base f: of the sample, its square, and of a state on the way."""
    process_mean = (MIXTURE.weights @ MIXTURE.means)[None]
    second = torch.einsum("k,kij->ij", MIXTURE.weights, MIXTURE.covs).diagonal()
    second = second + MIXTURE.weights @ MIXTURE.means.square()
    x, weight = batch.x0.double().view(GROUPS, -1, 2), weight.double().view(GROUPS, -1, 1)
    columns = [weight - 1.0, weight * (x - process_mean), weight * (x.square() - second)]
    if bool(batch.mask.any(1).all()):
        here = batch.x_t[:, 2].double().view(GROUPS, -1, 2)
        alpha = 1.0 - float(batch.t[0, 2])
        columns.append(weight * (here - alpha * process_mean))
    return max(abs(z(values.mean(1)[:, i])) for values in columns for i in range(values.shape[2]))


@pytest.mark.parametrize("name", LAWFUL)
def test_policy_expectations_are_recovered(name):
    """Unbiased at sixteen rows a group, of samples and of states on their paths; without the weights it is not."""
    process = exact_chain(MIXTURE, "flow", STEPS)
    batch = grpo.collect(
        process, REWARD, groups=GROUPS, group_size=ROWS, method=LAWFUL[name], temperature=1.5, key=6,
        objective="tilted_sft",
    )  # fmt: skip
    assert worst(batch, batch.log_w_base.exp()) < LIMIT
    if name == "smc":  # nor would weights of single steps do: none was drawn by another law, they were selected
        assert (batch.step_weights() == 1.0).all()
    target = batch.log_w_target.exp()
    assert worst(batch, target) > 3 * LIMIT  # the mutant: the steered law taken for the policy's
    if name != "importance sampling":  # whose rows are draws of the policy that weights alone tilt
        assert worst(batch, torch.ones_like(target)) > 2 * LIMIT


def test_self_normalised_weights_after_mcmc():
    """Ψ does not know its evidence: weights are right up to a constant per group, and a mean over many rows is."""
    process = gaussian([0.0, 0.0], [[0.75, 0.2], [0.2, 0.5]], schedule=steer.RectifiedFlow(), steps=12)
    start = steer.pcnl(chains=16, burn_in=20, kept=48, step_size=0.5, x0_predictor=lambda x: 0.8 * x)
    method = functools.partial(steer.psi, start=start)
    batch = grpo.collect(process, REWARD, groups=60, group_size=128, method=method)
    x, w = batch.x0.double().view(60, 128, 2), batch.weights().double().view(60, 128, 1)
    assert max(abs(z((w * x).mean(1)[:, i])) for i in range(2)) < LIMIT
    assert max(abs(z(x.mean(1)[:, i])) for i in range(2)) > 2 * LIMIT


@pytest.mark.parametrize(
    ("strength", "guide", "ess"), [(0.5, 0.0, 0.79), (0.5, 1.0, 0.57), (1.0, 0.0, 0.21), (1.0, 1.0, 0.21)]
)
def test_effective_sample_size_falls_with_the_tilt(strength, guide, ess):
    """N(0, .75) and r = 2 x at 64 rows: ESS / N is usable while Var(strength r) <= 1 (here .75) and not at 3."""
    process = gaussian([0.0], [[0.75]], schedule=steer.RectifiedFlow(), steps=100)
    method = functools.partial(steer.smc, proposal=steer.guided(guide) if guide else steer.bootstrap)
    batch = grpo.collect(
        process, Linear([2.0]), groups=100, group_size=64, method=method, temperature=1 / strength, key=3,
        objective="tilted_sft",
    )  # fmt: skip
    assert float(batch.ess().mean()) / 64 == pytest.approx(ess, abs=0.04)
    base = (batch.weights().double() * batch.x0[:, 0].double()).view(100, 64).mean(1)
    assert abs(float(base.mean())) < 0.2
    steered = dataclasses.replace(batch, log_w_base=batch.log_w_target)  # a mutant
    assert abs(float(steered.ess().mean()) / 64 - ess) > 0.05


def test_step_weights_correct_a_guided_step():
    """E over guided draws of exp(logp_old - logp_behavior) f(x_next) is the kernel's mean: densities are both true."""
    process = exact_chain(MIXTURE, "flow", STEPS)
    method = functools.partial(
        steer.smc, proposal=steer.guided(0.4), selection=steer.resample(threshold=0.0), weight=steer.final_only()
    )
    batch = grpo.collect(
        process, REWARD, groups=GROUPS, group_size=ROWS, method=method, objective="tilted_sft", window=grpo.every()
    )
    ratio = (batch.logp_old.double() - batch.logp_behavior.double()).exp()
    assert bool((ratio != 1.0).any())
    for slot in range(2, ratio.shape[1]):
        assert abs(z((ratio[:, slot] - 1.0).view(GROUPS, ROWS).mean(1))) < LIMIT


def with_copies(groups):
    """Resampled before last steps that draw nothing, so that copies are equal: process, method and batch."""
    process = steer.models.gaussian_mixture(
        MIXTURE.means, MIXTURE.covs, MIXTURE.weights, schedule=steer.RectifiedFlow(), steps=5
    )
    method = functools.partial(steer.smc, selection=steer.resample(threshold=1.0, at=[3]))
    batch = grpo.collect(
        process, REWARD, groups=groups, group_size=16, method=method, temperature=0.3, window=grpo.every(0.6),
        objective="tilted_sft",
    )  # fmt: skip
    return process, method, batch


def test_copies_of_a_sample_are_merged():
    """One row keeps their weight."""
    process, method, batch = with_copies(20)
    kept = batch.sample_id == torch.arange(batch.rows)
    assert 0 < int(kept.sum()) < batch.rows
    assert not batch.mask[~kept].any()
    assert (batch.log_w_base[~kept] == -math.inf).all()
    windowed = process.with_rule(Windowed(process.rule, frozenset(process.times[:3])))
    result = method(windowed, REWARD, batch=20, particles=16, temperature=0.3, key=0)
    raw = 16 * (result.log_weight + result.log_evidence[:, None] - result.reward / 0.3).exp()
    torch.testing.assert_close(batch.log_w_base.exp().view(20, 16).sum(1), raw.sum(1).float(), rtol=1e-4, atol=1e-5)
    assert len(torch.unique(batch.x0[kept], dim=0)) == int(kept.sum())


def test_selected_rows_are_merged_and_counted_by_their_samples():
    """Ids stay those of the rows they were, so they are no numbers of the rows there are now."""
    batch = grpo.collect(exact_chain(MIXTURE, "flow", 3), REWARD, groups=20, group_size=16)
    twice = batch.select(torch.tensor([[5, 5, 9]]).expand(20, -1))
    one = grpo.merged(twice)
    torch.testing.assert_close(one.log_w_base.view(20, 3).exp(), torch.tensor([[2.0, 0.0, 1.0]]).expand(20, -1))
    assert one.mask.view(20, 3, -1).all(2).tolist() == [[True, False, True]] * 20
    for some in (twice, one):
        torch.testing.assert_close(some.ess(), torch.full((20,), 9.0 / 5.0, dtype=torch.float64))
        torch.testing.assert_close(some.effective_roots(), some.ess())


def test_lineage_of_a_resampled_population():
    process = exact_chain(MIXTURE, "flow", STEPS)
    batch = grpo.collect(
        process, REWARD, groups=5, group_size=8, temperature=1.0, method=LAWFUL["smc"], objective="tilted_sft"
    )
    assert batch.ancestors.shape == (40, STEPS)
    assert (batch.root_id // 8 == batch.problem_id).all()
    assert (batch.root_id % 8 == batch.ancestors[:, 0]).all()
    for s in range(STEPS):
        for row in range(40):
            same = batch.step_id[:, s] == batch.step_id[row, s]
            assert (batch.x_next[same, s] == batch.x_next[row, s]).all()
    assert (batch.x_next[:, :-1] == batch.x_t[:, 1:]).all()


# --- scouts -----------------------------------------------------------------------------------------------------------


def test_scouts_estimate_what_all_would_have_said():
    """Sum over rows of advantage times a function, of the kept ones weighted, equals that of all in expectation."""
    process = exact_chain(MIXTURE, "flow", 3)
    scouts = grpo.collect(process, REWARD, groups=500, group_size=32, key=8)
    everyone = grpo.advantages(scouts, limit=math.inf).value

    def gradient(batch, advantage, weight):
        terms = weight * advantage * batch.x_next[:, 0].double().square().sum(1)
        return terms.view(500, -1).mean(1)

    full = gradient(scouts, everyone.double(), scouts.weights().double())
    kept = grpo.keep(scouts, best=3, worst=3, middle=4, by="reward", key=1)
    advantage = grpo.advantages(kept, limit=math.inf).value.double()
    assert abs(z(gradient(kept, advantage, kept.weights().double()) - full)) < LIMIT
    assert abs(z(gradient(kept, advantage, torch.ones(kept.rows).double()) - full)) > LIMIT  # the mutant: no weights
    alone = dataclasses.replace(kept, reward_mean={}, reward_std={})
    torch.testing.assert_close(kept.rewards["reward"], alone.rewards["reward"])
    reward = kept.rewards["reward"].view(500, 10)
    everything = scouts.rewards["reward"].view(500, 32).sort(1, descending=True).values
    assert (reward[:, :3] == everything[:, :3]).all()
    assert (reward[:, 7:] == everything[:, -3:]).all()
    assert kept.cost["nfe"] == pytest.approx(3 * 3.2)
    with pytest.raises(steer.SteerError, match="without any of the middle"):
        grpo.keep(scouts, best=8, worst=8, middle=0, by="reward")


def test_rows_drawn_of_the_middle_stand_for_the_rest_of_it():
    """Of 32 rows 3 + 3 are kept for certain and 4 of 26 drawn, which weigh 26 / 4 as much; the mean weight is one."""
    scouts = grpo.collect(exact_chain(MIXTURE, "flow", 3), REWARD, groups=2, group_size=32, key=8)
    kept = grpo.keep(scouts, best=3, worst=3, middle=4, by="reward")
    expected = torch.tensor([1.0] * 3 + [26 / 4] * 4 + [1.0] * 3) * 10 / 32
    for log_weight in (kept.log_w_base, kept.log_w_target):
        torch.testing.assert_close(log_weight.exp().view(2, 10), expected.expand(2, -1))
    assert float(expected.mean()) == pytest.approx(1.0)


def test_an_ess_of_rows_is_blind_where_one_noise_is_left():
    """Far too cold, all rows descend from one particle and weigh the same: only counting their roots tells."""
    process = exact_chain(MIXTURE, "flow", STEPS)
    batch = grpo.collect(
        process, REWARD, groups=20, group_size=ROWS, method=steer.smc, temperature=0.02, objective="tilted_sft"
    )
    assert batch.ess().max() > 4.0
    assert batch.effective_roots().max() < 2.0
    plain = grpo.collect(process, REWARD, groups=2, group_size=ROWS)
    assert (plain.ess() == ROWS).all()
    assert (plain.effective_roots() == ROWS).all()


def test_rows_without_weight_spoil_no_statistics():
    """A forbidden leaf counts for nothing: depth-wise advantages of the others stand, and scouts keep their moments."""
    process = steer.models.gaussian_mixture(
        MIXTURE.means, MIXTURE.covs, MIXTURE.weights, schedule=steer.RectifiedFlow(), steps=10,
        transition=steer.ddim(1.0),
    )  # fmt: skip

    def some(x):
        return torch.where(x[:, 0] > 1.5, -torch.inf, 0.1 * x[:, 1])

    tree = grpo.collect(process, some, groups=2, group_size=32, method=search.dts, temperature=2.0)
    assert int((tree.weights() == 0).sum()) > 5
    assert int((grpo.depth_advantages(tree).value != 0).sum()) > 200

    batch = grpo.collect(process, some, groups=2, group_size=32)
    dropped = torch.where(batch.rewards["reward"] == -torch.inf, -torch.inf, batch.log_w_base)
    batch = dataclasses.replace(batch, log_w_base=dropped)
    kept = grpo.keep(batch, best=4, worst=2, middle=3, by="reward")
    torch.testing.assert_close(kept.reward_mean["reward"], grpo.advantages(batch).mean["reward"])
    assert bool(grpo.advantages(kept).value.isfinite().all())


def test_merged_rows_are_padding_in_every_field():
    """As `RolloutBatch` has it; so a first update's ratio is 1 there too."""
    process, _, batch = with_copies(2)
    assert batch.mask.dtype is torch.bool
    empty = ~batch.mask
    assert int(empty.all(1).sum()) > 2
    for name in ("x_t", "x_next", "t", "t_next", "step_idx", "std", "logp_old", "logp_behavior"):
        assert not getattr(batch, name)[empty].any(), name
    assert grpo.clip_fraction(grpo.log_probs(process, batch), batch.logp()) == 0.0
