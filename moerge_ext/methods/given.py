"""`given`: weights that are known before the forward pass, one row per sequence: nothing is scored.

    y_t = W u_t + sum_e w[row(t),e] B_e A_e u_t          w given by `with handle.affinities(w):`, used as it is

Weights may have any sign. A row of zeros is the base alone, a one-hot row one expert alone, so the sequences of one
batch can use different experts. Lower `top_k` when rows have few weights above zero: an expert that is not among the
top_k is never read.

`lorahub` is the same with the factors averaged apart; its options are those of the search, `moerge_ext.lorahub`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank, ModuleBank
from .base import Method, Plan, Routing, Taxonomy
from .gating import expert_mask
from .survey import SURVEY

TAXONOMY = Taxonomy(
    routing_dataset="Target",
    input_granularity="Multiple",  # whatever the weights were made for
    depth="Model",
    selection="Dense",
    generalization="Multiple",
    user_dataset="Few-Shot",
)

# the score is the row's weight and nothing else: gates of zero, weighting by score
WEIGHTS = Routing(top_k=None, normalize="none", scale=1.0, weighting="score")


def ungated_plan(bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any]) -> Plan:
    """The whole bank with gates of zero; an expert without a LoRA here is masked, its weight adds nothing."""
    shape = (module_bank.num_experts, module_bank.in_features)
    return Plan(
        lora_A=module_bank.lora_A,
        lora_B=module_bank.lora_B,
        lora_bias=module_bank.lora_bias,
        gates=torch.zeros(shape, device=module_bank.device, dtype=torch.float32),
        mask=expert_mask(module_bank.present, module_bank.device),
        branches=module_bank.branches,
    )


def as_given(weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """w [N,E] -> w float32."""
    return weights.float()


GIVEN = Method(
    name="given",
    summary="the weights you give for every sequence",
    paper="no paper's router: weights fixed beforehand (those of LoraHub, arXiv 2307.13269, are row lorahub)",
    taxonomy=TAXONOMY,
    plan=ungated_plan,
    routing=WEIGHTS,
    bias=as_given,
)

LORAHUB = Method(
    name="lorahub",
    summary="weights for a task, searched with a few of its examples",
    paper="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition, arXiv 2307.13269, section 3",
    taxonomy=SURVEY[7].taxonomy,
    plan=ungated_plan,
    routing=WEIGHTS,
    aggregation="factored",
    bias=as_given,
    # of the search, `moerge_ext.lorahub`
    options={"count": 20, "budget": 40, "bound": 1.5, "l1": 0.05, "optimizer": "nevergrad", "seed": 0},
    source="few-shot",
    per_task=True,
    survey=7,
)

ROWS = (GIVEN, LORAHUB)
