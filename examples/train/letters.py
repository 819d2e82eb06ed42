"""Train `letters`, the masked model of short English words that ships in ``steer/assets``.

    python examples/train/letters.py

The words are ``words.txt`` beside this script, the 7,555 commonest lower-case words of 3 to 8 letters in SCOWL (see
``words_license.txt``). The loss is that of masked diffusion in any order: hide a uniformly drawn number of places,
chosen uniformly, and predict the letters there. The script writes weights (float16), configuration, measured quality
and model card, and takes about ten minutes on one free CPU core.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn import functional as F

from steer.files import write_digests
from steer.key import Key
from steer.models.letters import ALPHABET, LENGTH, MASK, LettersNet, letters_process, to_text, to_tokens
from steer.samplers.rollout import rollout

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "steer" / "assets" / "letters"
CONFIG = {"width": 64, "heads": 4, "hidden": 224, "layers": 3}
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
SAMPLES = 10_000


class Words(NamedTuple):
    """The list cut in two: one word in ten, chosen by its hash, is held out of training."""

    train: list[str]
    held_out: list[str]


def read_words() -> Words:
    """The words of words.txt, split the same way on every call."""
    words = (HERE / "words.txt").read_text().split()
    held_out = [word for word in words if int(hashlib.sha256(word.encode()).hexdigest(), 16) % 10 == 0]
    return Words(sorted(set(words) - set(held_out)), held_out)


def masks(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Places to hide, (count, 8) bool: how many is uniform in 1..8, and which is uniform."""
    many = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    return torch.rand(count, LENGTH, generator=generator).argsort(1).argsort(1) < many


