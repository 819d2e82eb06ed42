"""The model cards of `emoji` and of its reward, and the notice of what they were made from."""

from pathlib import Path

NOTICE = """emoji and clip-emoji were trained on pictures drawn from a font, and on names of them.

Pictures: Noto Color Emoji, https://github.com/googlefonts/noto-emoji
  Copyright 2013-2017 Google Inc., Arjen Nienhuis. The font is licensed under the SIL Open Font License, Version 1.1,
  https://openfontlicense.org. Noto is a trademark of Google LLC. Neither font nor weights are endorsed by Google.
  The pictures were rendered at 64x64 pixels with the Debian package fonts-noto-color-emoji. The font itself is not
  part of this folder.

Names and keywords: Unicode CLDR 41, https://cldr.unicode.org, and the groups of Unicode emoji 15,
  https://unicode.org/Public/emoji
  Copyright 1991-2022 Unicode, Inc. All rights reserved.
  Distributed under the Terms of Use in https://www.unicode.org/copyright.html (Unicode-DFS-2016).

  Permission is hereby granted, free of charge, to any person obtaining a copy of the Unicode data files and any
  associated documentation (the "Data Files") or Unicode software and any associated documentation (the "Software") to
  deal in the Data Files or Software without restriction, including without limitation the rights to use, copy, modify,
  merge, publish, distribute, and/or sell copies of the Data Files or Software, and to permit persons to whom the Data
  Files or Software are furnished to do so, provided that either (a) this copyright and permission notice appear with
  all copies of the Data Files or Software, or (b) this copyright and permission notice appear in associated
  Documentation.

  THE DATA FILES AND SOFTWARE ARE PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
  LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT OF THIRD PARTY
  RIGHTS. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR HOLDERS INCLUDED IN THIS NOTICE BE LIABLE FOR ANY CLAIM, OR ANY
  SPECIAL INDIRECT OR CONSEQUENTIAL DAMAGES, OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS,
  WHETHER IN AN ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR
  PERFORMANCE OF THE DATA FILES OR SOFTWARE.

  Except as contained in this notice, the name of a copyright holder shall not be used in advertising or otherwise to
  promote the sale, use or other dealings in these Data Files or Software without prior written authorization of the
  copyright holder.
"""

PIPELINE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [emoji, stable-diffusion, latent-diffusion]
---

# emoji

A `StableDiffusionPipeline` that is small enough to ship inside a package: 64x64 pictures from prompts, trained on Noto
Color Emoji with the names that Unicode gives them. A picture takes {seconds_a_picture:.2f} s of one core in {steps}
steps with guidance.

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained("steer/assets/emoji")
    pipeline("a red heart", num_inference_steps=20, guidance_scale=3.0, eta=1.0).images[0]

- Prompts: names ("fox", "crying face", "woman firefighter, dark skin tone"), categories ("animal", "heart", "person",
  "vehicle", "food"), and with them a colour ("blue butterfly"), a background ("fox, blue background"), "small", and
  "on the left", "on the right", "at the top", "at the bottom". What a prompt leaves open is open: "heart" has many
  colours, "person" many roles and tones. Other words fall into pieces and mean little.
- Networks: UNet of {unet:,} parameters on latents 16x8x8, v-prediction, DDIM with trailing timesteps; CLIP text encoder
  of {text:,}; AutoencoderKL of {vae:,}. Stored in float16, in files below 5 MB, and loaded as float32.
- Latents: 16 principal components of 8x8 patches, fixed before training (`latents.safetensors`); the encoder is
  regressed on them, the decoder learnt to draw from them.

## Data

{pictures:,} pictures of {designs:,} designs, rendered from Noto Color Emoji (Google, SIL Open Font License 1.1), with
names and keywords of Unicode CLDR 41 (Unicode License); see NOTICE. Flags, letters, clocks, arrows and signs are left
out. While training, pictures are recoloured, mirrored (never letters, clocks, arrows, flags, nor a "left" or "right"),
made smaller, moved, and put on ten backgrounds, and the captions say so most of the time. Held out are one toned person
in twenty and one pair of design and background in ten; of single designs nothing can be held out, for there is one
picture of each.

## Training

The scripts are in `examples/train/emoji`, in the order of their README. Seconds of one core of a shared machine:

| network | steps | seconds |
|---|---|---|
| UNet and text encoder, batch 32 | {generator_step:,} | {generator_seconds:,.0f} |
| decoder, batch 16 | {decoder_step:,} | {decoder_seconds:,.0f} |
| encoder, batch 16 | {encoder_step:,} | {encoder_seconds:,.0f} |
| reward (`clip-emoji`), batch 160 | {reward_step:,} | {reward_seconds:,.0f} |
| judge (not shipped), batch 160 | {judge_step:,} | {judge_seconds:,.0f} |

## Measured

{steps} DDIM steps, eta = 1, guidance {guidance:g} where nothing else is said, one seed of training, {prompts} names.
The judge is a CLIP network of another shape and seed than the reward, trained with the other half of the keywords and
bolder variations. Both saw the same designs as the generator, so all three can share their faults.

