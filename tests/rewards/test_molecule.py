"""QED of molecules with known values, and of what is none."""

from __future__ import annotations

import pytest
import torch

from steer import rewards
from steer.errors import RewardError
from steer.rewards.molecule import QED

pytest.importorskip("rdkit")
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "CCO", "C1CC", "", "C(C)(C)(C)(C)C", "not a molecule"]
INDEX = torch.arange(len(SMILES)).view(-1, 1)


def to_text(samples):
    return [SMILES[int(i)] for i in samples[:, 0]]


def test_known_molecules_have_their_values_and_others_are_forbidden():
    scores = QED(to_text)(INDEX)
    assert scores[:2].tolist() == pytest.approx([0.550, 0.407], abs=2e-3)  # aspirin, ethanol
    assert (scores[2:] == -torch.inf).all()
    assert QED(to_text, invalid=0.0)(INDEX)[2:].tolist() == [0.0] * 4
    torch.testing.assert_close(QED(to_text)(INDEX.flip(0)), scores.flip(0))


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(rewards.hub.importlib, "import_module", missing)
    with pytest.raises(RewardError, match=r"needs the package rdkit.*pip install 'steer-diffusion\[molecules\]'"):
        QED(to_text)
