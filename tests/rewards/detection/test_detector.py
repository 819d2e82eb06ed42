"""Detectors of transformers with random weights, and the arithmetic of boxes."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image
from tiny_vlm import VISION, word_tokenizer

from steer.errors import RewardError
from steer.rewards.detection.colors import COLORS, CLIPColors
from steer.rewards.detection.detector import Detection, TransformersDetector, detect, iou, phrase_of


def picture(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    levels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(levels.to(torch.uint8).numpy())


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "N/A"}, "label2id": {"cat": 0, "dog": 1, "N/A": 2}}


def detr():
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(out_features=["stage4"], **RESNET),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        **NAMES,
    )
    model = seeded(lambda: transformers.DetrForObjectDetection(config))
    processor = transformers.DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return model, processor


def test_detr_gives_boxes_labels_and_scores():
    model, processor = detr()
    pictures = [picture(), picture(1)]
    found = TransformersDetector(model, processor)(pictures, [["cat"], ["dog"]])
    inputs = processor(images=pictures[0], return_tensors="pt")
    outputs = model(**inputs)
    best, label = outputs.logits.softmax(2)[0, :, :-1].max(1)
    kept = best > 0.05
    assert 0 < kept.sum() == len(found[0].labels)
    torch.testing.assert_close(found[0].scores, best[kept])
    assert list(found[0].labels) == [NAMES["id2label"][int(i)] for i in label[kept]]
    middle = (found[0].boxes[:, :2] + found[0].boxes[:, 2:]) / 2
    torch.testing.assert_close(middle, outputs.pred_boxes[0, kept, :2] * torch.tensor([48.0, 32.0]))


def test_a_label_that_would_never_be_found_is_an_error():
    with pytest.raises(RewardError, match="does not know hound; it knows cat, dog, N/A; pass names="):
        TransformersDetector(*detr())([picture()], [["cat", "hound"]])
    renamed = TransformersDetector(*detr(), names={"N/A": "hound"})([picture()], [["cat", "hound"]])[0]
    plain = TransformersDetector(*detr())([picture()], [["cat", "N/A"]])[0]
    assert [label.replace("hound", "N/A") for label in renamed.labels] == list(plain.labels)
    assert "hound" in renamed.labels


def test_mask2former_gives_masks_and_the_boxes_around_them():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        **NAMES,
    )
    model = seeded(lambda: transformers.Mask2FormerForUniversalSegmentation(config))
    processor = transformers.Mask2FormerImageProcessor(size={"height": 96, "width": 96})
    (found,) = TransformersDetector(model, processor, least=0.01)([picture()], [["cat"]])
    assert found.masks is not None
    assert found.masks.shape == (len(found.labels), 32, 48)
    assert len(found.labels) > 0
    for mask, box in zip(found.masks, found.boxes.long().tolist(), strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        assert mask[top].any()
        assert mask[bottom - 1].any()
        assert mask[:, left].any()
        assert mask[:, right - 1].any()
    (none,) = TransformersDetector(model, processor, least=1.0)([picture()], [["cat"]])
    assert none.boxes.shape == (0, 4)


def test_grounding_dino_looks_for_what_it_is_asked():
    tokenizer = word_tokenizer("cat dog a red .")
    text = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = transformers.GroundingDinoConfig(
        text_config=text,
        backbone_config=transformers.SwinConfig(
            image_size=32,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=8,
        max_text_len=32,
        num_feature_levels=4,
    )
    model = seeded(lambda: transformers.GroundingDinoForObjectDetection(config))
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    processor = transformers.GroundingDinoProcessor(images, tokenizer)
    found = TransformersDetector(model, processor, least=0.0)([picture(), picture()], [["cat", "red dog"], []])
    assert set(found[0].labels) <= {"cat", "red dog"}
    assert len(found[0].boxes) == len(found[0].labels) > 0
    assert found[1].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "phrase"), [("cat", "cat"), ("Dog red", "red dog"), ("red", "red dog"), ("", None), ("mouse", None)]
)
def test_answers_are_taken_for_the_phrase_they_share_most_with(text: str, phrase):
    assert phrase_of(text, ["cat", "red dog"]) == phrase


def test_overlaps_by_hand():
    unit = torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert iou(unit, unit) == 1.0
    assert iou(unit, torch.tensor([1.0, 1.0, 3.0, 3.0])) == pytest.approx(1 / 7)
    assert iou(unit, torch.tensor([2.0, 0.0, 3.0, 2.0])) == 0.0
    assert iou(torch.zeros(4), torch.zeros(4)) == 0.0


def test_colors_are_the_zero_shot_ones():
    """Against cosines with every sentence taken by hand."""
    tokenizer = word_tokenizer(" ".join([*COLORS, *(f"{c}-colored" for c in COLORS), "a photo of object cup"]))
    text = {key: value for key, value in VISION.items() if key != "patch_size"}
    config = transformers.CLIPConfig(
        text_config=transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=16, eos_token_id=3, **text
        ).to_dict(),
        vision_config=transformers.CLIPVisionConfig(image_size=16, **VISION).to_dict(),
        projection_dim=8,
    )
    model = seeded(lambda: transformers.CLIPModel(config))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.CLIPProcessor(images, tokenizer)
    crops = [picture(seed) for seed in range(6)]
    features = model.get_image_features(**processor(images=crops, return_tensors="pt")).pooler_output
    cosines = []
    for color in COLORS:
        rows = []
        for end in (f"{color} cup", f"{color}-colored cup", f"{color} object"):
            sentence = f"a photo of a {end}"
            embedded = model.get_text_features(**processor(text=[sentence], return_tensors="pt")).pooler_output[0]
            rows.append(embedded / embedded.norm())
        mean = torch.stack(rows).mean(0)
        cosines.append(features @ (mean / mean.norm()))
    expected = [COLORS[int(i)] for i in torch.stack(cosines).argmax(0)]
    colors = CLIPColors(model, processor)
    assert colors(crops, "cup") == expected
    assert colors([], "cup") == []
    with pytest.raises(RewardError, match=r"'no-such/clip'.*download=True"):
        CLIPColors("no-such/clip")


def test_what_is_wrong_is_named():
    with pytest.raises(RewardError, match=r"2 labels needs boxes \(2, 4\)"):
        Detection(torch.zeros(1, 4), ["a", "b"], torch.zeros(2))
    with pytest.raises(RewardError, match=r"one rewards\.Detection for each of 1 pictures, got 0"):
        detect(lambda pictures, labels: [], [picture()], [["cat"]])
    with pytest.raises(RewardError, match=r"'no-such/detector'.*download=True"):
        TransformersDetector("no-such/detector")


def test_a_detector_is_loaded_from_a_folder(tmp_path):
    """The way a hub id is: class and processor found from what is saved."""
    model, processor = detr()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (loaded,) = TransformersDetector(str(tmp_path))([picture()], [["cat"]])
    (ready,) = TransformersDetector(model, processor)([picture()], [["cat"]])
    torch.testing.assert_close(loaded.boxes, ready.boxes)
    torch.testing.assert_close(loaded.scores, ready.scores)
