"""The OCR reward against hand-counted edits, on readers that say what they are told."""

from __future__ import annotations

import unicodedata

import pytest
import torch
import transformers
from tiny_vlm import VISION, word_tokenizer

from steer.errors import RewardError
from steer.rewards.ocr import OCR, TransformersReader, edits, likeness, quoted

GREY = (torch.arange(4) / 255).view(4, 1, 1, 1).expand(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edits_are_levenshteins(a: str, b: str, distance: int):
    assert edits(a, b) == edits(b, a) == distance


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("OPEN", "open", 1.0),
        ("o p\nen", "Open", 1.0),
        ("we are open today", "Open", 1.0),  # found inside: other text is free
        ("oben", "open", 0.75),
        ("", "open", 0.0),
        ("entirely different", "open", 0.0),  # never below 0
        (unicodedata.normalize("NFD", "Café"), "Café", 1.0),
        ("Café", unicodedata.normalize("NFD", "CAFÉ"), 1.0),
        ("STRASSE", "Straße", 1.0),
        ("Don't panic", "Don’t panic", 1.0),
        ("A - B", "A – B", 1.0),
        ("-5 °C", "−5 °C", 1.0),
        ("Wait...", "Wait…", 1.0),
        ("ＯＰＥＮ", "open", 1.0),
        ("oﬃce", "office", 1.0),
        ("24'' wide", "24″ wide", 1.0),
        ("Cafe", "Café", 0.75),  # an accent that is missing is a fault
    ],
)
def test_likeness_by_hand(read: str, wanted: str, score: float):
    assert likeness(read, wanted) == score


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('A sign "Open" here', "Open"),
        ('"a" and "b"', "a"),
        ("the words “Go home”", "Go home"),
        ("a sign that says „Open“", "Open"),
        ("a sign that says «Open»", "Open"),
        ('a mixed “Open" sign', "Open"),
        ('a 24" monitor that shows "Hello"', "Hello"),
        ('a sign "Route 66" on a 12" board', "Route 66"),
        ('“a 24" monitor”', 'a 24" monitor'),
    ],
)
def test_the_first_quoted_text_is_wanted(prompt: str, text: str):
    assert quoted(prompt) == text


@pytest.mark.parametrize(
    "prompt", ['a "sign" and a "quote', 'one "quote', "open “only", "closed” only", 'a "24" monitor" here']
)
def test_quotes_that_do_not_pair_are_an_error(prompt: str):
    """Which text is wanted would be a guess."""
    with pytest.raises(RewardError, match=r"OCR found (a quote that does not close|” before a quote)"):
        quoted(prompt)


@pytest.mark.parametrize("prompt", ["a sign", 'a 24" monitor', 'an empty "" one', 'a " " blank', 'sign ""No.""'])
def test_a_prompt_without_quoted_text_is_an_error(prompt: str):
    with pytest.raises(RewardError, match="needs the wanted text in double quotes"):
        quoted(prompt)


def test_every_picture_is_read_in_order():
    reward = OCR(lambda picture: ["open", "oben", "", "xx"][picture.getpixel((0, 0))[0]])
    assert reward(GREY, prompts=['a "Open"'] * 4).tolist() == [1.0, 0.75, 0.0, 0.0]
    assert reward(GREY[:2], prompts=['a "xx"', 'a "oben"']).tolist() == [0.0, 1.0]
    assert reward.spec.prompts


def test_a_reader_that_fails_has_not_read_nothing():
    with pytest.raises(RewardError, match="must return the text of a picture, got NoneType"):
        OCR(lambda picture: None)(GREY[:1], prompts=['"a"'])  # type: ignore[arg-type, return-value]
    with pytest.raises(RewardError, match="needs 2 prompts"):
        OCR(lambda picture: "")(GREY[:2], prompts=['"a"'])
    with pytest.raises(RewardError, match=r"needs a list of 3 prompts, .* got the single string '\"a\"'; put"):
        OCR(lambda picture: "a")(GREY[:3], prompts='"a"')  # as many letters as images: it would pass for a list


def test_a_model_of_transformers_reads():
    """A tiny TrOCR-like model with random weights: what it writes is what `generate` gives by hand."""
    tokenizer = word_tokenizer("a b c d e f g h")
    encoder = {key: value for key, value in VISION.items() if key != "patch_size"}
    config = transformers.VisionEncoderDecoderConfig(
        encoder=transformers.ViTConfig(image_size=16, patch_size=8, **encoder).to_dict(),
        decoder=transformers.TrOCRConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=2,
            cross_attention_hidden_size=16,
        ).to_dict(),
        decoder_start_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.VisionEncoderDecoderModel(config)
    images = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor = transformers.TrOCRProcessor(images, tokenizer)
    reader = TransformersReader(model, processor, most=6)
    scores = OCR(reader)(GREY, prompts=['"a b c"'] * 4)
    assert scores.shape == (4,)
    assert ((scores >= 0) & (scores <= 1)).all()
    with pytest.raises(RewardError, match=r"cannot load 'no-such/reader'.*download=True"):
        TransformersReader("no-such/reader")
