"""Random-weight miniatures of the real classes of transformers, and a tokenizer of whole words."""

from __future__ import annotations

import re
from functools import cache

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

_WORD = r"(?:[^ \n:]+|:)"


def word_tokenizer(text: str, *special: str, blanks: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token per word of the text. blanks: a word with a blank before it is another token, as GPT-2 has it."""
    found = text.replace("\n", " ").split()
    if blanks:
        found = [blank + word for word in [*re.findall(_WORD, text), "\n"] for blank in ("", " ")]
    words = ["<pad>", "<unk>", "<s>", "</s>", *special, *dict.fromkeys(found)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if blanks:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf" ?{_WORD}|\n"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=list(special),
    )  # fmt: skip


WORDS = 'Yes No USER: ASSISTANT: Does this figure show "a cat"? "dog"? Please answer yes or no.'
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


@cache
def llava(blanks: bool = False) -> tuple[transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor]:
    tokenizer = word_tokenizer(WORDS, "<image>", blanks=blanks)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, **VISION),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
        image_token_index=image,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            parameter.data.mul_(4)  # a freshly made network hardly looks at the image
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


@cache
def blip2() -> tuple[transformers.Blip2ForConditionalGeneration, transformers.Blip2Processor]:
    """An encoder-decoder (T5)."""
    tokenizer = word_tokenizer(WORDS, "<image>")
    text = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    former = {key: value for key, value in VISION.items() if key != "patch_size"}
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(image_size=32, **VISION).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(vocab_size=9, encoder_hidden_size=16, **former).to_dict(),
        text_config=transformers.T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3, **text).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Blip2ForConditionalGeneration(config)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    return model, transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)


@cache
def qwen2_vl() -> tuple[transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLProcessor]:
    """Images of any size as any number of patches, and a chat template."""
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = word_tokenizer(WORDS, *special)
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(special))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        text_config={
            "vocab_size": len(tokenizer), "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 2,
            "eos_token_id": 3, **width,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen2VLForConditionalGeneration(config)
    template = (
        "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    videos = transformers.Qwen2VLVideoProcessor()
    return model, transformers.Qwen2VLProcessor(images, tokenizer, videos, chat_template=template)
