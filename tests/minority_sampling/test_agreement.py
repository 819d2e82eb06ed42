"""Rarity that spaces agree on: rare and real in known places of the plane."""

import pytest
import torch

import steer
from steer import search
from steer.minority_sampling import agreed_rarity

KEY = steer.Key(3)
CROWD = KEY.normal((1, 400, 2))[0]  # N(0, I), the 95 % circle at 2.45
AWAY = 0.1 * KEY.fold("away").normal((1, 400, 2))[0] + torch.tensor([9.0, 0.0])  # tight: .1 is its whole width
REAL = torch.cat([CROWD, AWAY])
GROUPS = torch.tensor([0, 1]).repeat_interleave(400)


def plane(x):
    return x


def across(x):
    """Sees one coordinate only, and so nothing wrong with garbage along the other."""
    return x[:, :1]


def test_rare_is_the_tail_and_garbage_is_forbidden():
    reward = agreed_rarity(REAL, [plane])
    tail = CROWD[CROWD.norm(dim=1).argmax()][None]
    values = reward(torch.cat([tail, torch.zeros(1, 2).double(), torch.tensor([[4.5, 6.0]]).double()]))
    assert values.tolist() == [1.0, 0.0, -torch.inf]
    fresh = reward(KEY.fold("fresh").normal((1, 4000, 2))[0])
    assert 0.07 < (fresh == 1.0).double().mean() < 0.18  # a tenth by construction, of both groups together
    assert (fresh == -torch.inf).double().mean() < 0.1


def test_what_one_space_takes_for_real_another_forbids():
    garbage = torch.tensor([[0.1, 30.0]], dtype=torch.float64)
    fooled, both = agreed_rarity(REAL, [across]), agreed_rarity(REAL, [across, plane])
    assert fooled(garbage).item() > -torch.inf
    assert both(garbage).item() == -torch.inf
    assert agreed_rarity(REAL, [across, plane], least=0.5)(garbage).item() > -torch.inf


def test_rare_among_its_like():
    """.4 off the centre of the tight group: common among all, rare in its own."""
    odd = AWAY[(AWAY - AWAY.mean(0)).norm(dim=1).argmax()][None]
    assert agreed_rarity(REAL, [plane], groups=GROUPS)(odd).item() == 1.0
    assert agreed_rarity(REAL, [plane])(odd).item() == 0.0


def test_distances_are_to_the_own_group_among_others():
    """On a line: just past the end of group 0, 2.9 from five of its own, 1.2 from five of any; typical there is 1.8."""
    line = torch.cat([torch.arange(51.0), torch.tensor([51.0, 51.1]), 200.0 + torch.arange(6.0)])[:, None].double()
    groups = torch.tensor([0] * 51 + [1] * 8)
    past = torch.tensor([[50.9]], dtype=torch.float64)
    assert agreed_rarity(line, [plane], groups=groups)(past).item() == 1.0
    assert agreed_rarity(line, [plane])(past).item() == 0.0


def test_scores_are_each_samples_own_and_steer_a_search():
    x = KEY.fold("x").normal((1, 50, 2))[0]
    reward = agreed_rarity(REAL, [plane, across], groups=GROUPS)
    assert torch.equal(reward(x), torch.cat([reward(part) for part in x.split(7)]))
    process = steer.models.gaussian([0.0, 0.0], 1.0, steps=60, dtype=torch.float64)
    reward = agreed_rarity(REAL, [plane], groups=GROUPS)
    result = search.best_of_n(process, reward, particles=200, keep=10, key=1)
    kept = result.x[result.log_weight > -torch.inf].norm(dim=1)
    assert 1.5 < kept.min() < kept.max() < 3.5


def test_errors_say_the_cure():
    with pytest.raises(steer.ShapeError, match="groups"):
        agreed_rarity(REAL, [plane], groups=GROUPS[:5])
    with pytest.raises(steer.ShapeError, match="spaces"):
        agreed_rarity(REAL, [])
    with pytest.raises(steer.SteerError, match="merge groups"):
        agreed_rarity(REAL[:402], [plane], groups=GROUPS[:402])
    with pytest.raises(steer.SteerError, match="quantile"):
        agreed_rarity(REAL, [plane], quantile=1.0)
