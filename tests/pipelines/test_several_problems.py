"""Several prompts in one process: each as it is alone, with its own images, masks and other arguments."""

import contextlib

import diffusers
import numpy
import PIL.Image
import pytest
import torch
from tiny_pipelines import WIDTH, build, embeddings, near, prepared, sd15, steps_recorded
from tiny_pipelines import conditional_unet as unet_of
from tiny_pipelines import flux as make_flux

import steer
from steer.pipelines import preparation, several_problems
from steer.pipelines.argument_division import blanked, divided, possible_divisions
from steer.pipelines.from_pipeline import PipelineDenoiser
from steer.pipelines.module_state import WatchedModules
from steer.pipelines.network_proxy import NetworkProxy
from steer.pipelines.row_composition import composed_of

PROMPTS = ["a", "a very long prompt about many things"]


def pictures(rows=2, seed=0, size=16):
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def masks():
    return (pictures(seed=3)[:, :1] > 0.5).float()


def photograph(seed, size=64):
    return PIL.Image.fromarray((as_numpy(pictures(1, seed, size))[0] * 255).astype("uint8"))


def as_numpy(images):
    return images.permute(0, 2, 3, 1).numpy()


def processed_alone(pipe, steps, calls):
    return [steer.from_pipeline(pipe, steps=steps, **call) for call in calls]


def differences(both, alone, k=1, particles=2):
    """Largest difference of each problem's predictions from the process of that problem, relative."""
    x = both.prior(steer.Key(0), len(alone), particles)
    with torch.no_grad():
        together = both.denoise(x, k)
        own = [process.denoise(x[b : b + 1], k)[0] for b, process in enumerate(alone)]
    return [float((together[b] - own[b]).abs().max() / own[b].abs().max()) for b in range(len(alone))]


# --- prompts of different lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "particles"), [("sana", 1), ("ltx", 2), ("sd15", 2)])
def test_prompts_of_different_length_are_each_alone(name, particles):
    pipe, call = build(name)
    both = steer.from_pipeline(pipe, steps=3, **{**call, "prompt": PROMPTS})
    alone = processed_alone(pipe, 3, [{**call, "prompt": prompt} for prompt in PROMPTS])
    assert max(differences(both, alone, 1, particles)) < 1e-5
    assert several_problems.may_share(both.denoiser.call, (0, 1), 2) == (name == "sd15")


def test_embeddings_and_their_masks_stay_together():
    pipe, call = build("qwen")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 6:] = 0
    call |= {"prompt_embeds": embeddings(2), "prompt_embeds_mask": mask}
    both = steer.from_pipeline(pipe, steps=3, **call)
    own = [{**call, "prompt_embeds": embeddings(2)[b : b + 1], "prompt_embeds_mask": mask[b : b + 1]} for b in range(2)]
    assert max(differences(both, processed_alone(pipe, 3, own))) < 1e-5


def test_rows_of_inputs_are_compared():
    p, q = torch.arange(6.0).view(2, 3), torch.arange(10.0, 16.0).view(2, 3)
    assert composed_of([torch.cat([p, q])], [[p], [q]], 2)
    assert composed_of({"x": torch.cat([p[:1], q[:1], p[1:], q[1:]])}, [{"x": p}, {"x": q}], 1)  # guidance branches
    assert not composed_of([torch.stack([p[0], q[0], p[1], q[1]])], [[p], [q]], 2)  # p0, q0, p1, q1
    assert not composed_of([torch.cat([p, q])], [[p], [q + 1e-3]], 2)
    assert composed_of([[p[0], q[0]], 3], [[[p[0]], 3], [[q[0]], 3]], 1)  # a list with an item per row
    assert not composed_of([3], [[3], [4]], 1)
    assert not composed_of([torch.ones(2, 4)], [[torch.ones(1, 3)], [torch.ones(1, 4)]], 1)  # padded to the longest


# --- images, masks and other arguments -------------------------------------------------------------------------------


def inpainting(channels):
    torch.manual_seed(0)
    pipe = sd15(diffusers.StableDiffusionInpaintPipeline)
    pipe.unet = unet_of(channels=channels)
    return prepared(pipe), {"image": pictures(), "mask_image": masks(), "height": 16, "width": 16}


