"""VQAScore on a tiny LLaVA with random weights: the formula, the template, the padding, the gradient."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import blip2, llava, qwen2_vl

from steer.errors import NotDifferentiableError, RewardError, ShapeError
from steer.rewards.pil_images import to_pictures
from steer.rewards.pretrained.vqa_score import QUESTION, VQAScore, to_square

TEMPLATE = "USER: <image> {question} ASSISTANT:"


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reward():
    return VQAScore(*llava(), template=TEMPLATE)


def test_it_is_the_probability_of_yes_after_the_question(reward):
    """Against the model asked by hand, with a picture in 8 bits."""
    model, processor = llava()
    images = (pictures(2, 3, 32, 32) * 255).round() / 255  # as large as the model's, so that nothing is resized
    expected = []
    for picture, prompt in zip(to_pictures(images, "it"), ["a cat", "dog"], strict=True):
        text = f'USER: <image> Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT:'
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        logits = model(**inputs).logits[0, -1]
        expected.append(logits.softmax(0)[processor.tokenizer.convert_tokens_to_ids("Yes")].item())
    scores = reward(images, prompts=["a cat", "dog"])
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[1]) > 0.1 * expected[0]
    assert QUESTION == 'Does this figure show "{prompt}"? Please answer yes or no.'


def test_scores_do_not_depend_on_batch_order_or_rows(reward):
    images, prompts = pictures(5, 3, 32, 32), ["a cat", "dog", "a cat", "a big dog of five words", "dog"]
    whole, order = reward(images, prompts=prompts), [3, 0, 4, 2, 1]
    assert (whole > 0).all()
    assert (whole < 1).all()
    torch.testing.assert_close(reward(images[order], prompts=[prompts[i] for i in order]), whole[order])
    few = VQAScore(*llava(), template=TEMPLATE, rows=1)
    torch.testing.assert_close(few(images, prompts=prompts), whole)
    assert reward(images[:0], prompts=[]).shape == (0,)


def test_the_gradient_is_that_of_finite_differences(reward):
    assert reward.spec.gradient == "exact"
    images = pictures(1, 3, 40, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, prompts=["a cat"]).sum(), images)
    step = 0.002 * gradient / gradient.norm()
    with torch.no_grad():
        rise = reward(images + step, prompts=["a cat"]) - reward(images - step, prompts=["a cat"])
    assert rise.item() == pytest.approx(2 * 0.002 * gradient.norm().item(), rel=0.02)
    assert all(parameter.grad is None for parameter in reward.model.parameters())


def test_a_processor_that_loses_the_gradient_is_said_to(reward):
    model, processor = llava()

    class Arrays(type(processor.image_processor)):
        def __call__(self, images, **options):
            return super().__call__([i.detach() if isinstance(i, torch.Tensor) else i for i in images], **options)

    held = processor.image_processor
    processor.image_processor = Arrays(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    try:
        lossy = VQAScore(model, processor, template=TEMPLATE)
        assert lossy.spec.gradient == "none"
        with pytest.raises(NotDifferentiableError, match="VQAScore has no gradient"):
            lossy(pictures(1, 3, 32, 32).requires_grad_(), prompts=["dog"])
        levels = (pictures(1, 3, 32, 32) * 255).round() / 255
        torch.testing.assert_close(lossy(levels, prompts=["dog"]), reward(levels, prompts=["dog"]))
    finally:
        processor.image_processor = held


@pytest.mark.parametrize(("family", "template"), [(blip2, "{question}"), (qwen2_vl, None)], ids=["blip2", "qwen2_vl"])
def test_other_families(family, template):
    """An encoder-decoder, whose first token is the answer, and a model with as many patches as an image needs."""
    other, images, prompts = VQAScore(*family(), template=template), pictures(3, 3, 56, 40), ["dog", "a cat", "dog"]
    assert other.spec.gradient == "exact"
    whole = other(images, prompts=prompts)
    assert ((whole > 0) & (whole < 1)).all()
    torch.testing.assert_close(other(images[:1], prompts=prompts[:1]), whole[:1])
    assert len(set(whole.tolist())) == 3
    (gradient,) = torch.autograd.grad(other(images.requires_grad_(), prompts=prompts).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_images_are_padded_to_squares_with_the_mean():
    image = torch.ones(1, 3, 2, 5)
    square = to_square(image, (0.5, 0.25, 0.0))
    assert square.shape == (1, 3, 5, 5)
    assert torch.allclose(square[0, :, 1:3], torch.ones(3, 2, 5))
    for channel, level in enumerate((127, 63, 0)):
        assert torch.allclose(square[0, channel, [0, 3, 4]], torch.full((3, 5), level / 255))
    assert torch.equal(to_square(image.mT, None)[0, 0, :, 1], torch.ones(5))
    assert torch.equal(to_square(image.mT, None)[0, 0, :, 0], torch.zeros(5))


def chat(between: str, end: str = "\n") -> str:
    """A chat template that ends with "ASSISTANT:" where an answer is wanted, and puts `between` before answers."""
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
        "{% else %}ASSISTANT:" + between + "{{ m['content'][0]['text'] }}" + end + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


@pytest.fixture
def with_chat_template():
    """Sets the chat template of a processor, and takes it away again."""
    changed = []

    def change(processor, template):
        changed.append(processor)
        processor.chat_template = template

    yield change
    for processor in changed:
        processor.chat_template = None


def test_a_chat_template_is_used_where_there_is_one(with_chat_template):
    model, processor = llava()
    with_chat_template(processor, chat(" "))
    images = pictures(2, 3, 32, 32)
    scores = VQAScore(model, processor)(images, prompts=["dog", "dog"])
    with_chat_template(processor, None)
    torch.testing.assert_close(scores, VQAScore(model, processor, template=TEMPLATE)(images, prompts=["dog", "dog"]))


@pytest.mark.parametrize(
    ("template", "between", "answer", "token"),
    [
        (None, " ", "Yes", " Yes"),  # SmolVLM and Idefics
        (None, "", "Yes", "Yes"),
        (None, " ", " No", " No"),
        (None, "", " Yes", " Yes"),  # whoever gives the blank has it
        (TEMPLATE, "", "Yes", " Yes"),
        (TEMPLATE + "\n", "", "Yes", "Yes"),
    ],
)
def test_the_answer_is_the_token_that_continues_the_question(with_chat_template, template, between, answer, token):
    """A tokenizer for which "Yes" and " Yes" are two tokens, as for most."""
    model, processor = llava(blanks=True)
    with_chat_template(processor, chat(between))
    reward, images = VQAScore(model, processor, template=template, answer=answer, square=False), pictures(2, 3, 32, 32)
    wanted = processor.tokenizer.convert_tokens_to_ids(token)
    assert wanted != processor.tokenizer.unk_token_id
    assert reward.answer_token == wanted
    scores, logits = reward(images, prompts=["dog", "dog"]), []
    text = reward._text("dog")
    for image in images:
        inputs = processor(text=[text], images=[image], do_rescale=False, return_tensors="pt")
        logits.append(model(**inputs).logits[0, -1])
    probabilities = torch.stack(logits).softmax(1)
    torch.testing.assert_close(scores, probabilities[:, wanted])
    other = processor.tokenizer.convert_tokens_to_ids({"Yes": " Yes", " Yes": "Yes", " No": "No"}[token])
    assert ((scores - probabilities[:, other]).abs() > 0.1 * scores).any()


def test_a_template_that_does_not_show_how_answers_are_joined_is_named(with_chat_template):
    model, processor = llava(blanks=True)
    for template in (
        chat(" so: "),
        "{% if messages | length > 1 %}{{ raise_exception('no answers') }}{% endif %}USER: <image> ASSISTANT:",
        "{% for m in messages %}USER: {% endfor %}ASSISTANT:",
    ):
        with_chat_template(processor, template)
        with pytest.raises(RewardError, match=r"cannot tell how .* joins '.*ASSISTANT:' with.*answer=' Yes'"):
            VQAScore(model, processor)
        assert VQAScore(model, processor, answer=" Yes").answer_token


def test_what_is_wrong_is_named(reward):
    model, processor = llava()
    with pytest.raises(RewardError, match="no chat template"):
        VQAScore(model, processor)
    with pytest.raises(RewardError, match="got no processor; pass both"):
        VQAScore(model)
    with pytest.raises(RewardError, match="one token, and 'Yes sir' has 2"):
        VQAScore(model, processor, template=TEMPLATE, answer="Yes sir")
    with pytest.raises(RewardError, match=r"or joins with what is before it, '.*ASSISTANT: '"):
        VQAScore(*llava(blanks=True), template=TEMPLATE + " ")
    with pytest.raises(RewardError, match=r"needs \{prompt\}"):
        VQAScore(model, processor, template=TEMPLATE, question="Is it?")
    with pytest.raises(RewardError, match="needs 2 prompts"):
        reward(pictures(2, 3, 32, 32), prompts=["a"])
    with pytest.raises(ShapeError, match="reads images"):
        reward(pictures(2, 1, 32, 32), prompts=["a", "b"])


def test_a_model_is_loaded_from_a_folder(reward, tmp_path):
    """The way a hub id is."""
    model, processor = llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, images = VQAScore(str(tmp_path), template=TEMPLATE), pictures(2, 3, 32, 32)
    assert loaded.spec.gradient == "exact"
    torch.testing.assert_close(loaded(images, prompts=["dog", "a cat"]), reward(images, prompts=["dog", "a cat"]))


def test_nothing_is_downloaded_unless_asked():
    with pytest.raises(RewardError, match=r"cannot load 'no-such/model-of-steer'.*download=True"):
        VQAScore("no-such/model-of-steer")
