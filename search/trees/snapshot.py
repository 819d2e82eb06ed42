"""Trees read back from the tensors and facts that `Tree.parts` made of them, to be grown on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.errors import SteerError

from .backup import Backup, Siblings, Values, max_backup, soft_backup
from .node_table import NodeTable
from .tree import Tree


@dataclass(frozen=True)
class ForgottenBackup:
    """In place of a backup rule of the user's own, which a file does not hold: values stay as they were saved."""

    name: str

    def leaf_value(self, reward: Values, temperature: float) -> Values:
        raise self._error()

    def child_value(self, value: Values, log_importance_ratio: Values) -> Values:
        raise self._error()

    def pool(self, value: Values, siblings: Siblings) -> Values:
        raise self._error()

    def _error(self) -> SteerError:
        return SteerError(
            f"this tree was saved with values of the backup rule {self.name}, which is code and not in the file; grow "
            "it on with search.dts_star(tree=..., backup=...), or set tree.rule"
        )


def tree_from(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device | str) -> Tree:
    """Trees that grow on as those saved would have.

    Args:
        tensors: by the names that `Tree.parts` gave them.
        facts: likewise.
        device: where nodes' states go that were not on the CPU.
    """
    name = facts["rule"]
    rules: dict[str, Backup] = {type(rule).__name__: rule for rule in (soft_backup, max_backup)}
    tree = Tree(facts["problems"], tuple(facts["levels"]), rules.get(name) or ForgottenBackup(name))
    tree.simulations, tree.batches = facts["simulations"], facts["batches"]
    tree.biased_start = facts["biased_start"]
    tree.normalizer_known, tree.expansions = (
        tensors[name].numpy().copy() for name in ("normalizer_known", "expansions")
    )
    for depth, (bookkeeping, on_device) in enumerate(zip(facts["bookkeeping"], facts["on_device"], strict=True)):
        begins = f"{depth}."
        columns = {name[len(begins) :]: tensor for name, tensor in tensors.items() if name.startswith(begins)}
        table = tree.layers[depth] = NodeTable(tree.problems)
        table.resize(columns.pop("count").numpy().copy())
        table.room = table.size  # exactly full
        # Copies: a tree grows in place, and what was read may be read again.
        table.facts = {name: columns.pop(name).numpy().copy() for name in bookkeeping}
        table.states = {name: t.to(device if name in on_device else "cpu", copy=True) for name, t in columns.items()}
    return tree


def restore(tree: Tree, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device | str) -> None:
    """Has trees be those of `tree_from`, under the backup rule and with the reward that they have."""
    held = tree_from(tensors, facts, device)
    tree.__dict__.update({**held.__dict__, "rule": tree.rule, "reward": tree.reward})
