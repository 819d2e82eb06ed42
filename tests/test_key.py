"""Keyed draws: the layout of its counter, the laws, and what a draw may not depend on."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from exact import LIMIT, z
from python_philox import python_philox
from scipy import stats

import steer
from steer.key import Key, _words, as_key
from steer.noise import reference
from steer.noise.backends import name_of

EVENTS = [(), (1,), (2,), (3,), (5,), (4,), (3, 5), (1, 8, 8)]
P_VALUE = 1e-5


def test_layout_of_the_counter():
    """Draws are pinned to words (position // 4, 0, problem, step) of the reference: no release may move them."""
    key, size = Key(11, ("step",), problem=5, slot=3, step=70), 3
    uniform, normal = key.uniform((2, 4, size)), key.normal((2, 4, size))
    for b, n, e in itertools.product(range(2), range(4), range(size)):
        position = (3 + n) * size + e
        four = python_philox((position // 4, 0, 5 + b, 70), _words(key.seed, key.stream))
        u = [(w + 0.5) / 2.0**32 for w in four]
        pair = position % 4 // 2 * 2
        radius, angle = math.sqrt(-2.0 * math.log(u[pair])), 2.0 * math.pi * four[pair + 1] / 2.0**32
        expected = radius * (math.cos(angle) if position % 2 == 0 else math.sin(angle))
        assert float(uniform[b, n, e]) == u[position % 4]
        assert float(normal[b, n, e]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_draws_do_not_depend_on_batch_chunk_or_offset(kind, event):
    """Bitwise, for events of sizes that are and are not multiples of four."""
    key = Key(3).fold("x").at(9)
    whole = getattr(key, kind)((4, 7, *event))
    for problem, slot, problems, particles in itertools.product((0, 1, 3), (0, 1, 2, 5), (1, 2), (1, 2, 3)):
        if problem + problems > 4 or slot + particles > 7:
            continue
        part = getattr(key.shifted(problem=problem, slot=slot), kind)((problems, particles, *event))
        assert torch.equal(part, whole[problem : problem + problems, slot : slot + particles])


@pytest.mark.parametrize("event", [(), (3,), (1, 8, 8)])
def test_draws_do_not_depend_on_order(event):
    key, steps = Key(8).fold("order"), [70, 0, 3, 64, 1, 63, 2, 1000, 65, 0, 3]
    first = {k: key.at(k).normal((2, 3, *event)) for k in steps}
    for k in sorted(set(steps), reverse=True):
        assert torch.equal(first[k], key.at(k).normal((2, 3, *event)))
        large = key.at(k).normal((2, 70_000 // max(1, math.prod(event)), *event))
        assert torch.equal(first[k], large[:, :3])


def test_names_give_different_draws():
    """No two of the names share a single one of sixteen 32-bit draws (chance of a false alarm below 1e-6)."""
    base = Key(0)
    names = [Key(s) for s in (0, 1, -1, 2, 2**32, 1 + 2**32, -(2**32), 2**64, 1 + 2**64, 2**200)]
    names += [base.fold(*path) for path in (("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), (1,), ("1",), (0,))]
    names += [base.at(k) for k in (1, 2, 63, 64, 65, 2**31 - 1, 2**31, 2**32 - 1)]
    names += [base.shifted(slot=16), base.shifted(slot=2**20), base.shifted(problem=1), base.shifted(problem=2**30)]
    draws = torch.stack([name.uniform((1, 16)) for name in names])
    assert draws.flatten().unique().numel() == draws.numel()
    assert torch.equal(base.fold("a").fold("b").normal((1, 4)), base.fold("a", "b").normal((1, 4)))


def test_keys_are_values():
    assert as_key(3) == Key(3)
    assert as_key(Key(3, ("a",))) == Key(3, ("a",))
    assert Key(3).fold("a").at(2).shifted(problem=1, slot=2) == Key(3, ("a",), 1, 2, 2)
    assert as_key(np.int64(3)) == Key(3)
    assert torch.equal(as_key(np.int64(3)).normal((1, 2)), Key(3).normal((1, 2)))


def test_neighbours_are_uncorrelated():
    """z of the mean product of 2**17 pairs, SE 1 / sqrt(n), and of their squares, SE 2 / sqrt(n)."""
    n = 1 << 17
    key = Key(21).fold("a").at(4)
    line = key.normal((1, n + 8))[0]
    pairs = {f"slot+{lag}": line[lag : lag + n] for lag in (1, 2, 3, 4, 8)}
    pairs |= {
        "step": key.at(5).normal((1, n))[0],
        "problem": key.shifted(problem=1).normal((1, n))[0],
        "stream": key.fold("b").normal((1, n))[0],
        "seed": Key(22).fold("a").at(4).normal((1, n))[0],
        "block": key.at(4 + 64).normal((1, n))[0],
    }
    for name, other in pairs.items():
        x, y = line[:n], other[:n]
        assert abs(float((x * y).mean()) * math.sqrt(n)) < LIMIT, name
        assert abs(float(((x**2 - 1) * (y**2 - 1)).mean()) * math.sqrt(n) / 2.0) < LIMIT, name


def test_normals_have_the_normal_law():
    """2**18 draws: moments by z with exact SE, and Kolmogorov-Smirnov; a spread 1% off is rejected."""
    x = Key(5).normal((4, 1 << 14, 4)).flatten()
    root = math.sqrt(len(x))
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0)}
    for power, (mean, variance) in moments.items():
        assert abs(float((x**power).mean() - mean) * root / math.sqrt(variance)) < LIMIT, power
    assert stats.kstest(x.numpy(), "norm").pvalue > P_VALUE
    assert abs(float((1.01 * x).square().mean() - 1.0) * root / math.sqrt(2.0)) > LIMIT
    assert float(x.abs().max()) > 4.0


def test_uniforms_have_the_uniform_law():
    u = Key(6).uniform((4, 1 << 14, 4)).flatten()
    assert stats.kstest(u.numpy(), "uniform").pvalue > P_VALUE
    assert 0.0 < float(u.min()) < 1e-4
    assert 1.0 - 1e-4 < float(u.max()) < 1.0


def test_what_a_counter_cannot_name_is_refused():
    for key, shape in ((Key(0, problem=2**32 - 1), (2, 1)), (Key(0, problem=-1), (1, 1)), (Key(0, slot=-1), (1, 1))):
        with pytest.raises(steer.SteerError, match="fold the rest in"):
            key.normal(shape)
    Key(0, problem=2**32 - 1).normal((1, 1))


def test_uniforms_stay_inside_the_open_interval_at_the_extreme_words(monkeypatch):
    """Once in 2**32 draws the word is the smallest or the largest: forced here."""

    def extreme(counter, key):
        shape = torch.broadcast_shapes(*(word.shape for word in counter))
        return tuple(torch.full(shape, w) for w in (0, 2**32 - 1, 2**32 - 1, 0))

    monkeypatch.setattr(reference, "philox", extreme)
    key = Key(0, noise="reference")
    u, fine = key.uniform((1, 4)), key.fine_uniform((1, 4))
    assert bool(key.normal((1, 4)).isfinite().all())
    assert bool(key.gumbel((1, 4)).isfinite().all())
    assert bool(((u > 0.0) & (u < 1.0)).all()), u.tolist()
    assert bool(((fine > 0.0) & (fine < 1.0)).all()), fine.tolist()


def test_fine_uniforms_see_what_is_rarer_than_two_to_the_minus_32():
    """The share of a grid step that lies below a fine uniform is uniform itself; of a uniform it is always a half."""
    key = Key(14).fold("fine")
    inside = {
        name: (getattr(key, name)((1, 1 << 12)).flatten() * 2.0**32) % 1.0 for name in ("uniform", "fine_uniform")
    }
    assert stats.kstest(inside["fine_uniform"].numpy(), "uniform").pvalue > P_VALUE
    assert bool((inside["uniform"] == 0.5).all())
    assert torch.equal(key.gumbel((1, 8)), -(-key.fine_uniform((1, 8)).log()).log())


def test_gumbel_argmax_is_a_categorical_draw():
    """Shares of 40 000 draws against softmax, each with binomial SE; a forbidden category never comes."""
    logits = torch.tensor([0.0, 1.0, -1.0, -math.inf, 0.5], dtype=torch.float64)
    drawn = (logits + Key(9).gumbel((1, 40_000, 5))[0]).argmax(1)
    shares = torch.softmax(logits, 0)
    for category, share in enumerate(shares.tolist()):
        hits = (drawn == category).double()
        assert abs(z(hits - share)) < LIMIT if share else not bool(hits.any())


def test_results_may_be_modified_in_place():
    key = Key(1).fold("place")
    for kind in ("normal", "uniform", "gumbel"):
        first = getattr(key, kind)((1, 4, 2))
        kept = first.clone()
        first.zero_()
        assert torch.equal(getattr(key, kind)((1, 4, 2)), kept), kind


@pytest.mark.parametrize("noise", ["auto", "reference"])
def test_draws_in_inference_mode_are_the_same(noise):
    key = Key(2, noise=noise).fold("inference")
    with torch.inference_mode():
        inside = key.normal((2, 3, 2)).clone()
    outside = key.normal((2, 3, 2))
    assert torch.equal(inside, outside)
    assert not outside.is_inference()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    (weight * outside).square().sum().backward()
    assert float(weight.grad) == pytest.approx(2.0 * float(outside.square().sum()))


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    Key(1).normal((2, 3)), Key(1).uniform((2, 3)), Key(1).gumbel((2, 3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002
    a = Key(1).normal((2, 3))
    torch.manual_seed(12345)
    assert torch.equal(a, Key(1).normal((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_the_rounded_draw(dtype):
    key = Key(4)
    assert torch.equal(key.normal((2, 33, 3), dtype=dtype), key.normal((2, 33, 3)).to(dtype))
    assert key.normal((1, 1)).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_are_those_of_the_cpu():
    """To the last bit, and by Triton's kernel, also those of the reference there."""
    for noise in ("auto", "reference"):
        key = Key(4, noise=noise).at(3)
        assert torch.equal(key.uniform((2, 33, 3), device="cuda").cpu(), key.uniform((2, 33, 3)))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            on_gpu = key.normal((2, 33, 3), device="cuda", dtype=dtype)
            assert torch.equal(on_gpu.cpu(), key.normal((2, 33, 3), dtype=dtype))
    assert name_of("auto", "cuda") == "triton"


def test_the_public_key_is_this_one():
    assert steer.Key is Key
