"""Pipelines of diffusers with small random networks, built in memory: no weights and no files are needed.

Every parameter is random, the ones that are zero at initialisation too, so that outputs depend on the state, the
timestep and the prompt. Text encoders are tiny; tokenizers map characters to numbers.
"""

import contextlib
import functools
import json
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models

import steer

WIDTH = 32  # of every text encoder


def clip_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|startoftext|>": 0, "<pad>": 1, "<|endoftext|>": 2}
    for text in (*letters, *(letter + "</w>" for letter in letters)):
        vocab.setdefault(text, len(vocab))
    with tempfile.TemporaryDirectory() as folder:  # files, which transformers 4 and 5 both read
        Path(folder, "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 77
    return tokenizer


def character_tokenizer():
    vocab = {text: i for i, text in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    for code in range(32, 127):
        vocab[chr(code)] = len(vocab)
    core = Tokenizer(token_models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.model_max_length = 128
    return tokenizer


def clip_encoder(projected=False):
    config = transformers.CLIPTextConfig(
        bos_token_id=0, eos_token_id=2, pad_token_id=1, vocab_size=1000, hidden_size=WIDTH, intermediate_size=37,
        num_attention_heads=4, num_hidden_layers=2, projection_dim=WIDTH, hidden_act="gelu",
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config)


def t5_encoder():
    config = transformers.T5Config(
        vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4, relative_attention_num_buckets=8,
        feed_forward_proj="relu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def autoencoder(channels=4, blocks=(4, 8), **options):
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=blocks, norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * len(blocks), up_block_types=["UpDecoderBlock2D"] * len(blocks),
        **options,
    )  # fmt: skip


def conditional_unet(channels=4, context=WIDTH, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(4, 8), layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context, attention_head_dim=2, **options,
    )  # fmt: skip


STABLE_DIFFUSION_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sd15(kind=diffusers.StableDiffusionPipeline, **options):
    return kind(
        unet=conditional_unet(), vae=autoencoder(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(
            **STABLE_DIFFUSION_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options,
    )  # fmt: skip


def sdxl():
    unet = conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH, use_linear_projection=True,
    )  # fmt: skip
    unet.register_to_config(cross_attention_dim=2 * WIDTH)
    unet = diffusers.UNet2DConditionModel.from_config(unet.config)
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, vae=autoencoder(), text_encoder=clip_encoder(), text_encoder_2=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(
            **STABLE_DIFFUSION_NOISE, steps_offset=1, timestep_spacing="leading"
        ),
    )  # fmt: skip


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=WIDTH, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=autoencoder(shift_factor=0.06, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_encoder(True), text_encoder_2=clip_encoder(True), text_encoder_3=None,
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=None,
    )  # fmt: skip


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, vae=autoencoder(1, shift_factor=0.06, scaling_factor=1.5),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=character_tokenizer(),
    )  # fmt: skip


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        in_channels=3, out_channels=3, latent_channels=1, block_out_channels=(4,), norm_num_groups=1, sample_size=32,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return diffusers.Flux2Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip


def wan():
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=WIDTH, freq_dim=256, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        transformer=transformer, transformer_2=None, vae=vae, text_encoder=t5_encoder(),
        tokenizer=character_tokenizer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, out_channels=8, cross_attention_dim=24, attention_bias=True, num_embeds_ada_norm=1000,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer, vae=autoencoder(), text_encoder=t5_encoder(), tokenizer=character_tokenizer(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )  # fmt: skip


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    blocks = {"encoder_block_types": ("ResBlock", "EfficientViTBlock")}
    blocks |= {"decoder_block_types": ("ResBlock", "EfficientViTBlock")}
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, **blocks, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    config = transformers.Gemma2Config(
        head_dim=16, hidden_size=8, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1,
        num_key_value_heads=2, vocab_size=128, attn_implementation="eager",
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer, vae=vae, text_encoder=transformers.Gemma2Model(config),
        tokenizer=character_tokenizer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=transformer, vae=vae, text_encoder=None, tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=WIDTH, num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1), patch_size=1, patch_size_t=1,
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), timestep_conditioning=False,
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return diffusers.LTXPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_encoder(), tokenizer=character_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


class Unguarded(torch.nn.Module):
    """In the place of Cosmos' safety checker."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def cosmos():
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=True, extra_pos_embed_type="learnable",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCosmos(
        in_channels=3, out_channels=3, latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), patch_size=4,
        decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=64, num_layers=2,
        patch_type="haar", scaling_factor=1.0, spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"
    )
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=t5_encoder(), tokenizer=character_tokenizer(), transformer=transformer, vae=vae,
        scheduler=scheduler, safety_checker=Unguarded(),
    )  # fmt: skip


def audioldm():
    """Sound: the decoder's spectrogram goes through a vocoder, and samples are waveforms (M, T)."""
    unet = conditional_unet(
        context=(4, 8),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
    )
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    clap = transformers.ClapTextConfig(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=37, num_attention_heads=2, num_hidden_layers=1,
        pad_token_id=1, projection_dim=WIDTH, max_position_embeddings=140,
    )  # fmt: skip
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=16000, upsample_initial_channel=8, upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )  # fmt: skip
    return diffusers.AudioLDMPipeline(
        vae=vae, text_encoder=transformers.ClapTextModelWithProjection(clap), tokenizer=character_tokenizer(),
        unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False), vocoder=vocoder,
    )  # fmt: skip


