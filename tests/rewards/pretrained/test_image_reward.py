"""ImageReward on tiny random weights with the official names, against BLIP written out by hand from the same names."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from steer.errors import RewardError
from steer.rewards import ImageReward, chunked
from steer.rewards.pretrained.clip_pixels import clip_pixels
from steer.rewards.pretrained.image_reward import MEAN, STD

pytest.importorskip("transformers")

WIDTH, HIDDEN, PATCH, SIDE, VOCABULARY, LENGTH, DEPTH = 128, 64, 8, 16, 40, 7, 2
TOLERANCE = 1e-10
PROMPTS = ["a cat", "a dog on the moon", "a cat", "snow"]


def state(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A state dict as ImageReward.pt has it: two image heads, one text head, of 64 channels each."""
    generator, found = torch.Generator().manual_seed(0), {}

    def put(name: str, *shape: int, around: float = 0.0) -> None:
        scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2
        found[name] = (around + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    def line(name: str, given: int, out: int) -> None:
        put(f"{name}.weight", out, given)
        put(f"{name}.bias", out)

    def norm(name: str, size: int) -> None:
        put(f"{name}.weight", size, around=1.0)
        put(f"{name}.bias", size)

    eye = "blip.visual_encoder"
    put(f"{eye}.cls_token", 1, 1, WIDTH)
    put(f"{eye}.pos_embed", 1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    put(f"{eye}.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    put(f"{eye}.patch_embed.proj.bias", WIDTH)
    for i in range(DEPTH):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", WIDTH)
        line(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        line(f"{block}.attn.proj", WIDTH, WIDTH)
        norm(f"{block}.norm2", WIDTH)
        line(f"{block}.mlp.fc1", WIDTH, 2 * WIDTH)
        line(f"{block}.mlp.fc2", 2 * WIDTH, WIDTH)
    norm(f"{eye}.norm", WIDTH)

    text = "blip.text_encoder"
    found[f"{text}.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    put(f"{text}.embeddings.word_embeddings.weight", VOCABULARY, HIDDEN)
    put(f"{text}.embeddings.position_embeddings.weight", LENGTH, HIDDEN)
    norm(f"{text}.embeddings.LayerNorm", HIDDEN)
    for i in range(DEPTH):
        layer = f"{text}.encoder.layer.{i}"
        for kind, given in (("attention", HIDDEN), ("crossattention", WIDTH)):
            line(f"{layer}.{kind}.self.query", HIDDEN, HIDDEN)
            line(f"{layer}.{kind}.self.key", given, HIDDEN)
            line(f"{layer}.{kind}.self.value", given, HIDDEN)
            line(f"{layer}.{kind}.output.dense", HIDDEN, HIDDEN)
            norm(f"{layer}.{kind}.output.LayerNorm", HIDDEN)
        line(f"{layer}.intermediate.dense", HIDDEN, 2 * HIDDEN)
        line(f"{layer}.output.dense", 2 * HIDDEN, HIDDEN)
        norm(f"{layer}.output.LayerNorm", HIDDEN)
    for i, given, out in ((0, HIDDEN, 10), (2, 10, 6), (4, 6, 5), (6, 5, 4), (7, 4, 1)):
        line(f"mlp.layers.{i}", given, out)
    return found


def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [[1, *[3 + ord(letter) % 37 for letter in text][: LENGTH - 2], 2] for text in texts]
    mask = [[1] * len(row) + [0] * (LENGTH - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows]),
        "attention_mask": torch.tensor(mask),
    }


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention by heads of 64 channels; mask (M, keys) of 0 and 1."""
    q, k, v = (t.unflatten(2, (-1, 64)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(2, 3) / 8
    if mask is not None:
        logits = logits.masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (logits.softmax(3) @ v).transpose(1, 2).flatten(2)


def by_hand(
    w: dict[str, torch.Tensor], pixels: torch.Tensor, read: dict[str, torch.Tensor], eps: float = 1e-6
) -> torch.Tensor:
    """Raw ImageReward scores from BLIP's paper and official names: ViT (norm first, eps), BERT (norm last)."""

    def line(x, name):
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name, eps):
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    eye = "blip.visual_encoder"
    patches = conv2d(pixels, w[f"{eye}.patch_embed.proj.weight"], w[f"{eye}.patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{eye}.pos_embed"]
    for i in range(DEPTH):
        block = f"{eye}.blocks.{i}"
        q, k, v = line(norm(x, f"{block}.norm1", eps), f"{block}.attn.qkv").chunk(3, 2)
        x = x + line(attend(q, k, v), f"{block}.attn.proj")
        x = x + line(gelu(line(norm(x, f"{block}.norm2", eps), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", eps)

    text = "blip.text_encoder"
    h = w[f"{text}.embeddings.word_embeddings.weight"][read["input_ids"]]
    h = norm(h + w[f"{text}.embeddings.position_embeddings.weight"], f"{text}.embeddings.LayerNorm", 1e-12)
    for i in range(DEPTH):
        layer = f"{text}.encoder.layer.{i}"
        for kind, source, mask in (("attention", None, read["attention_mask"]), ("crossattention", seen, None)):
            part = f"{layer}.{kind}"
            source = h if source is None else source
            q, k, v = (
                line(h, f"{part}.self.query"),
                line(source, f"{part}.self.key"),
                line(source, f"{part}.self.value"),
            )
            h = norm(h + line(attend(q, k, v, mask), f"{part}.output.dense"), f"{part}.output.LayerNorm", 1e-12)
        out = line(gelu(line(h, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        h = norm(h + out, f"{layer}.output.LayerNorm", 1e-12)
    first = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        first = line(first, f"mlp.layers.{i}")
    return first.squeeze(1)


def pictures(count: int = 4, side: int = 20) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_scores_are_those_of_the_official_formula():
    images = pictures()
    raw = by_hand(state(), clip_pixels(images, "test", side=SIDE), tokens(PROMPTS))
    assert raw.std() > 1e-3
    found = ImageReward(state(), tokenizer=tokens)(images, prompts=PROMPTS)
    torch.testing.assert_close(found, (raw - 0.16717362830052426) / 1.0333394966054072, rtol=0, atol=TOLERANCE)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


@pytest.mark.parametrize("change", ["eps", "mask", "cross"])
def test_the_formula_by_hand_would_notice(change):
    """Mutants: the usual slips of ports of BLIP move the score by far more than the tolerance above."""
    images, read = pictures(), tokens(PROMPTS)
    pixels = clip_pixels(images, "test", side=SIDE)
    right = by_hand(state(), pixels, read)
    if change == "mask":
        read["attention_mask"] = torch.ones_like(read["attention_mask"])
    weights, eps = state(), 1e-5 if change == "eps" else 1e-6  # 1e-5 is what transformers configures by itself
    if change == "cross":
        weights = {k: torch.zeros_like(v) if "crossattention.output.dense" in k else v for k, v in weights.items()}
    assert (by_hand(weights, pixels, read, eps) - right).abs().max() > 10 * TOLERANCE


def test_gradient_is_that_of_finite_differences():
    reward, images = ImageReward(state(), tokenizer=tokens), pictures(1, 18).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, prompts=["snow"]), images, fast_mode=True)
    assert all(not p.requires_grad for p in reward.network[0].parameters())


def test_scores_do_not_depend_on_batch_chunk_or_order():
    reward, images = ImageReward(state(), tokenizer=tokens), pictures()
    whole, order = reward(images, prompts=PROMPTS), [2, 0, 3, 1]
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(reward(images[order], prompts=[PROMPTS[i] for i in order]), whole[order], **close)
    torch.testing.assert_close(chunked(reward, 3)(images, prompts=PROMPTS), whole, **close)
    assert reward(images[:0], prompts=[]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scores_are_float32_whatever_the_weights_and_the_images(dtype):
    scores = ImageReward(state(dtype), tokenizer=tokens)(pictures().to(dtype), prompts=PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(
        scores.double(), ImageReward(state(), tokenizer=tokens)(pictures(), prompts=PROMPTS), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_files_are_read_and_others_refused(tmp_path, form):
    from safetensors.torch import save_file

    pytest.importorskip("open_clip")
    weights = state(torch.float32)
    path = tmp_path / f"ImageReward.{form}"
    (save_file if form == "safetensors" else torch.save)(weights, path)
    found = ImageReward(path, tokenizer=tokens)(pictures().float(), prompts=PROMPTS)
    torch.testing.assert_close(found, ImageReward(weights, tokenizer=tokens)(pictures().float(), prompts=PROMPTS))
    weights.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight")
    with pytest.raises(RewardError, match=r"no weights of ImageReward's text tower: .*crossattention.self.key.weight"):
        ImageReward(weights, tokenizer=tokens)(pictures(), prompts=PROMPTS)
    with pytest.raises(RewardError, match=r"no weights of ImageReward: 'patch_embed.proj.weight' is missing"):
        ImageReward({"a.weight": torch.ones(1)}, tokenizer=tokens)(pictures(), prompts=PROMPTS)


def test_absent_weights_and_prompts_are_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RewardError, match=r"ImageReward.pt of the hub .* THUDM/ImageReward; pass download=True"):
        ImageReward()(pictures(), prompts=PROMPTS)
    with pytest.raises(
        RewardError, match="ImageReward needs a list of 4 prompts, one per sample, got the single string 'four'"
    ):
        ImageReward(state(), tokenizer=tokens)(pictures(), prompts="four")


def test_real_weights_prefer_the_true_caption():
    red = torch.zeros(2, 3, 256, 256)
    red[:, 0] = 0.9
    try:
        scores = ImageReward()(red, prompts=["a plain red square", "a photo of two dogs playing chess"])
    except RewardError as error:
        pytest.skip(f"weights are not in the cache: {error}")
    assert scores[0] > scores[1]
    assert -4 < scores.min() <= scores.max() < 3
