"""Network rows where they change from level to level: guidance that skips layers for a while, or ends early."""

import diffusers
import pytest
import torch
from tiny_pipelines import WIDTH, build, prepared, sd3, states

import steer
from steer import search
from steer.cost import rows_between


def brightness(images):
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def skipping():
    """SD3 with skip-layer guidance in steps 1 to 7 of 10, the process, and the rows that reach its network."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=WIDTH, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )  # fmt: skip
    pipe = prepared(diffusers.StableDiffusion3Pipeline(**{**sd3().components, "transformer": transformer}))
    rows = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    process = steer.from_pipeline(
        pipe, steps=10, prompt="a cat", height=16, width=16, guidance_scale=5.0, skip_guidance_layers=[1],
        skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.8,
    )  # fmt: skip
    return process, rows


def test_every_level_costs_what_reaches_the_network(skipping):
    process, rows = skipping
    x, reached = states(process, 1, 2), []
    for k in range(process.steps):
        rows.clear()
        process.denoise(x, k)
        reached.append(sum(rows) // 2)
    assert reached == [process.rows_at(k) for k in range(process.steps)] == [2, *[3] * 7, 2, 2]
    assert process.rows == 3
    assert rows_between(process, 0, 10) == 27


def test_solvers_steps_have_their_own_rows(skipping):
    process, rows = skipping
    own = steer.own_solver(process)
    x, reached = states(own, 1, 2), []
    for k in range(own.steps):
        rows.clear()
        own.denoise(x, k)
        reached.append(sum(rows) // 2)
    assert reached == [own.rows_at(k) for k in range(own.steps)]


@pytest.mark.parametrize("method", [steer.smc, search.dts, search.svdd], ids=lambda m: m.__name__)
def test_no_budget_is_exceeded_and_every_row_is_counted(skipping, method):
    process, rows = skipping
    rows.clear()
    result = method(process, brightness, budget=108, key=0)
    assert result.cost.nfe == sum(rows) <= 108
    assert result.cost.nfe >= 54  # and it is used


def test_rows_differentiated_through_are_counted_by_level(skipping):
    process, rows = skipping
    rows.clear()
    result = steer.smc(process, brightness, particles=2, temperature=0.1, proposal=steer.guided(0.1), key=0)
    assert result.cost.nfe == sum(rows) == 2 * 27
    assert result.cost.grads in (2 * 27, 2 * (27 - 2))  # the last step draws nothing and follows no gradient


def test_counting_rows_leaves_predictions_alone():
    """Steps that ran on stubbed networks while opening leave nothing behind."""
    pipe, call = build("wan")
    process = steer.from_pipeline(pipe, steps=4, **call)
    assert [process.rows_at(k) for k in range(4)] == [2] * 4
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