def ddpm():
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(clip_sample=False))


def embeddings(rows=1, length=12):
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(9))


SMALL = {"height": 32, "width": 32}
FAMILIES = {
    "sd15": (sd15, {"prompt": "a cat", "guidance_scale": 5.0, "height": 16, "width": 16}),
    "sdxl": (sdxl, {"prompt": "a cat", "guidance_scale": 5.0, "height": 16, "width": 16}),
    "sd3": (sd3, {"prompt": "a cat", "guidance_scale": 5.0, "height": 16, "width": 16}),
    "flux": (flux, {"prompt": "a cat", "height": 16, "width": 16, "max_sequence_length": 32}),
    "flux2": (flux2, {"prompt_embeds": embeddings(), "height": 8, "width": 8}),
    "wan": (wan, {
        "prompt": "a cat", "negative_prompt": "bad", "guidance_scale": 5.0, "height": 16, "width": 16, "num_frames": 5,
        "max_sequence_length": 16,
    }),
    "pixart": (pixart, {"prompt": "a cat", "height": 16, "width": 16, "use_resolution_binning": False}),
    "sana": (sana, {
        "prompt": "a cat", **SMALL, "max_sequence_length": 16, "use_resolution_binning": False,
        "complex_human_instruction": None,
    }),
    "qwen": (qwen, {
        "prompt_embeds": embeddings(), "prompt_embeds_mask": torch.ones(1, 12, dtype=torch.long), "true_cfg_scale": 3.0,
        "negative_prompt_embeds": embeddings(length=12) * 0.5,
        "negative_prompt_embeds_mask": torch.ones(1, 12, dtype=torch.long), **SMALL,
    }),
    "ltx": (ltx, {
        "prompt": "a cat", "negative_prompt": "bad", "guidance_scale": 3.0, **SMALL, "num_frames": 9,
        "max_sequence_length": 16,
    }),
    "audioldm": (audioldm, {"prompt": "a bell", "guidance_scale": 3.0, "audio_length_in_s": 0.004}),
    "ddpm": (ddpm, {}),
}  # fmt: skip
"""Constructor and call arguments of a small pipeline of each family."""


def build(name):
    """(pipeline, call arguments) of a family: networks random everywhere, in eval mode, silent, without gradients."""
    make, call = FAMILIES[name]
    torch.manual_seed(0)
    pipe = make()
    return prepared(pipe), dict(call)


def process_of(name, steps=4, pipe=None, **options):
    """The process of a family's pipeline, or of another pipeline with that family's call arguments."""
    fresh, call = build(name)
    return steer.from_pipeline(pipe or fresh, steps=steps, **{**call, **options})


def states(process, problems=1, particles=3, key=0):
    """Starting states (B, N, *event)."""
    return process.prior(steer.Key(key), problems, particles)


def near(actual, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def prepared(pipe):
    """A pipeline ready for tests."""
    generator = torch.Generator().manual_seed(1)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                if bool((parameter == 0).all()):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def steps_recorded(pipe):
    """The (prediction, latents, next latents) of every scheduler step that a pipeline takes inside."""
    seen, step = [], pipe.scheduler.step

    def recording(output, timestep, sample, *args, **kwargs):
        result = step(output, timestep, sample, *args, **kwargs)
        following = result[0] if isinstance(result, tuple) else result.prev_sample
        seen.append((output, sample.clone(), following.clone()))  # copies, as some loops write into their latents
        return result

    pipe.scheduler.step = functools.wraps(step)(recording)
    try:
        yield seen
    finally:
        del pipe.scheduler.step
