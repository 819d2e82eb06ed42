"""How drug-like a molecule is."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

from torch import Tensor

from steer.types import RewardSpec

from .hub import optional_package
from .text import ToText, decode, score_tensor


@dataclass(frozen=True, eq=False)
class QED:
    """The quantitative estimate of drug-likeness of samples that decode to SMILES.

    Called with tokens `[M, L]`. RDKit writes its reasons for invalid molecules to its own log.

    Args:
        text: from tokens `[M, L]` to M strings, as in `rewards.text`.
        invalid: the score of what is no molecule (text that does not parse, impossible valences, nothing at all);
            -inf forbids it.

    Returns:
        Scores `[M]` in [0, 1] or `invalid`, float32, without a gradient.

    Raises:
        RewardError: where rdkit is missing (pip install 'steer-diffusion[molecules]').

    Source: Bickerton et al. 2012, "Quantifying the chemical beauty of drugs"; RDKit's `Chem.QED.qed`, BSD-3-Clause.
    """

    text: ToText = field(repr=False)
    invalid: float = -inf
    spec: ClassVar[RewardSpec] = RewardSpec("1", (-inf, 1.0), "none")

    def __post_init__(self) -> None:
        optional_package("rdkit", "molecules")

    def __call__(self, samples: Tensor) -> Tensor:
        return score_tensor([self._score(smiles) for smiles in decode(self.text, samples)], samples)

    def _score(self, smiles: str) -> float:
        chem = optional_package("rdkit.Chem", "molecules")
        qed = optional_package("rdkit.Chem.QED", "molecules")
        molecule = chem.MolFromSmiles(smiles)
        return self.invalid if molecule is None or not molecule.GetNumAtoms() else float(qed.qed(molecule))
