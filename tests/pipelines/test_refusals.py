"""What cannot be honoured is refused by a named error, before anything runs."""

import diffusers
import pytest
import torch
from tiny_pipelines import autoencoder, build, clip_encoder, clip_tokenizer, prepared, process_of, sd15, states

import steer

PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt must hold a text for every problem"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": -1}, "chunk must be at least 1"),
        ({"chunk": 2.5}, "chunk is a whole number, got 2.5"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": -1}, "steps must be at least 1"),
        ({"steps": 3.0}, "steps is a whole number"),
        ({"num_inference_steps": 3}, "give steps= instead"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "give the sampler on_step="),
        ({"steps": 5, "timesteps": [900, 500, 100]}, "steps=5 and 3 timesteps say different things"),
    ],
    ids=str,
)
def test_arguments_are_refused(options, message):
    with pytest.raises(steer.SteerError, match=message):
        process_of("sd15", **options)


def test_a_bare_unet_says_what_to_give_instead():
    pipe = build("ddpm")[0]
    for options in ({"steps": 0}, {"chunk": 0}):
        with pytest.raises(steer.SteerError, match="at least 1"):
            steer.from_pipeline(pipe, **options)
    with pytest.raises(steer.ModelError, match="give steps= for the number of steps, transition= for their noise"):
        steer.from_pipeline(pipe, num_inference_steps=3, eta=0.5)


def test_the_pipelines_own_timesteps_set_the_number_of_steps():
    pipe, call = build("sd15")
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    process = steer.from_pipeline(pipe, timesteps=[900, 500, 100], **call)
    assert process.steps == 3
    assert process.denoiser.grid.timesteps == (900.0, 500.0, 100.0)


@pytest.mark.parametrize("options", [{"strength": 0.01, "steps": 10}, {"steps": 1}], ids=str)
def test_a_strength_that_leaves_no_step_is_named(options):
    pipe = prepared(sd15(diffusers.StableDiffusionImg2ImgPipeline))
    with pytest.raises(steer.ModelError, match="leaves StableDiffusionImg2ImgPipeline no step to take"):
        steer.from_pipeline(pipe, prompt="a cat", image=PICTURE, **options)


def test_cropped_inpainting_is_refused():
    pipe = prepared(sd15(diffusers.StableDiffusionInpaintPipeline))
    with pytest.raises(steer.ModelError, match="crop image and mask_image yourself"):
        steer.from_pipeline(
            pipe,
            steps=3,
            prompt="a",
            image=PICTURE,
            mask_image=PICTURE[:, :1],
            padding_mask_crop=4,
            height=16,
            width=16,
        )


def test_free_noise_is_refused():
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        **blocks, sample_size=8, in_channels=4, out_channels=4, cross_attention_dim=32, norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    pipe = prepared(
        diffusers.AnimateDiffPipeline(
            unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False), vae=autoencoder(), motion_adapter=adapter,
            text_encoder=clip_encoder(), tokenizer=clip_tokenizer(), feature_extractor=None, image_encoder=None,
        )
    )  # fmt: skip
    pipe.enable_free_noise(context_length=4, context_stride=2)
    with pytest.raises(steer.ModelError, match="disable_free_noise"):
        steer.from_pipeline(pipe, steps=3, prompt="a", num_frames=8, height=16, width=16)


def test_pipelines_over_tokens_and_modular_ones_are_named():
    tokens = diffusers.LLaDA2Pipeline(model=None, scheduler=diffusers.BlockRefinementScheduler(), tokenizer=None)
    with pytest.raises(steer.ModelError, match=r"BlockRefinementScheduler of LLaDA2Pipeline steps tokens.*from_logits"):
        steer.from_pipeline(tokens, steps=3, prompt="a")
    with pytest.raises(steer.ModelError, match="FluxModularPipeline is a modular pipeline"):
        steer.from_pipeline(diffusers.FluxModularPipeline(), steps=3, prompt="a")


def test_a_loop_of_two_schedulers_is_named():
    class WithSound(diffusers.StableDiffusionPipeline):
        @property
        def components(self):
            return super().components | {"audio_scheduler": self.scheduler}

    pipe, call = sd15(WithSound), {"prompt": "a cat"}
    with pytest.raises(steer.ModelError, match=r"steps by 2 schedulers \(scheduler, audio_scheduler\)"):
        steer.from_pipeline(pipe, steps=3, **call)


def test_an_unknown_scheduler_is_named_before_a_network_runs():
    pipe, call = build("sd15")
    pipe.scheduler, pipe.unet.forward = diffusers.CMStochasticIterativeScheduler(), None
    with pytest.raises(steer.ModelError, match="noise levels of CMStochasticIterativeScheduler are not known"):
        steer.from_pipeline(pipe, steps=3, **call)


@pytest.mark.parametrize(("strength", "largest"), [(0.1, 20.0), (0.2, 4.0), (0.3, 4.0), (0.8, 4.0)])
def test_image_to_image_opens_in_bfloat16(strength, largest):
    """Image latents as large as real autoencoders' (up to 4), beside which bfloat16 rounds the noise by 1 or 2%."""
    means, stds = [], []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = prepared(sd15(diffusers.StableDiffusionImg2ImgPipeline))
        image = largest * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 2.5
        process = steer.from_pipeline(pipe.to(dtype), steps=20, prompt="a", image=image, strength=strength)
        mean, std = process.initial
        means.append(mean)
        stds.append(std)
    # The pipeline rounds alpha^2 to bfloat16, by up to 2^-9: its own start has another std, by up to 2^-10 / std^2.
    assert stds[1] == pytest.approx(stds[0], rel=2**-8 + 2**-10 / stds[0] ** 2)
    torch.testing.assert_close(means[1], means[0], rtol=2**-7, atol=0.02)


def test_starts_that_are_not_one_normal_are_still_refused():
    """The tolerance of half precision hides no second standard deviation."""
    pipe, call = build("sd15")
    pipe.to(torch.bfloat16)
    prepare = type(pipe).prepare_latents

    def uneven(*args, **kwargs):
        latents = prepare(pipe, *args, **kwargs)
        latents[..., 0] *= 1.1
        return latents

    pipe.prepare_latents = uneven
    with pytest.raises(steer.ModelError, match="must start from Gaussian latents of one standard deviation"):
        steer.from_pipeline(pipe, steps=3, **call)


def test_a_text_encoders_adapter_takes_effect_at_once():
    peft = pytest.importorskip("peft")
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=3, **call)
    x = states(process)
    bare = process.denoise(x, 1)
    config = peft.LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.text_encoder, "style")
    full = process.denoise(x, 1)
    layers = [
        layer for layer in pipe.text_encoder.modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    for layer in layers:
        layer.set_scale("style", 0.1)
    weak = process.denoise(x, 1)
    with torch.no_grad():
        assert steer.verify(process).prediction == 0.0
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(process.denoise(x, 1), bare)
    assert float((full - bare).abs().max()) > float((weak - bare).abs().max()) > 1e-5


def test_a_text_encoders_weights_take_effect_at_once():
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=3, **call)
    x = states(process)
    before, runs = process.denoise(x, 1), []
    pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    process.denoise(x, 0)
    assert not runs
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(1.5)
    assert float((process.denoise(x, 1) - before).abs().max()) > 1e-5
    assert runs
