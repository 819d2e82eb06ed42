"""A search tree as an SVG that stands by itself, and moves where scripts run.

Where each node goes is computed here. The script below the figure pans, zooms, and shows the node under the pointer;
without it every node still has its numbers as a tooltip.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import torch

from ..processes.gaussian import decoded_alone
from .images import is_images, to_images
from .page import img, number
from .tree_assets import SHADES
from .tree_layout import LEAVES, NODES, Shown, _ranked, chosen, clean_states, leaf_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..results.result import Result

PIXELS = 200_000
"""At most this many in the sheet of thumbnails of one tree."""
_WIDTH, _LEFT, _TOP = 1000.0, 72.0, 22.0


def tree_figure(result: Result, problem: int = 0, *, leaves: int = LEAVES, nodes: int = NODES) -> str:
    """The tree of one problem as HTML: a figure, the sheet of thumbnails that its script reads, and what is shown."""
    tree = chosen(result.tree, problem, leaf_weights(result, problem), leaves, nodes)
    sheet, cells, words = _thumbnails(result, tree, problem)
    height = _TOP + tree.depth * max(44.0, min(92.0, 430.0 / tree.depth)) + 16.0
    hidden = "" if sheet is None else img(sheet[0], "").replace("<img ", f'<img hidden data-side="{sheet[1]}" ')
    count = len(tree.slots[-1])
    omitted = f", of {tree.leaves:,}: those of largest {'weight' if tree.weight else 'reward'}"
    note = (
        f"{count:,} leaves{omitted * (count < tree.leaves)}. Each level's best branch is on the left. Stronger "
        "blue: higher value. Larger: more visits, or for leaves more weight. Orange: the way to the best leaf."
    )
    return (
        f'<p class="note">{note} <span class="moves" hidden>Click a node for its own way; drag to move, zoom with the '
        "buttons or Ctrl and the wheel.</span></p>"
        f'<div class="tree"><div class="scroll">{_svg(tree, height, words, cells)}</div>'
        f'<div class="node" aria-live="polite"></div>{hidden}</div>'
    )


def _svg(tree: Shown, height: float, words: dict[tuple[int, int], str], cells: dict[tuple[int, int], int]) -> str:
    step = (height - _TOP - 16.0) / tree.depth
    span = _WIDTH - _LEFT - 12.0
    xs = [[_LEFT + span * x for x in row] for row in tree.place]
    ys = [_TOP + step * d for d in range(tree.depth + 1)]
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:.0f} {height:.0f}" tabindex="0" role="img" '
        f'aria-label="Search tree of {tree.total} nodes and {tree.leaves} leaves">'
    ]
    for d, y in enumerate(ys):
        name = "start" if d == 0 else "data" if d == tree.depth else f"level {tree.levels[d - 1]}"
        parts.append(
            f'<path class="rule" d="M{_LEFT - 8:.0f} {y:.1f}H{_WIDTH:.0f}"/><text x="2" y="{y + 4.5:.1f}">{name}</text>'
        )
    for d in range(1, tree.depth + 1):
        lines = (_edge(xs[d - 1][p], ys[d - 1], x, ys[d]) for p, x in zip(tree.above[d], xs[d], strict=True))
        parts.append(f'<path class="edge" d="{"".join(lines)}"/>')
    way = "".join(
        _edge(xs[d - 1][tree.best[d - 1]], ys[d - 1], xs[d][tree.best[d]], ys[d]) for d in range(1, tree.depth + 1)
    )
    parts.append(f'<path class="best" d="{way}"/><path class="trail" d=""/>')
    first, shade, size = tree.first, _shades(tree), _sizes(tree, span)
    for d, i in tree.nodes():
        marks = f"v{shade[d][i]}" + " on" * (tree.best[d] == i)
        parent = f' data-p="{first[d - 1] + tree.above[d][i]}"' if d else ""
        cell = f' data-i="{cells[d, i]}"' if (d, i) in cells else ""
        parts.append(
            f'<circle class="{marks}" cx="{xs[d][i]:.1f}" cy="{ys[d]:.1f}" r="{size[d][i]:.1f}"{parent}{cell}>'
            f"<title>{escape(_facts(tree, d, i, words.get((d, i))))}</title></circle>"
        )
    return "".join(parts) + "</svg>"


def _edge(x: float, y: float, u: float, v: float) -> str:
    return f"M{x:.1f} {y:.1f}C{x:.1f} {(y + v) / 2:.1f} {u:.1f} {(y + v) / 2:.1f} {u:.1f} {v:.1f}"


def _facts(tree: Shown, d: int, i: int, word: str | None) -> str:
    """A node in words, one "name: value" a line."""
    known = tree.columns[d]
    lines = [("level", "start" if d == 0 else f"{tree.levels[d - 1]} of {tree.levels[-1]}")]
    if word is not None:
        lines.append(("text", word))
    if d < tree.depth:
        lines += [("visits", f"{known['visits'][i]:,.0f}"), ("children", f"{known['children'][i]:,.0f}")]
        lines.append(("value", number(known["value"][i])))
    for name, label in (("look", "reward of x̂0"), ("reward", "reward")):
        if name in known:
            lines.append((label, number(known[name][i])))
    if d == tree.depth and tree.weight is not None:
        lines.append(("weight", number(tree.weight[i])))
    return "\n".join(f"{name}: {text}" for name, text in lines)


def _shades(tree: Shown) -> list[list[int]]:
    """Values from low to high as 0 to 7, between the 2nd and 98th percentile of what is shown."""
    values = [known["value"] for known in tree.columns]
    finite = sorted(v for row in values for v in row if math.isfinite(v)) or [0.0]
    low, high = finite[int(0.02 * (len(finite) - 1))], finite[math.ceil(0.98 * (len(finite) - 1))]
    scale = SHADES / (high - low) if high > low else 0.0

    def shade(value: float) -> int:
        if not math.isfinite(value):
            return 0
        return min(SHADES - 1, max(0, int((value - low) * scale)))

    return [[shade(v) for v in row] for row in values]


def _sizes(tree: Shown, span: float) -> list[list[float]]:
    """Radii: area follows the share of visits, or of weight; neighbours overlap by little."""
    sizes = []
    for d, known in enumerate(tree.columns):
        shares = known["visits"] if d < tree.depth else tree.weight or [0.3] * len(tree.slots[d])
        top = max(shares) if d < tree.depth or tree.weight else 1.0
        least, most = 1.6, max(2.2, min(7.0, 1.5 * span / len(tree.slots[d])))
        sizes.append([least + (most - least) * math.sqrt(share / top if top > 0 else 0.0) for share in shares])
    return sizes


def _thumbnails(
    result: Result, tree: Shown, problem: int
) -> tuple[tuple[Image, int] | None, dict[tuple[int, int], int], dict[tuple[int, int], str]]:
    """A sheet of thumbnails with its columns, which node has which cell, and the texts of nodes that are text.

    Nodes on the way to the best leaves come first, until the sheet is full.
    """
    from PIL import Image as pillow

    read = result.process.text
    with torch.no_grad():
        probe = clean_states(result, tree.depth, tree.slots[-1][tree.best[-1] :][:1], problem)
        decoded = None if read else decoded_alone(result.process, probe, problem)
    if decoded is not None and not is_images(decoded):
        return None, {}, {}
    side = 0 if decoded is None else min(48, max(decoded.shape[-2:]))
    room = NODES if decoded is None else max(1, min(NODES, PIXELS // side**2))
    index = _ranked(tree, room)
    pictures: dict[tuple[int, int], Image] = {}
    words: dict[tuple[int, int], str] = {}
    with torch.no_grad():
        for d in range(1, tree.depth + 1):
            wanted = [i for depth, i in index if depth == d]
            for part in (wanted[j : j + 64] for j in range(0, len(wanted), 64)):
                clean = clean_states(result, d, tree.slots[d][part], problem)
                if read:
                    words |= {(d, i): word for i, word in zip(part, read(clean.flatten(0, 1)), strict=True)}
                else:
                    made = to_images(decoded_alone(result.process, clean, problem))
                    pictures |= {(d, i): image for i, image in zip(part, made, strict=True)}
    if not pictures:
        return None, {}, words
    wide = math.ceil(math.sqrt(len(pictures)))
    mode = next(iter(pictures.values())).mode
    sheet = pillow.new(mode, (wide * side, math.ceil(len(pictures) / wide) * side))
    for cell, image in enumerate(pictures.values()):
        image.thumbnail((side, side))  # shrinks only
        sheet.paste(image, (cell % wide * side, cell // wide * side))
    if mode == "RGB":
        sheet = sheet.quantize(255)
    return (sheet, side), {node: cell for cell, node in enumerate(pictures)}, words
