"""Classifier-free guidance of the class-conditional digits, before and after its Feynman-Kac correction.

    python examples/benchmarks/digits_guidance.py [--particles 64] [--keys 5] [--guidance 1.4 2 4] [--json FILE]

Guidance at scale w runs the reverse SDE with the score (1 - w) s_null + w s_digit, whose samples follow no law that
anyone wrote down. The law it means is p(x)^(1-w) p(x | digit)^w, and `steer.fkc` weights the same moves to sample it.
Its weights integrate w (w - 1) |s_digit - s_null|^2: an error e of a learned prediction enters as e^2 / sigma^2, and
grows without bound towards the data. So three corrections are shown: everywhere; at t in [.2, 1] only, where it matters
(of a bias that is not known); and everywhere, with VCG's drift, which leaves the weights less to do. Digits are told
apart nearly perfectly, so that law is close to p(x | digit) itself, whatever w is: the scans of the digit are its
reference. Columns are means over ten digits with standard errors over keys:

judge      held-out judge's probability of the digit, by weight.
ink        error of the mean brightness against the scans: guidance saturates.
frechet    Fréchet distance in the judge's features between draws by weight and the train scans of the digit. It falls
           with the number of distinct samples; the row "real scans" is a draw of as many.
diversity  mean distance of two draws by weight, in the judge's features.
ess        effective sample size.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

import steer
from steer import rewards
from steer.rewards.digits import load_digit_net

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from digits_data import splits
from digits_quality import frechet_distance

Row = dict[str, float]
CORRECTIONS = {
    "corrected": steer.fkc,
    "corrected at t > .2": functools.partial(steer.fkc, active=(0.2, 1.0)),
    "corrected, VCG": steer.driftlite,
}


def measure(images: Tensor, digit: int, scans: Tensor, ess: float, rows: float) -> Row:
    """Columns of equally weighted images (M, 1, 8, 8) in [0, 1]."""
    judge = load_digit_net("digits-judge")
    features, real = judge.features(images), judge.features(scans)
    return {
        "judge": rewards.judge(digit)(images).mean().item(),
        "ink": (images.mean() - scans.mean()).item(),
        "frechet": frechet_distance(features, real),
        "diversity": torch.pdist(features).mean().item(),
        "ess": ess,
        "network rows": rows,
    }


def run(particles: int, keys: int, guidances: list[float], digits: list[int]) -> dict[str, list[list[Row]]]:
    """table[name][key][digit]."""
    data = splits().train
    scans = {d: (data.images[data.labels == d] / 2 + 0.5).clamp(0, 1) for d in digits}
    null, table = steer.load("digits", steps=50), {}
    conditional = {d: steer.load("digits", steps=50, labels=d) for d in digits}
    for key in range(keys):
        each = []
        for d in digits:
            index = (steer.Key(key).fold("real", d).uniform((1, particles))[0] * len(scans[d])).long()
            each.append(measure(scans[d][index], d, scans[d], float(particles), 0.0))
        table.setdefault("real scans", []).append(each)
        for w in (1.0, *guidances):
            plain, corrected = [], {}
            for d in digits:
                target = steer.compose(conditional[d], unconditional=null, guidance=w)
                before = steer.rollout(target, rewards.Ink(), particles=particles, key=key, keep_states=False)
                plain.append(measure(before.decoded, d, scans[d], float(particles), before.cost.nfe))
                if w != 1.0:
                    for name, correct in CORRECTIONS.items():
                        after = correct(target, particles=particles, key=key)
                        drawn = after.draw(particles, key=key).decoded
                        row = measure(drawn, d, scans[d], after.ess.item(), after.cost.nfe)
                        corrected.setdefault(name, []).append(row)
            table.setdefault(f"w = {w:g}" + (" (no guidance)" if w == 1.0 else ", guidance"), []).append(plain)
            for name, rows in corrected.items():
                table.setdefault(f"w = {w:g}, {name}", []).append(rows)
    return table


def markdown(table: dict[str, list[list[Row]]]) -> str:
    """Means ± standard errors over keys."""
    columns = list(next(iter(table.values()))[0][0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, keys in table.items():
        cells = []
        for column in columns:
            means = torch.tensor([sum(row[column] for row in digits) / len(digits) for digits in keys])
            error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
            whole = column in ("ess", "network rows")
            cells.append(f"{means.mean():,.0f}" if whole else f"{means.mean():.3f} ± {error:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.4, 2.0, 4.0])
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="weights outside")  # the bias of an active interval is the point
    table = run(arguments.particles, arguments.keys, arguments.guidance, arguments.digits)
    print(markdown(table))
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
