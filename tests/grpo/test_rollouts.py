"""Rollout batches: the ratio of a first update is 1, whatever the kernel, the window and the storage; and lineage."""

import dataclasses
import functools
import math

import pytest
import torch
from exact import Linear, mixture_2d

import steer
from steer import grpo, search

KERNELS = {
    "flow-sde": steer.flow_sde(0.7),
    "dance-sde": steer.dance_sde(0.3),
    "cps": steer.cps(0.7),
    "ddpo": steer.ddim(1.0),
    "ddim-half": steer.ddim(0.5),
}
WINDOWS = {
    "every": grpo.every(),
    "all but the last": grpo.every(0.99),
    "first half": grpo.first_half(),
    "sliding": grpo.sliding(30),
    "per row": grpo.per_row(),
}
STEPS, GROUPS, ROWS = 10, 2, 4
REWARD = Linear([0.7, -0.5])
FLOW = steer.load("digits-flow", steps=STEPS)


def bright(images):
    return images.flatten(1).mean(1)


def toy(rule=None, steps=STEPS, dtype=torch.float32, schedule=None):
    mixture = mixture_2d()
    return steer.models.gaussian_mixture(
        mixture.means, mixture.covs, mixture.weights, schedule=schedule or steer.RectifiedFlow(), steps=steps,
        transition=rule or steer.ddim(1.0), dtype=dtype,
    )  # fmt: skip


def first_ratio(process, batch):
    """The worst |ratio - 1|, mean-reduced, of the collecting policy."""
    new, old = grpo.log_probs(process, batch, reduction="mean"), batch.logp("mean").double()
    return float(((new - old).exp() - 1.0).abs().max())


# --- the ratio --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_ratio_is_one_on_a_network(kernel, window):
    """Digits: every kernel with every window, and both storage dtypes, like the fields of a chessboard, with each.

    Rows are scored in other network batches than they were drawn.
    """
    odd = (list(KERNELS).index(kernel) + list(WINDOWS).index(window)) % 2
    rule, window, storage = KERNELS[kernel], WINDOWS[window], torch.bfloat16 if odd else torch.float32
    process = FLOW.with_rule(rule)
    batch = grpo.collect(process, bright, groups=GROUPS, group_size=ROWS, window=window, storage=storage, key=1)
    assert first_ratio(process, batch) < 1e-5
    torch.testing.assert_close(grpo.log_probs(process, batch).float(), batch.logp_old, rtol=0, atol=64 * 1e-5)
    assert batch.x_t.dtype == batch.x_next.dtype == storage
    assert (batch.logp_old == batch.logp_behavior).all()
    assert batch.mask.any(1).all()


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        steer.smc,
        functools.partial(steer.smc, proposal=steer.guided(1.0)),
        steer.psi,
        steer.das,
        steer.rollout,
        search.dts,
    ],
    ids=["smc", "guided smc", "psi", "das", "rollout", "dts"],
)
def test_ratio_is_one_on_steered_populations(method, storage):
    process = toy()
    batch = grpo.collect(process, REWARD, groups=3, group_size=16, method=method, temperature=2.0, storage=storage)
    assert first_ratio(process, batch) < 1e-5
    assert batch.mask.sum() > 0
    assert batch.ess().min() >= 4.0


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"spread": 1.0}, {"noise": "splits"}], ids=str)
def test_ratio_is_one_on_branches(options, storage):
    process = FLOW.with_rule(steer.flow_sde())
    batch = grpo.branch(process, bright, groups=2, splits=(0, 3), key=2, storage=storage, **options)
    assert first_ratio(process, batch) < 1e-5
    granular = grpo.granular(process, bright, level=3, groups=2, group_size=5, storage=storage)
    assert first_ratio(process, granular) < 1e-5


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", KERNELS.values(), ids=KERNELS)
def test_ratio_is_one_on_branches_of_every_kernel(rule, storage):
    process = toy(rule)
    for batch in (
        grpo.branch(process, REWARD, groups=2, splits=(1, 4), ways=3, spread=0.5, storage=storage),
        grpo.granular(process, REWARD, level=2, groups=2, group_size=5, strides=(1, 3), storage=storage),
    ):
        assert first_ratio(process, batch) < 1e-5
        assert batch.mask.sum() >= batch.rows


