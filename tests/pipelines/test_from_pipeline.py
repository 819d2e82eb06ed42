"""What a process does with a pipeline: prompts, chunks, memory, conditions, and the user's object left alone."""

import logging

import accelerate
import diffusers
import pytest
import torch
from tiny_pipelines import build, near, prepared, process_of, states

import steer
from steer.pipelines.chunking import Chunked, row_chunks

# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "wan", "pixart"])
@pytest.mark.parametrize("chunk", [2, 5, 16])
def test_two_prompts_at_once_are_each_alone(name, chunk):
    both = process_of(name, prompt=["a cat", "two dogs"], chunk=chunk)
    assert both.problems == 2
    assert both.prompts == ("a cat", "two dogs")
    x = states(both, 2, 3)
    with torch.no_grad():
        together = both.denoise(x, 1)
        for b, prompt in enumerate(both.prompts):
            alone = process_of(name, prompt=prompt)
            near(together[b], alone.denoise(x[b : b + 1], 1)[0])
        assert (
            float((both.denoise(x[:1].expand_as(x), 1)[0] - both.denoise(x[:1].expand_as(x), 1)[1]).abs().max()) > 1e-4
        )
        near(both.decode(x), torch.cat([alone.decode(x[b : b + 1]) for b in range(2)]))


def test_negative_prompts_belong_to_their_prompts():
    pair = process_of("sd15", prompt=["a cat", "a cat"], negative_prompt=["bad", "ugly"])
    x = states(pair, 2, 2)[:1].expand(2, -1, -1, -1, -1)
    with torch.no_grad():
        out = pair.denoise(x, 1)
        near(out[1], process_of("sd15", prompt="a cat", negative_prompt="ugly").denoise(x[:1], 1)[0])
    assert float((out[0] - out[1]).abs().max()) > 1e-4


def test_prompts_are_encoded_once():
    pipe, call = build("sd15")
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    process = steer.from_pipeline(pipe, steps=4, **call)
    x = states(process, 1, 4)
    process.denoise(x, 0)
    before = len(calls)
    for k in range(4):
        process.denoise(x, k)
    process.decode(x)
    assert len(calls) == before


@pytest.mark.slow
def test_rows_are_what_reaches_the_network():
    for name, expected in (("sd15", 2), ("wan", 2), ("qwen", 2), ("flux", 1)):
        pipe, call = build(name)
        process = steer.from_pipeline(pipe, steps=3, **call)
        network = pipe.unet if name == "sd15" else pipe.transformer
        rows = []
        hook = network.register_forward_pre_hook(
            lambda m, args, kwargs, rows=rows: rows.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        result = steer.rollout(process, lambda x: x.flatten(1).mean(1), particles=3)
        hook.remove()
        assert process.rows == expected
        assert result.cost.nfe == sum(rows) == 3 * 3 * expected
    assert process_of("flux", true_cfg_scale=3.0, negative_prompt="bad").rows == 2
    assert process_of("sd15", guidance_scale=1.0).rows == 1


# --- chunks and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problems", [1, 2, 3, 5])
@pytest.mark.parametrize("particles", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8, 40])
def test_pieces_cover_every_row_once_in_one_shape(problems, particles, chunk):
    owner = [b for b in range(problems) for _ in range(particles)]
    cut = list(row_chunks(problems, particles, chunk))
    assert [i for piece in cut for i in range(piece.start, piece.stop)] == list(range(problems * particles))
    assert len({(len(piece.problems), piece.rows_each) for piece in cut}) == 1
    for piece in cut:
        rows = [b for b in piece.problems for _ in range(piece.rows_each)]
        assert len(rows) <= chunk
        assert rows[: piece.stop - piece.start] == owner[piece.start : piece.stop]


