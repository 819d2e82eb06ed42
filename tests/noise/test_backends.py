"""One generator on three backends: the published words, the same bits, the law, and what happens without a kernel."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import LIMIT
from python_philox import python_philox
from scipy import stats

import steer
from steer.noise import backends, numba_kernel, reference

FILLS = {"reference": reference.fill, "numba": numba_kernel.compiled(cache=True)}
P_VALUE = 1e-5
KNOWN_ANSWERS = [  # Random123 kat_vectors, philox4x32 10: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Lines that begin and end inside a call, are shorter than one, cross a block, and cross 2**32 calls; the last names.
LINES = [
    ((3, 1000), 5, 7, 9, (123, 456)),
    ((5, 1), 3, 0, 0, (0, 0)),
    ((2, 1026), 1, 0, 0, (0, 9)),
    ((1, 4096), (1 << 34) - 1401, (1 << 32) - 1, (1 << 32) - 1, (0xFFFFFFFF, 0xFFFFFFFB)),
]


def words_of(fill, counter, key):
    """The words of one call, read off its uniforms."""
    out = torch.empty(1, 4, dtype=torch.float64)
    fill("uniform", out, 4 * (counter[0] | counter[1] << 32), counter[2], counter[3], key)
    return tuple(int(u * 2.0**32) for u in out[0].tolist())


def drawn(fill, kind, line, dtype=torch.float64):
    shape, *name = line
    out = torch.empty(shape, dtype=dtype)
    fill(kind, out, *name)
    return out


@pytest.fixture
def fresh(monkeypatch):
    """Backends as in a process that has drawn nothing."""
    monkeypatch.setattr(backends, "_proven", {})
    monkeypatch.setattr(backends, "_broken", set())
    monkeypatch.setattr(backends, "_loaded", lru_cache(backends._loaded.__wrapped__))


# -- words and numbers


@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_published_words(fill):
    source = random.Random(0)
    for counter, key, answer in KNOWN_ANSWERS:
        assert python_philox(counter, key) == answer
        assert words_of(fill, counter, key) == answer
    for _ in range(50):
        counter, key = (tuple(source.getrandbits(32) for _ in range(n)) for n in (4, 2))
        assert words_of(fill, counter, key) == python_philox(counter, key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("line", LINES, ids=str)
def test_the_kernel_of_the_cpu_is_the_reference_to_the_last_bit(kind, line, dtype):
    assert torch.equal(drawn(FILLS["numba"], kind, line, dtype), drawn(reference.fill, kind, line, dtype))


TRITON = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent.parent), str(Path(__file__).parent)]!r}
import torch
from steer.noise import reference, triton_kernel
from test_backends import KNOWN_ANSWERS, LINES, drawn, words_of
for counter, key, answer in KNOWN_ANSWERS:
    assert words_of(triton_kernel.fill, counter, key) == answer
for kind in ("normal", "uniform"):
    for dtype in (torch.float64, torch.float32):
        for line in LINES:
            expected = drawn(reference.fill, kind, line, dtype)
            assert torch.equal(drawn(triton_kernel.fill, kind, line, dtype), expected), (kind, line)
print("same")
"""


def run(script, **environment):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_kernel_of_cuda_is_the_reference_to_the_last_bit():
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    pytest.importorskip("triton")
    assert run(TRITON, TRITON_INTERPRET="1") == "same\n"


@pytest.mark.slow
def test_the_kernel_of_cuda_fuses_no_roundings(tmp_path):
    """The machine code for a device with sm_90, which no device is needed to make; with fusion allowed it has some."""
    pytest.importorskip("triton")
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steer.noise.triton_kernel import _kernel
numbers = {name: "i64" for name in ("count", "blocks", "call", "skip", "problem", "step", "key")}
signature = {"out": "*fp32", **numbers, "normal": "constexpr", "block": "constexpr"}
for fused in (False, True):
    source = ASTSource(_kernel, signature, constexprs={"normal": True, "block": 256})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fused})
    code = compiled.asm["ptx"]
    print("fma.rn.f64" in code, "sqrt.rn.f64" in code, "div.rn.f64" in code, "approx" in code)
"""
    kept, mutant = run(script, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert kept == "False True True False"
    assert mutant == "True True True False"


# -- accuracy and law


def test_normals_are_those_of_the_formula_to_rounding():
    """Against numpy's long double, over 2**16 calls: below 2e-15 at most (their words have 32 bits each)."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("no long double here")
    line = ((1, 1 << 18), 0, 3, 5, (7, 8))
    words = (drawn(FILLS["numba"], "uniform", line) * 2.0**32 - 0.5).numpy().astype(np.longdouble).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log((words[:, 0] + 0.5) / np.longdouble(2.0**32)))
    angle = words[:, 1] / np.longdouble(2.0**32) * 8.0 * np.arctan(np.longdouble(1.0))
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    assert np.abs(drawn(FILLS["numba"], "normal", line).numpy()[0] - expected).max() < 2e-15


def test_the_extreme_words():
    """The largest radius of a word of 32 bits is sqrt(66 log 2), the least sqrt(2**-32); quarter turns are exact."""
    word = torch.tensor([0, (1 << 32) - 1, 1 << 30, 1 << 31, 3 << 30])
    radius, (cosine, sine) = reference._radius(word), reference._cosine_and_sine(word)
    assert radius[0].item() == pytest.approx(math.sqrt(66.0 * math.log(2.0)), rel=1e-15)
    assert radius[1].item() == pytest.approx(2.0**-16, rel=1e-9)
    assert cosine[[0, 2, 3, 4]].tolist() == [1.0, 0.0, -1.0, 0.0]
    assert sine[[0, 2, 3, 4]].tolist() == [0.0, 1.0, 0.0, -1.0]


