"""Pictures of the documentation's executed examples, as HTML. `.ci/site` puts this on the path."""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.resources import files
from typing import Any

import torch

from steer.report.images import grid as grid_of
from steer.report.images import to_png
from steer.report.tree_figure import tree_figure


def grid(result: Any, caption: str) -> str:
    """A result's samples side by side."""
    return _figure(to_png(grid_of(result.decoded, columns=min(12, len(result.decoded)), least=64)), caption)


def tree(result: Any) -> str:
    """The tree of a search, as its report draws it."""
    style = (files("steer.report") / "assets" / "tree.css").read_text()
    return f'<style>{style}</style><div class="tree-figure">{tree_figure(result)}</div>'


def scatter(plain: Any, steered: Any) -> str:
    """States in the plane: the model's own, and those that follow the reward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    for place, (name, result) in enumerate((("unsteered", plain), ("steered, drawn by weight", steered.draw(512)))):
        axes = figure.add_subplot(1, 2, place + 1, aspect="equal")
        points: torch.Tensor = result.x[0]
        axes.scatter(points[:, 0], points[:, 1], s=4, color="#3b6fb6", alpha=0.5)
        axes.set(title=name, xlim=(-4, 4), ylim=(-2, 4))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return _figure(
        buffer.getvalue(), "The reward grows to the upper right: modes there gain mass and keep their shapes."
    )


def _figure(png: bytes, caption: str) -> str:
    source = base64.b64encode(png).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