def test_storing_after_the_densities_is_caught():
    """A mutant: states cast to bf16 after a float32 chain (verl-omni#81). The ratio of the sum is off by far."""
    process = FLOW.with_rule(steer.cps(0.7))
    batch = grpo.collect(process, bright, groups=1, group_size=4)
    cast = dataclasses.replace(batch, x_t=batch.x_t.bfloat16(), x_next=batch.x_next.bfloat16())
    assert first_ratio(process, cast) > 1e-3


def test_another_kernel_or_grid_is_refused():
    batch = grpo.collect(toy(), REWARD)
    for other in (toy(steer.cps(0.7)), toy(steps=8), toy(schedule=steer.VP())):
        with pytest.raises(steer.SteerError, match="densities are of the kernel that drew them"):
            grpo.log_probs(other, batch)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_shapes_and_meaning_of_every_field():
    process = toy()
    batch = grpo.collect(
        process, {"a": REWARD, "b": lambda x: x[:, 0]}, groups=3, group_size=5, key=7, path=True, policy_version=4
    )
    rows, stored = 15, STEPS - 1  # the last step of DDIM draws nothing
    assert batch.x_t.shape == batch.x_next.shape == batch.mean_old.shape == (rows, stored, 2)
    assert batch.t.shape == batch.std.shape == batch.logp_old.shape == batch.mask.shape == (rows, stored)
    assert batch.step_idx[0].tolist() == list(range(stored))
    torch.testing.assert_close(batch.t, batch.sigmas[batch.step_idx])  # on a rectified flow
    torch.testing.assert_close(batch.t_next, batch.sigmas[batch.step_idx + 1])
    assert (batch.x_next[:, :-1] == batch.x_t[:, 1:]).all()
    assert (batch.path[:, :-2] == batch.x_t).all()
    assert (batch.path[:, -1] == batch.x0).all()
    assert set(batch.rewards) == {"a", "b"}
    torch.testing.assert_close(batch.rewards["b"], batch.x0[:, 0])
    assert batch.group_id.tolist() == batch.problem_id.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert batch.weights().tolist() == [1.0] * rows
    assert (batch.seed == 7).all()
    assert batch.policy_version == 4
    assert batch.cost["nfe"] == STEPS
    assert batch.cost["rewards"] == 2
    assert batch.kernel["rule"] == "DDIM"
    assert batch.kernel["parameters"] == {"eta": 1.0}
    assert all(isinstance(v, str | tuple | dict) for v in batch.kernel.values())
    z = (batch.x_next - batch.mean_old) / batch.std[..., None]
    density = (-0.5 * z.square() - batch.std.log()[..., None] - 0.5 * math.log(2 * math.pi)).sum(2)
    torch.testing.assert_close(batch.logp_old, density, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.logp("mean"), batch.logp_old / 2)


def test_collecting_is_sampling():
    """Plain rows are those of `steer.rollout` under the same key, bitwise."""
    process = toy()
    result = steer.rollout(process, REWARD, batch=3, particles=5, key=11)
    batch = grpo.collect(process, REWARD, groups=3, group_size=5, key=11)
    assert (batch.x0.view(3, 5, 2) == result.x).all()
    steered = grpo.collect(process, REWARD, groups=3, group_size=5, key=11, method=steer.rollout)
    assert (steered.logp_old == batch.logp_old).all()
    assert (steered.log_w_base == 0).all()


def test_consecutive_steps_keep_every_state_once():
    process, state = FLOW.with_rule(steer.flow_sde()), 4 * 64
    whole = grpo.collect(process, bright, group_size=8, means=False)
    assert whole.x_t.untyped_storage().data_ptr() == whole.x_next.untyped_storage().data_ptr()
    assert whole.nbytes / (8 * STEPS) < 1.5 * state
    half = grpo.collect(process, bright, group_size=8, means=False, storage=torch.bfloat16)
    assert whole.nbytes - half.nbytes == 8 * (STEPS + 1) * state / 2


def test_steered_rows_cost_what_their_method_does():
    """Several rewards: the first steers, the others score the samples once; nothing is decoded for no reward."""
    process = FLOW.with_rule(steer.flow_sde())
    alone = steer.smc(process, bright, particles=8, temperature=5.0)
    for rewards, extra in (({"a": bright}, 0), ({"a": bright, "b": lambda im: -bright(im)}, 1)):
        batch = grpo.collect(process, rewards, group_size=8, method=steer.smc, temperature=5.0)
        assert 8 * batch.cost["nfe"] == alone.cost.nfe
        assert 8 * batch.cost["rewards"] == alone.cost.rewards + 8 * extra
        assert 8 * batch.cost["decodes"] == alone.cost.decodes + 8 * extra
    torch.testing.assert_close(batch.rewards["b"], -batch.rewards["a"])


