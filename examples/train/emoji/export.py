"""Put the trained networks of `emoji` together: a StableDiffusionPipeline folder and the reward, in float16.

    python examples/train/emoji/export.py
    python examples/train/emoji/export.py --part generator   # the others stay as they are

Every file stays below 5 MB, and no file says where it was made.
"""

import argparse
import json
import shutil
from pathlib import Path

import clip
import torch
from autoencoder import autoencoder, fix_variance, part
from data import WORK
from diffusers import AutoencoderKL, StableDiffusionPipeline
from generator import Generator, make, scheduler
from safetensors.torch import load_file, save_file
from tokenizer import read as read_tokenizer
from tokenizer import save as save_tokenizer
from torch import nn
from training import load_weights
from transformers import CLIPModel, CLIPTokenizer

from steer.files import write_digests

ROOT = Path(__file__).resolve().parents[3]
ASSETS = ROOT / "steer" / "assets" / "emoji"
REWARD = ROOT / "rewards" / "assets" / "clip-emoji"
PARTS = ("generator", "autoencoder", "reward", "judge")
SHARD = "4MB"


def trained_generator(work: Path, tokenizer: CLIPTokenizer, which: str = "average") -> Generator:
    """Text encoder and UNet with averaged weights, or with the last."""
    net = make(tokenizer)
    load_weights(net, load_file(work / "generator.safetensors"), which)
    return net.eval()


def trained_autoencoder(work: Path) -> AutoencoderKL:
    """Decoder and, where it is trained already, encoder."""
    net = autoencoder()
    for name in ("decoder", "encoder"):
        if (work / f"{name}.safetensors").exists():
            load_weights(part(net, name), load_file(work / f"{name}.safetensors"))
    fix_variance(net)
    return net.eval()


def trained_clip(work: Path, name: str, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The reward or the judge."""
    net = clip.clip(clip.KINDS[name], tokenizer)
    load_weights(net, load_file(work / f"{name}.safetensors"))
    return net.eval()


def assemble(generator: Generator, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline as users load it."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=generator.text_encoder,
        tokenizer=tokenizer,
        unet=generator.unet,
        scheduler=scheduler(),
        safety_checker=None,  # type: ignore[arg-type]  # optional, though its annotation does not say so
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def trained(work: Path, which: str = "average") -> StableDiffusionPipeline:
    """The pipeline from the checkpoints of a work folder, in float32."""
    tokenizer = read_tokenizer(work)
    return assemble(trained_generator(work, tokenizer, which), trained_autoencoder(work), tokenizer)


def save_half(net: nn.Module, folder: Path) -> None:
    """Save in float16 shards; a float32 "dtype" in the configuration makes transformers load it as float32."""
    shutil.rmtree(folder, ignore_errors=True)
    net.to(memory_format=torch.contiguous_format).half().save_pretrained(folder, max_shard_size=SHARD)
    net.float()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    if "architectures" in config:  # of transformers; diffusers loads float32 of itself
        config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def name_as_before(path: Path) -> None:
    """Weights of a text encoder under the names that transformers 4 reads, and 5 too, which writes them without."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--reward", type=Path, default=REWARD)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this, and may be given again")
    parser.add_argument("--which", choices=("average", "weight"), default="average", help="averaged or last weights")
    parser.add_argument("--unpack", action="store_true", help="only copy tokenizer and latents to the work folder")
    args = parser.parse_args()
    if args.unpack:
        shutil.copytree(args.out / "tokenizer", args.work / "tokenizer", dirs_exist_ok=True)
        shutil.copy(args.out / "latents.safetensors", args.work)
        return
    parts, tokenizer = args.part or PARTS[:3], read_tokenizer(args.work)
    args.out.mkdir(parents=True, exist_ok=True)
    generator = trained_generator(args.work, tokenizer, args.which) if "generator" in parts else None
    if generator:
        save_half(generator.text_encoder, args.out / "text_encoder")
        name_as_before(args.out / "text_encoder" / "model.safetensors")
        save_half(generator.unet, args.out / "unet")
        save_tokenizer(tokenizer, args.out / "tokenizer")
        scheduler().save_pretrained(args.out / "scheduler")
        shutil.copy(args.work / "latents.safetensors", args.out / "latents.safetensors")
        index = assemble(generator, autoencoder(), tokenizer).config
        index = {key: list(value) if isinstance(value, tuple) else value for key, value in index.items()}
        index = {"_class_name": "StableDiffusionPipeline", **{k: v for k, v in index.items() if k != "_name_or_path"}}
        (args.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if "autoencoder" in parts:
        save_half(trained_autoencoder(args.work), args.out / "vae")
    for name, folder in (("reward", args.reward), ("judge", args.work / "judge")):
        if name in parts:
            save_half(trained_clip(args.work, name, tokenizer), folder)
            save_tokenizer(tokenizer, folder)
    for folder in (args.out, args.reward):
        if folder.exists():
            write_digests(folder)
        files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
        sizes = [path.stat().st_size / 1e6 for path in files]
        print(f"{folder.name}: {sum(sizes):.2f} MB in {len(files)} files, the largest {max(sizes, default=0):.2f} MB")


if __name__ == "__main__":
    main()
