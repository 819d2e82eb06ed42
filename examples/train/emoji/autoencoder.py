"""Train the AutoencoderKL of `emoji`: a decoder of the fixed latents, and then an encoder to them.

    python examples/train/emoji/autoencoder.py decoder --minutes 40 --designs all
    python examples/train/emoji/autoencoder.py encoder --minutes 10 --designs all

The decoder learns from noised latents as well, so that it draws clean pictures from imperfect samples. Both start from
least squares: the first convolution of the decoder undoes the scaling of the latents.
"""

from pathlib import Path

import torch
from data import chosen, load
from diffusers import AutoencoderKL
from latents import CHANNELS, Latents, psnr
from latents import read as read_latents
from lessons import Lessons
from torch import Tensor, nn
from training import Training, arguments

BATCH_SIZE = 16
NOISE = 0.25
PARTS = {"decoder": ("decoder", "post_quant_conv"), "encoder": ("encoder", "quant_conv")}


def autoencoder() -> AutoencoderKL:
    """Widths 16, 32, 64, 64 from 64x64 to 8x8, one block a level; the latents are about of unit variance."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=64,
        scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False,
    )


def part(net: AutoencoderKL, name: str) -> nn.ModuleDict:
    """The modules that are trained together: those of the decoder or those of the encoder."""
    return nn.ModuleDict({key: getattr(net, key) for key in PARTS[name]})


def decoder_loss(net: AutoencoderKL, lessons: Lessons, latents: Latents, step: int) -> Tensor:
    """Pixels, colours and edges of what is decoded from noised latents."""
    pictures = lessons.batch(BATCH_SIZE, step).pictures
    codes = latents.encode(pictures)
    codes = codes + NOISE * torch.rand(BATCH_SIZE, 1, 1, 1) * torch.randn_like(codes)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = net.decode(codes).sample
    error = decoded.float() - pictures
    colour = error - error.mean(1, keepdim=True)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 3 * error.square().mean() + colour.abs().mean() + 0.5 * edges


def encoder_loss(net: AutoencoderKL, lessons: Lessons, latents: Latents, step: int) -> Tensor:
    """Mean squared error of the fixed latents."""
    pictures = lessons.batch(BATCH_SIZE, step).pictures
    with torch.autocast("cpu", torch.bfloat16):
        moments = net.encode(pictures).latent_dist.mean
    return (moments.float() - latents.encode(pictures)).square().mean()


@torch.no_grad()
def fix_variance(net: AutoencoderKL) -> None:
    """The encoder has no variance to speak of: its logarithm is always -12."""
    net.quant_conv.weight[CHANNELS:] = 0
    net.quant_conv.bias[CHANNELS:] = -12


@torch.no_grad()
def quality(net: AutoencoderKL, lessons: Lessons, latents: Latents) -> dict[str, float]:
    """PSNR of 128 varied pictures, in dB: from exact latents, from noised ones, and through the encoder."""
    pictures = lessons.batch(128, -1).pictures
    codes = latents.encode(pictures)
    noised = codes + 0.15 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(0))
    through = net.encode(pictures).latent_dist.mode()
    ways = {"linear": latents.decode(codes)}
    ways |= {k: net.decode(z).sample for k, z in (("exact", codes), ("noised", noised), ("encoded", through))}
    return {key: psnr(picture.clamp(-1, 1), pictures) for key, picture in ways.items()}


def main() -> None:
    """Train one half; `export.py` puts them together."""
    parser = arguments(__doc__, minutes=40, rate=1.5e-3)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--init", type=Path, help="exported folder whose weights to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    latents = read_latents(args.work)
    net = autoencoder() if args.init is None else AutoencoderKL.from_pretrained(args.init / "vae")
    lessons = Lessons(*load(args.work), seed=10 + args.seed, bases=chosen(args.designs))
    trained = part(net, args.part)
    print(f"{args.part}: {sum(p.numel() for p in trained.parameters()):,} parameters", flush=True)
    fix_variance(net)
    loss = decoder_loss if args.part == "decoder" else encoder_loss
    Training(trained, args.part, args, ema=0.998).run(lambda step: loss(net, lessons, latents, step))


if __name__ == "__main__":
    main()