def test_windows_are_where_they_should_be():
    draws = {name: window(10, 50, 8, steer.Key(0)) for name, window in WINDOWS.items()}
    assert draws["every"].all()
    assert draws["all but the last"].sum(2).unique().tolist() == [9]
    assert draws["sliding"][0, 0].nonzero().flatten().tolist() == [1, 2, 3, 4]  # update 30: one move on
    for name in ("first half", "per row"):
        assert draws[name].sum(2).unique().tolist() == [2]
        starts = draws[name].int().argmax(2)
        assert starts.unique().tolist() == list(range(6))
    assert (draws["first half"] == draws["first half"][:, :1]).all()
    assert not (draws["per row"] == draws["per row"][:, :1]).all()


def test_outside_a_window_chains_follow_the_ode():
    process = toy(steer.flow_sde())
    batch = grpo.collect(process, REWARD, groups=2, group_size=4, window=grpo.per_row(), path=True)
    ode = process.with_rule(steer.ode())
    for k in range(STEPS):
        x = batch.path[:, k].view(2, 4, 2)
        expected = ode.transition(x, ode.denoise(x, k), k).mean.flatten(0, 1)
        noisy = ((batch.step_idx == k) & batch.mask).any(1)
        same = (batch.path[:, k + 1] == expected).all(1)
        assert (same == ~noisy).all()


def test_shared_noise_is_shared_and_only_then():
    for shared in (True, False):
        batch = grpo.collect(toy(), REWARD, groups=2, group_size=4, shared_noise=shared)
        start = batch.x_t[:, 0]
        same = (start[:, None] == start[None]).all(2)
        assert (same == (batch.root_id[:, None] == batch.root_id[None])).all()
        assert same.sum() == (32 if shared else 8)


def test_neg_sq_err_is_labelled_and_recomputed():
    process = toy(steer.cps(0.7))
    batch = grpo.collect(process, REWARD, window=grpo.per_row())
    bare = batch.as_neg_sq_err()
    expected = -(batch.x_next - batch.mean_old).square().sum(2)
    torch.testing.assert_close(bare.logp_old, torch.where(batch.mask, expected, 0.0), rtol=1e-4, atol=1e-6)
    assert bare.logp_kind == "neg_sq_err"
    assert first_ratio(process, bare) < 1e-5
    with pytest.raises(steer.SteerError, match="need log-densities"):
        bare.step_weights()


def test_conditioned_policies_are_scored_problem_by_problem():
    process = steer.load("digits-flow", steps=6, labels=[3, 8], transition=steer.flow_sde())
    batch = grpo.collect(process, bright, groups=2, group_size=3, window=grpo.per_row(1))
    assert first_ratio(process, batch) < 1e-5
    swapped = steer.load("digits-flow", steps=6, labels=[8, 3], transition=steer.flow_sde())
    assert first_ratio(swapped, batch) > 1e-3


# --- branches ---------------------------------------------------------------------------------------------------------


def test_branches_share_prefixes_and_cost_what_they_are():
    process = toy(steer.flow_sde())
    batch = grpo.branch(process, REWARD, groups=2, splits=(0, 3, 6), key=5)
    assert batch.rows == 2 * 8
    assert batch.cost["nfe"] * 16 == 2 * (1 + 2 + 2 + 2 + 4 + 4 + 4 + 8 + 8 + 8)
    for s in range(batch.step_id.shape[1]):
        for row in range(16):
            same = batch.step_id[:, s] == batch.step_id[row, s]
            assert (batch.x_next[same, s] == batch.x_next[row, s]).all()
            assert (batch.x_next[~same, s] != batch.x_next[row, s]).all()
    counts = [len(batch.step_id[:, s].unique()) for s in range(STEPS)]
    assert counts == [4, 4, 4, 8, 8, 8, 16, 16, 16, 16]


