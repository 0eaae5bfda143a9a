"""16-bit banks in sizes that vector and tensor-core kernels take: every rank, both orders of the factors' axes."""

from __future__ import annotations

import pytest
import torch
from op_cases import assert_as_good, double, gradients, lora, rand

from moerge_ext import ops, reference

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)


def bank(T, D, E, K, R, O, dtype=torch.bfloat16, **more):
    return lora(T, D, E, K, R, O, base=dtype, x=dtype, bank=dtype, **more)


def stored(case, order):
    """The same bank with its axes stored otherwise: A as [E,D,R] and B as [E,O,R]."""
    a = case["lora_a"].mT.contiguous().mT if "a" in order else case["lora_a"]
    b = case["lora_b"].contiguous() if "b" in order else case["lora_b"]
    return {**case, "lora_a": a, "lora_b": b}


def check(case, atol=2e-3, **options):
    y = ops.lora_apply(**case, **options)
    truth = reference.lora_apply(**double(case), **options)
    assert_as_good(y, reference.lora_apply(**case, **options), truth, atol)
    return y


SHAPES = [  # T, D, E, K, R, O
    (16, 64, 2, 1, 16, 64), (33, 200, 7, 2, 8, 72), (33, 64, 36, 8, 24, 200), (129, 72, 166, 2, 16, 136),
    (129, 200, 7, 7, 64, 64), (40, 64, 3, 2, 128, 72), (17, 8, 5, 3, 1, 8), (20, 136, 2, 2, 32, 64),
    (70, 520, 5, 2, 16, 64), (17, 328, 9, 3, 24, 72), (1, 64, 7, 2, 16, 64), (2, 200, 36, 4, 8, 200),
    (600, 16, 4, 2, 16, 64),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("order", ["", "a", "b", "ab"])
def test_shapes(shape, order):
    T, D, E, K, R, O = shape
    case = stored(bank(T, D, E, K, R, O, HALVES[R % 3 == 0], lora_bias=order == "ab"), order)
    check(case)
    if order in ("", "ab"):
        check(case, factored=True)


@pytest.mark.parametrize("T", [17, 520])
@pytest.mark.parametrize("R", [16, 32, 64, 128])
@pytest.mark.parametrize("order", ["", "ab"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_tile_of_a_kernel(T, R, order, dtype):
    """Few and many tokens, each rank that a kernel is compiled for, both orders, both types, with and without bias."""
    check(stored(bank(T, 16, 3, 2, R, 64, dtype, lora_bias=T < 100), order))


@pytest.mark.parametrize("T", [31, 32, 33, 63, 64, 65, 97])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_tokens_around_a_chunk(T, K):
    """Chunks of the expand that are full, or hold one token; columns that are no multiple of its blocks'."""
    check(bank(T, 8, 5, K, 8, 40))


@pytest.mark.parametrize("shape", [(130, 8, 40, 3, 16, 4096), (257, 8, 5, 2, 16, 4096), (513, 8, 5, 2, 16, 4096)])
def test_large_chunks(shape):
    """So many columns that the expand's chunks grow with the tokens."""
    check(bank(*shape))


@pytest.mark.parametrize("shape", [(70, 8, 1024, 8, 16, 72), (40, 8, 4096, 2, 8, 8), (33, 8, 12, 9, 16, 40)], ids=str)
@pytest.mark.parametrize("factored", [False, True])
def test_many_experts_and_slots(shape, factored):
    check(bank(*shape, lora_bias=True), factored=factored)


def test_more_experts_than_can_be_sorted():
    check(bank(33, 8, 4100, 2, 16, 40))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_rank_too_large_for_tensor_cores(dtype):
    check(bank(9, 64, 3, 2, 136, 72, dtype, lora_bias=True))


@pytest.mark.parametrize("shape", [(33, 64, 7, 2, 16, 72), (129, 40, 5, 3, 24, 64)], ids=str)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("order", ["", "ab"])
def test_gradients(shape, factored, order):
    case = stored(bank(*shape, lora_bias=True), order)
    names = tuple(n for n, t in case.items() if t.is_floating_point())
    ours = gradients(ops.lora_apply, case, names, factored=factored)[1]
    plain = gradients(reference.lora_apply, case, names, factored=factored)[1]
    truth = gradients(reference.lora_apply, double(case), names, factored=factored)[1]
    for name in names:
        assert_as_good(ours[name], plain[name], truth[name], 4e-3)


@pytest.mark.parametrize(
    "shape", [(3, 200, 5, 2, 8, 40), (2, 64, 3, 3, 24, 64), (1, 8, 2, 1, 128, 8), (9, 37, 4, 2, 16, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_few_tokens_with_adjacent_ranks(shape, dtype):
    check(stored(bank(*shape, dtype), "ab"), 2e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("T", [16, 70, 150])
def test_one_expert_named_often(T):
    """More pairs of an expert than a tile holds, and exactly as many; a token that has it in several slots."""
    case = bank(T, 64, 6, 4, 16, 64)
    for ids in (torch.full((T, 4), 3), torch.tensor([1, 1, 4, 1]).expand(T, 4)):
        for factored in (False, True):
            check({**case, "experts": ids.int().contiguous()}, factored=factored)


def test_weights_per_row():
    case = bank(48, 64, 6, 3, 16, 64, N=4)
    rows = torch.arange(4).repeat_interleave(12).int()
    assert torch.equal(check(case), ops.lora_apply(**case, rows=rows))
    check(case, rows=rows[torch.randperm(48, generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("T", [16, 70])
def test_slots_of_weight_zero(T):
    """All of them, the first or the last of some tokens, and whole tokens."""
    case = bank(T, 64, 6, 3, 16, 64, lora_bias=True)
    assert torch.equal(ops.lora_apply(**{**case, "weights": torch.zeros_like(case["weights"])}), case["base"])
    for gone in ((slice(None), 0), (slice(0, 9), 2), (slice(3, 5), slice(None))):
        weights = case["weights"].clone()
        weights[gone] = 0
        y = check({**case, "weights": weights})
        assert torch.equal(y[3:5], case["base"][3:5]) or gone[0] != slice(3, 5)


@pytest.mark.parametrize("T", [33, 600])
def test_nan_of_an_expert_reaches_only_the_tokens_that_use_it(T):
    case = bank(T, 64, 6, 2, 16, 64)
    case["weights"][case["experts"] == 3] = 0
    clean = ops.lora_apply(**case)
    for name in ("lora_a", "lora_b"):
        case[name] = case[name].clone()
        case[name][2:4] = NAN
    uses = (case["experts"] == 2).any(-1)
    y = ops.lora_apply(**case)
    assert torch.equal(y[~uses], clean[~uses]) and y[uses].isnan().all()


def test_a_bad_token_is_alone():
    case = bank(70, 64, 6, 2, 16, 64)
    clean = ops.lora_apply(**case)
    case["x"][40, 1] = NAN
    y = ops.lora_apply(**case)
    others = torch.arange(70) != 40
    assert torch.equal(y[others], clean[others]) and y[40].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_in_place_and_packed_give_the_same_bits(dtype):
    case = bank(40, 64, 6, 2, 16, 72, dtype)
    case["lora_a"] = case["lora_a"].mT.contiguous().mT  # as packed: the other layout is summed in another order
    want = ops.lora_apply(**case)
    packed = ops.pack_experts(case["lora_a"], case["lora_b"])
    assert torch.equal(ops.lora_apply(**case, packed=packed), want)
    base = case["base"].clone()
    ops.lora_apply_(**{**case, "base": base})
    assert torch.equal(base, want)


@pytest.mark.parametrize("T", [1, 33, 129])
def test_routed(T):
    case = bank(T, 64, 36, 2, 16, 64)
    case = {n: t for n, t in case.items() if n not in ("weights", "experts")} | {"gates": rand(36, 64, seed=3)}
    y, weights, experts = ops.routed_lora(**case)
    w, e = ops.route(case["x"], case["gates"])
    rest = {n: case[n] for n in ("base", "x", "lora_a", "lora_b")}
    assert torch.equal(experts, e) and torch.equal(weights, w)
    assert torch.equal(y, ops.lora_apply(**rest, weights=w, experts=e))


def test_a_bank_of_no_experts_is_the_base():
    case = bank(40, 64, 1, 1, 16, 64)
    none = {n: case[n][:0] for n in ("lora_a", "lora_b")}
    none |= {n: case[n][:, :0] for n in ("weights", "experts")}
    assert torch.equal(ops.lora_apply(**{**case, **none}), case["base"])
