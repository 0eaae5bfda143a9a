"""Uniform merges: one expert made of all E, the same for every token; nothing is routed.

    merged           y = W u + (1/E) sum_e B_e A_e u         the exact mean of the outer products: the factors
                                                             lie side by side along the rank
    merged_factors   y = W u + (mean_e B_e) (mean_e A_e) u   A and B averaged apart (B with its scaling)

Both are in the PHATGOOSE paper (appendix C). An expert without this module counts as zero in the mean: E is
the number of experts of the bank, not of those present here. Output biases are averaged likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.module_bank import kernel_copy
from .base import Method, Plan, Taxonomy
from .phatgoose import PAPER

TAXONOMY = Taxonomy(  # a baseline; not in the survey
    input_granularity="N/A",  # nothing depends on the input
    depth="N/A",
    selection="Dense",
    aggregation="Parameter",
)


def used_ranks(module_bank: ModuleBank) -> Tensor:
    """[E, R] bool: False on the zero padding of experts with a smaller rank or without this module."""
    ranks = torch.tensor(module_bank.ranks, device="cpu") * module_bank.present
    return (torch.arange(module_bank.lora_A.shape[1], device="cpu") < ranks[:, None]).to(module_bank.device)


def merged_plan(bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any]) -> Plan:
    """One expert of rank sum_e R_e with weight 1/E.

    The factor 1/E is the weight, not part of B: it is applied in float32, where B in float16 could underflow.
    """
    used = used_ranks(module_bank)
    bias = module_bank.lora_bias
    return Plan(
        lora_A=kernel_copy(module_bank.lora_A[used].unsqueeze(0)),
        lora_B=module_bank.lora_B.transpose(1, 2)[used].unsqueeze(0).transpose(1, 2),
        lora_bias=None if bias is None else bias.float().sum(0, keepdim=True).to(bias.dtype),
        weights=torch.full((1,), 1.0 / module_bank.num_experts, device=module_bank.device, dtype=torch.float32),
    )


def merged_factors_plan(
    bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any]
) -> Plan:
    """One expert of the module's largest rank, A and B the means over the bank, weight 1."""
    return Plan(
        lora_A=_mean(module_bank.lora_A.transpose(1, 2)).transpose(1, 2),
        lora_B=_mean(module_bank.lora_B.transpose(1, 2)).transpose(1, 2),
        lora_bias=None if module_bank.lora_bias is None else _mean(module_bank.lora_bias),
        weights=torch.ones(1, device=module_bank.device, dtype=torch.float32),
    )


def _mean(stacked: Tensor) -> Tensor:
    """[E, ...] -> [1, ...], accumulated in at least float32, in the dtype of `stacked`."""
    wide = torch.promote_types(stacked.dtype, torch.float32)
    return stacked.mean(0, keepdim=True, dtype=wide).to(stacked.dtype).contiguous()


ROWS = (
    Method(
        name="merged",
        summary="uniform mean of the experts' B A for every token",
        paper=f"{PAPER}, baseline 'Merged Experts' and appendix C",
        taxonomy=TAXONOMY,
        plan=merged_plan,
        lora_only=True,
        routing=None,
    ),
    Method(
        name="merged_factors",
        summary="A and B averaged apart, then multiplied, for every token",
        paper=f"{PAPER}, appendix C",
        taxonomy=TAXONOMY,
        plan=merged_factors_plan,
        lora_only=True,
        routing=None,
    ),
)
