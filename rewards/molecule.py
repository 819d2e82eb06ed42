"""How drug-like a molecule is."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from steer.types import RewardSpec

from .hub import optional
from .text import ToText, decode


@dataclass(frozen=True, eq=False)
class QED:
    """The quantitative estimate of drug-likeness, in [0, 1], of samples that `text` decodes to SMILES.

    text: tokens (M, L) to M strings, as in `rewards.text`. invalid: the score of what is no molecule (text that does
    not parse, impossible valences, nothing at all); -inf forbids it. RDKit writes its reasons to its own log.
    Scores float32, no gradient. Raises RewardError where rdkit is missing (pip install 'steer-diffusion[molecules]').
    Source: Bickerton et al. 2012, "Quantifying the chemical beauty of drugs"; RDKit's `Chem.QED.qed`, BSD-3-Clause.
    """

    text: ToText = field(repr=False)
    invalid: float = -inf
    spec: ClassVar[RewardSpec] = RewardSpec("1", (-inf, 1.0), "none")

    def __post_init__(self) -> None:
        optional("rdkit", "molecules")

    def __call__(self, samples: Tensor) -> Tensor:
        scores = [self._score(smiles) for smiles in decode(self.text, samples)]
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    def _score(self, smiles: str) -> float:
        chem, qed = optional("rdkit.Chem", "molecules"), optional("rdkit.Chem.QED", "molecules")
        molecule = chem.MolFromSmiles(smiles)
        return self.invalid if molecule is None or not molecule.GetNumAtoms() else float(qed.qed(molecule))
