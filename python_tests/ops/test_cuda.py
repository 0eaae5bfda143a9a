"""What the CUDA kernels promise beyond the CPU's: nothing they are given makes them read or write elsewhere."""

from __future__ import annotations

import pytest
import torch
from op_cases import assert_as_good, double, gradients, lora, rand, router

from moerge_ext import ops, reference

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


@pytest.mark.parametrize("size", [(300, 2), (513, 2), (1100, 3), (2100, 4)], ids=str)  # pairs of a warp: up to 288
@pytest.mark.parametrize("rows", [False, True])
def test_every_pair_is_found_by_its_expert(size, rows):
    """Of many pairs, each by one warp of the expert's block; two experts have none, and some pairs no expert."""
    T, K = size
    case = bank(T, 8, 6, K, 16, 8, torch.bfloat16, N=T // 4 if rows else None)
    experts = case["experts"]
    experts[experts == 2] = 7
    experts[experts == 5] = -1
    experts[::9, 0] = experts[::9, -1]
    case["weights"][1::7] = 0
    y_rows = torch.randint(-1, T // 4, (T,), generator=torch.Generator().manual_seed(7)).int() if rows else None
    named = (experts >= 0) & (experts < 6)
    same = {**case, "experts": experts.clamp(0, 5), "weights": case["weights"] * named}
    valid = y_rows.clamp(min=0) if rows else None
    y = ops.lora_apply(**case, rows=y_rows)
    truth, plain = reference.lora_apply(**double(same), rows=valid), reference.lora_apply(**same, rows=valid)
    owned = y_rows >= 0 if rows else torch.ones(T, dtype=torch.bool)
    assert torch.equal(y[~owned], case["base"][~owned])
    assert_as_good(y[owned], plain[owned], truth[owned], 2e-3)
