"""What a run returns: a weighted population, what it cost, and how it got there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import diagnostics, log_weights
from ..core.resampling import systematic
from ..core.trajectory import Seen, Trajectory, gather
from ..cost import Cost, check_counts
from ..errors import StateSpaceError
from ..key import Key, as_key
from ..particles.path_mcmc import ACCEPTANCE
from ..types import ReverseProcess

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Result:
    """The weighted population a run ends with.

    process:      what made it.
    x:            clean states, (B, N, *event).
    reward:       scores, (B, N) float64.
    log_weight:   log-weights that sum to one within each problem, (B, N) float64. Samplers: of the law they target.
                  Searches: equal weights on what they chose, zero on the rest.
    log_evidence: estimate of log E_p[exp(r / temperature)], (B,); NaN for searches, which estimate none.
    root:         slot of the noise each sample began from, (B, N).
    key:          what names all the noise of the run.
    cost:         the ledger.
    temperature:  what rewards were divided by.
    trajectory:   the final population with its lineage, where the method keeps one.
    seen:         ESS and scores at the levels that were weighted.
    interrupted:  True where the run was stopped early: x then holds predictions, or fewer particles.
    tree:         the search tree, which can be grown further, where the method grows one.
    """

    process: ReverseProcess
    x: Tensor
    reward: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    root: Tensor
    key: Key
    cost: Cost
    temperature: float = 1.0
    trajectory: Trajectory | None = None
    seen: tuple[Seen, ...] = ()
    interrupted: bool = False
    tree: Any = None

    @classmethod
    def of(cls, state: Trajectory, reward: Tensor, **run: Any) -> Result:
        """What a sampler of a law returns: its last population with scores (B, N). run: key, cost and what else it
        knows of itself."""
        return cls(
            state.process, state.x, reward, log_weights.normalise(state.log_weight), state.log_normaliser, state.root,
            trajectory=state, **run,
        )  # fmt: skip

    def __repr__(self) -> str:
        problems, particles = self.reward.shape
        return (
            f"Result({problems} x {particles} samples, reward mean {self.mean_reward.mean():.4g} "
            f"best {self.reward.max():.4g}, ess {self.ess.mean():.3g}, nfe {self.cost.nfe}"
            f"{', interrupted' if self.interrupted else ''})"
        )

    @property
    def best(self) -> Tensor:
        """The sample of highest reward of each problem, (B, *event)."""
        return gather(self.x, self.reward.argmax(1, keepdim=True))[:, 0]

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the final weights, (B,)."""
        return log_weights.ess(self.log_weight)

    @property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of the final weights, (B,): above .7 their tail is too heavy to trust (`weights.pareto_k`)."""
        return diagnostics.pareto_k(self.log_weight)

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        """What the start or the sampler measured of itself, (B,) each: acceptance, step size, split R-hat."""
        return {} if self.trajectory is None else self.trajectory.diagnostics

    @property
    def mean_reward(self) -> Tensor:
        """Weighted mean reward, (B,)."""
        return log_weights.weighted_mean(self.log_weight, self.reward)

    @property
    def log_evidence_variance(self) -> Tensor:
        """Estimated variance of log_evidence, (B,); NaN where the run has no lineage, or moved it. See `weights`."""
        if self.trajectory is None or any(name.startswith(ACCEPTANCE) for name in self.diagnostics):
            return torch.full_like(self.log_evidence, torch.nan)
        return diagnostics.evidence_variance(self.log_weight, self.root, self.trajectory.resamplings())

    def mean(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Weighted mean over particles of f, a function of states (M, *event) to (M, ...): (B, ...)."""
        values = f(self.x.flatten(0, 1))
        return log_weights.weighted_mean(self.log_weight, values.reshape(*self.reward.shape, *values.shape[1:]))

    def ranked(self) -> Tensor:
        """Particle indices from highest to lowest reward, (B, N)."""
        return torch.sort(self.reward, dim=1, descending=True, stable=True).indices

    def draw(self, count: int, key: Key | int = 0) -> Result:
        """`count` samples per problem of equal weight, by systematic resampling of the weights."""
        check_counts(count=count)
        index = systematic(self.log_weight, as_key(key).fold("draw"), count)
        return self.take(index)

    def take(self, index: Tensor) -> Result:
        """The particles at index (B, M), with equal weights and the same ledger; lineage is left behind."""
        equal = torch.zeros_like(index, dtype=torch.float64)
        return replace(
            self,
            x=gather(self.x, index),
            reward=self.reward.gather(1, index),
            log_weight=log_weights.normalise(equal),
            root=self.root.gather(1, index),
            trajectory=None,
        )

    @property
    def decoded(self) -> Tensor:
        """Samples as rewards see them, (B * N, ...). Decoded when first asked for, and kept."""
        return self._decoded

    @cached_property
    def _decoded(self) -> Tensor:
        with torch.no_grad():
            return self.process.decode(self.x)

    @property
    def images(self) -> list[Image]:
        """Samples as PIL images, problem by problem; for processes that decode to images (M, C, H, W) in [0, 1]."""
        from ..report.images import to_images

        return to_images(self.decoded)

    @property
    def texts(self) -> list[str]:
        """Samples as strings, problem by problem; for processes over tokens that say how to read them."""
        read = getattr(self.process, "text", None)
        if read is None:
            raise StateSpaceError(
                f"samples of this {type(self.process).__name__} are no text; a masked process reads its tokens by "
                "the function steer.from_logits(text=...)"
            )
        return read(self.x.flatten(0, 1))

    def save(self, directory: str | Path, **extra: Any) -> Path:
        """Writes result.safetensors and result.json (seeds, lineage, ledger, versions, digest), atomically."""
        from .saving import save_result

        return save_result(self, Path(directory), **extra)

    def report(self, directory: str | Path, **extra: Any) -> Path:
        """Writes a self-contained report.html: samples, reward, ESS and lineage over steps, the ledger."""
        from ..report.run_report import write_report

        return write_report(self, Path(directory), **extra)

    def _repr_png_(self) -> bytes | None:
        from ..report.images import preview

        return preview(self)
