"""Spare slots: experts that join and leave a patched model, whose tensors keep their addresses and sizes.

A layer patched with `spare` slots holds tensors for E + spare experts. The experts there are lie in the first slots, in
the order of `handle.names`, as if the model had been patched with just them; the slots after them are masked, so that
their gates and factors are never chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..files.counting import counted
from ..files.listing import listed
from ..methods.base import Method, Plan, is_integer
from .few_experts import own_top_k

STACKED = ("lora_A", "lora_B", "lora_bias", "gates", "mask")  # [slots, ...] each


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
            raise ValueError(f"top_k={routing.top_k} is more than the {counted(count, 'expert')} that would be left")
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
        return [f"spare={spare}: {listed(others, 'module')}: experts that are no LoRA have no spare slots"]
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


def row_of(plan: Plan | None, absent: str) -> dict[str, Tensor | None]:
    """What a slot of a module will hold of the one expert of `plan`; without a plan, of an expert that lacks it."""
    if plan is None:
        return {"mask": torch.tensor(absent == "base", device="cpu")}
    kept = {key: None if (value := getattr(plan, key)) is None else value[0] for key in STACKED}
    return kept | {"mask": torch.tensor(True, device="cpu") if plan.mask is None else plan.mask[0]}


def no_room(stacked: Mapping[str, Tensor], row: Mapping[str, Tensor | None]) -> str | None:
    """Why a slot of a module's tensors [slots, ...] has no room for those of an expert."""
    rank, room = (0 if row.get("lora_A") is None else _used_rank(row["lora_A"])), stacked["lora_A"].shape[1]
    if rank > room:
        return f"the expert has rank {rank}, the layer has room for rank {room}, the largest there was at first"
    bias = row.get("lora_bias")
    if bias is not None and "lora_bias" not in stacked and bool(bias.any()):
        return "the expert has an output bias, and those that there were at first have none"
    return None


def _used_rank(lora_A: Tensor) -> int:
    """R of [R,D] without zeros at its end."""
    used = lora_A.any(1).nonzero()
    return 0 if not len(used) else int(used[-1]) + 1


def write_row(stacked: Mapping[str, Tensor], slot: int, row: Mapping[str, Tensor | None]) -> None:
    """Into one slot of a module's tensors; what `row` lacks becomes 0."""
    for key, tensor in stacked.items():
        value = row.get(key)
        with _writing(tensor):
            tensor[slot].zero_()
            if value is not None:
                # the rank of either may be padded further than that of the other
                size = [slice(min(pair)) for pair in zip(value.shape, tensor.shape[1:], strict=True)]
                tensor[(slot, *size)].copy_(value[tuple(size)])


def move_up(stacked: Mapping[str, Tensor], slot: int, count: int) -> None:
    """What lies in the slots after `slot`, up to `count`, lies one slot before."""
    for tensor in stacked.values():
        with _writing(tensor):
            tensor[slot:count] = tensor[slot + 1 : count + 1].clone()
            tensor[count].zero_()


@contextmanager
def _writing(tensor: Tensor) -> Iterator[None]:
    """In which a tensor may be written that was made in inference mode, or outside of it."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield
