"""What the rows with one gate vector per expert and module share: finding the gates, masks and scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.kinds import AVERAGE_ACTIVATION, SIGMOID_GATE
from .base import Plan, Routing, standardize

MENDS = {
    SIGMOID_GATE: "train it with `moerge train-gates` or moerge_ext.train_gates(model, folder, data)",
    AVERAGE_ACTIVATION: "compute it with `moerge train-gates --kind average-activation` or "
    "moerge_ext.average_activation(model, folder, batches)",
}
GATE_NORMS = ("standardize", "unit", "none")


@dataclass(frozen=True)
class InverseTemperature:
    """A `Routing.scale`: 1 / temperature, or 1 / (temperature * sqrt(D)) when `by_width`."""

    temperature: float = 1.0
    by_width: bool = False

    def __call__(self, in_features: int, num_experts: int) -> float:
        return 1.0 / (self.temperature * (math.sqrt(in_features) if self.by_width else 1.0))


def expert_mask(usable: Tensor, device: torch.device) -> Tensor | None:
    """[E] bool on `device` as `route` wants it; None when every expert may be chosen."""
    return None if bool(usable.all()) else usable.to(device, copy=True)


def stored_gates(bank: ExpertBank, module_bank: ModuleBank, module_name: str, kind: str) -> tuple[Tensor, Tensor]:
    """(raw gates [E, D] float32 of `kind`, zeros where there is none; [E] bool, who has one here).

    An expert with gates of the kind in other modules has none here because the module did not run when they were
    made: it is left out of this module. An expert with no gate of the kind at all could never be chosen, which no user
    wants silently: ValueError naming the module, every such expert, and the mend.
    """
    gates, has_gate = module_bank.gates.get(kind), module_bank.has_gate.get(kind)
    if gates is None or has_gate is None:
        shape = (module_bank.num_experts, module_bank.in_features)
        gates = torch.zeros(shape, dtype=torch.float32, device=module_bank.device)
        has_gate = torch.zeros_like(module_bank.present)
    missing = (module_bank.present & ~has_gate).nonzero().flatten().tolist()
    missing = [e for e in missing if e not in bank.gated(kind)]
    if missing:
        who = ", ".join(_expert_with_folder(bank, e) for e in missing)
        raise ValueError(
            f"module '{module_name}': expected a gate of kind '{kind}' for every expert that is here, "
            f"missing for {len(missing)} of {int(module_bank.present.sum())}: {who}; {MENDS[kind]}; "
            "or choose a method that needs no gates, such as arrow"
        )
    return gates.float(), module_bank.present & has_gate


def gates_lacking(bank: ExpertBank, *, kind: str) -> list[str]:
    """`Method.lacks` of rows that need stored gates of `kind`."""
    problems = []
    for name, module_bank in bank.modules.items():
        try:
            stored_gates(bank, module_bank, name, kind)
        except ValueError as error:
            problems.append(str(error))
    return problems


def gate_notes(bank: ExpertBank, kind: str | None) -> list[str]:
    """Lines for experts whose gates of `kind` were never trained, and for those that lack them in some modules; none
    for a method that reads no gates (None)."""
    notes = []
    if kind is None:
        return notes
    if untrained := flat_gates(bank, kind):
        notes.append(
            f"all gates of kind '{kind}' of {', '.join(untrained)} are constant, as before any training: standardized "
            f"they score 0 for every token; {MENDS[kind]}"
        )
    for e in sorted(bank.gated(kind)):
        theirs = {path: module for path, module in bank.modules.items() if bool(module.present[e])}
        without = [path for path, m in theirs.items() if kind not in m.has_gate or not bool(m.has_gate[kind][e])]
        if without:
            where = f"in {len(without)} of its {len(theirs)} modules, such as {without[0]}"
            who = f"expert '{bank.names[e]}' has no gate of kind '{kind}'"
            notes.append(f"{who} {where}, and is never chosen there; {MENDS[kind]}")
    return notes


def flat_gates(bank: ExpertBank, kind: str) -> list[str]:
    """The experts, quoted, that have gates of `kind` and only such whose values are all the same."""
    some = torch.zeros(len(bank), dtype=torch.bool, device="cpu")
    flat = torch.ones(len(bank), dtype=torch.bool, device="cpu")
    for module in bank.modules.values():
        if kind in module.gates and kind in module.has_gate:
            gates, has = module.gates[kind], module.has_gate[kind].cpu()
            some |= has
            flat &= (gates == gates[:, :1]).all(1).cpu() | ~has
    return [f"'{name}'" for name, alone in zip(bank.names, (some & flat).tolist(), strict=True) if alone]


def _expert_with_folder(bank: ExpertBank, expert: int) -> str:
    folder = bank.folders[expert]
    return f"'{bank.names[expert]}'" + (f" ({folder})" if folder is not None else "")


def normalize_gates(gates: Tensor, norm: str) -> Tensor:
    """[E, D] float32: standardized (eps 1e-5), of unit length (eps 1e-12), or as they are."""
    if norm == "standardize":
        return standardize(gates)
    if norm == "unit":
        return torch.nn.functional.normalize(gates.float(), dim=-1, eps=1e-12)
    return gates.float()


def gate_plan(
    bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any], *, kind: str
) -> Plan:
    """A routed `Plan` from the stored gates of `kind`, normalized per the option `gate_norm`."""
    gates, has_gate = stored_gates(bank, module_bank, module_name, kind)
    return Plan(
        lora_A=module_bank.lora_A,
        lora_B=module_bank.lora_B,
        lora_bias=module_bank.lora_bias,
        gates=normalize_gates(gates, options.get("gate_norm", "standardize")).contiguous(),
        mask=expert_mask(has_gate, module_bank.device),
        branches=module_bank.branches,
    )


def check_gate_norm(routing: Routing, options: Mapping[str, Any], *, method: str) -> Routing:
    """`Method.finish` of rows with the option `gate_norm`."""
    if options["gate_norm"] not in GATE_NORMS:
        raise ValueError(
            f"method '{method}': gate_norm must be one of {', '.join(GATE_NORMS)}, got {options['gate_norm']!r}"
        )
    return routing


sigmoid_gate_plan = partial(gate_plan, kind=SIGMOID_GATE)
average_activation_plan = partial(gate_plan, kind=AVERAGE_ACTIVATION)
