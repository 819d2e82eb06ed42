"""Train the UNet and the text encoder of `emoji` together, in the fixed latents of `latents.py`.

    python examples/train/emoji/generator.py --minutes 360
    python examples/train/emoji/generator.py --minutes 360 --init steer/assets/emoji   # go on from exported weights

v-prediction, 1,000 steps of the squared cosine schedule. One caption in ten is dropped, for guidance.
"""

from pathlib import Path

import torch
from data import chosen, load
from diffusers import DDIMScheduler, UNet2DConditionModel
from latents import CHANNELS, Latents
from latents import read as read_latents
from lessons import Lessons
from tokenizer import LENGTH
from tokenizer import read as read_tokenizer
from torch import Tensor, nn
from training import Training, arguments
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 96
BATCH_SIZE = 32
DROPPED = 0.1


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of 96 channels."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            hidden_act="gelu",
        )
    )


def unet() -> UNet2DConditionModel:
    """64 channels at 8x8 and 128 at 4x4; the text is read at 8x8 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """DDIM with trailing timesteps and no clipping."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,  # which trailing timesteps ignore, and StableDiffusionPipeline asks for
    )


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers, (B, 24)."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Generator(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        """The predicted velocity."""
        return self.unet(noisy, timesteps, self.text_encoder(prompts)[0]).sample


def make(tokenizer: CLIPTokenizer, init: Path | None = None) -> Generator:
    """A generator with fresh weights, or with those of an exported folder."""
    if init is None:
        return Generator(text_encoder(tokenizer), unet())
    return Generator(
        CLIPTextModel.from_pretrained(init / "text_encoder"), UNet2DConditionModel.from_pretrained(init / "unet")
    )


def velocity_loss(net: Generator, lessons: Lessons, tokenizer: CLIPTokenizer, latents: Latents, step: int) -> Tensor:
    """Mean squared error of v on the batch of a step, timesteps stratified."""
    batch = lessons.batch(BATCH_SIZE, step)
    drop = torch.rand(BATCH_SIZE) < DROPPED
    prompts = tokens(tokenizer, ["" if gone else text for gone, text in zip(drop, batch.captions, strict=True)])
    clean = latents.encode(batch.pictures)
    noise = torch.randn_like(clean)
    timesteps = ((torch.randperm(BATCH_SIZE) + torch.rand(BATCH_SIZE)) / BATCH_SIZE * 1000).long().clamp(max=999)
    alphas = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    target = alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
    return (net(noisy, timesteps, prompts) - target).square().mean()


SCHEDULER = scheduler()


def main() -> None:
    """Train; the checkpoint is what `export.py` reads."""
    parser = arguments(__doc__, minutes=360, rate=1.2e-3)
    parser.add_argument("--init", type=Path, help="exported folder whose weights to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, latents = read_tokenizer(args.work), read_latents(args.work)
    net = make(tokenizer, args.init)
    print({name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}, flush=True)
    net.to(memory_format=torch.channels_last)
    lessons = Lessons(*load(args.work), seed=args.seed, bases=chosen(args.designs))
    training = Training(net, "generator", args)
    training.run(lambda step: velocity_loss(net, lessons, tokenizer, latents, step))


if __name__ == "__main__":
    main()