def test_memory_that_runs_out_halves_the_chunk_and_says_so(caplog):
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=3, chunk=8, **call)
    x = states(process, 1, 6)
    with torch.no_grad():
        expected, picture = process.denoise(x, 1), process.decode(x)
    forward, decode, largest = pipe.unet.forward, pipe.vae.decode, []

    def small(sample, *args, **kwargs):
        if len(sample) > 4:  # two rows of a guidance pair
            raise torch.OutOfMemoryError("CUDA out of memory")
        largest.append(len(sample))
        return forward(sample, *args, **kwargs)

    def small_decode(latents, *args, **kwargs):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, *args, **kwargs)

    pipe.unet.forward, pipe.vae.decode = small, small_decode
    caplog.clear()  # what opening said
    with caplog.at_level(logging.WARNING, "steer"), torch.no_grad():
        near(process.denoise(x, 1), expected)
        near(process.decode(x), picture)
    said = [record.getMessage() for record in caplog.records]
    messages = [message for message in said if "out of memory" in message]  # not the line about the transition rule
    assert (
        "StableDiffusionPipeline's networks: continuing with chunks of 1 rows" in messages[1] or "of 3" in messages[0]
    )
    assert any("decoder: continuing with chunks of 1 rows" in message for message in messages)
    assert max(largest) <= 4
    caplog.clear()
    with torch.no_grad():
        process.denoise(x, 1)
    assert not caplog.records  # the smaller chunk stays

    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.unet.forward = never
    with pytest.raises(torch.OutOfMemoryError):
        process.denoise(x, 1)


def test_a_checkpointed_decoder_has_the_same_gradient():
    pipe, call = build("sd15")
    plain, saving = (steer.from_pipeline(pipe, steps=3, checkpoint_decode=on, **call) for on in (False, True))
    x = states(plain, 1, 2)
    gradients, calls = [], []
    pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    for process in (plain, saving):
        y = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(process.decode(y).square().sum(), y)[0])
    assert torch.equal(*gradients)
    assert len(calls) == 3  # recomputed once


def test_latents_can_be_left_undecoded():
    process = process_of("sd15", output_type="latent")
    x = states(process)
    assert process.decoder is None
    assert torch.equal(process.decode(x), x.flatten(0, 1))


# --- the user's pipeline ---------------------------------------------------------------------------------------------


def snapshot(pipe):
    """Everything that could change, as text: attributes of the pipeline and its scheduler, hooks, forwards, modes."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    kept = {name: str(value) for name, value in vars(pipe).items() if name not in modules}
    kept["scheduler"] = str(vars(pipe.scheduler))
    for name, module in modules.items():
        kept[name] = (id(getattr(pipe, name)), sorted(vars(module)), module.training, len(module._forward_hooks))
    return kept | {"random": torch.get_rng_state().sum().item(), "gradients": torch.is_grad_enabled()}


@pytest.mark.parametrize("name", ["sd15", "flux", "wan", "pixart"])
def test_the_pipeline_is_left_as_it_was(name):
    pipe, call = build(name)

    def run():
        return pipe(
            **call,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
            output_type="pt",
        )[0]

    first = run()
    before = snapshot(pipe)
    process = steer.from_pipeline(pipe, steps=4, **call)
    x = states(process)
    with torch.no_grad():
        process.decode(process.denoise(x, 3))
    steer.verify(process)
    assert snapshot(pipe) == before
    assert torch.equal(run(), first)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_an_exception_leaves_no_trace(name):
    pipe, call = build(name)
    process = steer.from_pipeline(pipe, steps=4, **call)
    x = states(process)
    expected = process.denoise(x, 2)
    before = snapshot(pipe)
    network = pipe.unet if name == "sd15" else pipe.transformer

    def broken(module, arguments):
        raise RuntimeError("the device fell off")

    handle = network.register_forward_pre_hook(broken)
    for act in (lambda: process.denoise(x, 2), lambda: process.denoise(x.requires_grad_(), 1)):
        with pytest.raises(RuntimeError, match="fell off"):
            act()
    handle.remove()
    assert snapshot(pipe) == before
    assert torch.equal(process.denoise(x.detach(), 2), expected)


def test_two_processes_share_a_pipeline():
    pipe, call = build("sd15")
    cat, dog = (steer.from_pipeline(pipe, steps=4, **{**call, "prompt": text}) for text in ("a cat", "two dogs"))
    x = states(cat)
    a, b = cat.denoise(x, 2), dog.denoise(x, 1)
    assert torch.equal(cat.denoise(x, 2), a)
    assert torch.equal(dog.denoise(x, 1), b)


def test_adapters_take_effect_at_once():
    peft = pytest.importorskip("peft")
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=4, **call)
    x = states(process)
    bare = process.denoise(x, 1)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="style")
    assert float((process.denoise(x, 1) - bare).detach().abs().max()) > 1e-4
    assert steer.verify(process).prediction == 0.0
    pipe.unet.disable_adapters()
    assert torch.equal(process.denoise(x, 1), bare)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_offloaded_modules_stay_offloaded(name):
    """accelerate's hooks live in the modules, and run as they do for the user."""
    pipe, call = build(name)
    x = states(process_of(name))
    expected = process_of(name).denoise(x, 1)
    runs = []

    class Spy(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            runs.append(type(module).__name__)
            return args, kwargs

    network = pipe.unet if name == "sd15" else pipe.transformer
    for module in (network, pipe.vae, pipe.text_encoder):
        accelerate.hooks.add_hook_to_module(module, Spy())
    process = steer.from_pipeline(pipe, steps=4, **call)
    assert torch.equal(process.denoise(x, 1), expected)
    process.denoise(x, 3)
    assert type(network).__name__ in runs
    assert hasattr(network, "_hf_hook")
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)


