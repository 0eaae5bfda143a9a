"""What the CUDA kernels promise beyond the CPU's: nothing they are given makes them read or write elsewhere."""

from __future__ import annotations

import pytest
import torch
from op_cases import gradients, lora, rand, router

from moerge_ext import ops

SIZES = [(12, 9, 5, 3, 4, 7, torch.float32), (40, 64, 6, 2, 16, 64, torch.bfloat16)]


def bank(T, D, E, K, R, O, dtype, **more):
    return lora(T, D, E, K, R, O, base=dtype, x=dtype, bank=dtype, lora_bias=True, **more)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("factored", [False, True])
def test_ids_out_of_range_are_skipped(size, factored):
    """As if their weight were 0, forward and backward; the weight's own gradient is 0."""
    case = bank(*size)
    names = tuple(n for n, t in case.items() if t.is_floating_point())
    wild = torch.zeros_like(case["experts"], dtype=torch.bool)
    wild[::3, 0] = True
    wild[5] = True
    silent = {**case, "weights": case["weights"].masked_fill(wild, 0)}
    (want,), want_grads = gradients(ops.lora_apply, silent, names, factored=factored)
    for value in (size[2], -1, 2**31 - 1, -(2**31)):
        loud = {**case, "experts": case["experts"].masked_fill(wild, value)}
        (got,), grads = gradients(ops.lora_apply, loud, names, factored=factored)
        assert torch.equal(got, want)
        assert (grads["weights"][wild] == 0).all()
        assert all(torch.equal(grads[n], want_grads[n]) for n in names if n != "weights")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_out_of_range_belong_to_nobody(size):
    T, D, E = size[:3]
    case = bank(*size, N=3)
    rows = (torch.arange(T) % 3).int()
    want = ops.lora_apply(**case, rows=rows)
    rows[1], rows[4], rows[7] = 3, -1, 2**31 - 1
    got = ops.lora_apply(**case, rows=rows)
    lost = torch.tensor([1, 4, 7])
    others = torch.ones(T, dtype=torch.bool)
    others[lost] = False
    assert torch.equal(got[others], want[others]) and torch.equal(got[lost], case["base"][lost])
    x, gates = router(T, D, E)
    weights, experts = ops.route(x, gates, bias=rand(3, E, seed=4), rows=rows)
    assert (weights[lost] == 0).all() and torch.equal(experts[lost], torch.arange(2).int().expand(3, 2))


def test_the_same_bits_every_time():
    case = bank(129, 64, 6, 2, 16, 64, torch.bfloat16)
    names = tuple(n for n, t in case.items() if t.is_floating_point())
    (y,), grads = gradients(ops.lora_apply, case, names)
    (again,), grads_again = gradients(ops.lora_apply, case, names)
    assert torch.equal(y, again) and all(torch.equal(grads[n], grads_again[n]) for n in names)
