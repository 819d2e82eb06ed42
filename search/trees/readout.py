"""What a search returns: the Result of a grown tree, or of the predictions of a first batch that did not end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from steer.core import diagnostics, population
from steer.core.loop import completed
from steer.core.run import Run
from steer.core.trajectory import LevelRecord
from steer.errors import CollapsedWeightsError, keep_partial
from steer.results.result import Law, MadeBy, Result, repeats_one_problem

from .simulation import LastPrediction
from .tree import Tree


class Readout(Protocol):
    """What leaves weigh."""

    @property
    def law(self) -> Law:
        """What weighted means over the leaves estimate; log_evidence is NaN unless it is "target"."""
        ...

    def log_weight(self, reward: Tensor, log_path_weight: Tensor, temperature: float) -> Tensor:
        """Log-weights [B, N] of leaves, of any scale. Where there is no leaf, reward and log path weight are -inf."""
        ...


@dataclass(frozen=True)
class LeafWeights:
    """The distribution p(x) exp(r(x) / temperature): every leaf by its path weight and its reward."""

    @property
    def law(self) -> Law:
        return "target"

    def log_weight(self, reward: Tensor, log_path_weight: Tensor, temperature: float) -> Tensor:
        return population.log_potential(reward, temperature) + log_path_weight


@dataclass(frozen=True)
class BestLeaves:
    """The `keep` best leaves share the weight: a search, which samples no distribution."""

    keep: int

    @property
    def law(self) -> Law:
        return "none"

    def log_weight(self, reward: Tensor, log_path_weight: Tensor, temperature: float) -> Tensor:
        return population.weights_of_top_k(reward, self.keep)


def read_tree(run: Run, tree: Tree, readout: Readout, *, interrupted: bool) -> Result:
    """The leaves of a grown tree."""
    root_value, slots = tree.backup(run.temperature), tree.leaf_slots()
    own = tree.leaves["reward"].masked_fill(~tree.leaves.filled, -torch.inf)
    log_weight = readout.log_weight(own, tree.log_path_weight(tree.depth), run.temperature)
    return _result(
        run,
        tree,
        readout,
        x=tree.states(tree.depth, slots, run.process.device)["x"],
        reward=tree.leaves["reward"].gather(1, slots),
        log_weight=log_weight,
        log_evidence=root_value,
        root=tree.ancestors(slots)[1],
        interrupted=interrupted,
    )


def read_predictions(run: Run, tree: Tree, readout: Readout, last: LastPrediction) -> Result:
    """What a run has that was stopped in its first batch: the last predictions of its simulations, as leaves."""
    with torch.no_grad():
        x = completed(last.state).x
        reward = run.objective(x, "of the predictions")
    log_weight = readout.log_weight(reward, last.state.log_weight + last.log_path_weight, run.temperature)
    return _result(
        run,
        tree,
        readout,
        x=x,
        reward=reward,
        log_weight=log_weight,
        log_evidence=population.log_mean_exp(log_weight),
        root=torch.arange(reward.shape[1]).expand(reward.shape),
        interrupted=True,
    )


def _result(
    run: Run,
    tree: Tree,
    readout: Readout,
    *,
    x: Tensor,
    reward: Tensor,
    log_weight: Tensor,
    log_evidence: Tensor,
    root: Tensor,
    interrupted: bool,
) -> Result:
    """The Result of samples with log-weights of any scale; an error with it inside, where a problem has none."""
    known = torch.from_numpy(tree.normalizer_known).to(log_evidence.device) & (readout.law == "target")
    log_evidence = torch.where(known, log_evidence, torch.nan)
    repeated = repeats_one_problem(run.process)
    variance = diagnostics.variance_between(log_evidence) if repeated else torch.full_like(log_evidence, torch.nan)
    dead = (log_weight == -torch.inf).all(1)
    log_weight = torch.where(dead[:, None], log_weight, population.normalise(log_weight))
    reward, log_weight, log_evidence, root = (part.to(x.device) for part in (reward, log_weight, log_evidence, root))
    result = Result(
        process=run.process,
        x=x,
        reward=reward,
        log_weight=log_weight,
        log_evidence=log_evidence,
        root=root,
        key=run.key,
        cost=run.meter.cost(),
        temperature=run.temperature,
        seen=(LevelRecord(run.process.steps, population.ess(log_weight), reward),),
        interrupted=interrupted,
        tree=tree,
        law="none" if tree.biased_start else readout.law,
        made_by=MadeBy.of(run),
        log_evidence_variance=variance.to(x.device),
    )
    if bool(dead.any()):
        error = CollapsedWeightsError(
            f"every leaf of problem {int(dead.nonzero()[0])} has weight zero: the reward forbids (-inf) all of them; "
            "grow the tree further (error.partial.tree), or give a reward that is finite on what the model makes"
        )
        raise keep_partial(error, result)
    return result
