"""Train two small CLIP networks on the pictures of `emoji`: the reward that ships, and the judge that measures.

    python examples/train/emoji/clip.py reward --minutes 20
    python examples/train/emoji/clip.py judge --minutes 20

What steering gains in the reward should be read off the judge, so the two share as little as possible. The reward reads
patches of 16x16 with a transformer and every other keyword; the judge sees 8x8 patches, the other keywords, other
variations, and pictures that are cut out, turned and recoloured more boldly.
"""

from dataclasses import dataclass

import torch
from data import chosen, load
from lessons import Lessons
from tokenizer import LENGTH
from tokenizer import read as read_tokenizer
from torch import Tensor
from torch.nn import functional as F
from training import Training, arguments
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

BATCH_SIZE = 160
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # of CLIP, for pixels in [0, 1]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@dataclass(frozen=True)
class Kind:
    """What tells the judge from the reward: network, seed, which half of the keywords, and how bold the variations."""

    width: int
    patch: int
    layers: int
    text_width: int
    seed: int
    keywords: int
    turn: float
    move: float


KINDS = {
    "reward": Kind(width=128, patch=16, layers=3, text_width=64, seed=101, keywords=0, turn=0.0, move=0.12),
    "judge": Kind(width=96, patch=8, layers=3, text_width=80, seed=202, keywords=1, turn=0.25, move=0.2),
}


def clip(kind: Kind, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIPModel of about 0.8 million parameters."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": kind.text_width,
        "intermediate_size": 2 * kind.text_width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "gelu",
    }
    vision = {
        "hidden_size": kind.width,
        "intermediate_size": 2 * kind.width,
        "num_hidden_layers": kind.layers,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": kind.patch,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, logit_scale_init_value=2.3))


def embed_pictures(net: CLIPModel, pictures: Tensor) -> Tensor:
    """Unit embeddings (B, 64) of pictures in [-1, 1]."""
    features = net.get_image_features(pixel_values=((pictures + 1) / 2 - MEAN) / STD)
    return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=1)


def embed_captions(net: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Unit embeddings (B, 64) of captions."""
    features = net.get_text_features(**tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt"))
    return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=1)


def disturb(pictures: Tensor, kind: Kind) -> Tensor:
    """Turned, moved, blurred and noised: samples of a generator are never quite sharp."""
    count = len(pictures)
    angle = kind.turn * (2 * torch.rand(count) - 1)
    scale = 1 + kind.move * (2 * torch.rand(count) - 1)
    shift = kind.move * (2 * torch.rand(count, 2, 1) - 1)
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(count, 2, 2)
    grid = F.affine_grid(torch.cat([rows * scale[:, None, None], shift], 2), list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(pictures, int(torch.randint(2, 5, ()))), size=64, mode="bilinear")
    share = torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
    pictures = pictures + share * (blurred - pictures)
    return (pictures + 0.1 * torch.rand(count, 1, 1, 1) * torch.randn_like(pictures)).clamp(-1, 1)


def contrastive_loss(net: CLIPModel, lessons: Lessons, tokenizer: CLIPTokenizer, kind: Kind, step: int) -> Tensor:
    """Which caption belongs to which picture? Equal captions in a batch do not count against each other."""
    batch = lessons.batch(BATCH_SIZE, step)
    images = embed_pictures(net, disturb(batch.pictures, kind))
    texts = embed_captions(net, tokenizer, batch.captions)
    numbers = torch.tensor([batch.captions.index(caption) for caption in batch.captions])
    same = (numbers[:, None] == numbers) & ~torch.eye(BATCH_SIZE, dtype=torch.bool)
    logits = (net.logit_scale.exp().clamp(max=60) * images @ texts.T).masked_fill(same, -1e4)
    target = torch.arange(BATCH_SIZE)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def main() -> None:
    """Train one of the two; `export.py` saves it."""
    parser = arguments(__doc__, minutes=20, rate=1.5e-3)
    parser.add_argument("kind", choices=list(KINDS))
    args = parser.parse_args()
    kind = KINDS[args.kind]
    args.seed += kind.seed
    torch.manual_seed(args.seed)
    tokenizer = read_tokenizer(args.work)
    net = clip(kind, tokenizer)
    print(f"{args.kind}: {sum(p.numel() for p in net.parameters()):,} parameters", flush=True)
    lessons = Lessons(*load(args.work), seed=args.seed, keywords=kind.keywords, bases=chosen(args.designs))
    Training(net, args.kind, args, ema=0.998).run(lambda step: contrastive_loss(net, lessons, tokenizer, kind, step))


if __name__ == "__main__":
    main()
