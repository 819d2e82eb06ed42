"""Exported rollouts, scored by the trainers' formulas: ratios begin at 1, names and shapes are those of their source.

The formulas are retold here from what the trainers document, on exported tensors and settings alone. Where checkouts of
the trainers lie under $STEER_TRAINERS (flow_grpo, verl-omni, verl, Flow-Factory), their own functions are called too.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import steer
from steer import grpo, search
from steer.errors import NonFiniteError, NotStochasticError, RewardError, ShapeError, StateSpaceError, SteerError
from steer.exporters import (
    flow_factory_settings,
    flow_grpo_settings,
    to_flow_factory,
    to_flow_grpo,
    to_verl_omni,
    verl_omni_settings,
)
from steer.processes.schedules import RectifiedFlow

K, EVENT, PROMPTS, ROWS = 6, (3, 4, 4), 2, 4
BF16, F32 = torch.bfloat16, torch.float32
KERNELS = {"flow_sde": steer.flow_sde(0.7), "dance_sde": steer.dance_sde(0.3), "cps": steer.cps(0.7)}
WINDOWS = {
    "every": grpo.every(),
    "most": grpo.every(0.99),
    "first_half": grpo.first_half(2),
    "per_row": grpo.per_row(2),
    "sliding": grpo.sliding(30, size=3, stride=1, every=25),
}

# What each trainer's source says, as data. B, S: rows and stored steps. E: event. L, D, D': sizes of conditioning.
FLOW_GRPO_SCHEMA = {  # yifan123/flow_grpo@ac4c86e scripts/train_sd3.py:667-682, shapes 653-660, rewards 691-696
    "prompt_ids": ("B L", torch.int64),
    "prompt_embeds": ("B L D", None),
    "pooled_prompt_embeds": ("B D'", None),
    "timesteps": ("B S", F32),
    "latents": ("B S E", F32),
    "next_latents": ("B S E", F32),
    "log_probs": ("B S", F32),
}
VERL_OMNI_SCHEMA = {  # verl-project/verl-omni@a1139ba verl_omni/agent_loop/diffusion_agent_loop.py:335-403
    "prompts": ("B L", torch.int64),
    "responses": ("B 3 H H", torch.uint8),
    "rollout_log_probs": ("B S", F32),  # pipelines/sd3_flow_grpo/vllm_omni_rollout_adapter.py:328-333
    "all_latents": ("B S+1 E", F32),  # the same, 265-267 and 322-324
    "all_timesteps": ("B S", F32),
    "rm_scores": ("B 1", F32),  # reward_loop/reward_manager/visual.py:54-57
    "prompt_embeds": ("B L D", None),
    "pooled_prompt_embeds": ("B D'", None),
}
FLOW_FACTORY_SCHEMA = {  # X-GenGroup/Flow-Factory@a0b2bc5 src/flow_factory/samples/samples.py:83-105
    "timesteps": ("K", F32),  # models/stable_diffusion/sd3_5.py:316-345
    "all_latents": ("M E", None),  # storage dtype: models/stable_diffusion/sd3_5.py:294-295
    "latent_index_map": ("K+1", torch.int64),  # utils/trajectory_collector.py:146-172
    "log_probs": ("S", F32),
    "log_prob_index_map": ("K+1", torch.int64),
    "image": ("3 H H", F32),
    "prompt_ids": ("L", torch.int64),
    "prompt_embeds": ("L D", None),
    "pooled_prompt_embeds": ("D'", None),
}
SETTINGS = {  # config/base.py:39-54 @ac4c86e and scripts/train_sd3_fast.py @74db691; rollout.py:36-66 and
    # config/diffusion_trainer.yaml:94-109 @a1139ba; hparams/scheduler_args.py:23-54 @a0b2bc5
    "flow_grpo": {"sample.num_steps", "sample.noise_level", "sample.sde_type", "sample.sde_window_size"},
    "verl_omni": {
        "actor_rollout_ref.rollout.pipeline.num_inference_steps",
        "actor_rollout_ref.rollout.algo.noise_level",
        "actor_rollout_ref.rollout.algo.sde_type",
        "actor_rollout_ref.rollout.algo.sde_window_size",
        "algorithm.rollout_correction.bypass_mode",
        "algorithm.rollout_correction.rollout_is",
    },
    "flow_factory": {
        "scheduler.dynamics_type",
        "scheduler.noise_level",
        "scheduler.sde_steps",
        "scheduler.num_sde_steps",
    },
}


def velocity(x: torch.Tensor, t) -> torch.Tensor:
    """A policy: any function of state and time that mixes coordinates, alone in its row."""
    t = t.view(-1, *(1 for _ in EVENT)) if isinstance(t, torch.Tensor) else t
    return torch.tanh(1.3 * x + 0.7 * x.roll(1, -1) - 0.4 * t) + 0.5 * x


def sigma_grid(shift: float = 3.0) -> torch.Tensor:
    """Sigmas as diffusers shifts them, float32."""
    s = torch.linspace(1.0, 1.0 / K, K, dtype=torch.float64)
    return torch.cat([(shift * s / (1 + (shift - 1) * s)).float(), torch.zeros(1)])


def policy(rule, times=None, prompts=("a cat", "a dog")):
    process = steer.from_velocity(
        velocity, RectifiedFlow(), sigma_grid().tolist() if times is None else times, event=EVENT, transition=rule
    )
    return replace(process, problems=len(prompts), prompts=prompts)


def total(samples: torch.Tensor) -> torch.Tensor:
    return samples.flatten(1).mean(1)


def spread(samples: torch.Tensor) -> torch.Tensor:
    return -samples.flatten(1).std(1)


def collected(kernel="flow_sde", window="every", storage=F32, **options) -> grpo.RolloutBatch:
    rewards = {"mean": total, "calm": spread}
    return grpo.collect(
        policy(KERNELS[kernel]),
        rewards,
        groups=PROMPTS,
        group_size=ROWS,
        key=3,
        window=WINDOWS[window],
        storage=storage,
        **options,
    )


COND = {
    "prompt_ids": torch.tensor([[1, 2, 0], [1, 3, 0]]),
    "prompt_embeds": torch.arange(2 * 3 * 5.0).view(2, 3, 5).to(BF16),
    "pooled_prompt_embeds": torch.arange(2 * 7.0).view(2, 7).to(BF16),
}
flow_grpo_sample = partial(to_flow_grpo, reward="mean", cond=COND)
verl_omni_rollout = partial(to_verl_omni, reward="mean", cond=COND)
flow_factory_samples = partial(to_flow_factory, cond=COND)


# The trainers' formulas, retold.


def formula(kind, x, v, x_next, sigma, after, second, level):
    """Mean-reduced log-prob (B,) of a step sigma -> after as trainers document it; second: the grid's second sigma."""
    if kind == "cps":
        std = after * math.sin(level * math.pi / 2)
        mean = (1 - after) * (x - sigma * v) + (after.square() - std.square()).sqrt() * (x + (1 - sigma) * v)
        return -(x_next - mean).square().flatten(1).mean(1)
    span = sigma - after
    if kind == "sde":
        g = level * (sigma / (1 - torch.where(sigma == 1, second, sigma))).sqrt()
        mean = x * (1 - g.square() * span / (2 * sigma)) - v * (1 + g.square() * (1 - sigma) / (2 * sigma)) * span
    else:
        g = torch.full_like(sigma, level)
        score = -(x - (1 - sigma) * (x - sigma * v)) / sigma.square()
        mean = x - v * span + 0.5 * g.square() * score * span
    std = g * span.sqrt()
    z = (x_next - mean) / std
    return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def column(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.view(-1, 1, 1, 1)


def looked_up(timesteps: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Step of each timestep in a scheduler, by exact equality as diffusers' index_for_timestep."""
    found = timesteps[:, None] == (sigmas[:-1] * 1000)[None]
    assert bool((found.sum(1) == 1).all())
    return found.int().argmax(1)


def flow_grpo_recomputes(sample, settings, sigmas):
    """compute_log_prob of scripts/train_sd3.py, step by step."""
    out = []
    for j in range(settings["sample.sde_window_size"]):
        x, t = sample["latents"][:, j], sample["timesteps"][:, j]
        k = looked_up(t, sigmas)
        at, kind, level = column(sigmas[k]), settings["sample.sde_type"], settings["sample.noise_level"]
        after, x_next = column(sigmas[k + 1]), sample["next_latents"][:, j]
        out.append(formula(kind, x, velocity(x, t / 1000), x_next, at, after, sigmas[1], level))
    return torch.stack(out, 1), sample["log_probs"]


def verl_omni_recomputes(data, settings, sigmas):
    """forward_and_sample_previous_step of the SD3 training adapter, step by step; old_log_probs as in bypass mode."""
    batch, algo = data["batch"], "actor_rollout_ref.rollout.algo."
    assert settings["algorithm.rollout_correction.bypass_mode"]
    kind = {"sde": "sde", "dance_sde": "dance", "cps": "cps"}[settings[algo + "sde_type"]]
    out = []
    for step in range(settings[algo + "sde_window_size"]):
        x, t = batch["all_latents"][:, step], batch["all_timesteps"][:, step]
        k = looked_up(t, sigmas)
        at, after, x_next = column(sigmas[k]), column(sigmas[k + 1]), batch["all_latents"][:, step + 1]
        level = settings[algo + "noise_level"]
        out.append(formula(kind, x, velocity(x, t / 1000), x_next, at, after, sigmas[1], level))
    return torch.stack(out, 1), batch["rollout_log_probs"]


def stacked(samples):
    """BaseSample.stack: maps from the first sample, tensors stacked."""
    shared = ("latent_index_map", "log_prob_index_map")
    return {
        name: value if name in shared else torch.stack([each[name] for each in samples])
        for name, value in samples[0].items()
        if isinstance(value, torch.Tensor)
    }


def flow_factory_recomputes(samples, settings, sigmas):
    """The inner loop of GRPOTrainer.optimize: timesteps / 1000 for sigmas, states by the maps."""
    batch, out, old = stacked(samples), [], []
    kind = {"Flow-SDE": "sde", "Dance-SDE": "dance", "CPS": "cps"}[settings["scheduler.dynamics_type"]]
    latents, log_probs = batch["latent_index_map"], batch["log_prob_index_map"]
    for k in settings["scheduler.sde_steps"]:
        t = batch["timesteps"][:, k]
        t_next = batch["timesteps"][:, k + 1] if k + 1 < batch["timesteps"].shape[1] else torch.zeros_like(t)
        x, x_next = (batch["all_latents"][:, latents[i]].float() for i in (k, k + 1))
        level, at, after = settings["scheduler.noise_level"], column(t / 1000), column(t_next / 1000)
        out.append(formula(kind, x, velocity(x, t / 1000), x_next, at, after, sigmas[1], level))
        old.append(batch["log_probs"][:, log_probs[k]])
    return torch.stack(out, 1), torch.stack(old, 1)


EXPORTERS = {
    "flow_grpo": (flow_grpo_sample, flow_grpo_settings, flow_grpo_recomputes),
    "verl_omni": (verl_omni_rollout, verl_omni_settings, verl_omni_recomputes),
    "flow_factory": (flow_factory_samples, flow_factory_settings, flow_factory_recomputes),
}


def pairs():
    for trainer in EXPORTERS:
        for kernel in KERNELS:
            for window in WINDOWS:
                known = not (trainer == "flow_grpo" and kernel == "dance_sde")
                shared = not (trainer == "flow_factory" and window in ("first_half", "per_row"))
                if known and shared:
                    yield trainer, kernel, window


@pytest.mark.parametrize("storage", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("trainer", "kernel", "window"), list(pairs()))
def test_ratios_begin_at_one(trainer, kernel, window, storage):
    export, settings, recompute = EXPORTERS[trainer]
    batch = collected(kernel, window, storage)
    new, old = recompute(export(batch), settings(batch), sigma_grid())
    assert new.shape == batch.mask.shape
    torch.testing.assert_close((new - old).exp(), torch.ones_like(new), rtol=0.0, atol=1e-5)
    assert old.std() > 1e-5  # there is something to get wrong


@pytest.mark.parametrize("trainer", EXPORTERS)
def test_the_test_of_ratios_can_fail(trainer):
    export, settings, recompute = EXPORTERS[trainer]
    batch = collected()
    right, level = settings(batch), next(name for name in settings(batch) if name.endswith("noise_level"))
    wrong = (
        (replace(batch, x_t=batch.x_t.to(BF16).to(F32), x_next=batch.x_next.to(BF16).to(F32)), right),  # cast too late
        (
            replace(batch, logp_old=2 * batch.logp_old, logp_behavior=2 * batch.logp_behavior),
            right,
        ),  # another reduction
        (batch, {**right, level: 0.7001}),
    )
    for other, told in wrong:
        new, old = recompute(export(other), told, sigma_grid())
        assert ((new - old).exp() - 1).abs().max() > 1e-5


def check(schema, tensors, batch, sizes=()):
    size = {"B": batch.rows, "S": batch.mask.shape[1], "K": K, "L": 3, "D": 5, "D'": 7, "H": 4, **dict(sizes)}
    for name, (shape, dtype) in schema.items():
        expected = []
        for axis in shape.split():
            base, _, more = axis.partition("+")
            expected += EVENT if axis == "E" else [int(base) if base.isdigit() else size[base] + int(more or 0)]
        assert tuple(tensors[name].shape) == tuple(expected), name
        assert dtype in (None, tensors[name].dtype), name
        assert tensors[name].is_contiguous() or name in ("all_latents", "log_probs")


def test_flow_grpo_gets_the_names_and_shapes_of_its_source():
    batch = collected(window="first_half", storage=BF16)
    sample = flow_grpo_sample(batch)
    check(FLOW_GRPO_SCHEMA, sample, batch)
    assert set(sample) == {*FLOW_GRPO_SCHEMA, "rewards"}
    assert set(sample["rewards"]) == {"avg", "mean", "calm"}
    assert torch.equal(sample["rewards"]["avg"], batch.rewards["mean"])
    assert bool((sample["timesteps"][:, 1:] < sample["timesteps"][:, :-1]).all())
    assert torch.equal(sample["latents"].to(BF16), batch.x_t)
    assert set(flow_grpo_settings(batch)) >= SETTINGS["flow_grpo"]
    # train_sd3.py:698-707, 817, 830-841: two of its batches, collated, filtered, shuffled and cut again
    both = {
        k: torch.cat([v, v]) if not isinstance(v, dict) else {n: torch.cat([w, w]) for n, w in v.items()}
        for k, v in sample.items()
    }
    both["advantages"] = both.pop("rewards")["avg"][:, None].repeat(1, 2)
    cut = {k: v[torch.randperm(16)].reshape(-1, 8, *v.shape[1:]) for k, v in both.items()}
    assert cut["latents"].shape == (2, 8, 2, *EVENT)


def test_verl_omni_gets_the_names_and_shapes_of_its_source():
    batch = collected(window="per_row")
    images = torch.rand(batch.rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = verl_omni_rollout(batch, images=images)
    check(VERL_OMNI_SCHEMA, data["batch"], batch)
    assert set(data["batch"]) == set(VERL_OMNI_SCHEMA)
    assert set(data["meta_info"]["reward_extra_keys"]) == {"mean", "calm"}
    assert data["non_tensor_batch"]["uid"].tolist() == ["0"] * ROWS + ["1"] * ROWS
    assert all(value.dtype == object and len(value) == batch.rows for value in data["non_tensor_batch"].values())
    assert set(verl_omni_settings(batch)) >= SETTINGS["verl_omni"]
    assert verl_omni_rollout(batch, uid=list("abcdefgh"))["non_tensor_batch"]["uid"].tolist() == list("abcdefgh")
    ready = verl_omni_rollout(batch, advantages=grpo.advantages(batch).value)["batch"]
    assert torch.equal(ready["old_log_probs"], ready["rollout_log_probs"])
    assert ready["advantages"].shape == batch.mask.shape


def test_flow_factory_gets_the_names_and_shapes_of_its_source():
    batch = collected(window="sliding", storage=BF16)
    images = torch.rand(batch.rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    samples = flow_factory_samples(batch, images=images)
    assert len(samples) == batch.rows
    for sample in samples:
        check(FLOW_FACTORY_SCHEMA, sample, batch, {"M": 4})
        assert set(sample) == {*FLOW_FACTORY_SCHEMA, "prompt", "extra_kwargs"}
        assert sample["all_latents"].dtype == BF16
        assert not set(sample["extra_kwargs"]) & set(sample)
    assert [sample["prompt"] for sample in samples] == ["a cat"] * ROWS + ["a dog"] * ROWS
    steps = flow_factory_settings(batch)["scheduler.sde_steps"]
    assert steps == [1, 2, 3]
    assert samples[0]["latent_index_map"].tolist() == [-1, 0, 1, 2, 3, -1, -1]  # as collected at positions 1 to 4
    assert samples[0]["log_prob_index_map"].tolist() == [-1, 0, 1, 2, -1, -1, -1]
    assert set(flow_factory_settings(batch)) >= SETTINGS["flow_factory"]


def test_windows_with_gaps_go_where_states_are_kept_apart():
    def gaps(steps, problems, rows, key):
        return torch.tensor([True, False, True, True, False, False]).expand(problems, rows, steps)

    batch = grpo.collect(policy(KERNELS["flow_sde"]), total, groups=PROMPTS, group_size=ROWS, window=gaps)
    for trainer in ("flow_grpo", "flow_factory"):
        export, settings, recompute = EXPORTERS[trainer]
        export = partial(export, reward="reward") if trainer == "flow_grpo" else export
        new, old = recompute(export(batch), settings(batch), sigma_grid())
        torch.testing.assert_close(new, old, rtol=0.0, atol=1e-5)
    assert flow_factory_samples(batch)[0]["latent_index_map"].tolist() == [0, 1, 2, 3, 4, -1, -1]
    with pytest.raises(ShapeError, match="no gaps"):
        to_verl_omni(batch)


@pytest.mark.parametrize("storage", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_flow_factory_takes_random_windows_a_prompt_at_a_time(kernel, storage):
    batch = grpo.collect(
        policy(KERNELS[kernel], prompts=("a cat",)),
        total,
        group_size=ROWS,
        key=1,
        window=grpo.first_half(2),
        storage=storage,
    )
    new, old = flow_factory_recomputes(to_flow_factory(batch), flow_factory_settings(batch), sigma_grid())
    assert new.shape == (ROWS, 2)
    torch.testing.assert_close((new - old).exp(), torch.ones_like(new), rtol=0.0, atol=1e-5)


def test_cps_goes_out_as_no_density_and_says_so():
    batch = collected("cps", "most")
    expected = -(batch.x_next - batch.mean_old).square().flatten(2).mean(2)
    for old in (
        flow_grpo_sample(batch)["log_probs"],
        verl_omni_rollout(batch)["batch"]["rollout_log_probs"],
        torch.stack([sample["log_probs"] for sample in flow_factory_samples(batch)]),
        flow_grpo_sample(batch.as_neg_sq_err())["log_probs"],
    ):
        torch.testing.assert_close(old, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(SteerError, match="as_neg_sq_err"):
        flow_grpo_sample(collected().as_neg_sq_err())
    assert "neg_sq_err" in to_flow_grpo.__doc__
    assert "neg_sq_err" in to_verl_omni.__doc__
    assert "neg_sq_err" in to_flow_factory.__doc__


def weighted(**options) -> grpo.RolloutBatch:
    """Rows with weights to the policy, as a steered collector makes them."""
    batch = collected(**options)
    log_w = 0.5 * torch.randn(batch.rows, generator=torch.Generator().manual_seed(0))
    return replace(batch, log_w_base=log_w, method="smc")


def test_weights_of_steered_rows_reach_the_loss_or_nothing_leaves():
    batch = weighted()
    weight = batch.weights()
    assert weight.std() > 0.01
    data = verl_omni_rollout(batch)["batch"]
    torch.testing.assert_close(data["rollout_is_weights"], weight[:, None].expand(batch.mask.shape))
    assert torch.equal(data["rollout_log_probs"], batch.logp("mean"))
    for export in (flow_grpo_sample, flow_factory_samples):
        with pytest.raises(SteerError, match="no field for weights"):
            export(batch)
    value = grpo.advantages(batch).value
    torch.testing.assert_close(
        flow_grpo_sample(batch, advantages=value)["advantages"], (weight * value)[:, None].expand(batch.mask.shape)
    )
    advantage = [float(s["extra_kwargs"]["advantage"]) for s in flow_factory_samples(batch, advantages=value)]
    np.testing.assert_allclose(advantage, (weight * value).numpy(), rtol=1e-6)
    assert "rollout_is_weights" not in verl_omni_rollout(collected())["batch"]


def test_rows_of_a_sampler_and_of_scouts_leave_with_their_weights():
    scouts = grpo.collect(policy(KERNELS["flow_sde"]), {"mean": total}, groups=PROMPTS, group_size=12, key=2)
    kept = grpo.keep(scouts, by="mean", best=2, worst=2, middle=2)
    data = verl_omni_rollout(kept)["batch"]
    torch.testing.assert_close(data["rollout_is_weights"][:, 0], kept.weights())
    assert kept.weights().std() > 0.1
    new, old = verl_omni_recomputes({"batch": data}, verl_omni_settings(kept), sigma_grid())
    torch.testing.assert_close(new, old, rtol=0.0, atol=1e-5)
    steered = grpo.collect(
        policy(KERNELS["flow_sde"]),
        {"mean": total},
        groups=PROMPTS,
        group_size=8,
        key=1,
        method=steer.smc,
        temperature=1.0,
    )
    new, old = verl_omni_recomputes(verl_omni_rollout(steered), verl_omni_settings(steered), sigma_grid())
    torch.testing.assert_close(new, old, rtol=0.0, atol=1e-5)


def test_a_guided_proposal_is_weighted_step_by_step():
    batch = collected()
    guided = replace(batch, logp_behavior=batch.logp_old + 0.3 * torch.linspace(-1, 1, K))
    data = verl_omni_rollout(guided)["batch"]
    expected = (guided.logp_old - guided.logp_behavior).exp().clamp(max=2.0)
    torch.testing.assert_close(data["rollout_is_weights"], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(data["rollout_log_probs"], batch.logp("mean"))


def test_weighted_loss_is_the_loss_of_weighted_advantages():
    """What makes folding weights into advantages exact: the clipped loss is proportional to them."""
    batch = weighted()
    new, old = batch.logp("mean") + 2e-4 * torch.linspace(-1, 1, batch.rows)[:, None], batch.logp("mean")
    value = grpo.advantages(batch).value[:, None]
    weight = batch.weights()[:, None]
    folded = flow_grpo_sample(batch, advantages=value[:, 0])["advantages"]
    torch.testing.assert_close(
        grpo.clipped_loss(new, old, folded), grpo.clipped_loss(new, old, value, weight=weight), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("trainer", EXPORTERS)
def test_what_trainers_cannot_train_on_is_refused(trainer):
    export, settings, _ = EXPORTERS[trainer]
    best = grpo.collect(
        policy(KERNELS["flow_sde"]), {"mean": total}, groups=PROMPTS, group_size=2, method=search.best_of_n
    )
    with pytest.raises(SteerError, match="SFT, DPO"):
        export(best)
    with pytest.raises(NotStochasticError, match="SFT, DPO or reward-weighted"):
        export(replace(collected(), logp_behavior=torch.full_like(collected().logp_old, torch.nan), method="svdd"))
    with pytest.raises(SteerError, match="tilted_sft"):
        export(replace(collected(), objective="tilted_sft"))
    with pytest.raises(StateSpaceError, match=r"FlowSDE.* only, got DDIM"):
        settings(grpo.collect(policy(steer.ddim(1.0)), total, groups=PROMPTS, group_size=ROWS))
    ragged = collected()
    mask = ragged.mask.clone()
    mask[0, -1] = False
    with pytest.raises(ShapeError, match="5 to 6"):
        export(replace(ragged, mask=mask))
    curved = steer.from_velocity(velocity, steer.schedules.Cosine(), 5, event=EVENT, transition=steer.flow_sde(0.7))
    with pytest.raises(StateSpaceError, match="standard deviation"):
        settings(grpo.collect(curved, total, groups=PROMPTS, group_size=ROWS))


@pytest.mark.parametrize("trainer", EXPORTERS)
def test_a_grid_that_float32_cannot_hold_is_refused_where_it_shows(trainer):
    """From t = .999 Flow-SDE's g is 22: what float32 makes of 1 - t moves ratios by 1e-4, the usual clip."""
    _, settings, _ = EXPORTERS[trainer]
    times = [0.999, 0.7, 0.4, 0.1, 0.0]
    for kernel in ("flow_sde", "cps"):
        fine, rounded = (policy(KERNELS[kernel], grid) for grid in (times, torch.tensor(times).tolist()))
        if kernel == "flow_sde":
            with pytest.raises(StateSpaceError, match="with_times"):
                settings(grpo.collect(fine, total, groups=PROMPTS, group_size=ROWS))
        else:
            assert settings(grpo.collect(fine, total, groups=PROMPTS, group_size=ROWS))
        assert settings(grpo.collect(rounded, total, groups=PROMPTS, group_size=ROWS))


def test_other_mistakes_are_named():
    batch = collected()
    with pytest.raises(StateSpaceError, match="DanceSDE"):
        flow_grpo_sample(collected("dance_sde"))
    with pytest.raises(SteerError, match="one of"):
        to_flow_grpo(batch, cond=COND)
    with pytest.raises(SteerError, match="pooled_prompt_embeds, prompt_embeds"):
        to_flow_grpo(batch, reward="mean", cond={"prompt_ids": COND["prompt_ids"]})
    with pytest.raises(ShapeError, match="per problem"):
        to_flow_factory(batch, cond={"prompt_embeds": torch.zeros(5, 2)})
    same = {**COND, "prompt_ids": torch.ones(2, 3)}
    with pytest.raises(SteerError, match="equal prompts"):
        to_flow_grpo(batch, reward="mean", cond=same)
    with pytest.raises(SteerError, match="equal prompts"):
        to_flow_factory(replace(batch, prompts=("a", "a")))
    with pytest.raises(ShapeError, match="same one"):
        to_flow_factory(collected(window="per_row"))
    with pytest.raises(ShapeError, match="not one a step"):
        to_flow_factory(batch, advantages=torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ShapeError, match="advantages are"):
        to_flow_grpo(batch, reward="mean", cond=COND, advantages=torch.zeros(3))
    with pytest.raises(ShapeError, match="one string per row"):
        to_verl_omni(batch, reward="mean", uid=["a"])
    with pytest.raises(ShapeError, match="images"):
        to_verl_omni(batch, reward="mean", images=torch.zeros(1, 3, 4, 4))


def test_branches_and_their_advantages_by_depth():
    batch = grpo.branch(policy(KERNELS["flow_sde"]), total, groups=PROMPTS, splits=(0, 2), key=0)
    value = grpo.depth_advantages(batch).value
    sample = to_flow_grpo(batch, cond=COND, advantages=value)
    torch.testing.assert_close(sample["advantages"], value)
    new, old = flow_grpo_recomputes(sample, flow_grpo_settings(batch), sigma_grid())
    torch.testing.assert_close(new, old, rtol=0.0, atol=1e-5)


def test_digits_flow_from_end_to_end():
    process = steer.load("digits-flow", steps=4, transition=steer.flow_sde(0.7))
    # without the last step, whose std of .0007 is below what bfloat16 resolves
    batch = grpo.collect(process, total, groups=1, group_size=3, key=0, storage=BF16, window=grpo.every(0.99))
    data = to_verl_omni(batch, images=process.decode(batch.x0[None]))["batch"]
    sigmas = batch.sigmas
    for step in range(3):
        x, x_next = data["all_latents"][:, step], data["all_latents"][:, step + 1]
        with torch.no_grad():
            v = (x - process.denoise(x[None], step)[0]) / sigmas[step]
        new = formula("sde", x, v, x_next, sigmas[step], sigmas[step + 1], sigmas[1], 0.7)
        torch.testing.assert_close(new, data["rollout_log_probs"][:, step], rtol=0.0, atol=1e-5)
    assert data["responses"].shape == (3, 1, 8, 8)


# The trainers' own functions, where their checkouts are.

CHECKOUTS = Path(os.environ.get("STEER_TRAINERS", "/nowhere"))


def loaded(path: str, name: str):
    if not (CHECKOUTS / path).is_file():
        pytest.skip(f"no {path} under $STEER_TRAINERS")
    spec = importlib.util.spec_from_file_location(name, CHECKOUTS / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def set_up(scheduler):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / K, K))
    torch.testing.assert_close(scheduler.sigmas.cpu(), sigma_grid(), rtol=0.0, atol=1e-6)
    return scheduler


def own_grid(batch_kernel, scheduler, **options):
    """A batch on the very sigmas that their scheduler has."""
    process = policy(KERNELS[batch_kernel], times=[float(s) for s in scheduler.sigmas.double()])
    return grpo.collect(process, {"mean": total}, groups=PROMPTS, group_size=ROWS, key=3, **options)


@pytest.mark.parametrize("storage", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
def test_flow_grpos_own_step_gives_ratio_one(kernel, storage):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = loaded("flow_grpo/flow_grpo/diffusers_patch/sd3_sde_with_logprob.py", "flow_grpo_step")
    scheduler = set_up(FlowMatchEulerDiscreteScheduler(shift=3.0))
    batch = own_grid(kernel, scheduler, storage=storage, window=grpo.per_row(2))
    sample, settings = to_flow_grpo(batch, cond=COND), flow_grpo_settings(batch)
    choice = {} if kernel == "flow_sde" else {"sde_type": settings["sample.sde_type"]}
    if choice and "sde_type" not in theirs.sde_step_with_logprob.__code__.co_varnames:
        pytest.skip("this flow_grpo has no CPS")
    for j in range(settings["sample.sde_window_size"]):
        x, t = sample["latents"][:, j], sample["timesteps"][:, j]
        _, new, _, _ = theirs.sde_step_with_logprob(
            scheduler,
            velocity(x, t / 1000),
            t,
            x,
            noise_level=settings["sample.noise_level"],
            prev_sample=sample["next_latents"][:, j],
            **choice,
        )
        torch.testing.assert_close((new - sample["log_probs"][:, j]).exp(), torch.ones(batch.rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("storage", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_verl_omnis_own_step_gives_ratio_one(kernel, storage):
    theirs = loaded("verl-omni/verl_omni/pipelines/schedulers/flow_match_sde.py", "verl_omni_step")
    scheduler = set_up(theirs.FlowMatchSDEDiscreteScheduler(shift=3.0))
    batch = own_grid(kernel, scheduler, storage=storage, window=grpo.per_row(2))
    data, settings = to_verl_omni(batch)["batch"], verl_omni_settings(batch)
    for step in range(batch.mask.shape[1]):
        x, t = data["all_latents"][:, step], data["all_timesteps"][:, step]
        _, new, _, _, _ = scheduler.sample_previous_step(
            sample=x,
            model_output=velocity(x, t / 1000),
            timestep=t,
            prev_sample=data["all_latents"][:, step + 1],
            noise_level=settings["actor_rollout_ref.rollout.algo.noise_level"],
            sde_type=settings["actor_rollout_ref.rollout.algo.sde_type"],
            return_logprobs=True,
            return_sqrt_dt=True,
        )
        old = data["rollout_log_probs"][:, step]
        torch.testing.assert_close((new - old).exp(), torch.ones(batch.rows), rtol=0, atol=1e-5)


@pytest.fixture
def verl(monkeypatch):
    """verl as verl-omni pins it (verl-project/verl@8a69493), with its cluster and verl-omni's config left out."""
    if not (CHECKOUTS / "verl/verl/protocol.py").is_file():
        pytest.skip("no verl under $STEER_TRAINERS")
    for name in ("tensordict", "omegaconf", "codetiming"):
        pytest.importorskip(name)
    stubs = {"ray": {"ObjectRef": object}, "verl_omni": {}, "verl_omni.workers": {}}
    stubs["verl_omni.workers.config"] = {"DiffusionActorConfig": object}
    for name, contents in stubs.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(CHECKOUTS / "verl"))
    return importlib.import_module("verl")


def test_verls_data_and_verl_omnis_advantages_and_loss_take_a_batch(verl):
    """As its trainer goes through them: joined to the prompts, split, bypassed, centred, clipped and weighted."""
    from tensordict import TensorDict

    algos = loaded("verl-omni/verl_omni/trainer/diffusion/diffusion_algos.py", "verl_omni_algos")
    correction = loaded("verl-omni/verl_omni/trainer/diffusion/rollout_correction.py", "verl_omni_correction")
    for batch in (collected(window="per_row"), weighted(window="per_row")):
        uid = np.repeat(np.array(["first", "second"], dtype=object), ROWS)
        data = verl_omni_rollout(batch, images=torch.zeros(batch.rows, 3, 4, 4), uid=uid.tolist())
        rollout = verl.DataProto(
            TensorDict(data["batch"], batch_size=batch.rows), data["non_tensor_batch"], data["meta_info"]
        )
        asked = verl.DataProto.from_dict(tensors={"dummy_tensor": torch.zeros(batch.rows, 1)}, non_tensors={"uid": uid})
        proto = asked.union(rollout)
        proto = verl.DataProto.concat(proto.chunk(2))
        correction.apply_bypass_mode_to_diffusion_batch(proto)
        value, _ = algos.compute_flow_grpo_outcome_advantage(
            proto.batch["rm_scores"].expand(-1, 2), proto.non_tensor_batch["uid"], global_std=False
        )
        plain = replace(batch, log_w_base=torch.zeros(batch.rows))
        expected = grpo.advantages(plain, weights={"mean": 1.0}).value[:, None].expand(-1, 2)
        unbiased = math.sqrt(1 - 1 / (2 * ROWS))  # their std is over all elements of a group, divided by n - 1
        torch.testing.assert_close(value, unbiased * expected, rtol=1e-3, atol=1e-4)
        proto.batch["advantages"] = value
        new, old = verl_omni_recomputes(data, verl_omni_settings(batch), sigma_grid())
        limits = SimpleNamespace(diffusion_loss=SimpleNamespace(adv_clip_max=5.0, clip_ratio=1e-4))
        out = algos.FlowGRPOLoss()(config=limits, model_output={"log_probs": new}, data=proto.batch)
        assert out.metrics["actor/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert out.metrics["actor/pg_clipfrac"] == 0.0
        torch.testing.assert_close(out.loss, grpo.clipped_loss(new, old, value, weight=batch.weights()[:, None]))


@pytest.mark.parametrize("storage", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_flow_factorys_own_samples_and_step_give_ratio_one(kernel, storage, monkeypatch):
    if not (CHECKOUTS / "Flow-Factory/src/flow_factory/samples/samples.py").is_file():
        pytest.skip("no Flow-Factory under $STEER_TRAINERS")
    monkeypatch.syspath_prepend(str(CHECKOUTS / "Flow-Factory/src"))
    try:
        samples_module = importlib.import_module("flow_factory.samples.samples")
        step_module = importlib.import_module("flow_factory.scheduler.flow_match_euler_discrete")
    except ImportError as error:
        pytest.skip(f"Flow-Factory needs {error.name}")
    scheduler = set_up(step_module.FlowMatchEulerDiscreteSDEScheduler(shift=3.0))
    batch = own_grid(kernel, scheduler, storage=storage, window=grpo.sliding(30, size=3))
    settings = flow_factory_settings(batch)
    scheduler = step_module.FlowMatchEulerDiscreteSDEScheduler(
        shift=3.0, **{name.removeprefix("scheduler."): v for name, v in settings.items() if name.startswith("sched")}
    )
    set_up(scheduler)
    images = torch.rand(batch.rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    rows = [samples_module.T2ISample.from_dict(row) for row in to_flow_factory(batch, images=images)]
    assert len({row.unique_id for row in rows}) == PROMPTS
    stack = samples_module.BaseSample.stack(rows)
    assert stack["rewards"]["mean"].shape == (batch.rows,)
    for k in scheduler.train_timesteps:
        t, t_next = stack["timesteps"][:, k], stack["timesteps"][:, k + 1]
        x, x_next = (stack["all_latents"][:, stack["latent_index_map"][i]] for i in (k, k + 1))
        out = scheduler.step(
            noise_pred=velocity(x.float(), t / 1000),
            timestep=t,
            latents=x,
            timestep_next=t_next,
            next_latents=x_next,
            noise_level=scheduler.noise_level,
            return_kwargs=["log_prob"],
        )
        old = stack["log_probs"][:, stack["log_prob_index_map"][k]]
        torch.testing.assert_close((out.log_prob - old).exp(), torch.ones(batch.rows), rtol=0, atol=1e-5)


def all_rewards(exported):
    """Every reward in what an exporter gives, as numbers."""
    if isinstance(exported, list):  # Flow-Factory
        return [float(value) for row in exported for value in row["extra_kwargs"]["rewards"].values()]
    if "meta_info" in exported:  # verl-omni
        objects = [value for name in ("mean", "calm") for value in exported["non_tensor_batch"][name].tolist()]
        return objects + exported["batch"]["rm_scores"].flatten().tolist()
    return [value for each in exported["rewards"].values() for value in each.tolist()]


@pytest.mark.parametrize("export", [flow_grpo_sample, verl_omni_rollout, flow_factory_samples])
def test_trainers_get_finite_numbers(export):
    batch = collected()
    forbids = batch.rewards["calm"].clone()
    forbids[1] = -math.inf
    batch = replace(batch, rewards={**batch.rewards, "calm": forbids})
    with pytest.raises(NonFiniteError, match=r"got -inf in 'calm' of row 1 .* pass forbidden="):
        export(batch)
    exported = all_rewards(export(batch, forbidden=-7.0))
    assert -7.0 in exported
    assert all(map(math.isfinite, exported))
    unknown = batch.rewards["mean"].clone()
    unknown[2] = math.nan
    with pytest.raises(NonFiniteError, match="got nan in 'mean' of row 2"):
        export(replace(batch, rewards={"mean": unknown, "calm": batch.rewards["mean"]}), forbidden=-7.0)
    for field in ("x_next", "logp_old"):
        broken = getattr(collected(), field).clone()
        broken[3, -1] = math.nan
        with pytest.raises(NonFiniteError, match="of row 3"):
            export(replace(collected(), **{field: broken}))
    given = torch.zeros(batch.rows)
    given[4] = math.nan
    with pytest.raises(NonFiniteError, match=r"got nan in 'advantages?' of row 4"):
        export(collected(), advantages=given)


@pytest.mark.parametrize("export", [verl_omni_rollout, flow_factory_samples])
@pytest.mark.parametrize("wrong", [lambda x: 2 * x - 1, lambda x: x * math.nan])
def test_images_for_trainers_are_in_their_range(export, wrong):
    images = torch.rand(PROMPTS * ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    export(collected(), images=images)
    with pytest.raises(RewardError, match=r"images in \[0, 1\]"):
        export(collected(), images=wrong(images))
