"""One HTML page with everything inside it, and the pieces it is made of."""

from __future__ import annotations

import base64
import json
import math
from html import escape
from typing import TYPE_CHECKING, Any

from ..files import plain, versions
from .images import to_png

if TYPE_CHECKING:
    from PIL.Image import Image


def table(heads: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def card(name: str, content: str) -> str:
    return f"<figure class=card><figcaption>{escape(name)}</figcaption>{content}</figure>"


def img(image: Image, alt: str) -> str:
    data = base64.b64encode(to_png(image)).decode()
    return f'<img alt="{escape(alt)}" width="{image.width}" height="{image.height}" src="data:image/png;base64,{data}">'


def page(title: str, body: str, facts: dict[str, Any], *, style: str = "", script: str = "") -> bytes:
    """The page. facts: its numbers, as JSON within. style, script: what its figures need; it must read without them."""
    # "<" is escaped so that no string can close the script element.
    data = json.dumps(plain({**facts, "versions": versions()}), allow_nan=False).replace("<", "\\u003c")
    made = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body><main>{body}"
        f'<footer>{escape(made)}</footer></main><script type="application/json" id="numbers">{data}</script>'
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    ).encode()


def number(value: float | None) -> str:
    """A number to three significant digits, with a true minus sign; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def with_error(mean: float | None, error: float | None) -> str:
    """mean ± error, both to the error's second significant digit and at most four decimals."""
    if mean is None or error is None or not error > 0.0 or math.isinf(error):
        return number(mean)
    decimals = min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def whole(value: float) -> str:
    return f"{value:,.0f}"


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#6a6f76;--rule:#d9dbdd;
  --steered:#2b8cbe;--best:#e6822e}
@media(prefers-color-scheme:dark){:root{--paper:#131416;--card:#1b1d20;--ink:#e8e9ea;--soft:#9aa0a6;--rule:#3a3d41}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:2.2rem 1.1rem 3rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .6rem}
h2{font-size:1.12rem;margin:2.2rem 0 .5rem}
h3{font-size:.95rem;margin:0 0 .5rem}
.chips{list-style:none;display:flex;flex-wrap:wrap;gap:.4rem;margin:0;padding:0}
.chips li{border:1px solid var(--rule);border-radius:99px;padding:.1rem .7rem;font-size:.85rem;background:var(--card)}
.chips span{color:var(--soft);margin-right:.4rem}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:8px;
  padding:.6rem .8rem;font-size:.8rem;margin:.8rem 0 0}
.stopped{border-left:3px solid var(--best);padding-left:.7rem}
.lead{font-size:1.22rem;margin:1.5rem 0 1rem}
.lead b{color:var(--steered)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.7rem}
.tile,.card,.panel{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.8rem .9rem;margin:0}
.tile span,.tile small,.note,.card>figcaption,footer{color:var(--soft);font-size:.85rem}
.tile span,.tile small,.tile b{display:block}
.tile b{font-size:1.6rem;line-height:1.25;font-variant-numeric:tabular-nums}
.note{margin:0 0 .7rem}
.pair,.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:.9rem}
.plots.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,280px),1fr))}
.panel.steered{border-top:3px solid var(--steered)}
.panel.unsteered{border-top:3px solid #9a9a9a}
.grid{display:grid;grid-template-columns:repeat(var(--columns,4),1fr);gap:.45rem}
.grid figure{margin:0}
.grid img{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:3px}
.grid figcaption{font-size:.74rem;text-align:center;color:var(--soft);font-variant-numeric:tabular-nums}
.plots.wide{grid-template-columns:minmax(0,1fr)}
.strip{display:flex;gap:.7rem;overflow-x:auto;padding-bottom:.3rem}
.strip figure{margin:0;flex:0 0 auto;text-align:center}
.strip img{display:block;width:auto;height:80px;image-rendering:pixelated;border-radius:4px}
.strip span{display:block;font:600 1.05rem ui-monospace,monospace;white-space:pre;background:var(--card);
  border:1px solid var(--rule);border-radius:6px;padding:.35rem .6rem}
.strip figcaption{font-size:.78rem;color:var(--soft);margin-top:.2rem;font-variant-numeric:tabular-nums}
.strip b{display:block;color:var(--ink);font-weight:500}
details{margin-bottom:.6rem}
summary{cursor:pointer;margin-bottom:.4rem}
.card svg,.card>img{display:block;width:100%;height:auto;margin-top:.3rem}
.card>img{image-rendering:pixelated}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .9rem .28rem 0;text-align:right;border-bottom:1px solid var(--rule);
  white-space:nowrap;font-weight:400}
th:first-child{text-align:left}
thead th{color:var(--soft);font-size:.82rem}
figure table{width:100%}
footer{margin-top:2.5rem}
"""
