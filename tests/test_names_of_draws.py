"""Every number drawn has a name of its own: no method asks for the same one twice for two different purposes.

A decision that draws from the key of what it decides about, an acceptance from a proposal's noise, leaves all else as
it should be, and the distribution wrong.
"""

import pytest
import test_contract as contract
import torch

import steer
from steer.key import Key

MORE = {
    "smc_mala": lambda p, r, **o: steer.smc(p, r, start=steer.mala(chains=3, burn_in=3, kept=3), **o),
    "waste_free": lambda p, r, **o: steer.waste_free(p, r, chain=2, **o),
    "birth_death": lambda p, r, **o: steer.fkc(
        p, r, selection=steer.birth_death(), transport=steer.half_transport, **o
    ),
    "probes": lambda p, r, **o: steer.fkc(p, r, weight=steer.FeynmanKac(probes=2), **o),
    "stratified": lambda p, r, **o: steer.smc(p, r, selection=steer.resample(steer.stratified, 1.0), **o),
}


@pytest.fixture
def drawn(monkeypatch):
    """name -> the ways (kind, size of an event) that numbers of that name were drawn in."""
    seen: dict[tuple, set] = {}
    draw = Key._draw

    def spy(key, kind, shape, dtype, device):
        for problem in range(shape[0]):
            name = (key.seed, key.stream, key.step, key.problem + problem)
            seen.setdefault(name, set()).add((kind, tuple(shape[2:])))
        return draw(key, kind, shape, dtype, device)

    monkeypatch.setattr(Key, "_draw", spy)
    return seen


@pytest.mark.parametrize("name", [*contract.METHODS, *MORE])
def test_one_name_is_drawn_in_one_way(drawn, name):
    method = {**contract.METHODS, **MORE}[name]
    method(contract.mixture_process(torch.float64), contract.REWARD, particles=4, batch=2, key=5)
    assert drawn
    twice = {key: ways for key, ways in drawn.items() if len(ways) > 1}
    assert not twice
