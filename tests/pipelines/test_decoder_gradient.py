"""Gradients through what pipelines do after their autoencoder, and through one that is upcast meanwhile."""

import logging

import diffusers
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_pipelines import build, near, prepared, sd15, states

import steer


def with_checker(flagged):
    """SD 1.5 with its safety checker, which passes every picture or blackens those brighter than a limit."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 64, "projection_dim": 16},
        vision_config={**small, "image_size": 32, "patch_size": 16, "projection_dim": 16},
        projection_dim=16,
    )
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    parts = {"safety_checker": StableDiffusionSafetyChecker(config), "feature_extractor": extractor}
    pipe = prepared(diffusers.StableDiffusionPipeline(**{**sd15().components, **parts}, requires_safety_checker=True))
    with torch.no_grad():
        pipe.safety_checker.concept_embeds_weights.fill_(-10.0 if flagged else 10.0)
        pipe.safety_checker.special_care_embeds_weights.fill_(10.0)
    return pipe, {"prompt": "a cat", "height": 16, "width": 16, "guidance_scale": 4.0}


def gradient(process, x):
    y = x.clone().requires_grad_()
    picture = process.decode(y)
    return picture, torch.autograd.grad(picture.float().square().sum(), y)[0]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_checker_that_passes_a_picture_passes_its_gradient(checkpoint):
    pipe, call = with_checker(flagged=False)
    process = steer.from_pipeline(pipe, steps=3, checkpoint_decode=checkpoint, **call)
    pipe.safety_checker = None
    unchecked = steer.from_pipeline(pipe, steps=3, **call)
    x = states(process, 1, 2)
    for ours, theirs in zip(gradient(process, x), gradient(unchecked, x), strict=True):
        assert torch.equal(ours, theirs)


def test_a_blackened_picture_has_no_gradient_and_is_reported(caplog):
    pipe, call = with_checker(flagged=True)
    process = steer.from_pipeline(pipe, steps=3, **call)
    x = states(process, 1, 3)
    with caplog.at_level(logging.WARNING, "steer"):
        picture, slope = gradient(process, x)
    assert not bool(picture.any())
    assert not bool(slope.any())
    message = next(record.getMessage() for record in caplog.records if "safety checker" in record.getMessage())
    assert "replaced 3 of the 3 pictures" in message
    assert "safety_checker=None" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "steer"):
        process.decode(x[:, :1])
        assert "replaced 4 of the 4 pictures" in caplog.text
        caplog.clear()
        process.decode(x)
        assert not [
            record for record in caplog.records if record.name == "steer"
        ]  # said again only when there are twice as many


class Watermark:
    """Writes into the lowest bit, in numpy, as diffusers' own does."""

    def apply_watermark(self, images):
        pixels = (255 * (images / 2 + 0.5)).round().numpy()
        return torch.from_numpy(2 * (pixels / 255) - 1).clamp(-1, 1)


def test_a_watermark_passes_the_gradient_of_the_picture():
    pipe, call = build("sdxl")
    pipe.watermark = Watermark()
    process = steer.from_pipeline(pipe, steps=3, **call)
    assert steer.verify(process).output == 0.0
    pipe.watermark = None
    bare = steer.from_pipeline(pipe, steps=3, **call)
    x = states(process, 1, 2)
    marked, plain = process.decode(x), bare.decode(x)
    assert 0.0 < float((marked - plain).abs().max()) < 0.01
    # A pixel that the watermark rounds to black or white stands at the edge of the pipeline's clamp, and has none.
    inside = ((marked > 0.0) & (marked < 1.0)).double()

    def slope(opened):
        y = x.clone().requires_grad_()
        return torch.autograd.grad((inside * opened.decode(y)).sum(), y)[0]

    near(slope(process), slope(bare), 1e-5)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_upcast_decoder_has_the_gradient_of_float32(checkpoint):
    pipe, call = build("sdxl")
    x = states(steer.from_pipeline(pipe, steps=3, **call), 1, 2).half().float()
    pipe.to(torch.float16)
    process = steer.from_pipeline(pipe, steps=3, checkpoint_decode=checkpoint, **call)
    _, ours = gradient(process, x)
    assert pipe.vae.dtype == torch.float16
    pipe.vae.to(torch.float32)
    _, theirs = gradient(steer.from_pipeline(build_like(pipe), steps=3, **call), x)
    near(ours, theirs, 2e-3)  # latents and pictures pass through float16 on one side


def build_like(pipe):
    """The same pipeline in float32 with the same (rounded) weights."""
    return diffusers.StableDiffusionXLPipeline(**pipe.components, add_watermarker=False).to(torch.float32)


def test_guided_sampling_runs_through_all_of_them():
    pipe, call = with_checker(flagged=False)
    for process in (
        steer.from_pipeline(pipe, steps=2, **call),
        steer.from_pipeline(build("sdxl")[0].to(torch.float16), steps=2, **build("sdxl")[1]),
    ):
        result = steer.smc(
            process, lambda x: x.flatten(1).mean(1), particles=2, temperature=0.1, proposal=steer.guided(0.5), key=0
        )
        assert result.cost.grads > 0


def test_a_decoder_that_leaves_torch_is_named():
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=3, **call)
    decode = pipe.vae.decode
    x = states(process).requires_grad_()
    cases = {
        "requires grad": lambda z, **options: decode(torch.from_numpy(z.numpy()), **options),
        "its output has none": lambda z, **options: decode(z.detach(), **options),
    }
    for reason, broken in cases.items():
        pipe.vae.decode = broken
        with pytest.raises(steer.errors.NotDifferentiableError, match=reason):
            process.decode(x)
    del pipe.vae.decode
