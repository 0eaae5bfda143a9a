"""Experts that change nothing: a LoRA whose product B A and bias are zero adds zero wherever it is routed to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .module_bank import ModuleBank

SAMPLE = 64  # numbers looked at first


def idle_notes(names: Sequence[str], modules: Mapping[str, ModuleBank]) -> list[str]:
    """One line for each expert that changes nothing in some of its modules."""
    if not modules:
        return []
    present = torch.stack([module.present for module in modules.values()])  # [modules, E]
    idle = torch.stack([idle_experts(module) for module in modules.values()]) & present
    notes = []
    for e, count in enumerate(idle.sum(0).tolist()):
        if count:
            total = int(present[:, e].sum())
            first = next(path for path, flag in zip(modules, idle[:, e].tolist(), strict=True) if flag)
            where = "" if count == total else f", such as {first}"
            kinds = [branch.kind for branch in modules[first].branches.values() if branch.present[e]]
            why = "its vector is 1" if kinds else "lora_B lora_A is 0"
            notes.append(f"expert {names[e]!r} changes nothing in {count} of {total} modules ({why}{where})")
    return notes


def idle_experts(module: ModuleBank) -> Tensor:
    """[E] bool on the CPU: A or B is zero, and so is the bias."""
    works = _any(module.lora_A.transpose(1, 2)) & _any(module.lora_B.transpose(1, 2))
    if module.lora_bias is not None:
        works |= _any(module.lora_bias)
    works = works.cpu()
    for branch in module.branches.values():
        works |= branch.works()
    return ~works


def _any(stacked: Tensor) -> Tensor:
    """[E, ...] -> [E] bool: whether anything but zero is in it."""
    rows = stacked.flatten(1)
    found = rows[:, :SAMPLE].any(1)  # nearly always all that has to be read
    found[~found] = rows[~found].any(1)
    return found
