"""The whole grid of sizes, types and options that the ops promise, by pairs: route, then lora_apply with what it chose.

Two budgets of multiplications per case: the small one always, the large one when slow tests run:

    pytest -m slow python_tests/ops/test_grid.py                      # the CPU kernels
    pytest -m slow --simt LIBRARY python_tests/ops/test_grid.py       # the CUDA kernels in the emulator
    pytest --cuda python_tests/ops/test_grid.py                       # on a GPU, all of it
"""

from __future__ import annotations

import pytest
import torch
from covering import pairs_of, pairwise
from op_cases import check_lora, check_route, lora, rand, router

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
AXES = {
    "T": (0, 1, 2, 33, 129, 1000),
    "D": (8, 64, 200, 4096),
    "E": (1, 2, 7, 36, 166, 1024),
    "K": (1, 2, 8, "E"),
    "R": (1, 8, 16, 24, 64),
    "O": (8, 72, 200),
    "dtypes": ((f32,) * 3, (bf16,) * 3, (f16,) * 3, (f32, bf16, f16), (bf16, f32, f32), (f64, f16, bf16)),
    "tokens": ("random", "same", "nan"),
    "gates": ("random", "equal"),
    "mask": (None, "experts", "rows"),
    "bias": (False, True),
    "top_p": (None, 0.6),
    "factored": (False, True),
    "order": ("", "ranks adjacent"),
}
SMALL, LARGE = 4e6, 1e8


def slots(case) -> int:
    return case["E"] if case["K"] == "E" else min(case["K"], case["E"])


def cost(case) -> int:
    T, D, E, R, O = (case[n] for n in "TDERO")
    return T * D * E + T * slots(case) * R * (D + O) + E * R * (D + O)


CASES = pairwise(AXES, lambda case: cost(case) <= SMALL)
MORE = pairwise(AXES, lambda case: SMALL < cost(case) <= LARGE, seed=1)


def name_of(case) -> str:
    short = "/".join(str(d).removeprefix("torch.") for d in case["dtypes"])
    flags = [f"{n}={case[n]}" for n in ("tokens", "gates", "mask", "bias", "top_p", "factored", "order")]
    return "-".join([*(f"{n}{case[n]}" for n in "TDEKRO"), short, *flags])


def options_of(case) -> dict:
    E, N = case["E"], next(n for n in (3, 2, 5, 1) if case["T"] % n == 0)
    options: dict = {"top_k": slots(case), "top_p": case["top_p"]}
    if case["mask"]:
        options["mask"] = rand(N, E, seed=11) > -0.5
        options["mask"] = options["mask"][0] if case["mask"] == "experts" else options["mask"]
    if case["bias"]:
        options["bias"] = rand(N, E, seed=12)
    return options


def run(case) -> None:
    T, D, E, R, O = (case[n] for n in "TDERO")
    K, (base, x_type, bank) = slots(case), case["dtypes"]
    x, gates = router(T, D, E, x_type)
    if case["tokens"] == "same":
        x = x[:1].expand(T, D).contiguous()
    if case["tokens"] == "nan" and T:
        x[T // 2, D // 2] = float("nan")
    if case["gates"] == "equal":
        gates = gates[:1].expand(E, D).contiguous()
    weights, experts = check_route(x, gates, **options_of(case))
    if case["gates"] == "equal" and not case["bias"] and not case["mask"] and not case["top_p"]:
        assert torch.equal(experts, torch.arange(K).int().expand(T, K))
    inputs = lora(T, D, E, K, R, O, base=base, x=x_type, bank=bank, lora_bias=True)
    inputs |= {"x": x, "weights": weights, "experts": experts}
    if case["order"]:
        inputs |= {"lora_a": inputs["lora_a"].mT.contiguous().mT, "lora_b": inputs["lora_b"].contiguous()}
    check_lora(inputs, 2e-6 if f32 in (x_type, bank) else 2e-3, factored=case["factored"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_pairs(case):
    run(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=name_of)
def test_pairs_of_larger_cases(case):
    run(case)


def test_the_cases_hold_what_the_grid_is_for():
    """Sizes that only a budget could have dropped."""
    found = set().union(*(pairs_of(case) for case in CASES + MORE))
    for a, b in [(("T", 1000), ("E", 1024)), (("T", 1000), ("D", 4096)), (("D", 4096), ("E", 1024)),
                 (("E", 1024), ("K", "E")), (("R", 64), ("T", 1000)), (("D", 4096), ("R", 64))]:  # fmt: skip
        assert (min(a, b), max(a, b)) in found, (a, b)
    values = {item for pair in found for item in pair}
    assert values == {(axis, value) for axis, given in AXES.items() for value in given}
