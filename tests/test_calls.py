"""The seam of paid calls: who sees them in which order, and what tells one call from another."""

import torch

from steer.calls import call, fingerprint, through


def test_the_outermost_block_sees_a_call_first():
    seen = []

    def caller(name):
        def noted(meter, kind, k, function, *tensors, named=""):
            seen.append(name)
            return function(*tensors)

        return noted

    with through(caller("outer")), through(caller("inner")):
        call(None, "denoise", 0, lambda x: {"x0": x}, torch.zeros(1, 1))
    assert seen == ["outer", "inner"]


def test_a_fingerprint_is_of_every_entry():
    x = torch.zeros(2, 3, 4)
    marks = {fingerprint(x)}
    for i in range(x.numel()):
        other = x.clone()
        other.view(-1)[i] = 1e-30
        marks.add(fingerprint(other))
    assert len(marks) == 1 + x.numel()
