"""CLIPScore, HPS, PickScore and Aesthetic on tiny networks of the real architectures, against the official formulas.

Golden values of the real weights are at the end, and are skipped where the weights are not on this machine.
"""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from steer.errors import RewardError, ShapeError
from steer.rewards import HPS, Aesthetic, CLIPScore, ImageReward, PickScore, chunked, weighted
from steer.rewards.pretrained.clip_network import PROMPTS_KEPT
from steer.rewards.pretrained.weights import rating_head

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

SIDE, DIM = 16, 8
PROMPTS = ["a cat", "a dog on the moon", "a cat", "snow"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(count: int = 4, side: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator, dtype=torch.float64)


def ids(texts: list[str]) -> torch.Tensor:
    """Token ids (n, 10) of a tiny vocabulary: letters 1 to 30, the largest, 31, at the end."""
    rows = [[*[1 + ord(letter) % 30 for letter in text][:9], 31] for text in texts]
    return torch.tensor([row + [0] * (10 - len(row)) for row in rows])


def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(texts), "attention_mask": torch.ones(len(texts), 10, dtype=torch.long)}


TOWERS = {
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2},
}


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(embed_dim=DIM, quick_gelu=True, **TOWERS).to(dtype)


def hugging(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.CLIPConfig(
            text_config={**sizes, "vocab_size": 32, "max_position_embeddings": 10, "eos_token_id": 31},
            vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
            projection_dim=DIM,
        )
        return transformers.CLIPModel(config).to(dtype)


def head(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A state dict of the LAION predictor's shape: linear layers 0, 2, 4, 6, 7, dropout between."""
    generator = torch.Generator().manual_seed(1)
    widths = {0: (DIM, 12), 2: (12, 6), 4: (6, 5), 6: (5, 4), 7: (4, 1)}
    state = {}
    for i, (given, out) in widths.items():
        state[f"layers.{i}.weight"] = torch.randn(out, given, generator=generator).to(dtype)
        state[f"layers.{i}.bias"] = torch.randn(out, generator=generator).to(dtype)
    return state


def made(name: str, dtype: torch.dtype = torch.float64):
    return {
        "CLIPScore": lambda: CLIPScore(network(dtype), tokenizer=ids, prefix=""),
        "HPS": lambda: HPS(model=network(dtype), tokenizer=ids),
        "PickScore": lambda: PickScore(hugging(dtype), tokens),
        "Aesthetic": lambda: Aesthetic(head(), model=network(dtype)),
    }[name]()


NAMES = ["CLIPScore", "HPS", "PickScore", "Aesthetic"]


def scored(name: str, images: torch.Tensor, prompts=PROMPTS, reward=None) -> torch.Tensor:
    reward = reward or made(name)
    return reward(images) if name == "Aesthetic" else reward(images, prompts=prompts[: len(images)])


def official_pixels(images: torch.Tensor) -> torch.Tensor:
    """Pillow and torchvision, of square images: eight bits between, so tests allow for it."""
    transforms = pytest.importorskip("torchvision.transforms")
    resize = transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(SIDE), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    see = transforms.Compose(steps)
    levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.stack([see(Image.fromarray(level)) for level in levels]).double()


def official(name: str, images: torch.Tensor) -> torch.Tensor:
    """The published formulas, written out by hand with the networks' own forward passes."""
    seen = official_pixels(images)
    with torch.no_grad():
        if name == "PickScore":  # diagonal of the model's own logits: exp(logit_scale) * cosines
            return hugging()(pixel_values=seen, **tokens(PROMPTS)).logits_per_image.diagonal()
        net = network().eval()
        e = net.visual(seen)
        e = e / e.norm(dim=-1, keepdim=True)
        if name == "Aesthetic":
            layers = {key: value.double() for key, value in head().items()}
            for i in (0, 2, 4, 6, 7):
                e = torch.nn.functional.linear(e, layers[f"layers.{i}.weight"], layers[f"layers.{i}.bias"])
            return e.squeeze(1)
        t = net.encode_text(ids(PROMPTS))
        cosines = (e * (t / t.norm(dim=-1, keepdim=True))).sum(-1)
        return 2.5 * cosines.clamp(min=0) if name == "CLIPScore" else cosines


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_official_formula(name):
    images = (pictures() * 255).round() / 255
    found, expected = scored(name, images), official(name, images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.std().item() + 0.002)
    as_it_is = (pictures(side=SIDE) * 255).round() / 255  # nothing is resized: no rounding between
    torch.testing.assert_close(scored(name, as_it_is), official(name, as_it_is), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_finite_differences(name):
    reward, images = made(name), pictures(2, 20).requires_grad_()
    assert reward.spec.gradient == "exact"
    assert torch.autograd.gradcheck(lambda x: scored(name, x, reward=reward), images, fast_mode=True)
    assert torch.autograd.grad(scored(name, images, reward=reward).sum(), images)[0].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_scores_do_not_depend_on_batch_chunk_or_order(name):
    reward, images = made(name), pictures()
    whole, order = scored(name, images, reward=reward), [2, 0, 3, 1]
    permuted = scored(name, images[order], [PROMPTS[i] for i in order], made(name))
    torch.testing.assert_close(permuted, whole[order], rtol=1e-10, atol=1e-10)
    alone = [scored(name, images[i : i + 1], PROMPTS[i : i + 1], made(name)) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-10, atol=1e-10)
    arguments = {} if name == "Aesthetic" else {"prompts": PROMPTS}
    torch.testing.assert_close(chunked(reward, 3)(images, **arguments), whole, rtol=1e-10, atol=1e-10)
    assert scored(name, images[:0], reward=reward).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_whatever_the_networks_weights_and_the_images(name, dtype):
    scores = scored(name, pictures().to(dtype), reward=made(name, dtype))
    assert scores.dtype == torch.float32
    assert len(set(scores.tolist())) == 4  # no ties


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_frozen_and_images_get_the_gradient(name):
    net = (hugging if name == "PickScore" else network)()
    net.train()
    reward = {
        "CLIPScore": lambda: CLIPScore(net, tokenizer=ids),
        "HPS": lambda: HPS(model=net, tokenizer=ids),
        "PickScore": lambda: PickScore(net, tokens),
        "Aesthetic": lambda: Aesthetic(head(), model=net),
    }[name]()
    scored(name, pictures().requires_grad_(), reward=reward).sum().backward()
    assert not net.training
    assert all(not p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", ["CLIPScore", "HPS", "PickScore"])
def test_a_prompt_is_encoded_once(name):
    calls = []
    counted = {"PickScore": tokens}.get(name, ids)

    def tokenizer(texts):
        calls.extend(texts)
        return counted(texts)

    reward = {
        "CLIPScore": lambda: CLIPScore(network(), tokenizer=tokenizer, prefix=""),
        "HPS": lambda: HPS(model=network(), tokenizer=tokenizer),
        "PickScore": lambda: PickScore(hugging(), tokenizer),
    }[name]()
    for seed in range(3):
        reward(pictures(seed=seed), prompts=PROMPTS)
    assert sorted(calls) == sorted(set(PROMPTS))
    assert reward.network._cached_embedding.cache_info().maxsize == PROMPTS_KEPT


def test_the_prefix_belongs_to_the_published_score():
    seen = []

    def tokenizer(texts):
        seen.extend(texts)
        return ids(texts)

    CLIPScore(network(), tokenizer=tokenizer)(pictures(1), prompts=["a cat"])
    assert seen == ["A photo depicts a cat"]


def test_hps_sees_the_whole_of_an_oblong_picture():
    """HPSv2 puts it between black bars; the others crop it."""
    wide = torch.rand(1, 3, 8, SIDE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    square = torch.nn.functional.pad(wide, (0, 0, 4, 4))
    torch.testing.assert_close(scored("HPS", wide), scored("HPS", square))
    middle = torch.nn.functional.interpolate(wide, (SIDE, 2 * SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    middle = middle[:, :, :, SIDE // 2 : SIDE // 2 + SIDE]
    torch.testing.assert_close(scored("Aesthetic", wide), scored("Aesthetic", middle), rtol=0, atol=0.05)
    assert (scored("Aesthetic", wide) - scored("Aesthetic", square)).abs() > 0.3


def test_clip_score_is_never_negative():
    reward = CLIPScore(network(), tokenizer=ids)
    scores = reward(pictures(4), prompts=["aaaaaaaa", "zzz", "q", "mmmmmm"])
    assert reward.spec.bounds[0] <= scores.min() <= scores.max() <= reward.spec.bounds[1]
    cosines = HPS(model=network(), tokenizer=ids)(pictures(4), prompts=PROMPTS)
    flipped = copy.deepcopy(network())
    flipped.text_projection.data.neg_()
    other = CLIPScore(flipped, tokenizer=ids, prefix="")(pictures(4), prompts=PROMPTS)
    assert torch.equal(other == 0, cosines >= 0)


def test_long_prompts_keep_the_end_token():
    tokenizer = open_clip.tokenize
    short, long = tokenizer(["a cat"])[0], tokenizer(["a cat and " * 60])[0]
    assert long.shape == (77,)
    assert long[-1] == 49407 == long.max()
    assert short[long.new_tensor(3)] == 49407


@pytest.mark.parametrize("name", ["CLIPScore", "HPS", "PickScore"])
def test_prompts_must_match_the_images(name):
    assert made(name).spec.prompts
    for prompts in (["a cat"], "four"):
        with pytest.raises(
            RewardError,
            match=rf"{name} needs (4 prompts, one per sample, got|a list of 4 prompts, one per sample, got the single)",
        ):
            made(name)(pictures(), prompts=prompts)


@pytest.mark.parametrize("name", NAMES)
def test_images_in_another_range_or_shape_are_refused(name):
    with pytest.raises(RewardError, match=rf"{name} needs images in \[0, 1\]"):
        scored(name, 2 * pictures() - 1)
    with pytest.raises(ShapeError, match=rf"{name} reads images of shape \(M, 3, H, W\)"):
        scored(name, pictures()[:, :1])


def test_units_keep_them_apart():
    with pytest.raises(RewardError, match="cannot add"):
        weighted((1.0, made("HPS")), (1.0, made("PickScore")))
    total = weighted((1.0, made("HPS")), (1 / 26, made("PickScore"), "cos/logit"))
    images = pictures()
    expected = scored("HPS", images) + scored("PickScore", images) / 26
    torch.testing.assert_close(total(images, prompts=PROMPTS), expected)


def test_the_head_is_one_affine_map():
    ((weight, _),) = rating_head({key.removeprefix("layers."): value for key, value in head().items()}).layers
    assert weight.dtype == torch.float64
    assert weight.shape == (1, DIM)
    with pytest.raises(RewardError, match=r"no weights of a stack of linear layers: 0\.weight"):
        rating_head({"0.weight": torch.ones(2, 3)})
    with pytest.raises(RewardError, match="no weights of a stack"):
        Aesthetic({"classifier": torch.ones(1)}, model=network())(pictures())


def test_a_head_with_relu_is_known_by_its_numbers():
    """ava+logos-l14-reluMSE.pth: Linear, ReLU, Dropout three times, Linear, ReLU, Linear."""
    nn, linear = torch.nn, head(torch.float64)
    numbers, state = {0: 0, 2: 3, 4: 6, 6: 9, 7: 11}, {}
    for i, number in numbers.items():
        state |= {f"layers.{number}.{part}": linear[f"layers.{i}.{part}"] for part in ("weight", "bias")}
    layers = []
    for given, out in ((DIM, 12), (12, 6), (6, 5)):
        layers += [nn.Linear(given, out), nn.ReLU(), nn.Dropout()]
    official = nn.Sequential(*layers, nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).double().eval()
    official.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    reward, images = Aesthetic(state, model=network()), pictures()
    with torch.no_grad():
        right = official(reward.network.images(images)).squeeze(1)
    torch.testing.assert_close(reward(images), right)
    assert (right - scored("Aesthetic", images)).abs().min() > 0.1
    assert torch.autograd.gradcheck(reward, images[:2].requires_grad_(), fast_mode=True)
    shifted = {key.replace("layers.11", "layers.12"): value for key, value in state.items()}
    with pytest.raises(RewardError, match=r"for N in \(0, 2, 4, 6, 7\) .* or \(0, 3, 6, 9, 11\)"):
        Aesthetic(shifted, model=network())(images)


def test_a_head_of_another_width_or_without_numbers_is_named():
    wide, holed, uneven = head(), head(), head()
    wide["layers.0.weight"] = torch.ones(12, 16)
    holed["layers.2.bias"][0] = torch.nan
    uneven["layers.4.weight"] = torch.ones(5, 7)
    for state, said in (
        (wide, "Aesthetic's head rates embeddings of 16 numbers, and its network makes 8"),
        (holed, "NaN or infinite"),
        (uneven, "no weights of a stack"),
    ):
        with pytest.raises(RewardError, match=said):
            Aesthetic(state, model=network())(pictures())


# Where weights come from


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network: what the libraries read of the environment, they read on import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(
    ("reward", "file"),
    [
        (CLIPScore(), "open_clip_model.safetensors of the hub repository timm/vit_base_patch32_clip_224.openai"),
        (HPS(), "HPS_v2.1_compressed.pt of the hub repository xswu/HPSv2"),
        (Aesthetic(), "aesthetic-model.pth of the hub repository trl-lib/ddpo-aesthetic-predictor"),
        (PickScore(), "CLIPModel cannot load 'yuvalkirstain/PickScore_v1'"),
    ],
    ids=["CLIPScore", "HPS", "Aesthetic", "PickScore"],
)
def test_absent_weights_are_named_with_the_cure(no_cache, reward, file):
    arguments = {"prompts": ["a cat"]} if reward.spec.prompts else {}
    with pytest.raises(RewardError, match=rf"{file}.*pass download=True to fetch it"):
        reward(pictures(1), **arguments)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(RewardError, match=r"package open_clip.*pip install 'steer-diffusion\[clip\]'"):
        CLIPScore()(pictures(1), prompts=["a cat"])


@pytest.fixture
def tiny(tmp_path):
    """A tiny architecture that open_clip knows by name, as it knows the real ones."""
    import json

    (tmp_path / "tiny-steer.json").write_text(json.dumps({"embed_dim": DIM, "quick_gelu": True, **TOWERS}))
    open_clip.add_model_config(tmp_path / "tiny-steer.json")
    return "tiny-steer"


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_official_files_are_read(tiny, tmp_path, form):
    """HPSv2 keeps its weights under "state_dict" of a torch file; copies are safetensors."""
    from safetensors.torch import save_file

    state = network(torch.float32).state_dict()
    path = tmp_path / f"weights.{form}"
    if form == "pt":
        torch.save({"epoch": 3, "state_dict": state}, path)
        torch.save(head(), tmp_path / "head.pth")
    else:
        save_file(state, path)
        save_file(head(), tmp_path / "head.pth.safetensors")
    expected = scored("HPS", pictures().float(), reward=made("HPS", torch.float32))
    found = HPS(path, model=tiny, tokenizer=ids)
    torch.testing.assert_close(found(pictures().float(), prompts=PROMPTS), expected)
    assert str(path) in found.spec.version
    file = tmp_path / ("head.pth" if form == "pt" else "head.pth.safetensors")
    rating = Aesthetic(file, model=tiny, weights=path)(pictures().float())
    torch.testing.assert_close(rating, scored("Aesthetic", pictures().float(), reward=made("Aesthetic", torch.float32)))


def test_files_with_code_in_them_are_refused(tiny, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    for reward in (
        HPS(tmp_path / "trap.pt", model=tiny, tokenizer=ids),
        Aesthetic(tmp_path / "trap.pt", model=network()),
    ):
        with pytest.raises(RewardError, match=r"trap.pt holds no"):
            scored(type(reward).__name__, pictures(), reward=reward)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "open_clip_model.bin"])
def test_a_git_lfs_pointer_is_named(tiny, tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    for reward in (
        Aesthetic(path, model=network()),
        HPS(path, model=tiny, tokenizer=ids),
        CLIPScore(tiny, path, tokenizer=ids),
        PickScore(str(tmp_path), tokens),
        ImageReward(path, tokenizer=tokens),
    ):
        arguments = {"prompts": PROMPTS[:1]} if reward.spec.prompts else {}
        with pytest.raises(RewardError, match=rf"{name} is not the file but git-lfs's pointer.*git lfs pull"):
            reward(pictures(1), **arguments)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RewardError, match="holds no plain state dict"):
        Aesthetic(tmp_path / "head.safetensors", model=network())(pictures(1))


def test_a_file_of_another_activation_is_refused_where_that_is_known(tiny, tmp_path):
    """tiny-steer has QuickGELU."""
    import json

    path = tmp_path / "models--laion--tiny" / "open_clip_model.pt"
    path.parent.mkdir()
    torch.save(network(torch.float32).state_dict(), path)
    arguments = {"prompts": ["a cat"]}
    CLIPScore(tiny, path, tokenizer=ids)(pictures(1), **arguments)  # nothing is known of it
    for known, fits in ((True, True), (False, False)):
        (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": known}}))
        if fits:
            CLIPScore(tiny, path, tokenizer=ids)(pictures(1), **arguments)
        else:
            with pytest.raises(RewardError, match="were trained with another activation than tiny-steer has"):
                CLIPScore(tiny, path, tokenizer=ids)(pictures(1), **arguments)
    cached = tmp_path / "models--timm--vit_base_patch32_clip_224.openai" / "open_clip_model.safetensors"
    cached.parent.mkdir()
    cached.write_bytes(b"")
    with pytest.raises(RewardError, match="another activation than ViT-B-32 has; name 'ViT-B-32-quickgelu'"):
        CLIPScore("ViT-B-32", cached)(pictures(1), **arguments)


def test_weights_of_another_activation_model_or_tag_are_refused(tiny, tmp_path):
    images = pictures(1)
    with pytest.raises(RewardError, match="another activation than ViT-B-32 has; name 'ViT-B-32-quickgelu'"):
        CLIPScore("ViT-B-32")(images, prompts=["a cat"])
    with pytest.raises(RewardError, match="open_clip has no model 'ViT-B-33'"):
        CLIPScore("ViT-B-33")(images, prompts=["a cat"])
    with pytest.raises(RewardError, match=r"'laion9b' is neither a file nor weights .* it knows: .*openai"):
        CLIPScore(weights="laion9b")(images, prompts=["a cat"])
    with pytest.raises(RewardError, match="no file of weights at"):
        HPS(tmp_path / "absent.pt")(images, prompts=["a cat"])
    torch.save({"state_dict": hugging(torch.float32).state_dict()}, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=r"other.pt holds no weights of tiny-steer"):
        HPS(tmp_path / "other.pt", model=tiny)(images, prompts=["a cat"])


# Real weights, where they are in the cache


def on_this_machine(reward, images, prompts):
    try:
        return reward(images, prompts=prompts) if reward.spec.prompts else reward(images)
    except RewardError as error:
        pytest.skip(f"weights are not in the cache: {error}")


@pytest.mark.parametrize(
    ("reward", "low", "high"), [(CLIPScore(), 0.3, 1.0), (HPS(), 0.05, 0.45), (PickScore(), 10, 30)]
)
def test_real_weights_prefer_the_true_caption(reward, low, high):
    """No published value belongs to a picture that could ship here; what a broken network would not do is checked."""
    red = torch.zeros(1, 3, 256, 256)
    red[:, 0] = 0.9
    images = red.expand(2, -1, -1, -1)
    scores = on_this_machine(reward, images, ["a plain red square", "a photo of two dogs playing chess"])
    assert scores[0] > scores[1]
    assert low < scores.min() <= scores.max() < high


def test_real_weights_rate_beauty_on_its_scale():
    grey = torch.full((1, 3, 256, 256), 0.5)
    assert 1.0 < on_this_machine(Aesthetic(), grey, None).item() < 8.0