def instructed():
    torch.manual_seed(0)
    parts = {**sd15().components, "unet": unet_of(channels=8)}
    del parts["image_encoder"]
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    return prepared(kind(**parts, requires_safety_checker=False)), {"image": pictures()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("4 channels", "tensor"), ("9 channels", "numpy"), ("instructed", "list")])
def test_images_in_one_tensor_belong_to_their_prompts(kind, form):
    pipe, call = instructed() if kind == "instructed" else inpainting(int(kind[0]))
    parts = {"tensor": lambda x: x, "numpy": as_numpy, "list": list}
    given = {name: parts[form](value) if torch.is_tensor(value) else value for name, value in call.items()}
    both = steer.from_pipeline(pipe, steps=3, prompt=PROMPTS, **given)
    one = [{n: v[b : b + 1] if torch.is_tensor(v) else v for n, v in call.items()} for b in range(2)]
    alone = processed_alone(pipe, 3, [{"prompt": PROMPTS[b], **one[b]} for b in range(2)])
    assert max(differences(both, alone)) < 1e-5
    assert max(differences(both, alone[::-1])) > 1e-3


@pytest.mark.slow
def test_reference_images_are_for_every_prompt():
    pipe, call = build("flux2")
    call |= {"prompt_embeds": embeddings(2), "image": [photograph(1), photograph(2)], "height": 16, "width": 16}
    process = steer.from_pipeline(pipe, steps=3, **call)
    assert process.denoiser.call.conditioning.division["image"] == "whole"
    with steps_recorded(pipe) as seen:
        pipe(**call, num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0))
    near(process.denoiser.output(seen[0][1][:, None], 0)[:, 0], seen[0][0])


@pytest.mark.slow
def test_two_control_networks_with_two_prompts():
    torch.manual_seed(0)
    base = sd15()
    make = diffusers.ControlNetModel.from_unet
    nets = [make(base.unet, conditioning_embedding_out_channels=(4, 8)) for _ in range(2)]
    kind = diffusers.StableDiffusionControlNetPipeline
    pipe = prepared(kind(**base.components, controlnet=nets, requires_safety_checker=False))
    images, scales = [pictures(1, 1), pictures(1, 2)], [1.0, 0.5]
    shared = steer.from_pipeline(pipe, steps=2, prompt=PROMPTS, image=images, controlnet_conditioning_scale=scales)
    assert shared.denoiser.call.conditioning.division["image"] == "whole"
    assert shared.denoiser.call.conditioning.division["controlnet_conditioning_scale"] == "whole"
    inside = {"image": [pictures(2, 1), pictures(2, 2)], "controlnet_conditioning_scale": scales}  # a row per prompt
    own = [{**inside, "image": [image[b : b + 1] for image in inside["image"]]} for b in range(2)]
    alone = processed_alone(pipe, 3, [{"prompt": PROMPTS[b], **own[b]} for b in range(2)])
    assert max(differences(steer.from_pipeline(pipe, steps=3, prompt=PROMPTS, **inside), alone)) < 1e-5


class Moody(diffusers.StableDiffusionPipeline):
    """Takes a mood for every prompt, under a name that says nothing, and shares that tell nothing of prompts."""

    def __call__(
        self, prompt=None, moods=None, blend=None, height=16, width=16, num_inference_steps=3, num_images_per_prompt=1,
        generator=None, output_type="pt", return_dict=True,
    ):  # fmt: skip
        prompts = [prompt] if isinstance(prompt, str) else prompt
        embeds = self.encode_prompt(prompts, "cpu", 1, False)[0]
        factors = torch.tensor((moods or [1.0])[: len(prompts)]) * sum(blend or [1.0])
        return super().__call__(
            prompt_embeds=embeds * factors[:, None, None], height=height, width=width, guidance_scale=1.0,
            num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt, generator=generator,
            output_type=output_type, return_dict=return_dict,
        )  # fmt: skip


def moody():
    torch.manual_seed(0)
    return prepared(sd15(Moody)), {"prompt": PROMPTS, "moods": [1.0, -2.0], "blend": [0.5, 1.5]}


def test_arguments_of_any_name_are_divided_by_what_they_do():
    pipe, call = moody()
    both = steer.from_pipeline(pipe, steps=3, **call)
    assert both.denoiser.call.conditioning.division == {"prompt": "entries", "moods": "entries", "blend": "whole"}
    own = [{"prompt": PROMPTS[b], "moods": [call["moods"][b]], "blend": call["blend"]} for b in range(2)]
    assert max(differences(both, processed_alone(pipe, 3, own))) < 1e-5


class Lyrical(Moody):
    """Takes lyrics, which it pads to the longest of a call, and reads the padding."""

    def __call__(
        self, prompt=None, lyrics=None, height=16, width=16, num_inference_steps=3, num_images_per_prompt=1,
        generator=None, output_type="pt", return_dict=True,
    ):  # fmt: skip
        longest = max(map(len, lyrics))
        return super().__call__(
            prompt, [len(words) + 0.1 * (longest - len(words)) for words in lyrics], height=height, width=width,
            num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt, generator=generator,
            output_type=output_type, return_dict=return_dict,
        )  # fmt: skip


