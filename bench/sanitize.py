"""Every routed kernel once, for compute-sanitizer: forward at sizes on both sides of the crossovers, and backward.

    compute-sanitizer --tool racecheck python bench/sanitize.py

Answers are compared with plain float32 too. On an H200 a tool takes less than a minute over it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script only its own folder is on the path

import torch
from torch import Tensor

from moerge_ext import ops

D, O, E, R, K = 256, 320, 9, 16, 2
TOKENS = (1, 5, 8, 16, 33, 300, 1100)
BACKWARD = (5, 33, 300)
LIMIT = 1e-2  # relative error of the first tokens


def inputs(T: int, dtype: torch.dtype, make: torch.Generator, device: str) -> dict[str, Tensor]:
    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=make).to(kind)

    return {
        "x": normal(T, D),
        "weight": normal(O, D),
        "gates": normal(E, D, kind=torch.float32),
        "lora_A": normal(E, D, R).mT,  # rank by rank, as `patch` lays a bank out
        "lora_B": normal(E, R, O).mT,
    }


def error(case: dict[str, Tensor], y: Tensor, weights: Tensor, experts: Tensor) -> float:
    """Of the first four tokens, against plain torch with the routing that came out."""
    x = case["x"][:4].float()
    want = x @ case["weight"].float().T
    for t in range(len(x)):
        for weight, e in zip(weights[t], experts[t], strict=True):
            want[t] += weight * (case["lora_B"][e].float() @ (case["lora_A"][e].float() @ x[t]))
    return ((y[:4].float() - want).norm() / want.norm()).item()


def main(device: str = "cuda") -> int:
    """0, or 1 when an answer was wrong."""
    make = torch.Generator(device).manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T in TOKENS:
            case = inputs(T, dtype, make, device)
            bank = (case["gates"], case["lora_A"], case["lora_B"])
            off = error(case, *ops.routed_linear(case["x"], case["weight"], None, *bank, top_k=K))
            print(f"{dtype} T={T}: {off:.2e}", flush=True)
            if not off < LIMIT:
                return 1
            if T in BACKWARD:
                base = torch.zeros(T, O, device=device, dtype=dtype)
                leaves = [t.requires_grad_() for t in (base, case["x"], *bank)]
                ops.routed_lora(*leaves, top_k=K)[0].float().pow(2).sum().backward()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