def nll(net: LettersNet, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Mean negative log-likelihood of a hidden letter of each word, (M,): times 8 it bounds the word's from above."""
    logits = net(tokens.masked_fill(hidden, MASK))
    each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return (each * hidden).sum(1) / hidden.sum(1)


def train(tokens: Tensor, steps: int, seed: int) -> LettersNet:
    """A network trained with AdamW on a one-cycle schedule, rounded to float16 as it is stored."""
    torch.manual_seed(seed)
    net = LettersNet(**CONFIG)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        words = tokens[torch.randint(len(tokens), (BATCH_SIZE,))]
        loss = nll(net, words, masks(BATCH_SIZE)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 1000 == 0:
            print(step + 1, f"{loss.item():.3f}", flush=True)
    return net.half().float().eval().requires_grad_(False)


def share(found: list[str], of: list[str]) -> float:
    """Share of strings that are in a list."""
    known = set(of)
    return sum(word in known for word in found) / len(found)


def lengths(words: list[str]) -> Tensor:
    """Share of words of each length 0..8."""
    counts = torch.bincount(torch.tensor([len(word) for word in words]), minlength=LENGTH + 1)
    return counts / counts.sum()


def measure(net: LettersNet, words: Words) -> dict[str, float]:
    """Quality of samples in 8 steps, one letter a step in a random order, and likelihood of held-out words."""
    generator = torch.Generator().manual_seed(0)
    seen, unseen = to_tokens(words.train), to_tokens(words.held_out)

    def mean_nll(tokens: Tensor) -> float:
        many = tokens.repeat(20, 1)
        return nll(net, many, masks(len(many), generator)).mean().item()

    counts = F.one_hot(seen, len(ALPHABET)).double().sum(0) + 1.0  # one more of each: no letter is impossible
    by_place = counts / counts.sum(1, keepdim=True)
    unigram = by_place.mean(0).expand(LENGTH, -1)
    control = torch.multinomial(by_place, SAMPLES, replacement=True, generator=generator).T
    result = rollout(letters_process(net), lambda x: 0.0 * x.sum(1), particles=SAMPLES, key=Key(0), keep_states=False)
    found, by_chance = result.texts, to_text(control)
    return {
        "words": share(found, words.train + words.held_out),
        "words_trained_on": share(found, words.train),
        "words_held_out": share(found, words.held_out),
        "words_by_chance": share(by_chance, words.train + words.held_out),
        "distinct": len(set(found)) / SAMPLES,
        "gaps": sum("_" in word for word in found) / SAMPLES,
        "length_distance": 0.5 * (lengths(found) - lengths(words.train)).abs().sum().item(),
        "length_distance_held_out": 0.5 * (lengths(words.held_out) - lengths(words.train)).abs().sum().item(),
        "nll_per_letter": mean_nll(unseen),
        "nll_per_letter_train": mean_nll(seen),
        "nll_per_letter_by_place": F.nll_loss(
            by_place.log().expand(len(unseen), -1, -1).transpose(1, 2), unseen
        ).item(),
        "nll_per_letter_unigram": F.nll_loss(unigram.log().expand(len(unseen), -1, -1).transpose(1, 2), unseen).item(),
    }


CARD = """---
license: other
license_name: SCOWL (permissive)
library_name: steer
pipeline_tag: text-generation
tags: [masked-diffusion, words]
---

# letters

A masked discrete diffusion model of English words of 3 to 8 letters: a bidirectional transformer with
{parameters:,} parameters ({layers} blocks of {width} channels, {heads} heads), stored in float16. It is small enough to
ship inside the package, so that every method that runs on tokens can be tried and tested on a CPU, offline.

    import steer
    process = steer.load("letters")  # 8 steps, one letter a step, in a random order
    steer.rollout(process, lambda x: 0.0 * x.sum(1), particles=16).texts

- States: tokens (M, 8), 0..25 for a..z, 26 for the space that fills a word up to eight places, 27 for the mask.
- Network: logits (M, 8, 27) of all places from the partly masked word; it is not told the time.
- Several letters a step are faster and worse: letters revealed together do not see each other.

## Data

{total:,} words: the lower-case words of 3 to 8 letters in the two commonest size classes ("10" and "20") of SCOWL,
Spell Checker Oriented Word Lists, http://wordlist.aspell.net, version 2020.12.07, as `examples/train/words.txt`;
one word in ten, by its hash, is held out ({held_out} words). Every word counts the same, however common. The notice:

> Copyright 2000-2018 by Kevin Atkinson
>
> Permission to use, copy, modify, distribute and sell these word lists, the associated scripts, the output created
> from the scripts, and its documentation for any purpose is hereby granted without fee, provided that the above
> copyright notice appears in all copies and that both that copyright notice and this permission notice appear in
> supporting documentation. Kevin Atkinson makes no representations about the suitability of this array for any
> purpose. It is provided "as is" without express or implied warranty.

Its sources and their terms are in `examples/train/words_license.txt`.

## Training

`python examples/train/letters.py --steps {steps} --seed {seed}`

AdamW (peak learning rate {rate}, one cycle with 5% warm-up, weight decay 0.01), batch {batch}, gradient norm clipped at
1, no dropout. Each time a uniformly drawn number of places is hidden, chosen uniformly.

## Measured

{samples:,} samples in 8 steps, one letter a step in a random order. Negative log-likelihoods are nats per hidden
letter, averaged over the number of hidden places, spaces included; times 8 they bound a word's from above.

| quantity | letters | for comparison |
|---|---|---|
| samples that are words of the list | {words:.1%} | {words_by_chance:.2%}, letters by frequency at each place |
| of the words trained on | {words_trained_on:.1%} | |
| of the held-out words | {words_held_out:.2%} | |
| distinct samples | {distinct:.1%} | |
| samples with a gap inside | {gaps:.2%} | 0 |
| total variation of the lengths | {length_distance:.3f} | {length_distance_held_out:.3f} held-out words |
| negative log-likelihood, held-out words | {nll_per_letter:.3f} | {nll_per_letter_by_place:.3f}, by place |
| | | {nll_per_letter_unigram:.3f}, one frequency for all places |
| negative log-likelihood, words trained on | {nll_per_letter_train:.3f} | |

## Limits

A demonstration model for tests and tutorials. Most samples look like English and are no words. It knows the words it
was trained on far better than others.
"""


def save(folder: Path, net: LettersNet, words: Words, metrics: dict[str, float], steps: int, seed: int) -> None:
    """Write weights, configuration, numbers and model card."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in net.state_dict().items()}
    (folder / "model.safetensors").write_bytes(to_safetensors(weights))
    config = {"kind": "masked diffusion", "architecture": "transformer", **CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_digests(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    card = CARD.format(
        parameters=sum(p.numel() for p in net.parameters()), total=len(words.train) + len(words.held_out),
        held_out=len(words.held_out), steps=steps, seed=seed, rate=LEARNING_RATE, batch=BATCH_SIZE, samples=SAMPLES,
        **CONFIG, **metrics,
    )  # fmt: skip
    (folder / "README.md").write_text(card)


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=18_000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder that gets weights, numbers and model card")
    args = parser.parse_args()
    torch.set_num_threads(1)
    words = read_words()
    net = train(to_tokens(words.train), args.steps, args.seed)
    metrics = measure(net, words)
    save(args.out, net, words, metrics, args.steps, args.seed)
    print({name: round(value, 4) for name, value in metrics.items()})


if __name__ == "__main__":
    main()
