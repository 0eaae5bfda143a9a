"""The CPU kernels for narrower instruction sets than this machine's: the same answers in a process held to each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moerge_ext
from moerge_ext import ops

CHECK = """
import itertools, torch
from moerge_ext import ops, reference
torch.manual_seed(0)
limits = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
shapes = [(1, 300, 5, 3, 70), (50, 257, 37, 16, 33), (300, 640, 19, 8, 130)]
for (T, D, E, R, O), dtype, banked in itertools.product(shapes, limits, (True, False)):
    make = lambda *sizes: torch.randn(sizes, dtype=torch.float64).to(dtype)
    x, base = make(T, D), make(T, O)
    if banked:  # side by side, as in a bank
        gates, a, b = make(D, E).t(), make(E, D, R).transpose(1, 2), make(E, R, O).transpose(1, 2)
    else:
        gates, a, b = make(E, D), make(E, R, D), make(E, O, R)
    inputs = [t.requires_grad_() for t in (base, x, gates, a, b)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y, weights, experts = ops.routed_lora(*inputs, top_k=3)
    want, _, chosen = reference.routed_lora(*wide, top_k=3)
    same = (experts == chosen).all(1)
    assert same.float().mean() > 0.97, (T, D, E, dtype, banked)
    error = ((y - want)[same].norm() / want[same].norm()).item()
    assert error < limits[dtype], (T, D, E, R, O, dtype, banked, error)
    if not same.all():
        continue
    for got, true in zip(torch.autograd.grad(y.double().sum(), inputs), torch.autograd.grad(want.sum(), wide)):
        error = ((got - true).norm() / true.norm().clamp_min(1e-30)).item()
        assert error < 10 * limits[dtype], (T, D, E, R, O, dtype, banked, error)
# the base layer of few tokens, whose weight may be a slice of wider rows and end its storage
for T, (D, O), dtype in itertools.product((1, 2, 3, 4, 6, 7, 16, 17), ((96, 33), (257, 130), (1, 1)), limits):
    make = lambda *sizes: torch.randn(sizes, dtype=torch.float64).to(dtype)
    bank = make(5, D), make(5, 4, D), make(5, O, 4)
    for weight in (make(O, D), torch.cat([make(O, D), make(O, 3) / 0], 1)[:, :D]):
        x, bias = make(T, D), make(O)
        y, _, experts = ops.routed_linear(x, weight, bias, *bank)
        want, _, chosen = reference.routed_linear(*(t.double() for t in (x, weight, bias, *bank)))
        same = (experts == chosen).all(1)
        error = ((y - want)[same].norm() / want[same].norm().clamp_min(1e-6)).item()
        assert error < limits[dtype], (T, D, O, dtype, error)
# gates that end their storage, and gates with something else behind each row: no vector takes what is not theirs
for E, D in itertools.product(range(1, 53), (1, 2, 257)):
    x, stored = torch.randn(7, D), torch.randn(D, E)
    wide = torch.full((D, E + 3), torch.nan)
    wide[:, :E] = stored
    want = x.double() @ stored.double()
    for gates in (stored.t(), wide[:, :E].t()):
        weights, experts = ops.route(x, gates, top_k=E, normalize="none", weighting="score", scale=1.0)
        scores = torch.zeros(7, E).scatter(1, experts.long(), weights)
        torch.testing.assert_close(scores, want.float(), atol=1e-4, rtol=1e-4)
# one column for all features: distance 0 from each to the next
x, gates, a, b = (torch.randn(*sizes) for sizes in ((9, 300), (7, 1), (7, 4, 1), (7, 4, 30)))
gates, a, b = gates.expand(7, 300), a.expand(7, 4, 300), b.transpose(1, 2)
a = torch.as_strided(a, a.shape, (4, 1, 0))
y, weights, experts = ops.routed_lora(torch.zeros(9, 30), x, gates, a, b, normalize="none")
want, _, chosen = reference.routed_lora(torch.zeros(9, 30), x, gates, a, b, normalize="none")
assert torch.equal(experts, chosen)
torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
print("all agree")
"""


def run(instruction_set: str) -> subprocess.CompletedProcess:
    env = os.environ | {
        "MOERGE_INSTRUCTION_SET": instruction_set,
        "PYTHONPATH": str(Path(moerge_ext.__file__).parents[1]),
    }
    return subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("name", moerge_ext.build_info()["instruction_sets"])
def test_it_computes_the_same(name):
    done = run(name)
    assert done.stdout.strip() == "all agree", done.stderr[-1500:]


@pytest.mark.skipif(
    "amx" not in ops.routed_lora_ways(*map(torch.zeros, ((1, 1), (1, 1), (1, 1), (1, 1, 1), (1, 1, 1))), top_k=1)[0],
    reason="no AMX: the suite itself is by vectors, or has neither",
)
def test_vectors_of_bfloat16_where_there_are_tiles():
    tests = Path(__file__).parents[1] / "ops" / "test_tiles.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"MOERGE_INSTRUCTION_SET": "avx512bf16"}, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stdout[-1500:]


def test_an_unknown_one_is_refused():
    done = run("mmx")
    expected = "MOERGE_INSTRUCTION_SET must be amx, avx512bf16, avx512, avx2 or portable, got mmx"
    assert done.returncode and expected in done.stderr
