"""A search tree as an SVG figure, which also pans and zooms where scripts run.

Where each node goes is computed here and drawn by assets/tree.html.j2. assets/tree.js pans, zooms, and shows the node
under the pointer; without it every node still has its numbers as a tooltip.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..processes.gaussian import decode_problem
from .images import is_images, to_images
from .page import number, render
from .run_result import RunResult
from .tree_layout import LEAVES, NODES, VisibleTree, chosen, clean_states, leaf_weights, ranked_nodes

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image


PIXELS = 200_000
"""At most this many in the sheet of thumbnails of one tree."""
SHADES = 8
"""Shades of blue for values, .v0 to .v7 in tree.css."""
_WIDTH, _LEFT, _TOP = 1000.0, 72.0, 22.0


def tree_figure(result: RunResult, problem: int = 0, *, leaves: int = LEAVES, nodes: int = NODES) -> Markup:
    """The tree of one problem as HTML: what is shown, a figure, and the sheet of thumbnails that its script reads.

    Args:
        result: A run with a tree that is `drawable`.
        problem: Which of its trees.
        leaves: How many leaves to draw at most.
        nodes: How many nodes to draw at most.

    Returns:
        Markup for a page that has tree.css, and tree.js where it is to move.

    Cost: one decoded sample for each thumbnail, not counted in the run's cost.
    """
    tree = chosen(result.tree, problem, leaf_weights(result, problem), leaves, nodes)
    sheet, cells, words = _thumbnails(result, tree, problem)
    height = _TOP + tree.depth * max(44.0, min(92.0, 430.0 / tree.depth)) + 16.0
    span = _WIDTH - _LEFT - 12.0
    xs = [[_LEFT + span * x for x in row] for row in tree.place]
    ys = [_TOP + (height - _TOP - 16.0) / tree.depth * d for d in range(tree.depth + 1)]
    return render(
        "tree.html.j2",
        count=len(tree.slots[-1]),
        leaves=tree.leaves,
        total=tree.total,
        weighted=tree.weight is not None,
        width=f"{_WIDTH:.0f}",
        height=f"{height:.0f}",
        rules=[
            {"left": f"{_LEFT - 8:.0f}", "y": f"{y:.1f}", "baseline": f"{y + 4.5:.1f}", "name": _level_name(tree, d)}
            for d, y in enumerate(ys)
        ],
        edges_by_depth=_edges(tree, xs, ys),
        best=_best_path(tree, xs, ys),
        nodes=_nodes(tree, xs, ys, _sizes(tree, span), words, cells),
        sheet=None if sheet is None else {"image": sheet[0], "side": sheet[1]},
    )


def _level_name(tree: VisibleTree, d: int) -> str:
    """What the nodes of a depth are called beside the figure."""
    return "start" if d == 0 else "data" if d == tree.depth else f"step {tree.levels[d - 1]}"


def _edges(tree: VisibleTree, xs: list[list[float]], ys: list[float]) -> list[str]:
    """SVG paths of all edges, one path for each depth."""
    return [
        "".join(_edge(xs[d - 1][p], ys[d - 1], x, ys[d]) for p, x in zip(tree.above[d], xs[d], strict=True))
        for d in range(1, tree.depth + 1)
    ]


def _best_path(tree: VisibleTree, xs: list[list[float]], ys: list[float]) -> str:
    """SVG path from the root to the best leaf."""
    at = [row[i] for row, i in zip(xs, tree.best, strict=True)]
    return "".join(_edge(at[d - 1], ys[d - 1], at[d], ys[d]) for d in range(1, tree.depth + 1))


def _nodes(
    tree: VisibleTree,
    xs: list[list[float]],
    ys: list[float],
    sizes: list[list[float]],
    words: dict[tuple[int, int], str],
    cells: dict[tuple[int, int], int],
) -> list[dict[str, Any]]:
    """The nodes as the template draws them, from the root down."""
    first, shades = tree.first, _shades(tree)
    return [
        {
            "shade": shades[d][i],
            "on_best": tree.best[d] == i,
            "x": f"{xs[d][i]:.1f}",
            "y": f"{ys[d]:.1f}",
            "r": f"{sizes[d][i]:.1f}",
            "parent": first[d - 1] + tree.above[d][i] if d else None,
            "cell": cells.get((d, i)),
            "facts": _facts(tree, d, i, words.get((d, i))),
        }
        for d, i in tree.nodes()
    ]


def _edge(x: float, y: float, u: float, v: float) -> str:
    """A curve from a node at (x, y) to its child at (u, v)."""
    return f"M{x:.1f} {y:.1f}C{x:.1f} {(y + v) / 2:.1f} {u:.1f} {(y + v) / 2:.1f} {u:.1f} {v:.1f}"


def _facts(tree: VisibleTree, d: int, i: int, word: str | None) -> str:
    """A node in words, one "name: value" a line."""
    known = tree.columns[d]
    lines = [("step", "start" if d == 0 else f"{tree.levels[d - 1]} of {tree.levels[-1]}")]
    if word is not None:
        lines.append(("text", word))
    if d < tree.depth:
        lines += [("visits", f"{known['visits'][i]:,.0f}"), ("children", f"{known['children'][i]:,.0f}")]
        lines.append(("value", number(known["value"][i])))
    for name, label in (("predicted_reward", "reward of x̂0"), ("reward", "reward")):
        if name in known:
            lines.append((label, number(known[name][i])))
    if d == tree.depth and tree.weight is not None:
        lines.append(("weight", number(tree.weight[i])))
    return "\n".join(f"{name}: {text}" for name, text in lines)


def _shades(tree: VisibleTree) -> list[list[int]]:
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


def _sizes(tree: VisibleTree, span: float) -> list[list[float]]:
    """Radii: area follows the share of visits, or of weight; neighbours overlap by little."""
    sizes = []
    for d, known in enumerate(tree.columns):
        shares = known["visits"] if d < tree.depth else tree.weight or [0.3] * len(tree.slots[d])
        top = max(shares) if d < tree.depth or tree.weight else 1.0
        least, most = 2.2, max(2.8, min(7.0, 1.5 * span / len(tree.slots[d])))
        sizes.append([least + (most - least) * math.sqrt(share / top if top > 0 else 0.0) for share in shares])
    return sizes


def _thumbnails(
    result: RunResult, tree: VisibleTree, problem: int
) -> tuple[tuple[Image, int] | None, dict[tuple[int, int], int], dict[tuple[int, int], str]]:
    """A sheet of thumbnails with its columns, which node has which cell, and the texts of nodes that are text.

    Nodes on the paths to the best leaves come first, until the sheet is full.
    """
    from PIL import Image as pillow

    read = result.process.text
    with torch.no_grad():
        probe = clean_states(result, tree.depth, tree.slots[-1][tree.best[-1] :][:1], problem)
        decoded = None if read else decode_problem(result.process, probe, problem)
    if decoded is not None and not is_images(decoded):
        return None, {}, {}
    side = 0 if decoded is None else min(48, max(decoded.shape[-2:]))
    room = NODES if decoded is None else max(1, min(NODES, PIXELS // side**2))
    index = ranked_nodes(tree, room)
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
                    made = to_images(decode_problem(result.process, clean, problem))
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
