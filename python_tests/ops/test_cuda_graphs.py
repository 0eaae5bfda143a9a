"""Recorded CUDA graphs of the ops, replayed with other inputs: the same bits as eager. Needs a GPU."""

from __future__ import annotations

import cuda_roundtrip
import pytest
import torch
from op_cases import lora, rand

import moerge_ext as moerge
from moerge_ext import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and moerge.build_info()["cuda"]), reason="needs a GPU and CUDA kernels"
)
D, E, R, O = 256, 9, 16, 320
BF16 = torch.bfloat16
OPS = ("routed_linear", "routed_lora", "routed_lora_", "route", "lora_apply")
KINDS = {  # what becomes of the inputs
    "as patched": {},  # few tokens are one launch
    "ranks outside": {"lora_a": lambda t: t.contiguous()},  # never one launch
    "strided x": {"x": lambda t: torch.cat([t, t], 1)[:, 1 : D + 1]},
    "float64 bank": {"lora_a": lambda t: t.double(), "lora_b": lambda t: t.double()},
}


def inputs(T: int, seed: int, kind: str) -> dict[str, torch.Tensor]:
    case = lora(T, D, E, 2, R, O, base=BF16, x=BF16, bank=BF16)
    case["lora_a"] = case["lora_a"].mT.contiguous().mT
    case |= {"gates": rand(E, D, seed=3), "weight": rand(O, D, seed=4, dtype=BF16)}
    case |= {"linear_bias": rand(O, seed=5, dtype=BF16), "x": rand(T, D, seed=seed, dtype=BF16)}
    case |= {name: change(case[name]) for name, change in KINDS[kind].items()}
    return {name: cuda_roundtrip.moved(tensor, torch.device("cuda")) for name, tensor in case.items()}


def call(op: str, case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    bank, x, gates = (case["lora_a"], case["lora_b"]), case["x"], case["gates"]
    if op == "routed_linear":
        return ops.routed_linear(x, case["weight"], case["linear_bias"], gates, *bank)
    if op == "routed_lora":
        return ops.routed_lora(case["base"], x, gates, *bank)
    if op == "route":
        return ops.route(x, gates)
    if op == "lora_apply":
        return (ops.lora_apply(case["base"], x, *bank, *ops.route(x, gates)),)
    base = case["base"].clone()
    ops.routed_lora_(base, x, gates, *bank)
    return (base,)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 8, 33, 300, 1100])
@pytest.mark.parametrize(
    "op, kind", [*((op, "as patched") for op in OPS), *(("routed_linear", kind) for kind in [*KINDS][1:])]
)
def test_replay_with_changing_routing(op, kind, T):
    """Twice as long a chain as one op: a second call in the same graph forks from the stream again."""
    held, graph = inputs(T, 1, kind), torch.cuda.CUDAGraph()
    for _ in range(2):
        call(op, held)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = (*call(op, held), *call(op, held))
    chosen = []
    for seed in (2, 3, 2):
        case = inputs(T, seed, kind)
        held["x"].copy_(case["x"])
        graph.replay()
        want = call(op, case)
        assert all(torch.equal(a, b) for a, b in zip(got, (*want, *want), strict=True))
        chosen.append(ops.route(case["x"], case["gates"])[1])
    assert torch.equal(chosen[0], chosen[2]) and (T == 1 or not torch.equal(chosen[0], chosen[1]))
