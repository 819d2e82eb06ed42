"""Rewards across the border to trainers: called as the trainers' source calls them, and back again the same scores."""

from __future__ import annotations

import asyncio
import inspect
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import steer
from steer import testing
from steer.errors import NonFiniteError, NotDifferentiableError, RewardError, ShapeError
from steer.models import letters
from steer.rewards import (
    Ink,
    JPEGSize,
    LetterCount,
    Symmetry,
    as_flow_grpo,
    as_flow_grpo_scores,
    as_trl,
    as_verl_omni,
    chunked,
    from_flow_grpo,
    from_pil,
    from_trl,
    group_zscore,
    per_frame,
    weighted,
)
from steer.types import RewardSpec


def images(count: int = 4, channels: int = 3) -> torch.Tensor:
    levels = torch.randint(0, 256, (count, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    return levels.float() / 255


def with_prompts(samples: torch.Tensor, *, prompts) -> torch.Tensor:
    return samples.flatten(1).mean(1) + torch.tensor([float(len(prompt)) for prompt in prompts])


def theirs(images, prompts, metadata):
    """In the form of flow_grpo's JPEG reward: 8 bits, NCHW to NHWC, PIL, an array of scores and a dict."""
    if isinstance(images, torch.Tensor):
        images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().transpose(0, 2, 3, 1)
    sizes = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return np.array(sizes), {}


def trl_calls(funcs, prompts, completions, completion_ids, columns):
    """What TRL's trainer does with reward functions (GRPOTrainer._calculate_rewards), retold: the matrix (M, funcs)."""
    extra = {**columns, "trainer_state": object(), "log_extra": lambda *a: None, "log_metric": lambda *a: None}
    table = torch.zeros(len(prompts), len(funcs))
    for i, fn in enumerate(funcs):
        out = fn(prompts=prompts, completions=completions, completion_ids=completion_ids, **extra)
        out = asyncio.run(out) if inspect.iscoroutine(out) else out
        table[:, i] = torch.tensor([torch.nan if each is None else each for each in out], dtype=torch.float32)
    return table


def flow_grpo_calls(reward_fn, pixels, prompts, metadata):
    """What flow_grpo's scripts do with theirs: a thread of a pool, only_strict by name, a dict of (B,) floats."""
    with ThreadPoolExecutor(1) as executor:
        rewards, _ = executor.submit(reward_fn, pixels, prompts, metadata, only_strict=True).result()
    return {name: torch.as_tensor(value).float() for name, value in rewards.items()}


def test_a_reward_of_flow_grpo_steers_as_ours():
    reward = from_flow_grpo(theirs, unit="kB", version="theirs 95")
    scores = reward(images())
    assert scores.dtype == torch.float64
    assert scores.tolist() == theirs(images(), None, None)[0].tolist()
    assert (reward.spec.unit, reward.spec.gradient, reward.spec.version) == ("kB", "none", "theirs 95")
    with pytest.raises(NotDifferentiableError):
        reward(images().requires_grad_())
    process = steer.load("digits-flow", steps=3)

    def grey(samples, prompts, metadata):
        assert samples.min() >= 0
        assert samples.max() <= 1
        assert len(metadata) == len(samples)
        return theirs(samples.expand(-1, 3, -1, -1), prompts, metadata)

    result = steer.smc(process, from_flow_grpo(grey), particles=3, temperature=0.1, key=0)
    assert result.reward.isfinite().all()


def test_a_dict_of_scores_gives_its_average_or_the_one_asked_for():
    both = as_flow_grpo_scores({"ink": Ink(), "symmetry": Symmetry()}, {"ink": 2.0})
    x = images()
    torch.testing.assert_close(from_flow_grpo(both)(x).float(), 2 * Ink()(x) + Symmetry()(x))
    torch.testing.assert_close(from_flow_grpo(both, key="ink")(x).float(), Ink()(x))
    with pytest.raises(RewardError, match="ocr"):
        from_flow_grpo(both, key="ocr")(x)


def test_flow_grpo_metadata_and_prompts_reach_their_function():
    seen = {}

    def fn(images, prompts, metadata):
        seen.update(prompts=prompts, metadata=metadata)
        return [torch.tensor(1.0)] * len(images), {}

    about = {"a": {"tag": 1}, "b": {"tag": 2}}
    reward = from_flow_grpo(fn, metadata=lambda prompts: [about[prompt] for prompt in prompts])
    assert reward(images(2), prompts=("a", "b")).tolist() == [1.0, 1.0]
    assert seen == {"prompts": ["a", "b"], "metadata": [{"tag": 1}, {"tag": 2}]}
    with pytest.raises(ShapeError, match="4 samples"):
        from_flow_grpo(lambda images, prompts, metadata: ([1.0], {}))(images())
    with pytest.raises(RewardError, match="one number per sample"):
        from_flow_grpo(lambda images, prompts, metadata: ({"avg": None}, {}))(images())


def test_our_reward_is_called_as_flow_grpo_calls_its_own():
    x, prompts = images(), ["a", "bb", "ccc", "dddd"]
    scores, info = as_flow_grpo(JPEGSize(quality=95))(x, prompts, [{}] * 4)
    assert info == {}
    assert scores == JPEGSize(quality=95)(x).tolist()
    array = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert as_flow_grpo(Ink())(array, prompts, None)[0] == pytest.approx(Ink()(x).tolist())
    rewards = flow_grpo_calls(as_flow_grpo_scores({"ink": Ink(), "words": with_prompts}), x, tuple(prompts), [{}] * 4)
    assert set(rewards) == {"ink", "words", "avg"}
    assert all(value.shape == (4,) for value in rewards.values())
    torch.testing.assert_close(rewards["avg"], Ink()(x) + with_prompts(x, prompts=prompts))


def test_there_and_back_is_the_same_reward():
    x, prompts = images(), ["a", "bb", "ccc", "dddd"]
    back = from_flow_grpo(as_flow_grpo(with_prompts))
    torch.testing.assert_close(back(x, prompts=prompts).float(), with_prompts(x, prompts=prompts))
    tokens = letters.to_tokens(["banana", "orchid"])
    reward = LetterCount("a", letters.to_text)
    assert from_trl(as_trl(reward, pad=0), letters.to_text)(tokens).tolist() == reward(tokens).tolist() == [3.0, 0.0]


TEXTS = ["ab", "abc", "b"]


def read(samples: torch.Tensor) -> list[str]:
    return ["".join(chr(96 + int(i)) for i in row if i) for row in samples]


IDS = [[ord(c) - 96 for c in text] for text in TEXTS]
TOKENS = torch.tensor([[1, 2, 0], [1, 2, 3], [2, 0, 0]])


def test_our_reward_is_called_as_trl_calls_its_own():
    ours = as_trl(LetterCount("a", read), pad=0)
    longer = as_trl(lambda samples, *, prompts: torch.tensor([float(len(p)) for p in prompts]), pad=0)
    table = trl_calls([ours, longer], ["x", "yy", "zzz"], TEXTS, IDS, {"answer": [1, 2, 3]})
    assert table.tolist() == [[1.0, 1.0], [1.0, 2.0], [0.0, 3.0]]
    assert ours.__name__ == "LetterCount"
    chats = [[{"role": "user", "content": "yy"}]] * 3
    assert longer(prompts=chats, completions=[], completion_ids=IDS) == [2.0, 2.0, 2.0]
    with pytest.raises(RewardError, match="completion_ids"):
        ours(prompts=["x"], completions=["a"])


def test_a_reward_of_trl_steers_as_ours():
    def fn(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **rest):
        log_extra("answer", answer)
        log_metric("mean", 0.5)
        return [None if text == "b" else float(text == want) for text, want in zip(completions, answer, strict=True)]

    def columns(prompts):
        return {"answer": [{"q": "abc"}[prompt] for prompt in prompts]}

    with pytest.raises(RewardError, match="absent="):
        from_trl(fn, read, columns=columns)(TOKENS, prompts=["q"] * 3)
    reward = from_trl(fn, read, columns=columns, absent=-1.0)
    assert reward(TOKENS, prompts=["q"] * 3).tolist() == [0.0, 1.0, -1.0]


def test_asynchronous_rewards_and_messages():
    async def fn(completions, completion_ids, **rest):
        await asyncio.sleep(0)
        assert completion_ids == TOKENS.tolist()
        return [float(len(messages[0]["content"])) for messages in completions]

    reward = from_trl(fn, read, conversational=True)
    assert reward(TOKENS).tolist() == [2.0, 3.0, 1.0]

    async def notebook():
        return reward(TOKENS).tolist()

    assert asyncio.run(notebook()) == [2.0, 3.0, 1.0]


def test_our_reward_is_called_as_verl_omni_calls_its_own():
    image = (images(1)[0] * 255).round().to(torch.uint8)
    compute_score = as_verl_omni(with_prompts)
    result = compute_score(data_source="x", solution_image=image, ground_truth="four", extra_info={}, model_name="m")
    assert set(result) == {"score"}
    assert result["score"] == pytest.approx(float(image.float().mean() / 255) + 4)
    with pytest.raises(ShapeError, match="uint8"):
        compute_score(solution_image=image.float(), ground_truth="")


def test_what_a_trainer_cannot_average_is_refused():
    forbids = as_trl(lambda samples: torch.full((len(samples),), -torch.inf), pad=0)
    with pytest.raises(NonFiniteError, match="forbidden="):
        forbids(prompts=["q"], completions=["a"], completion_ids=[[1]])
    lifted = as_trl(lambda samples: torch.full((len(samples),), -torch.inf), pad=0, forbidden=-3.0)
    assert lifted(prompts=["q"], completions=["a"], completion_ids=[[1]]) == [-3.0]
    with pytest.raises(NonFiniteError, match="look into"):
        as_flow_grpo(lambda samples: samples.flatten(1).mean(1) * torch.nan, forbidden=0.0)(images(), None)
    for convert in (as_flow_grpo, as_verl_omni, lambda r: as_trl(r, pad=0), lambda r: as_flow_grpo_scores({"r": r})):
        with pytest.raises(RewardError, match="compares samples"):
            convert(group_zscore(Ink(), 1e-3))
    with pytest.raises(RewardError, match="needs prompts"):
        as_flow_grpo(with_prompts)(images(), None)
    with pytest.raises(RewardError, match="avg"):
        as_flow_grpo_scores({"avg": Ink()})
    with pytest.raises(RewardError, match="weights"):
        as_flow_grpo_scores({"ink": Ink()}, {"inc": 1.0})
    with pytest.raises(ShapeError, match="uint8"):
        as_flow_grpo(Ink())(np.zeros((1, 8, 8, 3)), None)
    with pytest.raises(ShapeError, match="M, C, H, W"):
        as_flow_grpo(Ink())(torch.zeros(8, 8), None)


LEVELS = torch.randint(0, 256, (2, 3, 8, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
LAYOUTS = {
    "float tensor": LEVELS.float() / 255,
    "uint8 tensor": LEVELS,
    "uint8 tensor, channels last": LEVELS.permute(0, 2, 3, 1),
    "uint8 array": LEVELS.numpy(),
    "uint8 array, channels last": LEVELS.permute(0, 2, 3, 1).numpy(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_every_layout_score_the_same(layout):
    expected = (LEVELS.float() / 255).mean((1, 2, 3)).tolist()
    assert as_flow_grpo(Ink())(LAYOUTS[layout], ["", ""])[0] == pytest.approx(expected)
    assert as_flow_grpo_scores({"ink": Ink()})(LAYOUTS[layout], ["", ""])[0]["avg"] == pytest.approx(expected)
    if "uint8" in layout:
        assert as_verl_omni(Ink())(solution_image=LAYOUTS[layout][0])["score"] == pytest.approx(expected[0])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (LEVELS.float() / 127.5 - 1, RewardError),
        (LEVELS.float(), RewardError),
        (LEVELS.float() * torch.nan, RewardError),
        (LEVELS.long(), RewardError),
        (torch.rand(2, 4, 8, 12), ShapeError),
        (torch.rand(2, 8, 12), ShapeError),
        ([Image.new("RGB", (8, 12))] * 2, ShapeError),
    ],
    ids=["-1 to 1", "0 to 255", "NaN", "int64", "RGBA", "one axis less", "PIL"],
)
def test_images_that_are_none_are_refused_at_every_door(wrong, error):
    with pytest.raises(error):
        as_flow_grpo(Ink())(wrong, ["", ""])
    with pytest.raises(error):
        as_flow_grpo_scores({"ink": Ink()})(wrong, ["", ""])
    if isinstance(wrong, torch.Tensor):
        with pytest.raises((RewardError, ShapeError)):
            from_flow_grpo(theirs)(wrong)


def test_one_string_is_no_list_of_prompts():
    """Nor is a string as long as the batch."""
    four = images(4)
    for call in (
        lambda: as_flow_grpo(with_prompts)(four, "four"),
        lambda: as_flow_grpo_scores({"r": with_prompts})(four, "four"),
        lambda: from_flow_grpo(theirs)(four, prompts="four"),
        lambda: chunked(with_prompts, 2)(four, prompts="four"),
        lambda: per_frame(with_prompts)(four[:, None].expand(-1, 4, -1, -1, -1), prompts="four"),
        lambda: weighted((1.0, with_prompts), (1.0, with_prompts))(four, prompts="four"),
        lambda: from_pil(lambda pictures, prompts: [1.0] * 4)(four, prompts="four"),
        lambda: as_trl(with_prompts, pad=0)(prompts="ab", completions=["a", "b"], completion_ids=[[1], [2]]),
        lambda: from_trl(lambda **_: [1.0] * 4, lambda tokens: [""] * 4)(four.long()[:, 0, 0], prompts="four"),
    ):
        with pytest.raises(RewardError, match="single string"):
            call()


def test_rewards_of_pil_images():
    def brightness(pictures, prompts=None):
        assert all(picture.mode == "RGB" for picture in pictures)
        bonus = [0.0] * len(pictures) if prompts is None else [float(len(prompt)) for prompt in prompts]
        return [np.asarray(p).mean() / 255 + more for p, more in zip(pictures, bonus, strict=True)]

    reward = from_pil(brightness, unit="1", bounds=(0.0, 1.0))
    assert reward.spec == RewardSpec("1", (0.0, 1.0), "none", prompts=True)
    torch.testing.assert_close(reward(images()), images().mean((1, 2, 3)).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(reward(images(2), prompts=["", "four"])[1], images(2).mean((1, 2, 3)).double()[1] + 4)
    testing.check_reward(from_pil(lambda pictures: [p.getpixel((0, 0))[0] for p in pictures]), images(4, 1))
    with pytest.raises(RewardError, match=r"\[0, 1\]"):
        reward(2 * images() - 1)
    with pytest.raises(NotDifferentiableError):
        reward(images().requires_grad_())
    with pytest.raises(ShapeError, match="4 samples"):
        from_pil(lambda pictures: [1.0])(images())
    with pytest.raises(RewardError, match="takes a function"):
        from_pil(3)
