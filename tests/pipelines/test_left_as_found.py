"""What a pipeline changes in its own modules while it runs is put back, however steer's call of it ends."""

import diffusers
import pytest
import torch
from tiny_pipelines import build, clip_encoder, prepared, sd15, states

import steer
from steer.pipelines.module_state import WatchedModules


def watched(pipe):
    return WatchedModules(part for part in pipe.components.values() if isinstance(part, torch.nn.Module))


def run(pipe, call, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=2, output_type="pt", generator=generator, **options).images


def perturbed():
    """Perturbed-attention guidance, which sets other attention processors for the length of a call."""
    torch.manual_seed(0)
    pipe = prepared(sd15(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["up"]))
    return pipe, {"prompt": "a cat", "height": 16, "width": 16, "guidance_scale": 5.0}


def test_perturbed_attention_is_gone_after_every_call():
    pipe, call = perturbed()
    plain = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    expected = run(plain, call)
    modules = watched(pipe)
    before = modules.read()
    process = steer.from_pipeline(pipe, steps=3, pag_scale=3.0, **call)
    assert modules.changes(before) == []
    x = states(process)
    with torch.no_grad():
        process.decode(process.denoise(x, 1))
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    assert modules.changes(before) == []
    assert torch.equal(run(plain, call), expected)


def test_a_failing_network_leaves_no_processors_behind():
    pipe, call = perturbed()
    process = steer.from_pipeline(pipe, steps=3, pag_scale=3.0, **call)
    x, modules = states(process), watched(pipe)
    handle = pipe.unet.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    before = modules.read()
    with pytest.raises(torch.OutOfMemoryError):
        process.denoise(x, 1)
    assert modules.changes(before) == []
    handle.remove()


def half_sdxl():
    """SDXL in float16, whose decoder is moved to float32 for the length of a call."""
    pipe, call = build("sdxl")
    pipe.to(torch.float16)
    return pipe, call


def test_an_upcast_decoder_is_float16_again_after_memory_ran_out():
    pipe, call = half_sdxl()
    process = steer.from_pipeline(pipe, steps=3, **call)
    x, decode, modules = states(process, 1, 4), pipe.vae.decode, watched(pipe)
    before = modules.read()
    expected = process.decode(x)

    def small(latents, *args, **kwargs):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = small
    torch.testing.assert_close(process.decode(x), expected, rtol=0, atol=2e-3)  # pictures in float16, other batches
    del pipe.vae.decode
    assert modules.changes(before) == []
    assert run(pipe, call).isfinite().all()


def test_text_encoder_scales_are_restored_where_encoding_fails():
    peft = pytest.importorskip("peft")
    pipe, call = build("sd15")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.text_encoder, "style")
    modules, broken = watched(pipe), pipe.text_encoder.forward

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    pipe.text_encoder.forward = fails
    before = modules.read()
    with pytest.raises(torch.OutOfMemoryError):
        steer.from_pipeline(pipe, steps=3, cross_attention_kwargs={"scale": 0.3}, **call)
    assert modules.changes(before) == []
    pipe.text_encoder.forward = broken


CHANGES = {
    "processors": lambda unet: unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor()),
    "dtypes": lambda unet: unet.conv_in.to(torch.bfloat16),
    "configs": lambda unet: unet.register_to_config(sample_size=7),
    "training": lambda unet: unet.up_blocks.train(),
    "hooks": lambda unet: diffusers.hooks.HookRegistry.check_if_exists_or_initialize(unet.mid_block).register_hook(
        diffusers.hooks.ModelHook(), "skip"
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_kind_of_change_is_named_and_undone(name):
    pipe, _ = build("sd15")
    modules = watched(pipe)
    before = modules.read()
    with modules.left_as_found():
        CHANGES[name](pipe.unet)
        assert modules.changes(before) == [name]
    assert modules.changes(before) == []


def test_hooks_that_transformers_adds_at_a_first_call_stay():
    """Its encoders return hidden states by forward hooks, which they add once; SDXL reads them."""
    pipe, call = build("sdxl")
    steer.from_pipeline(pipe, steps=2, **call)
    steer.from_pipeline(pipe, steps=2, **call)
    assert run(pipe, call).isfinite().all()


def test_adapter_scales_of_an_adapter_added_later_are_undone():
    peft = pytest.importorskip("peft")
    encoder = clip_encoder()
    modules = WatchedModules([encoder])
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, encoder, "style")
    before, answers = modules.read(), modules.answers()
    diffusers.utils.scale_lora_layers(encoder, 0.5)
    assert modules.changes(before) == ["adapter_scales"]
    assert modules.answers() != answers
    modules.restore(before)
    assert modules.changes(before) == []
    assert modules.answers() == answers
