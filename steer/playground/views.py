"""Parts of the page, as markup: the state of a run, its samples, its genealogy. No text of a run becomes markup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..report.page import data_uri, number, trusted, whole
from .lineage import Lineage
from .session import Ended, Moment, Sample

if TYPE_CHECKING:
    from markupsafe import Markup

STYLE = """
.steer-error { border-left: 4px solid #c0392b; padding: .5rem .8rem; overflow-wrap: anywhere; }
.steer-verdict { font-size: 1.15rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.steer-facts { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .3rem 0; }
.steer-facts div { display: flex; flex-direction: column; }
.steer-facts dt { font-size: .8rem; opacity: .8; }
.steer-facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.steer-samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: .6rem; margin: 0;
  padding: 0; list-style: none; }
.steer-samples img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
.steer-samples span { display: block; font-size: .8rem; text-align: center; font-variant-numeric: tabular-nums; }
.steer-samples .steer-text { font-size: 1rem; overflow-wrap: anywhere; }
.lineage { width: 100%; height: auto; display: block; }
progress.steer-bar { width: 100%; height: .6rem; accent-color: #2b8cbe; }
"""


def status(seen: Moment | Ended) -> Markup:
    """How far a run is; at its end what it did, and what it cost."""
    if isinstance(seen, Moment):
        return _bar(seen) + _facts(
            ("step", f"{seen.level} of {seen.steps}"),
            ("NFE, network rows", f"{seen.nfe:,} of {seen.budget:,}"),
            ("ESS", number(seen.ess)),
            ("mean reward", "not scored" if seen.mean is None else number(seen.mean)),
            ("best reward", "not scored" if seen.best is None else number(seen.best)),
            ("time left", f"{whole(seen.left)} s"),
        )
    wrong = error(seen.error) if seen.error else trusted("")
    if seen.result is None:
        return wrong
    result = seen.result
    kept = "Stopped; this is what there was. " if result.interrupted else ""
    words = trusted('<p class="steer-verdict" role="status">{}{}.</p>').format(kept, _capital(seen.verdict))
    return wrong + words + _facts(
        ("samples", str(result.reward.shape[1])),
        ("mean reward", number(float(result.mean_reward.mean()))),
        ("best reward", number(float(result.reward.max()))),
        ("ESS", number(float(result.ess.mean()))),
        ("temperature", number(result.temperature)),
        ("NFE, network rows", f"{result.cost.nfe:,}"),
        ("seconds", number(result.cost.seconds["total"])),
    )  # fmt: skip


def error(message: str) -> Markup:
    """What went wrong."""
    return trusted('<p class="steer-error" role="alert">{}</p>').format(message)


def waiting() -> Markup:
    """Before the first step."""
    return trusted('<p role="status">The model is being loaded, or another visitor\'s step is under way.</p>')


def samples(shown: tuple[Sample, ...]) -> Markup:
    """Pictures or texts with their rewards, in the order given."""
    items = [_sample(place, each) for place, each in enumerate(shown, 1) if each.picture is not None or each.text]
    if not items:
        return trusted("<p>{}</p>").format("These samples are neither pictures nor texts." if shown else "")
    return trusted('<ul class="steer-samples">') + trusted("").join(items) + trusted("</ul>")


def lineage(drawn: Lineage | None) -> Markup:
    """The genealogy, and in words what it shows."""
    if drawn is None:
        return trusted("<p>This method keeps no genealogy of its samples.</p>")
    return drawn.figure() + trusted("<p>From noise (left) to data (right): {}.</p>").format(drawn.words)


def _sample(place: int, each: Sample) -> Markup:
    reward = "" if each.reward is None else number(each.reward)
    said = f"sample {place}" + (f", reward {reward}" if reward else "")
    if each.picture is not None:
        shown = trusted('<img src="{}" alt="{}">').format(data_uri(each.picture), said)
    else:
        shown = trusted('<span class="steer-text">{}</span>').format(each.text)
    return trusted("<li>{}<span>{}</span></li>").format(shown, reward)


def _bar(seen: Moment) -> Markup:
    return trusted(
        '<progress class="steer-bar" aria-label="network rows spent" value="{}" max="{}"></progress>'
    ).format(min(seen.nfe, seen.budget), seen.budget)


def _facts(*facts: tuple[str, str]) -> Markup:
    items = [trusted("<div><dt>{}</dt><dd>{}</dd></div>").format(*fact) for fact in facts]
    return trusted('<dl class="steer-facts">') + trusted("").join(items) + trusted("</dl>")


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
