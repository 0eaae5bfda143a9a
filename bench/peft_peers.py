"""PEFT's own layers over the same weights: Arrow routing, and a single adapter (the lower bound of any branch)."""

from __future__ import annotations

from functools import cache

import torch
from peft import ArrowConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from .cells import Cell, wants
from .data import Tokens, Weights
from .timing import Candidate

ROUTER = "arrow_router"


def add_adapters(
    model: nn.Module, targets: str, rank: int, factors: dict[str, list[tuple[Tensor, Tensor]]]
) -> PeftModel:
    """Wraps a model with one LoRA adapter per expert, around existing factors: {path: [(A [R,D], B [O,R]), ...]}.

    In the factors' dtype: PEFT's default would keep bfloat16 adapters in float32, which is slower.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0)
    count = len(next(iter(factors.values())))
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    wrapped = get_peft_model(model, config, adapter_name="task_0", **options)
    for e in range(1, count):
        wrapped.add_adapter(f"task_{e}", config, **options)
    for path, experts in factors.items():
        layer = model.get_submodule(path)
        for e, (a, b) in enumerate(experts):
            layer.lora_A[f"task_{e}"].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B[f"task_{e}"].weight = nn.Parameter(b, requires_grad=False)
    return wrapped.eval()


def add_arrow(wrapped: PeftModel, targets: str, rank: int, count: int, top_k: int) -> None:
    """Turns on Arrow routing over task_0 .. task_<count - 1>, as peft's create_arrow_model does."""
    names = [f"task_{e}" for e in range(count)]
    arrow = ArrowConfig(top_k=top_k, router_temperature=1.0, rng_seed=0)
    arrow.task_adapter_names = names
    wrapped.add_adapter(ROUTER, LoraConfig(r=rank, target_modules=targets, arrow_config=arrow))
    wrapped.set_adapter(ROUTER)
    wrapped.eval()


def _layers(weights: Weights, count: int, top_k: int | None) -> list[nn.Module]:
    """One PEFT layer per copy with the first `count` experts; top_k None: only expert 0, without routing."""
    factors = {}
    for i in range(weights.copies):
        factors[f"proj.{i}"] = [(weights.A[i][e], weights.B[i][e]) for e in range(count)]
    holder = weights.holder()
    wrapped = add_adapters(holder, r"proj\.\d+", weights.cell.R, factors)
    if top_k is not None:
        add_arrow(wrapped, r"proj\.\d+", weights.cell.R, count, top_k)
    return list(holder.proj)


@cache
def _both(weights: Weights) -> tuple[list[nn.Module] | None, list[nn.Module]]:
    return _layers(weights, weights.cell.E, weights.cell.K), _layers(weights, 1, None)


def forget() -> None:
    """Frees the layers of earlier weights."""
    _both.cache_clear()


def candidates(
    cell: Cell, weights: Weights, tokens: Tokens, transient: dict[str, float], traffic: dict[str, float]
) -> list[Candidate]:
    """peft_arrow and ours_arrow (the same semantics; only routed), and peft_one."""
    found: list[Candidate] = []
    x: torch.Tensor = tokens.x
    if cell.mode == "routed" and wants(cell, "ours_arrow"):
        ours = weights.arrow_layers
        found.append(Candidate("ours_arrow", lambda i: ours[i](x), truth="arrow", own=True))
    if cell.mode == "routed" and wants(cell, "peft_arrow"):
        arrow = _both(weights)[0]
        found.append(
            Candidate(
                "peft_arrow",
                lambda i: arrow[i](x),
                truth="arrow",
                tolerance=0.08 if cell.dtype != "float32" else None,  # it scores in the dtype of the adapters
                transient=transient["peft_arrow"],
                traffic=traffic["peft_arrow"],
            )
        )
    if wants(cell, "peft_one"):
        one = _both(weights)[1]
        found.append(Candidate("peft_one", lambda i: one[i](x), truth="expert 0"))
    return found