def test_depth_advantages_are_those_of_the_tree():
    process = toy(steer.flow_sde())
    batch = grpo.branch(process, REWARD, groups=2, splits=(0, 3), key=5)
    value = grpo.depth_advantages(batch, eps=0.0).value
    reward = batch.rewards["reward"].double().view(2, 2, 2)
    z = lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0)  # noqa: E731
    top, leaf = z(reward.mean(2)), z(reward.view(2, 4))
    torch.testing.assert_close(value[:, 0].double(), top.repeat_interleave(2, 1).flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value[:, 9].double(), leaf.flatten(), atol=1e-5, rtol=1e-5)


def test_distinct_steps_give_the_same_loss_for_less():
    process = FLOW.with_rule(steer.flow_sde())
    batch = grpo.branch(process, bright, groups=2, splits=(0, 3), key=5)
    advantage = grpo.depth_advantages(batch).value
    whole, distinct = grpo.by_level(batch), grpo.by_level(batch, distinct=True)
    assert [step.row.shape[1] for step in distinct] == [2] * 3 + [4] * 7
    for one, two in zip(whole, distinct, strict=True):
        losses = [
            grpo.clipped_loss(
                step.of(batch.logp("mean")) + 0.01, step.of(batch.logp("mean")), step.of(advantage), mask=step.valid
            )
            for step in (one, two)
        ]
        torch.testing.assert_close(*losses)


def test_granular_rows_part_at_one_step():
    process = toy(steer.flow_sde())
    batch = grpo.granular(process, REWARD, level=4, groups=2, group_size=6, strides=(1, 2))
    x = batch.x_t.view(2, 6, 2)
    assert (x == x[:, :1]).all()
    assert set(batch.rewards) == {"reward/1", "reward/2"}
    assert batch.cost["nfe"] * 12 == 2 * (5 + 6 * (5 + 3))
    # The rewards are those of the ODE from x_next on.
    ode, end = process.with_rule(steer.ode()), batch.x_next.view(2, 6, 2)
    for k in range(5, STEPS):
        end = ode.transition(end, ode.denoise(end, k), k).mean
    torch.testing.assert_close(batch.rewards["reward/1"], REWARD(end.flatten(0, 1)).float())
    with pytest.raises(steer.SteerError, match="perturb one stochastic step"):
        grpo.granular(toy(), REWARD, level=STEPS - 1)


# --- what cannot be collected -----------------------------------------------------------------------------------------


def test_greedy_methods_give_samples_without_densities():
    for method in (search.best_of_n, search.svdd, search.rbf):
        batch = grpo.collect(toy(), REWARD, groups=2, group_size=4, method=method)
        assert batch.objective == "tilted_sft"
        assert batch.log_w_base.isnan().all()
        assert batch.rewards["reward"].shape == (8,)
        with pytest.raises(steer.NotStochasticError, match="SFT, DPO or reward-weighted"):
            grpo.advantages(batch)
    stated = grpo.collect(toy(), REWARD, groups=2, group_size=4, method=steer.smc, law="none")
    assert stated.logp_behavior.isnan().all()
    assert not stated.logp_old.isnan().any()


def test_refusals_say_the_cure():
    with pytest.raises(steer.SteerError, match="raise the temperature") as caught:
        grpo.collect(toy(), REWARD, groups=2, group_size=16, method=steer.smc, temperature=0.02)
    assert isinstance(caught.value.partial, steer.Result)
    sft = grpo.collect(toy(), REWARD, group_size=16, method=steer.smc, temperature=0.02, objective="tilted_sft")
    assert sft.objective == "tilted_sft"
    with pytest.raises(steer.SteerError, match="without a stochastic step"):
        grpo.collect(toy(steer.ode()), REWARD)
    with pytest.raises(steer.SteerError, match="differs between rows"):
        grpo.collect(toy(), REWARD, groups=2, method=steer.smc, window=grpo.per_row())
    with pytest.raises(steer.StateSpaceError, match="needs a GaussianProcess"):
        grpo.collect(steer.load("letters"), lambda x: x.float().mean(1))