| right name among {names}, first / in five | judge | reward |
|---|---|---|
{accuracy}

- Fréchet distance in the judge's features, {pairs} pictures of training captions against as many real ones:
  {frechet_guidance_1:.3f} at guidance 1, {frechet_guidance_3:.3f} at 3; two draws of real ones {frechet_real:.3f}.
- Pairs never trained on: skin tone right, of five, in {tone_held_out:.0%} of {tone_held_out_pairs} pairs of role and
  tone (trained pairs {tone_seen:.0%}); background right in {background_held_out:.0%} of pairs with a thing, and its
  name among the judge's first five in {background_held_out_top5:.0%} (trained pairs {background_seen:.0%} and
  {background_seen_top5:.0%}).
- Autoencoder, PSNR of varied pictures: {psnr_exact:.1f} dB from exact latents ({psnr_linear:.1f} decoded
  linearly), {psnr_noised:.1f} with noise 0.15, {psnr_encoded:.1f} through the encoder.

What a prompt leaves open, {each} pictures each: mean of 1 - cosine in the judge's features, for comparison that of real
pictures of the category, the number of designs they are nearest to, and the share of these in the category.

| prompt | spread | real | designs | right |
|---|---|---|---|---|
{diversity}

**Memory.** It recites: with one picture a name, there is nothing else to learn of a name. Root mean square distances
to the nearest training picture, pixels in [0, 1]: names {nearest_named:.3f}, where the nearest is the design named in
{nearest_is_the_named:.0%}; category prompts {nearest_category:.3f}. For comparison, {nearest_decoded:.3f} is what the
decoder alone does to a training picture, and {nearest_other_design:.3f} lie between a design and the nearest other one.
{category_copies:.0%} of the pictures of category prompts are nearer to a training picture than all but 1% of designs
are to each other.

## Limits

A demonstration model: it knows some hundred emoji and nothing else. Fine detail is soft. It must not be taken for the
font: pictures are imitations, with faults, of Google's designs.
"""

REWARD_CARD = """---
license: apache-2.0
library_name: transformers
tags: [clip, emoji]
---

# clip-emoji

A `CLIPModel` of {parameters:,} parameters (float16) that tells how well a 64x64 picture fits a prompt about emoji: the
reward that goes with the pipeline `emoji`. Vision: 16x16 patches, three layers of 128; text: two layers of 64.

    from functools import partial
    from transformers import CLIPModel, CLIPTokenizer
    from steer import rewards
    tokenizer = CLIPTokenizer.from_pretrained("rewards/assets/clip-emoji")
    tokenize = partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
    network = CLIPModel.from_pretrained("rewards/assets/clip-emoji").eval()
    reward = rewards.CLIPScore(model=network, tokenizer=tokenize, prefix="")

Trained by `examples/train/emoji/clip.py reward` on the pictures and captions of the pipeline, in {step:,} steps or
{seconds:,.0f} s of one core. Of {names} names it puts the right one first for {reward_real_top1:.0%} of real pictures,
and among five for {reward_real_top5:.0%}; it was trained on these pictures. What steering by it gains is to be measured
by another network, such as the judge of `clip.py judge`. Data and licences: see NOTICE.
"""


def parameters(folder: Path) -> int:
    """Number of parameters in a folder of float16 safetensors, from their sizes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2


def write(model: Path, reward: Path, numbers: dict[str, float]) -> None:
    """Both cards and both notices."""
    from quality import CATEGORIES, EACH, GUIDANCE, PAIRS, PROMPTS, STEPS

    accuracy = [
        f"| {what.replace('_', ' ')}{' pictures' * (what == 'real')} "
        + " ".join(f"| {numbers[f'{who}_{what}_top1']:.2f} / {numbers[f'{who}_{what}_top5']:.2f}" for who in EYES)
        + " |"
        for what in ("real", "guidance_1", "guidance_3", "guidance_5")
    ]
    rows = [
        f'| "{kind}" | {numbers[f"{kind}_spread"]:.2f} | {numbers[f"{kind}_spread_real"]:.2f} '
        f"| {numbers[f'{kind}_designs']:.0f} | {numbers[f'{kind}_right']:.0%} |"
        for kind in CATEGORIES
    ]
    sizes = {name: parameters(model / folder) for name, folder in PARTS.items()}
    fixed = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "pairs": PAIRS,
        "each": EACH,
        "prompts": PROMPTS,
        "diversity": "\n".join(rows),
    }
    fixed["accuracy"] = "\n".join(accuracy)
    (model / "README.md").write_text(PIPELINE.format(**fixed, **sizes, **numbers))
    own = {"step": numbers["reward_step"], "seconds": numbers["reward_seconds"], "parameters": parameters(reward)}
    (reward / "README.md").write_text(REWARD_CARD.format(**own, **numbers))
    for folder in (model, reward):
        (folder / "NOTICE").write_text(NOTICE)


EYES = ("judge", "reward")
PARTS = {"unet": "unet", "text": "text_encoder", "vae": "vae"}
