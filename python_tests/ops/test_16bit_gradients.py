"""Gradients of 16-bit banks and of 16-bit tokens at other banks, in sizes that the tensor-core kernels take: lists of
pairs that end in and at a tile, every rank, ids named twice, weights of 0, NaN.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import assert_as_good, double, gradients, lora, rand

from moerge_ext import ops, reference

NAN = float("nan")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
COUNTS = (17, 0, 129, 1, 64)  # pairs of experts 0..4


def bank(D, R, O, x=BF16, bank=BF16, base=None, counts=COUNTS):
    """K = 3: a slot that gives each expert its count of pairs, one of expert 5 for every third token, one of weight 0
    that names an expert of its own (6).
    """
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1))
    first = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[order]
    T = len(first)
    case = lora(T, D, 7, 3, R, O, base=base or x, x=x, bank=bank)
    case["experts"] = torch.stack([first, torch.full((T,), 5), torch.full((T,), 6)], 1).int()
    case["weights"][:, 1] *= torch.arange(T) % 3 == 0
    case["weights"][:, 2] = 0
    return case


def check(case, atol=4e-3, wanted=("lora_a", "lora_b"), **options):
    ours = gradients(ops.lora_apply, case, wanted, **options)[1]
    plain = gradients(reference.lora_apply, case, wanted, **options)[1]
    truth = gradients(reference.lora_apply, double(case), wanted, **options)[1]
    for name in wanted:
        for e in range(len(truth[name])):  # a sum of few pairs is held to its own size
            assert_as_good(ours[name][e], plain[name][e], truth[name][e], atol)
    return ours


# x, bank, base
MIXED = [(BF16, F32, BF16), (F16, F32, BF16), (BF16, F16, BF16), (F16, BF16, F16), (F32, F16, BF16)]
SIZES = [(8, 8, 64), (64, 16, 200), (200, 24, 8), (136, 64, 72), (72, 128, 136)]  # D, R, O


@pytest.mark.parametrize("D,R,O", SIZES)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("factored", [False, True])
def test_pairs_per_expert(D, R, O, dtype, factored):
    grads = check(bank(D, R, O, dtype, dtype), factored=factored)
    assert all((grad[1] == 0).all() and (grad[6] == 0).all() for grad in grads.values())


@pytest.mark.parametrize("types", MIXED, ids=str)
@pytest.mark.parametrize("R", [16, 24, 64, 128])
def test_a_bank_of_another_type_loses_nothing(types, R):
    """What comes before the last rounding is as exact as the bank's type."""
    x, other, base = types
    check(bank(64, R, 72, x, other, base, counts=(40, 0, 17)), 5e-6 if other == F32 else 1e-5)


def test_a_long_sum_does_not_drift():
    """Its terms do not cancel, and a tensor core rounds every sum toward zero."""
    case = bank(8, 16, 8, BF16, F32, BF16, counts=(3000, 0, 17))
    for name in ("x", "lora_a", "lora_b"):
        case[name] = case[name].abs() + 1
    wanted = ("lora_a", "lora_b")
    ours = gradients(ops.lora_apply, case, wanted)[1]
    truth = gradients(reference.lora_apply, double(case), wanted)[1]
    for name in wanted:
        assert abs((ours[name][0] / truth[name][0] - 1).median()) < 2e-6


@pytest.mark.parametrize("factored", [False, True])
def test_an_expert_named_often(factored):
    case = bank(64, 24, 72)
    case["weights"] = rand(*case["weights"].shape, seed=8).sigmoid()
    for ids in (torch.full((len(case["x"]), 3), 3), torch.tensor([1, 4, 1]).expand(len(case["x"]), 3)):
        check({**case, "experts": ids.int().contiguous()}, wanted=("lora_a", "lora_b", "weights"), factored=factored)


def test_weights_of_rows():
    case = bank(64, 16, 72, counts=(40, 8))
    case |= {"weights": case["weights"][:4].contiguous(), "experts": case["experts"][:4].contiguous()}
    check(case)
    check(case, rows=torch.randint(4, (48,), generator=torch.Generator().manual_seed(2)).int())


@pytest.mark.parametrize("R", [16, 64])
@pytest.mark.parametrize("name", ["x", "grad"])
def test_a_bad_token_reaches_only_its_experts(name, R):
    """It is the only one of expert 3, whose pair lies behind the 129 of expert 2 and before those of expert 4."""
    case = bank(64, R, 136)
    bad = (case["experts"][:, 0] == 3).nonzero().item()
    case["weights"][bad, 1] = 0
    leaves = [case[n].requires_grad_() for n in ("lora_a", "lora_b")]
    grad = rand(*case["base"].shape, seed=5, dtype=BF16)
    clean = torch.autograd.grad(ops.lora_apply(**case), leaves, grad)
    {"x": case["x"], "grad": grad}[name][bad, 3] = NAN
    for before, after in zip(clean, torch.autograd.grad(ops.lora_apply(**case), leaves, grad), strict=True):
        others = torch.arange(7) != 3
        assert torch.equal(after[others], before[others]) and after[3].isnan().any()