@pytest.mark.slow
def test_model_offload_goes_on_as_the_user_set_it_up():
    """diffusers' own enable_model_cpu_offload, with the CPU as execution device."""
    pipe, call = build("sd15")
    plain = steer.from_pipeline(pipe, steps=4, **call)
    x = states(plain)
    expected = plain.denoise(x, 2)
    pipe, call = build("sd15")
    pipe.enable_model_cpu_offload(device="cpu")
    options = {"num_inference_steps": 3, "output_type": "pt"}
    first = pipe(**call, **options, generator=torch.Generator().manual_seed(0)).images
    process = steer.from_pipeline(pipe, steps=4, **call)
    for _ in range(2):  # decoding sets the hooks up anew
        assert torch.equal(process.denoise(x, 2), expected)
        process.decode(x)
    assert torch.equal(pipe(**call, **options, generator=torch.Generator().manual_seed(0)).images, first)
    assert hasattr(pipe.unet, "_hf_hook")


@pytest.mark.slow
def test_sequential_offload_goes_on_as_the_user_set_it_up():
    """accelerate's hooks on every submodule, as enable_sequential_cpu_offload sets them, with the CPU to compute on."""
    plain = process_of("sd15")
    x = states(plain)
    expected, picture = plain.denoise(x, 2), plain.decode(x)
    pipe, call = build("sd15")
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        accelerate.cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    hooked = sum(hasattr(module, "_hf_hook") for module in pipe.unet.modules())
    assert next(pipe.unet.parameters()).device.type == "meta"  # only there while it computes
    process = steer.from_pipeline(pipe, steps=4, **call)
    for _ in range(2):
        assert torch.equal(process.denoise(x, 2), expected)
        assert torch.equal(process.decode(x), picture)
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    assert next(pipe.unet.parameters()).device.type == "meta"
    assert sum(hasattr(module, "_hf_hook") for module in pipe.unet.modules()) == hooked > 1


