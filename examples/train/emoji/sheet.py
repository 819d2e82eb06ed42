"""A sheet of samples of `emoji` by prompt, to look at: `python examples/train/emoji/sheet.py runs/emoji/sheet.png`."""

import argparse
from pathlib import Path

import torch
from data import WORK
from diffusers import StableDiffusionPipeline
from export import trained
from PIL import Image, ImageDraw

PROMPTS = [
    *("fox", "dog face", "penguin", "tropical fish", "octopus", "butterfly", "grinning face", "crying face"),
    *("smiling face with sunglasses", "red heart", "blue heart", "green apple", "strawberry", "hamburger", "pizza"),
    *("cactus", "sunflower", "airplane", "sailboat", "rocket", "rainbow", "automobile", "house", "guitar"),
    *("woman firefighter, dark skin tone", "man, red hair", "thumbs up", "a heart", "animal", "blue animal", "person"),
    *(
        "face",
        "vehicle",
        "food",
        "flower",
        "weather",
        "fox, blue background",
        "a small fox",
        "a small heart, on the left",
    ),
    *("purple butterfly", "red car, blue background", "animal on a green background"),
]


@torch.no_grad()
def samples(
    pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, guidance: float, seed: int
) -> torch.Tensor:
    """Pictures (M, 3, 64, 64) in [0, 1], one of each prompt, with DDIM at eta = 1."""
    pipeline.set_progress_bar_config(disable=True)
    generator, found = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), 64):
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "eta": 1.0, "output_type": "pt"}
        found.append(pipeline(prompts[start : start + 64], generator=generator, **options).images)
    return torch.cat(found)


def sheet(rows: dict[str, torch.Tensor], columns: int = 3) -> Image.Image:
    """A picture with a row of pictures (K, 3, 64, 64) in [0, 1] for each label, in so many columns."""
    many = max(map(len, rows.values()))
    width, height = 130 + 66 * many, -(-len(rows) // columns)
    image = Image.new("RGB", (width * columns, 68 * height), "white")
    pen = ImageDraw.Draw(image)
    for index, (label, pictures) in enumerate(rows.items()):
        x, y = index // height * width, index % height * 68
        pen.multiline_text((x + 4, y + 20), label[:20] + "\n" + label[20:40], fill="black")
        for number, picture in enumerate(pictures):
            pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            image.paste(Image.fromarray(pixels), (x + 130 + 66 * number, y))
    return image


def main() -> None:
    """Draw, from the work folder's checkpoints or from an exported folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--model", type=Path, help="an exported folder instead of the checkpoints")
    parser.add_argument("--prompt", action="append", help="instead of the usual ones, and may be given again")
    parser.add_argument("--many", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--which", choices=("average", "weight"), default="average", help="averaged or last weights")
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model) if args.model else trained(args.work, args.which)
    prompts = args.prompt or PROMPTS
    found = samples(pipeline, [prompt for prompt in prompts for _ in range(args.many)], args.steps, args.guidance, 0)
    sheet(dict(zip(prompts, found.split(args.many), strict=True))).save(args.out)


if __name__ == "__main__":
    main()