def test_lyrics_that_a_call_pads_are_each_prompts_own_and_no_fault():
    torch.manual_seed(0)
    pipe, lyrics = prepared(sd15(Lyrical)), ["la", "la la la"]
    both = steer.from_pipeline(pipe, steps=2, prompt=PROMPTS, lyrics=lyrics)
    own = [{"prompt": PROMPTS[b], "lyrics": [lyrics[b]]} for b in range(2)]
    assert max(differences(both, processed_alone(pipe, 2, own))) < 1e-5
    assert steer.verify(both, steps=2).prediction < 1e-5


def test_what_cannot_be_told_is_refused():
    pipe, call = moody()
    with pytest.raises(steer.ModelError, match=r"moods has as many entries.*one process per prompt"):
        steer.from_pipeline(pipe, steps=3, **{**call, "moods": ["x", "y"]})
    with pytest.raises(steer.ModelError, match=r"2 prompt.* and 3 entries of negative_prompt"):
        steer.from_pipeline(build("sd15")[0], prompt=PROMPTS, negative_prompt=["a", "b", "c"])


def test_values_are_divided_in_the_form_they_came_in():
    rows = torch.arange(8.0).view(4, 2)
    assert possible_divisions(rows, 4) == ["entries"]
    assert possible_divisions(rows, 2) == ["blocks"]
    assert torch.equal(divided(rows, "blocks", [1], 2), rows[[1, 3]])
    assert possible_divisions([rows, rows + 1], 4) == ["inside"]
    assert torch.equal(divided([rows, rows + 1], "inside", [2], 4)[1], rows[2:3] + 1)
    assert divided(("a", "b"), "entries", [1, 1], 2) == ("b", "b")
    assert isinstance(divided(numpy.zeros((2, 4, 4, 3)), "entries", [0], 2), numpy.ndarray)
    assert possible_divisions({"masks": rows, "scale": 1.0}, 4) == ["inside"]
    assert divided({"masks": rows, "scale": 1.0}, "inside", [0], 4)["scale"] == 1.0
    assert possible_divisions(1.0, 2) == possible_divisions("text", 4) == possible_divisions(rows, 1) == []
    assert blanked([1.0, 1.0], "entries") is None
    assert blanked(["a", "a"], "entries")[0] != "a"


# --- what is drawn and encoded before the loop -----------------------------------------------------------------------


def controlled():
    """FLUX with a control image, which its call encodes itself, with noise of the encoder's."""
    torch.manual_seed(0)
    base = make_flux()
    parts = {name: part for name, part in base.components.items() if name not in ("image_encoder", "feature_extractor")}
    parts["transformer"] = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )  # fmt: skip
    call = {"prompt": "a", "height": 16, "width": 16, "max_sequence_length": 32, "control_image": pictures(1)}
    return prepared(diffusers.FluxControlPipeline(**parts)), call


def test_equal_particles_get_equal_predictions():
    pipe, call = controlled()
    process = steer.from_pipeline(pipe, steps=3, **call)
    encoded, encode = [], pipe.vae.encode
    pipe.vae.encode = lambda x, *args, **kwargs: (encoded.append(len(x)), encode(x, *args, **kwargs))[1]
    x = process.prior(steer.Key(0), 1, 1).expand(-1, 4, *process.event).contiguous()
    for k in range(3):
        x0 = process.denoise(x, k)[0]
        assert float((x0 - x0[:1]).abs().max()) < 1e-5
    assert encoded == []  # once, when it was opened


def test_a_control_image_encoded_with_noise_for_each_branch_of_guidance_is_no_fault():
    """Its draws, one for each branch, are the same in the pipeline's own call with both prompts and with one."""
    torch.manual_seed(0)
    base = build("sd3")[0]
    config = {**base.transformer.config, "num_layers": 2}  # the last one takes no control
    base.transformer = diffusers.SD3Transformer2DModel.from_config(config)
    net = diffusers.SD3ControlNetModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=2 * WIDTH, out_channels=4,
    )  # fmt: skip
    for part in (net.pos_embed_input, *net.controlnet_blocks):
        for parameter in part.parameters():  # zeros, from which no control comes
            torch.nn.init.normal_(parameter)
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**base.components, controlnet=net)
    call = {"prompt": PROMPTS, "control_image": pictures(1), "height": 16, "width": 16, "guidance_scale": 4.0}
    found = steer.verify(steer.from_pipeline(prepared(pipe), steps=2, **call), steps=2)
    assert found.divided is not None
    assert found.divided < 1e-5