def departures(x):
    """How far normals are from their law: |z| of moments and of shares beyond 3 and 4, with exact standard errors; and
    the p-value of Kolmogorov-Smirnov."""
    x, root = x.flatten().double(), math.sqrt(x.numel())
    moments = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0), 6: (15.0, 10_170.0)}
    z = [abs(float((x**power).mean() - mean)) * root / math.sqrt(spread) for power, (mean, spread) in moments.items()]
    for bound in (3.0, 4.0):
        share = 2.0 * float(stats.norm.sf(bound))
        z.append(abs(float((x.abs() > bound).double().mean()) - share) * root / math.sqrt(share * (1.0 - share)))
    even, odd = x[::2], x[1::2]  # the two of a pair: the mean product of their squares less one has SE 2 / sqrt(n)
    z.append(abs(float(((even**2 - 1) * (odd**2 - 1)).mean())) * math.sqrt(len(even)) / 2.0)
    return max(z), float(stats.kstest(x[: 1 << 16].numpy(), "norm").pvalue)


def one_word_for_both(word0, word1, word2, word3):
    """A mutant: radius and angle of the same word."""
    return reference_normals(word0, word0, word2, word2)


reference_normals = reference._NUMBERS["normal"]


def test_normals_have_the_normal_law(monkeypatch):
    """2**20 draws by the kernel; and a mutant of the reference that is rejected on 2**16."""
    worst, p = departures(drawn(FILLS["numba"], "normal", ((4, 1 << 18), 0, 0, 0, (5, 6)), torch.float32))
    assert worst < LIMIT
    assert p > P_VALUE
    monkeypatch.setitem(reference._NUMBERS, "normal", one_word_for_both)
    worst, p = departures(drawn(reference.fill, "normal", ((4, 1 << 14), 0, 0, 0, (5, 6))))
    assert worst > LIMIT
    assert p < P_VALUE


# -- the choice and the record


def smc(key):
    process = steer.models.gaussian_mixture([[0.0, 0.0], [3.0, 1.0]], [0.1, 0.2], steps=5)
    return steer.smc(process, lambda x: x.sum(1), particles=8, key=key)


def test_the_record_says_what_made_the_noise(tmp_path):
    fast, slow = smc(3), smc(steer.Key(3, noise="reference"))
    assert (fast.made_by.noise, slow.made_by.noise) == ("numba", "reference")
    assert fast.key == slow.key
    for name in ("x", "log_weight", "log_evidence"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    slow.save(tmp_path)
    assert json.loads((tmp_path / "result.json").read_bytes())["made_by"]["noise"] == "reference"


def test_the_choice_goes_with_the_key(monkeypatch):
    used = []
    monkeypatch.setattr(backends, "fill", lambda *draw: used.append(draw[-1]))
    key = steer.Key(3, noise="reference")
    for child in (key, key.fold("a"), key.at(3), key.shifted(problem=1, slot=2)):
        child.normal((1, 2))
    assert used == ["reference"] * 4


def test_unknown_names_are_refused():
    with pytest.raises(steer.SteerError, match=r"'auto'.*'reference'.*got 'torch'"):
        steer.Key(0, noise="torch")


# -- where a kernel is missing, wrong, or cannot be kept


def test_without_numba_torch_draws_the_same(fresh, monkeypatch, caplog):
    expected = smc(steer.Key(3, noise="reference"))
    monkeypatch.setitem(sys.modules, "steer.noise.numba_kernel", None)  # importing it raises
    with caplog.at_level(logging.WARNING, "steer"):
        result = smc(3)
    assert torch.equal(result.x, expected.x)
    assert result.made_by.noise == "reference"
    (record,) = caplog.records
    assert "noise on this cpu is made by torch" in record.getMessage()
    assert "numba" in record.getMessage()


def test_a_kernel_that_draws_other_numbers_is_not_used(fresh, monkeypatch, caplog):
    def one_bit_off(kind, out, *name):
        reference.fill(kind, out, *name)
        out[-1, -1] = torch.nextafter(out[-1, -1], out.new_tensor(9.0))

    monkeypatch.setattr(backends, "_loaded", lambda name: one_bit_off)
    with caplog.at_level(logging.WARNING, "steer"):
        drawn = steer.Key(3).normal((2, 3))
    assert torch.equal(drawn, steer.Key(3, noise="reference").normal((2, 3)))
    assert backends.name_of("auto", "cpu") == "reference"
    assert "differ by up to" in caplog.text


def test_where_no_code_can_be_kept_it_is_compiled_anew_and_said(fresh, monkeypatch, caplog):
    """numba raises where the package's folder and the user's cache are both read-only."""
    asked, compiled = [], numba_kernel.compiled

    def nowhere(cache):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function '_fill_normals': no locator available for file")
        return compiled(cache=True)

    monkeypatch.setattr(numba_kernel, "compiled", nowhere)
    with caplog.at_level(logging.WARNING, "steer"):
        steer.Key(3).normal((2, 3))
        steer.Key(3).uniform((2, 3))
    assert asked == [True, False]
    (record,) = caplog.records
    assert "NUMBA_CACHE_DIR" in record.getMessage()
    assert backends.name_of("auto", "cpu") == "numba"


def test_threads_may_draw_first_at_the_same_time(fresh):
    expected = steer.Key(3, noise="reference").normal((4, 5000))
    with ThreadPoolExecutor(4) as pool:
        for drawn in pool.map(lambda _: steer.Key(3).normal((4, 5000)), range(16)):
            assert torch.equal(drawn, expected)
    assert backends.name_of("auto", "cpu") == "numba"