def test_a_group_is_refused_below_a_quarter(monkeypatch):
    """Of rows and of starting noises alike: 4 of 16 are enough, 3.99 are not."""

    def collected(ess, roots):
        monkeypatch.setattr(grpo.RolloutBatch, "ess", lambda batch: torch.tensor([9.0, ess]))
        monkeypatch.setattr(grpo.RolloutBatch, "effective_roots", lambda batch: torch.tensor([roots, 9.0]))
        return grpo.collect(toy(), REWARD, groups=2, group_size=16, method=steer.smc, temperature=2.0)

    assert collected(4.0, 4.0).objective == "policy_gradient"
    for sizes in ((3.99, 9.0), (9.0, 3.99)):
        with pytest.raises(steer.SteerError, match="a quarter of the group, 4 of 16 rows"):
            collected(*sizes)


@pytest.mark.parametrize("levels", [range(STEPS - 1), 9, [2, 5], [0]], ids=str)
@pytest.mark.parametrize("proposal", [steer.bootstrap, steer.guided(0.5)], ids=["bootstrap", "guided"])
@pytest.mark.parametrize("store", [None, "cpu"])
def test_trees_store_every_step_wherever_they_branch(levels, proposal, store):
    process = toy()
    tree = functools.partial(search.dts, levels=levels, walkers=4, proposal=proposal, store=store)
    batch = grpo.collect(
        process, REWARD, groups=2, group_size=16, method=tree, temperature=2.0, objective="tilted_sft",
        storage=torch.bfloat16,
    )  # fmt: skip
    assert batch.step_idx[batch.mask].unique().tolist() == list(range(STEPS - 1))
    assert (batch.x_next[:, :-1] == batch.x_t[:, 1:])[batch.mask[:, 1:]].all()
    assert first_ratio(process, batch) < 1e-5
    guided = batch.logp_old[batch.mask] != batch.logp_behavior[batch.mask]
    assert bool(guided.any()) == (proposal is not steer.bootstrap)
    for s in range(STEPS - 1):
        here, ids = batch.x_next[:, s], batch.step_id[:, s]
        for row in range(32):
            assert (here[ids == ids[row]] == here[row]).all()


def test_rows_know_the_nodes_they_came_by():
    tree = functools.partial(search.dts, levels=range(STEPS - 1), walkers=4)
    batch = grpo.collect(toy(), REWARD, groups=2, group_size=16, method=tree, temperature=2.0)
    assert len(batch.root_id.unique()) == 8  # the first four walks of each tree
    for node, state in ((batch.root_id, batch.x_t[:, 0]), (batch.parent_id, batch.x_next[:, STEPS - 3])):
        assert ((state[:, None] == state[None]).all(2) == (node[:, None] == node[None])).all()
        assert (node // 16 == batch.problem_id).all()


def test_a_tree_keeps_all_its_steps_or_none():
    tree = search.dts(toy(), REWARD, particles=8).tree
    with pytest.raises(steer.SteerError, match="all its steps or of none"):
        search.dts(toy(), REWARD, particles=8, tree=tree, keep_states=True)


def test_what_stores_no_steps_or_moves_by_other_laws_is_refused():
    with pytest.raises(steer.SteerError, match=r"stored not all of the stochastic steps .*can keep states"):
        grpo.collect(toy(), REWARD, group_size=16, method=steer.waste_free, temperature=2.0)
    with pytest.raises(steer.SteerError, match="by transitions of its own"):
        grpo.collect(toy(), REWARD, group_size=16, method=steer.fkc, temperature=2.0)
    samples = grpo.collect(toy(), REWARD, group_size=16, method=steer.fkc, temperature=2.0, law="none")
    assert samples.mask.shape == (16, 0)
    assert samples.objective == "tilted_sft"


@pytest.mark.parametrize(("share", "steps"), [(0.29, 100), (0.57, 100), (0.99, 100), (0.3, 10), (1.0, 7)])
def test_a_share_of_the_steps_is_whole_where_it_is(share, steps):
    """.29 of a hundred are 29, though their product in binary is 28.999999999999996."""
    held = grpo.every(share)(steps, 1, 1, steer.Key(0))
    assert int(held.sum()) == round(share * steps)


def test_a_sliding_window_is_whole_wherever_it_stands_and_then_starts_over():
    """Four of ten steps: it begins at 0, 2, 4, 6 and again at 1, never where less than four are left."""
    begins = []
    for update in range(0, 50, 10):
        mask = grpo.sliding(update, size=4, stride=2, every=10)(10, 1, 1, steer.Key(0))[0, 0]
        assert int(mask.sum()) == 4
        begins.append(int(mask.nonzero()[0]))
    assert begins == [0, 2, 4, 6, 1]
