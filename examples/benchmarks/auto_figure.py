"""The figure of docs/which_method.md, from the table of `auto.py`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from auto import FIXED, GOALS, Regrets, values

from steer.evaluation.choice import CANDIDATES

COLOURS = {0: "#3465a4", 1: "#73a946", 10: "#e0912f", 100: "#b5312c"}
SHOWN = {"svdd argmax": "SVDD argmax", "best_of_n": "best-of-N", "importance_sampling": "importance s."}


def draw(table: dict[str, Any], path: Path) -> None:
    """Where choosing early pays, and what always using one method costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.2, 1.0))
    _crossing(left, table)
    _regrets(right, table)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _crossing(axes: Any, table: dict[str, Any]) -> None:
    """Gain of SVDD argmax over best-of-N in every cell, by candidates of a step."""
    for price, colour in COLOURS.items():
        x, y = [], []
        for facts in (f for f in table.values() if f["price"] == price and f["stochastic"] and "best" in f):
            for number, chains in enumerate(facts["chains"]):
                made, steps = values(facts, number, "best"), facts["steps"]
                if "svdd argmax" in made:
                    x.append(chains * (steps + price) / (steps + price * (steps + 1)))
                    y.append(fmean(made["svdd argmax"]) - fmean(made["best_of_n"]))
        axes.scatter(x, y, s=18, color=colour, alpha=0.75, label=f"a score costs {price} network rows")
    axes.axhline(0.0, color="#888", lw=0.8)
    axes.axvline(CANDIDATES, color="#222", lw=1.0, ls="--")
    axes.annotate(f"{CANDIDATES:g}", (CANDIDATES, axes.get_ylim()[0]), (3, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="candidates of every step that the budget pays for, scored")
    axes.set(ylabel="SVDD argmax less best-of-N\n(of the largest gain in the task)")
    axes.set_title("One best sample: choose early, or at the end?", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _regrets(axes: Any, table: dict[str, Any]) -> None:
    """Mean regret of `auto` and of fixed methods, for each goal."""
    place, ticks, names = 0.0, [], []
    for goal in GOALS:
        regrets = Regrets(table, goal)
        own = "auto, population" if goal == "population" else "auto"
        for name in (own, *FIXED[goal][:5]):
            found = fmean(fair for _, fair, _ in regrets.of(lambda *_, name=name: name))
            axes.barh(place, min(max(found, 0.0), 0.6), color="#222" if name == own else "#9bb3cf", height=0.8)
            axes.text(min(max(found, 0.0), 0.6) + 0.01, place, f"{found:.2f}", va="center", fontsize=7)
            ticks.append(place)
            names.append("auto" if name == own else SHOWN.get(name, name))
            place += 1.0
        axes.text(
            0.66, place - 3.5, GOALS[goal].replace(", ", ",\n"), ha="right", va="center", fontsize=8, color="#555"
        )
        place += 0.8
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0.0, 0.68), xlabel="mean regret, as a share of the gain (bars end at .6)")
    axes.set_title("What it costs always to use one method", fontsize=10)
