"""Offline stand-ins for the tiny hub repositories that diffusers' own pipeline tests ask for.

The tests build every network from a configuration in their source, and take tokenizers, processors and a few text
encoders from `hf-internal-testing/...`. `install` makes `from_pretrained` answer with equivalents built in memory:
tokenizers that map characters to numbers, and random encoders of a few thousand parameters. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PRINTABLE = [chr(code) for code in range(33, 127)]


def install() -> None:
    """Replaces `from_pretrained` of the tokenizers, processors and text encoders that the tests load."""
    for name in ("parameterized", "requests_mock"):  # the tests import them for checks that play no part here
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].parameterized = types.SimpleNamespace(expand=lambda *_, **__: lambda test: test)
    PreTrainedTokenizerBase.from_pretrained = classmethod(lambda cls, repo, *_, **__: _tokenizer(cls.__name__, repo))
    transformers.AutoTokenizer.from_pretrained = staticmethod(lambda repo, *_, **__: _tokenizer("", repo))
    transformers.AutoConfig.from_pretrained = staticmethod(lambda repo, *_, **__: _t5_config(transformers.T5Config))
    transformers.AutoProcessor.from_pretrained = staticmethod(lambda *_, **__: _qwen_processor("Qwen2VLProcessor"))
    for name in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"):
        if hasattr(transformers, name):
            getattr(transformers, name).from_pretrained = classmethod(
                lambda cls, *_, **__: _qwen_processor(cls.__name__)
            )
    for name, config in _ENCODERS.items():
        if hasattr(transformers, name):
            getattr(transformers, name).from_pretrained = classmethod(
                lambda cls, *_, config=config, **__: _seeded(cls, config())
            )
    for name in ("ClapFeatureExtractor", "SiglipImageProcessor"):
        getattr(transformers, name).from_pretrained = classmethod(lambda cls, *_, **__: cls())
    transformers.DPTImageProcessor.from_pretrained = classmethod(
        lambda cls, *_, **__: cls(size={"height": 32, "width": 32})
    )


def _seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def _t5_config(kind: Any) -> Any:
    return kind(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_decoder_layers=5, num_heads=4,
        relative_attention_num_buckets=8, is_gated_act=False, feed_forward_proj="relu",
    )  # fmt: skip


def _text_config(kind: Any, vocabulary: int) -> Any:
    return kind(vocab_size=vocabulary, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=5)


_ENCODERS = {
    "T5EncoderModel": lambda: _t5_config(transformers.T5Config),
    "T5ForConditionalGeneration": lambda: _t5_config(transformers.T5Config),
    "UMT5EncoderModel": lambda: _t5_config(transformers.UMT5Config),
    "BertModel": lambda: _text_config(transformers.BertConfig, 1124),
    "LlamaForCausalLM": lambda: _text_config(transformers.LlamaConfig, 1000),
    "SiglipVisionModel": lambda: transformers.SiglipVisionConfig(
        image_size=30, patch_size=2, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2
    ),
}


def _tokenizer(kind: str, repo: Any) -> Any:
    """A tokenizer of the family that a class or a repository's name tells."""
    name = f"{kind} {repo}".lower()
    if "t5" in name:
        return _t5()
    if "clip" in name and "mclip" not in name:
        return _clip()
    if "qwen" in name:
        return _qwen()
    return _gemma() if "gemma" in name else _characters()


def _numbered(*groups: list[str]) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for token in (token for group in groups for token in group):
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _clip() -> Any:
    letters = _bytes()
    special = ["<|startoftext|>", "<pad>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab=_numbered(special, letters, [f"{letter}</w>" for letter in letters]), merges=[]
    )
    tokenizer.model_max_length = 77
    return tokenizer


def _t5() -> Any:
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scores += [(letter, -3.0) for letter in _PRINTABLE] + [(f"▁{letter}", -2.5) for letter in _PRINTABLE]
    tokenizer = transformers.T5Tokenizer(vocab=scores, extra_ids=0)
    tokenizer.model_max_length = 512
    return tokenizer


def _qwen() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab=_numbered([*special, "<|video_pad|>"], _bytes()), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    tokenizer.chat_template, tokenizer.model_max_length = _CHAT, 512
    return tokenizer


def _gemma() -> Any:
    fallback = [f"<0x{code:02X}>" for code in range(256)]
    tokenizer = transformers.GemmaTokenizer(
        vocab=_numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], fallback, ["▁"], _PRINTABLE), merges=[]
    )
    tokenizer.chat_template, tokenizer.model_max_length = _CHAT, 300
    return tokenizer


def _characters() -> Any:
    """One token per printable character, for every family without a stand-in of its own."""
    vocabulary = _numbered(["<s>", "<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], [" "], _PRINTABLE)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template, tokenizer.model_max_length = _CHAT, 128
    return tokenizer


def _qwen_processor(name: str) -> Any:
    videos = "Qwen3VLVideoProcessor" if "Qwen3" in name else "Qwen2VLVideoProcessor"
    return getattr(transformers, name)(
        transformers.Qwen2VLImageProcessor(), _qwen(), getattr(transformers, videos)(), chat_template=_CHAT
    )