class Int8Linear(torch.nn.Module):
    """A linear layer whose weights are stored as int8, as quantisers replace them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127.0
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_quantised_modules_run_as_they_are():
    pipe, call = build("sd15")
    replaced = 0
    for module in list(pipe.unet.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and not name.startswith("linear_"):
                setattr(module, name, Int8Linear(child))
                replaced += 1
    assert replaced > 5
    full = process_of("sd15")
    process = steer.from_pipeline(pipe, steps=4, **call)
    assert steer.verify(process)[:3] == (3, 0.0, 0.0)
    x = states(process)
    out = process.denoise(x, 1)
    assert out.dtype == torch.float32
    near(out, full.denoise(x, 1), 0.05)
    assert not torch.equal(out, full.denoise(x, 1))
    y = x.clone().requires_grad_()
    assert float(torch.autograd.grad(process.denoise(y, 1).sum(), y)[0].abs().max()) > 0.0


def test_opening_that_fails_leaves_no_trace():
    pipe, call = build("sd15")
    before = snapshot(pipe)

    def broken(module, arguments):
        raise RuntimeError("the device fell off")

    handle = pipe.unet.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="fell off"):
        steer.from_pipeline(pipe, steps=4, **call)
    handle.remove()
    with pytest.raises(steer.ModelError):
        steer.from_pipeline(pipe, steps=4, **call, latents=torch.zeros(5, 4, 8, 8))
    with pytest.raises(ValueError, match="divisible by 8"):
        steer.from_pipeline(pipe, steps=4, **{**call, "height": 13})
    assert snapshot(pipe) == before
    assert diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.randn_tensor.__name__ == "randn_tensor"


@pytest.mark.slow
def test_compiled_networks_see_one_shape():
    pipe, call = build("sd15")
    plain = steer.from_pipeline(pipe, steps=4, **call)
    x = states(plain, 1, 5)
    expected = plain.denoise(x, 2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(1)
        return graph.forward

    pipe.unet = torch.compile(pipe.unet, backend=backend)
    process = steer.from_pipeline(pipe, steps=4, chunk=2, **call)
    near(process.denoise(x, 2), expected)
    for k in (0, 3, 1):
        process.denoise(x, k)
    assert len(graphs) == 1


def test_half_precision_networks_keep_float32_states():
    pipe, call = build("sd15")
    pipe.to(torch.bfloat16)
    process = steer.from_pipeline(pipe, steps=4, **call)
    x = states(process)
    assert process.denoise(x, 1).dtype == x.dtype == torch.float32
    assert steer.verify(process, tolerance=2e-2)[:3] == (3, 0.0, 0.0)
    result = steer.rollout(process, lambda pictures: pictures.flatten(1).mean(1), particles=2)
    kept = [event.x for event in result.trajectory.past if hasattr(event, "log_prob")]
    assert {tensor.dtype for tensor in (result.x, *kept)} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept)  # not rounded on the way


def test_tiling_and_slicing_of_the_decoder_are_the_users():
    pipe, call = build("sd15")
    process = steer.from_pipeline(pipe, steps=4, **call)
    x, calls = states(process), []
    whole = process.decode(x)
    pipe.vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    pipe.vae.enable_slicing()
    near(process.decode(x), whole)
    assert len(calls) == 3


def test_two_networks_share_a_loop_by_noise_level():
    """Wan 2.2: one transformer above a boundary of noise, another below."""
    pipe, call = build("wan")
    other = build("wan")[0].transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    kind = diffusers.WanPipeline
    pipe = prepared(kind(**{**pipe.components, "transformer_2": other}, boundary_ratio=0.875))
    process = steer.from_pipeline(pipe, steps=6, **call)
    assert steer.verify(process, steps=6)[:3] == (6, 0.0, 0.0)
    runs = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: runs.append(name))
    x = states(process)
    process.denoise(x, 0)
    process.denoise(x, 5)
    assert runs == ["transformer", "transformer", "transformer_2", "transformer_2"]


def test_only_the_first_call_with_several_rows_may_fall_back_to_single_ones():
    """Inputs for one row only show at once; an error after rows went together is an error."""
    calls = []

    def function(rows, problems, rows_each):
        calls.append(len(rows))
        if len(rows) > limit:
            raise RuntimeError("too many rows")
        return rows

    flat, limit = torch.arange(6.0)[:, None], 1
    single = Chunked("a network", function, 4)
    assert torch.equal(single(flat, 1), flat)
    assert (single.chunk, calls) == (1, [3, *[1] * 6])
    limit = 6
    together = Chunked("a network", function, 4)
    together(flat, 1)
    limit = 1
    with pytest.raises(RuntimeError, match="too many rows"):
        together(flat, 1)
    assert together.chunk == 4
