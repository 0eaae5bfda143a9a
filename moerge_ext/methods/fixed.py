"""`expert:<name>`: one fixed expert for every token, as PEFT's set_adapter does: the oracle, the control."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.module_bank import kernel_copy
from .base import Method, Plan, Taxonomy

PREFIX = "expert:"

TAXONOMY = Taxonomy(  # the control; not in the survey
    input_granularity="Task",  # the user names the expert
    depth="Model",
    aggregation="None",
    generalization="In-Distribution",
)


def fixed_plan(
    bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any], *, expert: str
) -> Plan:
    """The slice of one expert, weight 1; weight 0 and one zero row where it has no LoRA in this module.

    Copied, so that the bank of all experts need not stay in memory. ValueError lists the names when no expert
    has this one.
    """
    if missing := unknown_expert(bank, expert=expert):
        raise ValueError(missing[0])
    index = bank.names.index(expert)
    present = bool(module_bank.present[index])
    own = module_bank.branches
    rank = max(0 if own else 1, module_bank.ranks[index])
    rows = slice(index, index + 1)
    bias = module_bank.lora_bias
    return Plan(
        lora_A=kernel_copy(module_bank.lora_A[rows, :rank]),
        lora_B=kernel_copy(module_bank.lora_B[rows, :, :rank]),
        lora_bias=None if bias is None else bias[rows].clone(),
        weights=torch.full((1,), float(present), device=module_bank.device, dtype=torch.float32),
        branches={kind: branch.take([index]) for kind, branch in own.items() if branch.present[index]},
    )


def unknown_expert(bank: ExpertBank, *, expert: str) -> list[str]:
    """`Method.lacks`: what is wrong when the bank has no expert of this name."""
    return [] if expert in bank.names else [f"no expert named '{expert}'; there are: {', '.join(bank.names)}"]


def fixed_expert(name: str) -> Method:
    """The row `expert:<name>`; whether the bank has such an expert is checked when the plan is built."""
    return Method(
        name=PREFIX + name,
        summary="one fixed expert for every token",
        paper="the single expert, as PEFT's set_adapter applies it (LoRA, arXiv 2106.09685, section 4.1)",
        taxonomy=TAXONOMY,
        plan=partial(fixed_plan, expert=name),
        routing=None,
        lacks=partial(unknown_expert, expert=name),
    )
