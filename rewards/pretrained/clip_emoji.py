"""`clip_emoji`: the small CLIP that ships with steer, for the embedded pipeline `emoji`."""

from __future__ import annotations

from functools import partial
from importlib.resources import as_file, files

from steer.files import check_digests
from steer.torch_modes import lasting

from .clip_score import CLIPScore


@lasting()
def clip_emoji() -> CLIPScore:
    """How well a 64x64 picture fits a prompt about emoji: CLIPScore by a network of 0.8 M parameters of ours.

    Returns:
        A reward on images `[M, 3, H, W]` in [0, 1] with M prompts, in [0, 2.5]; differentiable.

    Raises:
        SteerError: the files in the package are damaged.

    Cost: about a millisecond of one core an image. Trained by examples/train/emoji; see its card.
    """
    from transformers import CLIPModel, CLIPTokenizer

    with as_file(files("steer.rewards") / "assets" / "clip-emoji") as folder:
        check_digests(folder)
        network = CLIPModel.from_pretrained(str(folder), local_files_only=True).eval()
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenize = partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
    return CLIPScore(model=network, tokenizer=tokenize, prefix="")
