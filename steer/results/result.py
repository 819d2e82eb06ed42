"""What a run returns: a weighted population, what it cost, and how it got there."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import unwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core import diagnostics, population
from ..core.method_choice import MethodChoice
from ..core.population import gather
from ..core.resampling import systematic
from ..core.run import Run
from ..core.temperature import TemperatureChoice
from ..core.trajectory import LevelRecord, Trajectory
from ..cost import Cost, check_counts
from ..errors import StateSpaceError, SteerError
from ..key import Key, as_key
from ..noise import backends
from ..report.verdict import verdict
from ..types import ReverseProcess, RewardSpec

if TYPE_CHECKING:
    from PIL.Image import Image


Law = Literal["target", "model", "none"]
"""What a weighted mean over a result estimates: see `Result.law`."""


class MadeBy(NamedTuple):
    """What a run was, for its record.

    method: name of the method; "" for a population put together by hand.
    reward: name of the reward; unit, version: what it says of itself.
    noise:  what made the normals: "numba", "triton" or "reference"; "" where a file does not say.
    """

    method: str = ""
    reward: str | None = None
    unit: str | None = None
    version: str | None = None
    noise: str = ""

    @classmethod
    def of(cls, run: Run) -> MadeBy:
        """Read off a run."""
        reward = unwrap(run.objective.reward)
        spec = getattr(reward, "spec", None)
        spec = spec if isinstance(spec, RewardSpec) else RewardSpec()
        name = getattr(reward, "__qualname__", None) or type(reward).__qualname__
        noise = backends.name_of(run.key.noise, run.process.device)
        return cls(run.name, name, spec.unit, spec.version or None, noise)


@dataclass(frozen=True, eq=False)
class Result:
    """The weighted population a run ends with.

    process:      what made it.
    x:            clean states, [B, N, *event].
    reward:       scores, [B, N] float64.
    log_weight:   log-weights that sum to one within each problem, [B, N] float64. Samplers: of their target.
                  Searches: equal weights on what they chose, zero on the rest.
    log_evidence: estimate of log E_p[exp(r / temperature)], [B]; NaN for searches, which estimate none.
    root:         slot of the noise each sample began from, [B, N].
    key:          what names all the noise of the run.
    cost:         the ledger.
    temperature:  what rewards were divided by.
    trajectory:   the final population with its lineage, where the method keeps one.
    seen:         ESS and scores at the levels that were weighted.
    interrupted:  True where the run was stopped early: x then holds predictions, or fewer particles.
    tree:         the search tree, which can be grown further, where the method grows one.
    law:          what weighted means estimate: "target", p(x) exp(r(x) / temperature); "model", p(x); "none", where a
                  search chose the samples, or a start that no weight corrects for.
    log_evidence_variance: estimated variance of log_evidence, [B]. From the ancestors of each problem's particles,
                  where `multinomial` drew them, at most N / 2 times, or nothing was resampled, and one starting noise
                  has not all of the weight. Else from the spread over problems, the same number for all, where these
                  repeat one: no prompts or labels, batch >= 2. Else NaN: a single run does not tell (a UserWarning says
                  so where one starting noise has all of the weight). Repeat it, or resample less, by
                  `steer.multinomial`. By ancestors it is right on average, has an error of its own of about sqrt(2 R) /
                  N after R resamplings, and may be negative where it is smaller than that.
    made_by:      the method and the reward, by their names.
    temperature_choice: how the temperature was chosen, where the run was asked for "auto", `ess=` or `kl=`. The run is
                  the same as one of this temperature, but for what the choice cost.
    method_choice: what `method="auto"` chose, and why.
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
    seen: tuple[LevelRecord, ...] = ()
    interrupted: bool = False
    tree: Any = None
    law: Law = "none"
    log_evidence_variance: Tensor = None  # type: ignore[assignment]
    made_by: MadeBy = MadeBy()  # noqa: RUF009, a tuple does not change
    temperature_choice: TemperatureChoice | None = None
    method_choice: MethodChoice | None = None

    def __post_init__(self) -> None:
        if self.log_evidence_variance is None:
            object.__setattr__(self, "log_evidence_variance", torch.full_like(self.log_evidence, torch.nan))

    @classmethod
    def from_population(
        cls,
        run: Run,
        state: Trajectory,
        reward: Tensor,
        *,
        law: Law,
        seen: Sequence[LevelRecord] = (),
        interrupted: bool = False,
    ) -> Result:
        """What a sampler of a distribution returns: its last population, with its scores [B, N]."""
        root, weight = state.root, population.normalise(state.log_weight)
        variance = _evidence_variance(state, weight, root)
        lost = diagnostics.one_root(weight, root) & variance.isnan() & ~state.log_evidence.isnan()
        if weight.shape[1] > 1 and bool(lost.any()):
            _warn_of_one_root(int(lost.nonzero()[0]), weight.shape[1])
        return cls(
            process=state.process,
            x=state.x,
            reward=reward,
            log_weight=weight,
            log_evidence=state.log_normaliser,
            root=root,
            key=run.key,
            cost=run.meter.cost(),
            temperature=run.temperature,
            trajectory=state,
            seen=tuple(seen),
            interrupted=interrupted,
            law="none" if state.biased_start else law,
            log_evidence_variance=variance,
            made_by=MadeBy.of(run),
        )

    @classmethod
    def from_search(
        cls,
        run: Run,
        x: Tensor,
        reward: Tensor,
        root: Tensor,
        *,
        keep: int | None = None,
        seen: Sequence[LevelRecord] = (),
        interrupted: bool = False,
    ) -> Result:
        """What a search returns: samples [B, n, *event], of which the `keep` best share the weight; None: all."""
        equal = population.normalise(torch.zeros_like(reward))
        log_weight = equal if keep is None else population.weights_of_top_k(reward, keep)
        return cls(
            process=run.process,
            x=x,
            reward=reward,
            log_weight=log_weight,
            log_evidence=torch.full_like(reward[:, 0], torch.nan),
            root=root,
            key=run.key,
            cost=run.meter.cost(),
            temperature=run.temperature,
            seen=(*seen, LevelRecord(run.process.steps, population.ess(log_weight), reward)),
            interrupted=interrupted,
            made_by=MadeBy.of(run),
        )

    def __repr__(self) -> str:
        problems, particles = self.reward.shape
        choice, chosen = self.temperature_choice, self.method_choice
        return (
            f"Result({problems} x {particles} samples, reward mean {self.mean_reward.mean():.4g} "
            f"best {self.reward.max():.4g}, ess {self.ess.mean():.3g}, nfe {self.cost.nfe}"
            f"{'' if choice is None else f', temperature {choice.temperature:.3g} for {choice.asked}'}"
            f"{', interrupted' if self.interrupted else ''}; {verdict(self)}"
            f"{'' if chosen is None else f'. {chosen}'})"
        )

    @property
    def best(self) -> Tensor:
        """The sample of highest reward of each problem, [B, *event]."""
        return gather(self.x, self.reward.argmax(1, keepdim=True))[:, 0]

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the final weights, [B]."""
        return population.ess(self.log_weight)

    @property
    def pareto_k(self) -> Tensor:
        """Pareto k-hat of the final weights, [B]: above .7 their tail is too heavy to trust (`weights.pareto_k`)."""
        return diagnostics.pareto_k(self.log_weight)

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        """What the start or the sampler measured of itself, [B] each: acceptance, step size, split R-hat."""
        return {} if self.trajectory is None else self.trajectory.diagnostics

    @property
    def mean_reward(self) -> Tensor:
        """Weighted mean reward, [B]."""
        return population.weighted_mean(self.log_weight, self.reward)

    def mean(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Weighted mean over particles of f, a function of states [M, *event] to [M, ...]: [B, ...]."""
        values = f(self.x.flatten(0, 1).clone())  # a copy: f may work in place
        return population.weighted_mean(self.log_weight, values.reshape(*self.reward.shape, *values.shape[1:]))

    def ranked(self) -> Tensor:
        """Particle indices from highest to lowest reward, [B, N]."""
        return torch.sort(self.reward, dim=1, descending=True, stable=True).indices

    def draw(self, count: int, key: Key | int = 0, *, seed: int | None = None) -> Result:
        """`count` samples per problem of equal weight, by systematic resampling of the weights."""
        check_counts(count=count)
        index = systematic(self.log_weight, as_key(key, seed).fold("draw"), count)
        return replace(self.take(index), law=self.law)

    def take(self, index: Tensor) -> Result:
        """The particles at index [B, M], with equal weights and the same cost; lineage and `law` are left behind."""
        equal = torch.zeros_like(index, dtype=torch.float64)
        return replace(
            self,
            x=gather(self.x, index),
            reward=self.reward.gather(1, index),
            log_weight=population.normalise(equal),
            root=self.root.gather(1, index),
            trajectory=None,
            law="none",
            log_evidence_variance=torch.full_like(self.log_evidence, torch.nan),
        )

    def by(self, method: str) -> Result:
        """The same result, of a method that is a setting of another one: under its own name in the record."""
        return replace(self, made_by=self.made_by._replace(method=method))

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
        """Samples as PIL images, problem by problem; for processes that decode to images [M, C, H, W] in [0, 1]."""
        from ..report.images import to_images

        return to_images(self.decoded)

    @property
    def best_images(self) -> list[Image]:
        """The sample of highest reward of each problem, as PIL images."""
        return self.take(self.reward.argmax(1, keepdim=True)).images

    def __len__(self) -> int:
        """The number of problems."""
        return len(self.x)

    def __getitem__(self, problem: int) -> Result:
        """The result of one problem, such as one prompt: its samples, weights and history of scores.

        Lineage and trees stay with the whole; the cost is that of the whole run.
        """
        problem = range(len(self))[problem]
        one = slice(problem, problem + 1)
        return replace(
            self,
            process=self.process.only(problem),
            key=self.key.shifted(problem=problem),
            seen=tuple(LevelRecord(k, ess[one], score[one]) for k, ess, score in self.seen),
            trajectory=None,
            tree=None,
            **{name: getattr(self, name)[one] for name in _BY_PROBLEM},
        )

    def to_dataframe(self) -> Any:
        """The samples as a pandas DataFrame, a line each: problem, prompt, particle, reward, weight, seed (its root).

        Raises:
            SteerError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise SteerError('to_dataframe needs pandas: pip install "steer-diffusion[data]"') from error
        problems, particles = self.reward.shape
        prompts = self.process.prompts or [None] * problems
        columns = {
            "problem": [b for b in range(problems) for _ in range(particles)],
            "prompt": [prompts[b] for b in range(problems) for _ in range(particles)],
            "particle": list(range(particles)) * problems,
            "reward": self.reward.flatten().tolist(),
            "weight": self.log_weight.exp().flatten().tolist(),
            "root": self.root.flatten().tolist(),
        }
        return DataFrame(columns)

    @property
    def texts(self) -> list[str]:
        """Samples as strings, problem by problem; for processes over tokens that say how to read them."""
        read = self.process.text
        if read is None:
            raise StateSpaceError(
                f"samples of this {type(self.process).__name__} are no text; a masked process reads its tokens by "
                "the function steer.from_logits(text=...)"
            )
        return read(self.x.flatten(0, 1))

    def save(self, directory: str | Path, **extra: Any) -> Path:
        """Writes result.safetensors, which `steer.load_run` reads, and result.json, its record for people.

        extra: `reference`, a run to keep beside it; `states=True`, to save the states on the way where the run kept
        them; and notes for the record, by names of your own.
        """
        from .saving import save_result

        return save_result(self, Path(directory), **extra)

    def report(self, directory: str | Path, **extra: Any) -> Path:
        """Writes a self-contained report.html: samples, reward, ESS and lineage over steps, the ledger."""
        from ..report.run_report import write_report

        return write_report(self, Path(directory), **extra)

    def _repr_png_(self) -> bytes | None:
        from ..report.images import preview

        return preview(self)


_BY_PROBLEM = ("x", "reward", "log_weight", "log_evidence", "log_evidence_variance", "root")


def _warn_of_one_root(problem: int, particles: int) -> None:
    """A UserWarning to the caller of the public function: the evidence that is returned has no error estimate."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("steer", "search"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"one starting noise has all of the weight of problem {problem}'s {particles} particles: log_evidence may be "
        "off by any amount, and its variance cannot be estimated (it is NaN); take more particles, a higher "
        "temperature or fewer resamplings, or compare several seeds",
        UserWarning,
        stacklevel=level,
    )


