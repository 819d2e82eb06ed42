"""Pipelines of diffusers through steer: the same pictures, the pipeline untouched, and the embedded models."""

import dataclasses

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

import steer
from steer.core.trajectory import Trajectory


def tiny_unet(classes=None):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    )
    return net.eval().requires_grad_(False)


def pictures(process, latents):
    """The chain from given latents (M, C, H, W), decoded."""
    start = Trajectory.begin(process, latents[None])
    result = steer.smc(
        process,
        lambda x: x.flatten(1).mean(1),
        start=start,
        temperature=float("inf"),
        selection=steer.resample(threshold=0.0),
    )
    return result.decoded


def diffusers_pictures(pipe, seed, count, steps, **options):
    images = pipe(
        batch_size=count,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        output_type="np",
        **options,
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("alpha_to_one", [True, False])
def test_eta_zero_is_diffusers_own_ddim(prediction, clip, spacing, alpha_to_one):
    scheduler = DDIMScheduler(
        prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing, set_alpha_to_one=alpha_to_one
    )
    pipe = DDIMPipeline(tiny_unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = diffusers_pictures(pipe, 1, 3, 10, eta=0.0)
    process = steer.from_pipeline(pipe, steps=10, transition=steer.ddim(0.0))
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ours, tolerance = pictures(process, latents), 1e-5
    if prediction == "epsilon" and clip:
        # x_0 from eps divides by alpha = .006, which magnifies float32's rounding 160-fold, and clipping keeps it: here
        # diffusers' own pictures are some 1e-5 to 6e-5 from the same chain in float64, and so may ours be.
        pipe.unet.double()
        exact = steer.from_pipeline(pipe, steps=10, transition=steer.ddim(0.0))
        truth = pictures(dataclasses.replace(exact, dtype=torch.float64), latents.double())
        rounding = float((theirs - truth).abs().max())
        assert rounding < 1e-4
        tolerance += 2.0 * rounding
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_step_ends_where_the_next_begins(spacing):
    """At 12 steps diffusers' DDIM steps to t - 83, off its own grid of spacing 91 or 83.3; steer keeps to the grid."""
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing=spacing, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    process = steer.from_pipeline(pipe, steps=12, transition=steer.ddim(0.0))
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    gap = (pictures(process, latents) - diffusers_pictures(pipe, 1, 3, 12, eta=0.0)).abs().max()
    assert 1e-4 < float(gap) < 0.6
    assert len(set(process.times)) == 13


def test_a_flow_pipeline_is_diffusers_own_euler():
    for shift in (1.0, 3.0):
        pipe = DDPMPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler(shift=shift))
        pipe.set_progress_bar_config(disable=True)
        theirs = diffusers_pictures(pipe, 2, 2, 10)
        process = steer.from_pipeline(pipe, steps=10, transition=steer.ode())
        latents = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(pictures(process, latents), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_steps_have_diffusers_ddpm_mean_and_std(clip):
    """Every step of DDPM, its noise replaced by 0 and by 1."""
    scheduler = DDPMScheduler(clip_sample=clip)
    pipe = DDPMPipeline(tiny_unet(), scheduler)
    process = steer.from_pipeline(pipe, steps=10)
    scheduler.set_timesteps(10)
    x = torch.randn(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for k, t in enumerate(scheduler.timesteps):
        law = process.transition(x, process.denoise(x, k), k)
        out = pipe.unet(x[0], t).sample
        drawn = [scheduler.step(out, t, x[0], generator=torch.Generator().manual_seed(i)).prev_sample for i in (5, 6)]
        noises = [torch.randn(x[0].shape, generator=torch.Generator().manual_seed(i)) for i in (5, 6)]
        for sample, noise in zip(drawn, noises, strict=True):
            torch.testing.assert_close(law.mean[0] + law.std * noise, sample, rtol=0, atol=2e-5)


def test_the_pipeline_is_left_as_it_was():
    pipe = DDIMPipeline(tiny_unet(), DDIMScheduler())
    before = {name: value for name, value in vars(pipe.scheduler).items() if not torch.is_tensor(value)}
    process = steer.from_pipeline(pipe, steps=5)
    steer.smc(process, lambda x: x.mean((1, 2, 3)), particles=2)
    assert {name: value for name, value in vars(pipe.scheduler).items() if not torch.is_tensor(value)} == before


def test_chunks_do_not_change_the_network():
    pipe = DDIMPipeline(tiny_unet(classes=4), DDIMScheduler())
    x = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, pieces = (
        steer.from_pipeline(pipe, steps=5, class_labels=[1, 2], guidance_scale=2.0, chunk=chunk) for chunk in (256, 3)
    )
    torch.testing.assert_close(whole.denoise(x, 2), pieces.denoise(x, 2), rtol=1e-5, atol=1e-5)


def test_labels_belong_to_problems_and_guidance_is_counted():
    pipe = DDIMPipeline(tiny_unet(classes=4), DDIMScheduler())
    x = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    both = steer.from_pipeline(pipe, steps=5, class_labels=[0, 2])
    assert both.problems == 2
    for b, label in enumerate((0, 2)):
        alone = steer.from_pipeline(pipe, steps=5, class_labels=label)
        torch.testing.assert_close(both.denoise(x, 1)[b], alone.denoise(x[b : b + 1], 1)[0], rtol=1e-5, atol=1e-5)
    guided = steer.from_pipeline(pipe, steps=5, class_labels=[0, 2], guidance_scale=3.0)
    null = steer.from_pipeline(pipe, steps=5)
    expected = null.denoise(x, 1) + 3.0 * (both.denoise(x, 1) - null.denoise(x, 1))
    torch.testing.assert_close(guided.denoise(x, 1), expected, rtol=1e-4, atol=1e-4)
    assert steer.rollout(guided, lambda x: x.mean((1, 2, 3)), particles=3).cost.nfe == 2 * 2 * 3 * 5


def test_errors_name_what_is_served():
    class Other:
        unet, scheduler = object(), object()

    with pytest.raises(steer.ModelError, match="UNet2DModel"):
        steer.from_pipeline(Other())
    with pytest.raises(steer.ModelError, match="no class embedding"):
        steer.from_pipeline(DDIMPipeline(tiny_unet(), DDIMScheduler()), class_labels=1)
    with pytest.raises(steer.ShapeError, match=r"\[0, 3\]"):
        steer.from_pipeline(DDIMPipeline(tiny_unet(classes=4), DDIMScheduler()), class_labels=7)
    with pytest.raises(steer.ModelError, match="digits"):
        steer.load("letter")


@pytest.mark.parametrize("name", ["digits", "digits-flow"])
def test_embedded_models_draw_the_digit_asked_for(name):
    """Of 40 conditional samples the held-out judge recognises at least 36 (measured share above 0.99)."""
    from steer import rewards

    process = steer.load(name, steps=20, labels=list(range(10)))
    result = steer.rollout(process, lambda x: x.mean((1, 2, 3)), particles=4, key=0, keep_states=False)
    seen = torch.stack([rewards.judge(digit)(result.decoded) for digit in range(10)], 1).argmax(1)
    assert int((seen == torch.arange(10).repeat_interleave(4)).sum()) >= 36


def test_a_digit_run_on_another_path_draws_digits_too():
    """The diffusion model as a flow and the flow model as a VP diffusion."""
    from steer import rewards

    for name, path in (("digits", steer.RectifiedFlow()), ("digits-flow", steer.VP())):
        process = steer.convert(steer.load(name, steps=25, labels=7), path)
        result = steer.rollout(process, lambda x: x.mean((1, 2, 3)), particles=12, key=0)
        assert float(rewards.judge(7)(result.decoded).mean()) > 0.8
