"""The genealogy of a population so far: which seeds have descendants, drawn as it grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.trajectory import ResamplingRecord, Trajectory
from ..report.page import trusted

if TYPE_CHECKING:
    from markupsafe import Markup

_DRAWN = 64  # lines of descent, at most
_WIDTH, _HEIGHT, _EDGE = 640.0, 260.0, 8.0


@dataclass(frozen=True)
class Lineage:
    """Descent of the particles of one problem.

    levels: the level of every generation, the start first, the present last.
    slots:  of today's particles (of `_DRAWN` of them at most), the slot of their ancestor in every generation.
    sizes:  particles of every generation.
    ended:  (generation, slot, slot of the parent) of particles without descendants today.
    alive:  for every generation, how many starting particles had descendants.
    steps:  of the whole chain.
    """

    levels: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    ended: tuple[tuple[int, int, int], ...]
    alive: tuple[int, ...]
    steps: int

    @classmethod
    def of(cls, state: Trajectory, problem: int = 0) -> Lineage:
        """That of a population, which is only read."""
        records = [record for record in state.past if isinstance(record, ResamplingRecord)]
        parents = [record.parent[problem].tolist() for record in records]
        count = state.x.shape[1]
        sizes = [len(parent) for parent in parents]
        first = _number_at_start(parents, count)
        drawn = sorted({round(i * (count - 1) / max(1, min(count, _DRAWN) - 1)) for i in range(min(count, _DRAWN))})
        back = [drawn, drawn]  # the present, and the last rearrangement: the same slots
        for parent in reversed(parents):
            back.append([parent[slot] for slot in back[-1]])
        roots, alive = list(range(first)), [first]
        for parent in parents:
            roots = [roots[slot] for slot in parent]
            alive.append(len(set(roots)))
        generations = back[::-1]
        few = max([first, *sizes, count]) <= _DRAWN
        born = [list(range(first)), *parents] if few else []
        lost = [
            (g, slot, parent)
            for g, of in enumerate(born)
            for slot, parent in enumerate(of)
            if slot not in generations[g]
        ]
        return cls(
            (0, *(record.k for record in records), state.k),
            tuple(zip(*generations, strict=True)),
            (first, *sizes, count),
            tuple(lost),
            (*alive, alive[-1]),
            state.process.steps,
        )

    def figure(self) -> Markup:
        """Lines of descent from noise (left) to the present, a colour for each start; grey ones have ended."""
        wide = (_WIDTH - 2 * _EDGE) / max(1, self.steps)
        xs = [_EDGE + wide * k for k in self.levels]

        def y(generation: int, slot: int) -> float:
            return _EDGE + (_HEIGHT - 2 * _EDGE) * (slot + 0.5) / self.sizes[generation]

        lines = []
        for g, slot, parent in self.ended:  # each from its parent to where it was left behind
            points = [(xs[max(0, g - 1)], y(max(0, g - 1), parent)), (xs[g], y(g, slot)), (xs[g + 1], y(g, slot))]
            way = "M" + "L".join(f"{x:.1f} {height:.1f}" for x, height in points)
            lines.append(f'<path d="{way}" stroke="currentColor" stroke-opacity=".25" stroke-width="1"/>')
        for line in dict.fromkeys(self.slots):
            path = "L".join(f"{x:.1f} {y(g, slot):.1f}" for g, (x, slot) in enumerate(zip(xs, line, strict=True)))
            lines.append(f'<path d="M{path}" stroke-width="1.6" stroke="hsl({line[0] * 137.5 % 360:.0f} 60% 48%)"/>')
        opening = trusted(
            '<svg class="lineage" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}" fill="none">'
            '<rect x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" stroke="currentColor" '
            'stroke-opacity=".2"/>'
        ).format(_WIDTH, _HEIGHT, self.words, _EDGE, _EDGE / 2, _WIDTH - 2 * _EDGE, _HEIGHT - _EDGE)
        return opening + trusted("".join(lines) + "</svg>")

    @property
    def words(self) -> str:
        """The figure in a sentence."""
        now = f"at step {self.levels[-1]} of {self.steps}"
        if len(self.levels) == 2:
            return f"nothing was resampled: {self.sizes[-1]} particles {now}"
        of = f" of {self.sizes[0]}" if len({*self.sizes}) == 1 else ""
        return f"{self.alive[-1]}{of} starting particles have descendants {now}"


def _number_at_start(parents: list[list[int]], count: int) -> int:
    """How many particles began, which the past does not say.

    Where the first rearrangement uses the first few slots and no others, a search has branched: that many began. Where
    it uses later ones than it has particles, a search has left some out: at least as many began as were used.
    """
    if not parents:
        return count
    used = 1 + max(parents[0])
    return used if len(set(parents[0])) == used else max(used, len(parents[0]))
