"""Experts copied into one stack: any dtype, scaling and rank, against the formula."""

from __future__ import annotations

import pytest
import torch

from moerge_ext.experts.formats.adapter import LoraWeights, ModuleHeader
from moerge_ext.experts.stacks import Stack

D, O = 40, 24  # noqa: E741


def _stack(dtype: torch.dtype, parts: dict[int, LoraWeights], num: int) -> Stack:
    held = [
        (e, ModuleHeader(D, O, w.lora_A.shape[0], w.scaling, w.lora_A.dtype, w.bias is not None, 0))
        for e, w in parts.items()
    ]
    stack = Stack(held, num, dtype, torch.device("cpu"))
    for e, weights in parts.items():
        stack.put(e, weights)
    return stack


def _weights(rank: int, dtype: torch.dtype, scaling: float, bias: bool = False) -> LoraWeights:
    a, b = torch.randn(rank, D).to(dtype), torch.randn(O, rank).to(dtype)
    return LoraWeights(a, b, scaling, torch.randn(O).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scalings", [(0.3, 0.3, 0.3), (0.3, -1.7, 0.0)])
def test_rows_are_scaled_in_float32_and_rounded_once(dtype, stored, scalings):
    ranks, num = (3, 5, 1), 4  # the fourth has no LoRA here
    parts = {e: _weights(r, stored, s, bias=e == 1) for e, (r, s) in enumerate(zip(ranks, scalings, strict=True))}
    stack = _stack(dtype, parts, num)
    assert stack.finish() == set()
    bank = stack.bank({})
    wide = torch.promote_types(stored, torch.float32)
    for e, weights in parts.items():
        rank = ranks[e]
        assert torch.equal(bank.lora_A[e, :rank], weights.lora_A.to(dtype)) and not bank.lora_A[e, rank:].any()
        expected = (weights.lora_B.to(wide) * weights.scaling).to(dtype)
        assert torch.equal(bank.lora_B[e, :, :rank], expected) and not bank.lora_B[e, :, rank:].any()
    assert torch.equal(bank.lora_bias[1], (parts[1].bias.to(wide) * scalings[1]).to(dtype))
    assert not bank.lora_A[3].any() and not bank.lora_B[3].any() and bank.ranks == (*ranks, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_found(dtype):
    for value in (float("nan"), float("inf"), -float("inf")):
        parts = {e: _weights(2, dtype, 2.0) for e in range(3)}
        parts[1].lora_B[5, 1] = value
        stack = _stack(dtype, parts, 3)
        assert stack.finish() == {1} and stack.overflows(1) == ["lora_B"] and stack.overflows(0) == []
    big = {0: _weights(2, dtype, torch.finfo(dtype).max), 1: _weights(2, dtype, 1.0)}
    assert _stack(dtype, big, 2).finish() == {0}  # once scaled
    # a sum that overflows is no proof of anything
    fine = {0: _weights(2, dtype, 1.0)}
    fine[0].lora_A.fill_(torch.finfo(dtype).max)
    assert _stack(dtype, fine, 1).finish() == set()