def test_a_pipeline_that_takes_one_row_in_a_call_is_verified_row_by_row(monkeypatch):
    pipe = prepared(sd15())
    forward = pipe.unet.forward

    def one_picture(sample, *args, **kwargs):
        if len(sample) > 2:  # with and without the prompt
            raise ValueError("one picture at a time")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", one_picture)
    found = steer.verify(steer.from_pipeline(pipe, steps=2, prompt="a", height=16, width=16), steps=2)
    assert found.batched is None
    assert found.prediction < 1e-5


# --- verify finds each of these faults when it is put back -----------------------------------------------------------


def fault_of_shared_calls(patch):
    patch.setattr("steer.pipelines.several_problems.may_share", lambda *_: True)
    pipe, call = build("ltx")
    return pipe, {**call, "prompt": PROMPTS}


def fault_of_tensor_images(patch):
    patch.setattr("steer.pipelines.several_problems.may_share", lambda *_: True)
    pipe, call = inpainting(9)
    return pipe, {**call, "prompt": PROMPTS}


def fault_of_dealt_references(patch):
    dealt = lambda call: call.conditioning.division.update(dict.fromkeys(call.conditioning.undecided, "entries"))  # noqa: E731
    patch.setattr("steer.pipelines.several_problems.divide_arguments", dealt)
    pipe, call = build("flux2")
    references = [photograph(1), photograph(2)]
    return pipe, {**call, "prompt_embeds": embeddings(2), "image": references, "height": 16, "width": 16}


def fault_of_first_entries(patch):
    patch.setattr("steer.pipelines.several_problems.divide_arguments", lambda call: None)
    return moody()


def fault_of_draws_per_row(patch):
    patch.setattr(preparation, "same_draw_per_row", lambda rows: lambda original, *args, **kw: original(*args, **kw))
    patch.setattr(preparation, "has_encoder", lambda component: False)
    return controlled()


def fault_of_changed_processors(patch):
    patch.setattr(WatchedModules, "left_as_found", lambda self: contextlib.nullcontext())
    pipe = prepared(sd15(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["up"]))
    return pipe, {"prompt": "a cat", "height": 16, "width": 16, "pag_scale": 3.0}


def fault_of_uncounted_stubs(patch):
    patch.setattr(NetworkProxy, "_of_same_form", lambda self, rows, args, kwargs: self._module(*args, **kwargs))
    return build("pixart")


def fault_of_rows_by_level(patch):
    patch.setattr(PipelineDenoiser, "rows_at", lambda self, t: max(self.call.rows), raising=False)
    pipe, call = build("sd3")
    config = {**pipe.transformer.config, "num_layers": 3}
    pipe.transformer = diffusers.SD3Transformer2DModel.from_config(config)
    late = {"skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.8}
    return prepared(pipe), {**call, "skip_guidance_layers": [1], **late}


FAULTS = {
    "masks of other prompts": (fault_of_shared_calls, "a row in a batch differs"),
    "images of other prompts": (fault_of_tensor_images, "a row in a batch differs"),
    "references dealt out": (fault_of_dealt_references, "reaches another prompt"),
    "first entry for all": (fault_of_first_entries, "reaches another prompt"),
    "draws for every row": (fault_of_draws_per_row, "a row in a batch differs"),
    "processors left": (fault_of_changed_processors, "opening left the processors"),
    "stubs that run": (fault_of_uncounted_stubs, "network rows, and .* are counted"),
    "one number of rows": (fault_of_rows_by_level, "network rows, and .* are counted"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_verify_finds_the_fault(name, monkeypatch):
    fault, message = FAULTS[name]
    pipe, call = fault(monkeypatch)
    with pytest.raises(steer.ModelError, match=message):
        steer.verify(steer.from_pipeline(pipe, steps=4, **call))


@pytest.mark.parametrize("name", ["masks of other prompts", "draws for every row", "one number of rows"])
def test_verify_finds_nothing_without_the_fault(name):
    with pytest.MonkeyPatch.context() as patch:
        pipe, call = FAULTS[name][0](patch)
    verified = steer.verify(steer.from_pipeline(pipe, steps=4, **call))
    assert verified.prediction == verified.output == 0.0
    assert (verified.batched or 0.0) < 1e-5
    assert (verified.divided or 0.0) < 1e-5
