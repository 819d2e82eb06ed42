"""Images, masks and control beside a prompt; what `steer.verify` finds; what is refused, and how it says so."""

import diffusers
import pytest
import torch
from tiny_pipelines import (
    FAMILIES,
    autoencoder,
    build,
    clip_encoder,
    clip_tokenizer,
    conditional_unet,
    cosmos,
    near,
    prepared,
    process_of,
    states,
    steps_recorded,
)
from tiny_pipelines import sd15 as make_sd15

import steer


def picture(seed=0, rows=1):
    return torch.rand(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_image_to_image_starts_from_the_image():
    pipe = prepared(make_sd15(diffusers.StableDiffusionImg2ImgPipeline))
    call = {"prompt": "a cat", "image": picture(), "strength": 0.5}
    process = steer.from_pipeline(pipe, steps=8, transition=steer.ddim(0.0), **call)
    assert process.steps == 4
    assert process.initial is not None
    mean, std = process.initial
    assert std == pytest.approx(process.levels[0].sigma, rel=1e-4)
    assert float(mean.abs().max()) > 0.1
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    with steps_recorded(pipe) as seen:
        out = pipe(**call, num_inference_steps=8, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    x = seen[0][1][None]
    with torch.no_grad():
        for k in range(process.steps):
            x = process.transition(x, process.denoise(x, k), k).mean
        near(process.decode(x), out)


@pytest.mark.slow
def test_control_images_condition_every_row():
    torch.manual_seed(0)
    unet = conditional_unet()
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    pipe = prepared(
        diffusers.StableDiffusionControlNetPipeline(
            unet=unet,
            controlnet=control,
            vae=autoencoder(),
            text_encoder=clip_encoder(),
            tokenizer=clip_tokenizer(),
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    call = {"prompt": "a cat", "image": picture()}
    process = steer.from_pipeline(pipe, steps=4, **call)
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    x = states(process)
    other = steer.from_pipeline(pipe, steps=4, **{**call, "image": picture(1)})
    assert float((process.denoise(x, 1) - other.denoise(x, 1)).abs().max()) > 1e-5
    late = {**call, "control_guidance_start": 0.5}
    waiting = steer.from_pipeline(pipe, steps=4, **late)  # the loop's own index decides
    bare = steer.from_pipeline(pipe, steps=4, **{**call, "controlnet_conditioning_scale": 0.0})
    near(waiting.denoise(x, 1), bare.denoise(x, 1))
    near(waiting.denoise(x, 2), process.denoise(x, 2))


def test_inpainting_networks_see_mask_and_image():
    """Nine channels: the encoded image is drawn once, and is the same in a batch as for one row."""
    torch.manual_seed(0)
    pipe = make_sd15(diffusers.StableDiffusionInpaintPipeline)
    pipe.unet = conditional_unet(channels=9)
    pipe = prepared(pipe)
    call = {"prompt": "a cat", "image": picture(), "mask_image": (picture(3)[:, :1] > 0.5).float()}
    process = steer.from_pipeline(pipe, steps=4, height=16, width=16, **call)
    assert process.event == (4, 8, 8)
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    x = states(process, 1, 5)
    whole = process.denoise(x, 2)
    near(torch.cat([process.denoise(x[:, :2], 2), process.denoise(x[:, 2:], 2)], 1), whole)


def test_images_belong_to_their_prompts():
    pipe = prepared(make_sd15(diffusers.StableDiffusionInpaintPipeline))
    pipe = prepared(
        diffusers.StableDiffusionInpaintPipeline(
            **{**pipe.components, "unet": prepared_unet(9)},
            requires_safety_checker=False,
        )
    )
    masks = [(picture(i)[:, :1] > 0.5).float()[0] for i in (3, 4)]
    common = {"steps": 4, "height": 16, "width": 16}
    both = steer.from_pipeline(
        pipe, prompt=["a cat", "two dogs"], image=[picture(1)[0], picture(2)[0]], mask_image=masks, **common
    )
    x = states(both, 2, 3)
    together = both.denoise(x, 1)
    for b, prompt in enumerate(("a cat", "two dogs")):
        alone = steer.from_pipeline(pipe, prompt=prompt, image=picture(b + 1), mask_image=masks[b][None], **common)
        near(together[b], alone.denoise(x[b : b + 1], 1)[0])


def prepared_unet(channels):
    torch.manual_seed(1)
    return conditional_unet(channels=channels)


# --- verify, and what is refused -------------------------------------------------------------------------------------


def test_verify_finds_a_network_that_remembers():
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=4, **call)
    forward, seen = pipe.unet.forward, []

    def remembering(sample, *args, **kwargs):
        seen.append(1)
        return (forward(sample, *args, **kwargs)[0] * (1.0 + 0.01 * len(seen)),)

    pipe.unet.forward = remembering
    with pytest.raises(steer.ModelError, match="keeps state from step to step"):
        steer.verify(process)
    with pytest.raises(steer.ModelError, match="calls a network directly"):
        steer.verify(steer.load("digits", steps=3))


def test_verify_finds_rows_that_see_each_other():
    pipe, call = build("flux")
    process = steer.from_pipeline(pipe, steps=4, **call)
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: (
        (out := forward(*args, **kwargs)[0]) + 0.1 * out.mean(0, keepdim=True),
    )
    with pytest.raises(steer.ModelError, match="a row in a batch differs"):
        steer.verify(process)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": 3.0}, "takes no argument guidance"),
        ({"num_images_per_prompt": 4}, "particles="),
        ({"latents": torch.zeros(3, 4, 8, 8)}, "start=steer.from_latents"),
        ({"latents": "noise.pt"}, "one starting point per prompt"),
        ({"callback_on_step_end": print}, "on_step="),
        ({"generator": [torch.Generator()]}, "at most one generator"),
    ],
)
def test_arguments_that_do_not_fit_say_what_does(arguments, message):
    with pytest.raises(steer.ModelError, match=message):
        process_of("sd15", **arguments)


def test_bare_networks_say_who_owns_what():
    pipe, _ = build("ddpm")
    with pytest.raises(steer.ModelError, match=r"got generator, latents; .*start=steer\.from_latents"):
        steer.from_pipeline(pipe, latents=noise(1), generator=torch.Generator())
    process = steer.from_pipeline(pipe, steps=2)
    x = torch.randn(2, *process.event, generator=torch.Generator().manual_seed(0))
    seen = []
    steer.rollout(process, mean, particles=2, start=steer.from_latents(x), on_step=seen.append)
    assert torch.equal(seen[0].state.past[0].x[0], x)


def test_the_cures_are_what_works():
    """The run that each refusal above asks for."""
    process = process_of("sd15", steps=2)
    seen = []
    result = steer.smc(process, mean, particles=3, start=steer.from_latents(noise(3)), on_step=seen.append)
    assert result.reward.shape == (1, 3)
    assert [event.level for event in seen] == [1, 2]


def mean(samples):
    return samples.flatten(1).mean(1)


def noise(rows, seed=0):
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_latents_are_where_the_pipeline_would_start_from_them(name):
    """Euler scales them, FLUX takes them packed: the pipeline's own run with the same latents is the reference."""
    pipe, call = build(name)
    given = noise(1) if name != "flux" else torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    process = steer.from_pipeline(pipe, steps=3, transition=steer.ddim(0.0), latents=given, **call)
    assert process.initial is not None
    assert process.initial[1] == 0.0
    with steps_recorded(pipe) as seen:
        output = pipe(**call, latents=given.clone(), num_inference_steps=3, output_type="pt", return_dict=False)[0]
    assert torch.equal(process.prior(steer.Key(0), 1, 2)[0], seen[0][1].expand(2, *seen[0][1].shape[1:]))
    result = steer.rollout(process, mean, particles=1)
    near(process.decode(result.x), output)
    assert steer.verify(process)[:2] == (3, 0.0)


def test_latents_of_their_own_for_every_particle():
    pipe, call = build("sdxl")
    call["prompt"] = ["a cat", "two dogs"]
    process = steer.from_pipeline(pipe, steps=2, **call)
    rows = noise(6)
    start = steer.from_latents(rows)
    x = start(process, None, steer.Key(0), 2, 3).x
    scale = process.levels[0].sigma ** 2 + 1.0  # of Euler's spacing "leading"
    near(x.flatten(0, 1), rows * scale**0.5)
    assert torch.equal(start(process, None, steer.Key(0).shifted(slot=1), 2, 2).x, x[:, 1:])  # a later chunk
    with pytest.raises(steer.ShapeError, match="height, width"):
        steer.from_latents(torch.zeros(6, 4, 5, 5))(process, None, steer.Key(0), 2, 3)
    with pytest.raises(steer.ShapeError, match="particles=3"):
        start(process, None, steer.Key(0), 2, 4)
    one = steer.from_pipeline(pipe, steps=2, latents=rows[:2], **call)
    near(one.prior(steer.Key(0), 2, 3)[:, 2], rows[:2] * scale**0.5)
    plain = steer.models.gaussian([0.0, 0.0], 1.0, steps=3)
    assert steer.from_latents(torch.ones(4, 2))(plain, None, steer.Key(0), 2, 2).x.shape == (2, 2, 2)


def test_a_pipeline_that_steps_twice_is_refused_in_words():
    """Cosmos asks its scheduler for x_0, guides that, and steps again."""
    pipe, (_, call) = prepared(cosmos()), FAMILIES["ltx"]
    with pytest.raises(steer.ModelError, match=r"scheduler\.step twice in a step.*steer\.from_velocity"):
        steer.from_pipeline(pipe, steps=4, **call)


def test_a_pipeline_of_pipelines_names_them():
    class Combined(diffusers.DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    pipe, call = build("sd15")
    combined = Combined(pipe.unet, pipe.scheduler)
    combined.decoder_pipe = pipe
    with pytest.raises(steer.ModelError, match=r"Combined runs other pipelines.*pipe\.decoder_pipe"):
        steer.from_pipeline(combined, **call)


def test_the_pipelines_own_complaints_are_passed_on():
    with pytest.raises(ValueError, match="divisible by 8"):
        process_of("sd15", height=13)


def test_caches_are_refused():
    pipe, call = build("flux")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(steer.ModelError, match="disable_cache"):
        steer.from_pipeline(pipe, **call)


def test_a_generator_fixes_what_the_prelude_draws():
    pipe = prepared(make_sd15(diffusers.StableDiffusionImg2ImgPipeline))
    call = {"prompt": "a cat", "image": picture(), "strength": 0.5, "steps": 4}
    means = [
        steer.from_pipeline(pipe, generator=torch.Generator().manual_seed(seed), **call).initial[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])