def _evidence_variance(state: Trajectory, log_weight: Tensor, root: Tensor) -> Tensor:
    """Variance of each problem's log_evidence [B], by the estimator that holds; see `Result.log_evidence_variance`."""
    evidence, independent = state.log_normaliser, state.independent_lineages()
    count = state.resamplings()
    own = diagnostics.evidence_variance(log_weight, root, count)
    repeated = repeats_one_problem(state.process) and len(evidence) > 1
    spread = diagnostics.variance_between(evidence) if repeated else torch.full_like(evidence, torch.nan)
    if repeated and not bool(independent.all()):  # for all: those that happened not to be resampled are a choice
        own = spread
    # Pairs of different roots die out in the course of N resamplings: V then is 1, or far below zero in the few runs
    # that have some left, which is right on average and says nothing of a run.
    tells = (2 * count <= root.shape[1]) & ~diagnostics.one_root(log_weight, root)
    own = torch.where(independent & tells, own, spread)
    return own.masked_fill(state.log_evidence.isnan(), torch.nan)  # NaN together


def repeats_one_problem(process: ReverseProcess) -> bool:
    """Whether the problems of a run are repetitions of one: no conditioning of the model or of its hooks differs."""
    hooks = getattr(process, "hooks", None)
    placed = () if hooks is None else (*hooks.start, *hooks.score, *hooks.x0, *hooks.mean, *hooks.after)
    return process.problems is None and not any(hasattr(hook, "only") for hook in placed)
