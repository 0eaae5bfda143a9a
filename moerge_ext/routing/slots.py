"""Spare slots: experts that join and leave a patched model, whose tensors keep their addresses and sizes.

A layer patched with `spare` slots holds tensors for E + spare experts. The experts there are lie in the first slots, in
the order of `handle.names`, as if the model had been patched with just them; the slots after them are masked, so that
their gates and factors are never chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..files.listing import listed
from ..methods.base import Method, Plan, is_integer
from .few_experts import own_top_k


@dataclass
class Slots:
    """What a patch with spare slots keeps in order to take more experts. free: slots that no expert has."""

    free: int
    row: Method
    overrides: Mapping[str, Any]  # the method's options as they were given to `patch`
    absent: str
    missing: str

    def settings(self, count: int) -> tuple[Any, dict[str, Any]]:
        """(routing, the method's options) for `count` experts; ValueError where they ask for more."""
        names = range(count)
        routing, _, options = self.row.configure(**dict(self.overrides) | own_top_k(self.row, names, self.overrides))
        if routing.top_k is not None and routing.top_k > count:
            raise ValueError(f"top_k={routing.top_k} is more than the {count} experts that would be left")
        return routing, options


def spare_problems(spare: Any, row: Method, experts: ExpertBank, parameters: Sequence[str]) -> list[str]:
    """Why a patch cannot have `spare` slots."""
    if not is_integer(spare) or spare < 0:
        return [f"spare must be a number of experts, 0 or more, got {spare!r}"]
    if spare and row.routing is None:
        return [f"spare={spare}: method '{row.name}' routes nothing: what it applies is computed from all its experts"]
    if spare and (row.together or row.learned is not None):
        return [f"spare={spare}: method '{row.name}' makes of every expert what depends on the others"]
    if spare and (others := [path for path, module in experts.modules.items() if module.branches]):
        return [f"spare={spare}: {listed(others, 'modules')}: experts that are no LoRA have no spare slots"]
    if spare and parameters:
        return [f"spare={spare}: experts on fused base experts ({listed(list(parameters))}) have no spare slots"]
    return []


def with_spare(plan: Plan, spare: int) -> Plan:
    """Copies of the plan's tensors with `spare` masked slots after its experts."""
    if not spare:
        return plan
    mask = torch.ones(plan.lora_A.shape[0], dtype=torch.bool, device=plan.lora_A.device)
    return replace(
        plan,
        lora_A=_longer(plan.lora_A.mT, spare).mT,  # the middle axis stays the contiguous one
        lora_B=_longer(plan.lora_B.mT, spare).mT,
        lora_bias=None if plan.lora_bias is None else _longer(plan.lora_bias, spare),
        gates=_longer(plan.gates, spare),
        mask=_longer(mask if plan.mask is None else plan.mask, spare),
    )


def _longer(stacked: Tensor, spare: int) -> Tensor:
    longer = stacked.new_zeros(stacked.shape[0] + spare, *stacked.shape[1:])
    longer[: stacked.shape[0]] = stacked
    return longer


def for_slots(bias: Tensor, slots: Slots | None) -> Tensor:
    """A score bias [N,E] for layers with that many slots."""
    return bias if slots is None or not slots.free else nn.functional.pad(bias, (0, slots.free))
