"""Learn the tokenizer of `emoji`: byte pairs merged until every word of its captions is one token.

    python examples/train/emoji/tokenizer.py

A `CLIPTokenizer` like that of Stable Diffusion, only small. Words it does not know fall into pieces.
"""

import argparse
import json
import re
from pathlib import Path

from data import WORK, Design, load
from lessons import COLOURS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789,.'!?&-"
LENGTH = 24
ALSO = (
    *("a", "an", "the", "on", "at", "of", "in", "and", "with", "small", "big", "left", "right", "top", "bottom"),
    *("background", "picture", "emoji", "color", "colour", "gray"),
)


def words_of(designs: list[Design]) -> list[str]:
    """All words of names and categories, and those keywords that occur twice."""
    counts: dict[str, int] = dict.fromkeys((*COLOURS, *ALSO), 2)
    for design in designs:
        for text in (design.name, design.category):
            counts.update(dict.fromkeys(re.findall(r"[a-z]+", text), 2))
    for design in designs:
        for word in {word for text in design.keywords for word in re.findall(r"[a-z]+", text)}:
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count > 1)


def learn(words: list[str]) -> CLIPTokenizer:
    """Merges until each of the words is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, end_of_word_suffix="</w>", initial_alphabet=list(ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    pairs = [
        pair.split(" ") if isinstance(pair, str) else pair for pair in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    tokens = [*ALPHABET, *(f"{letter}</w>" for letter in ALPHABET)]
    tokens += [token for first, second in pairs for token in (first, second, first + second)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=[(first, second) for first, second in pairs], model_max_length=LENGTH)


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`tokenizer.json`, and the two files that transformers before 5 reads."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def read(work: Path) -> CLIPTokenizer:
    """The tokenizer as this script wrote it."""
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def main() -> None:
    """Learn, save and check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    words = words_of(load(args.work)[0])
    save(learn(words), args.work / "tokenizer")
    tokenizer = read(args.work)
    single = sum(len(tokenizer.tokenize(word)) == 1 for word in words)
    print(f"{len(words)} words, {single} of them one token, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
