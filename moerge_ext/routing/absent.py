"""Modules that not every expert has: who competes there.

absent="mask"    the experts that have the module, among themselves: where only one has it, softmax gives it weight 1
                 on every token of every task. The papers' pools are homogeneous, so that this never arises.
absent="base"    all: an expert without the module competes with score 0 (its gate is zero; what the handle adds to
                 its score counts) as a branch that adds zero, so its share of the weight goes to the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..experts.bank import ExpertBank
from ..experts.module_bank import ModuleBank
from ..files.listing import listed
from ..methods.base import Plan, Routing

ABSENT = ("mask", "base")


def with_absent(plan: Plan, module: ModuleBank) -> Plan:
    """The plan in which experts without the module compete as zero branches."""
    if plan.mask is None or (plan.gates is None and plan.weigher is None):
        return plan
    absent = ~module.present.to(plan.mask.device)
    mask = plan.mask | absent
    gates = plan.gates if plan.gates is None else plan.gates.masked_fill(absent.to(plan.gates.device)[:, None], 0.0)
    return replace(plan, gates=gates, mask=None if bool(mask.all()) else mask)


def alone_note(plans: Mapping[str, Any], experts: ExpertBank, routing: Routing | None) -> str | None:
    """What to say of modules in which one expert alone can be chosen, under a weighting that gives it everything.

    plans: {path: whatever has a `mask`}.
    """
    names = experts.names
    if routing is None or len(names) < 2 or not routing.weighting.startswith("softmax"):
        return None
    alone = {}
    for path, plan in plans.items():
        # of a stacked parameter [n,E] where base experts differ
        masks = [] if plan.mask is None else plan.mask.reshape(-1, plan.mask.shape[-1])
        if len(masks) and all(int(mask.sum()) == 1 for mask in masks):
            alone[path] = names[int(masks[0].int().argmax())]
    if not alone:
        return None
    others = {path: int(experts.modules[path].present.sum()) - 1 if path in experts.modules else 0 for path in alone}
    where = listed([f"{path} (only {name!r})" for path, name in alone.items()])
    said = f"in {len(alone)} of {len(plans)} modules one expert is alone and gets weight 1 on every token: {where}. "
    if all(others.values()):
        return said + "Others have a LoRA there, but nothing that they could be chosen by"
    return said + 'absent="base" lets the experts without a module compete there as zero branches'
