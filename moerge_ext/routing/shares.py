"""Which rows and columns of a module a rank holds, where ranks share a layer out by its features.

Column parallel: a rank has some of the output features. Row parallel: some of the input features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..experts.module_bank import kernel_copy
from ..methods.base import Plan


@dataclass(frozen=True)
class Share:
    """What a rank holds of one module.

    offset, size: where its output features are in the rank's layer
    rows: [(start, size)], which of the module's O output features these are
    columns: (start, size) of its D input features, None for all of them
    """

    offset: int
    size: int
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None


def share_of_plan(plan: Plan, share: Share, *, adds_bias: bool = True) -> Plan:
    """The plan's tensors for one rank; the very same where the rank holds everything.

    adds_bias: False on the ranks whose sum already has the experts' output biases from another.
    """
    features = plan.lora_B.shape[1]
    if share.rows != ((0, features),):
        ids = torch.cat([torch.arange(start, start + size, device="cpu") for start, size in share.rows]).to(
            plan.lora_B.device
        )
        bias = None if plan.lora_bias is None else plan.lora_bias[:, ids].contiguous()
        plan = replace(plan, lora_B=kernel_copy(plan.lora_B[:, ids]), lora_bias=bias)
    if share.columns not in (None, (0, plan.lora_A.shape[2])):
        start, size = share.columns
        gates = None if plan.gates is None else _columns(plan.gates, start, size)
        plan = replace(plan, lora_A=kernel_copy(plan.lora_A[:, :, start : start + size]), gates=gates)
    return plan if adds_bias else replace(plan, lora_bias=None)


def _columns(gates: Tensor, start: int, size: int) -> Tensor:
    return gates[:, start : start + size].contiguous()
