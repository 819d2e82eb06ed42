"""Rules of selection on given values, without a search."""

import pytest
import torch

import steer
from steer.core.trajectory import PathState
from steer.search import selection
from steer.search.selection import Choice


def choice(values, **options):
    table = torch.tensor([values], dtype=torch.float64)
    given = {"particles": table.shape[1], "temperature": 1e-3, "k": 1, "steps": 4, "separable": True, **options}
    return Choice(values=table, path=PathState(), key=steer.Key(0), **given)


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.21, 2), (0.4, 2), (0.41, 3), (0.6, 3), (1.0, 5)]
)
def test_the_worst_share_is_rounded_up(share, count):
    """Of five: a share of .21 is two of them. A share that is a whole number but for rounding is that number."""

    def everyone(choice):
        return torch.arange(5)[None]

    kept = selection.replace_worst(everyone, share)(choice([3.0, 1.0, 5.0, 2.0, 4.0]))
    worst = {0: [], 1: [1], 2: [1, 3], 3: [0, 1, 3], 5: [0, 1, 2, 3, 4]}[count]
    expected = [2 if i in worst else i for i in range(5)]  # at this temperature all draws are the best
    assert kept[0].tolist() == expected
