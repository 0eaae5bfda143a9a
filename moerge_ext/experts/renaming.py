"""A bank under other module paths; where two names of one module meet, their experts are stacked anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from .bank import ExpertBank
from .branches import joined as branches_of
from .module_bank import ModuleBank


def renamed_bank(bank: ExpertBank, paths: Sequence[Mapping[str, str]], there: Collection[str]) -> ExpertBank:
    """`bank` with `paths[e]` = {path: new path} for expert e, modules of a model that has those named `there`; what is
    not in `paths` is left out.

    No tensor is copied where all experts of a module move together. Two experts may have the same module under
    different paths (they were trained with different versions of the model's code): they meet under the new one.
    ValueError when one expert has two modules for one path, or experts of different widths meet.
    """
    rows: dict[str, dict[str, list[int]]] = {}  # {new path: {path: experts}}
    for old, module in bank.modules.items():
        for e in module.present.nonzero().flatten().tolist():
            if old in paths[e]:
                rows.setdefault(paths[e][old], {}).setdefault(old, []).append(e)
    modules = {}
    for new, parts in rows.items():
        (old, experts), *others = parts.items()
        whole = bank.modules[old]
        if not others and len(experts) == int(whole.present.sum()):
            modules[new] = whole
        else:
            modules[new] = _joined(new, [(bank.modules[path], ids) for path, ids in parts.items()])
    stored = [{new: bank.stored_paths[e].get(old, old) for old, new in moved.items()} for e, moved in enumerate(paths)]
    renamed = bank.with_modules(modules, stored)
    renamed.claims = {
        name: claims.renamed(paths[bank.names.index(name)], there=there) for name, claims in bank.claims.items()
    }
    return renamed


def _joined(path: str, parts: Sequence[tuple[ModuleBank, list[int]]]) -> ModuleBank:
    """One stack of the rows that each part names; the other rows are absent."""
    sizes = {(part.in_features, part.out_features) for part, _ in parts}
    ids = [e for _, rows in parts for e in rows]
    if len(sizes) > 1 or len(set(ids)) < len(ids):
        raise ValueError(f"module '{path}': the experts have it twice, under different names")
    num, device = parts[0][0].num_experts, parts[0][0].device
    dtype = parts[0][0].dtype
    for part, _ in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    rank = max(part.rank for part, _ in parts)
    ((d, o),) = sizes
    lora_a = torch.zeros(num, d, rank, dtype=dtype, device=device)  # as a ModuleBank stores them
    lora_b = torch.zeros(num, rank, o, dtype=dtype, device=device)
    bias = torch.zeros(num, o, dtype=dtype, device=device) if any(p.lora_bias is not None for p, _ in parts) else None
    present, ranks = torch.zeros(num, dtype=torch.bool, device="cpu"), [0] * num
    for part, rows in parts:
        lora_a[rows, :, : part.rank] = part.lora_A[rows].transpose(1, 2).to(dtype)
        lora_b[rows, : part.rank] = part.lora_B[rows].transpose(1, 2).to(dtype)
        if part.lora_bias is not None:
            bias[rows] = part.lora_bias[rows].to(dtype)
        present[rows] = True
        for e in rows:
            ranks[e] = part.ranks[e]
    branches = branches_of((part.branches, rows) for part, rows in parts)
    joined = ModuleBank(
        lora_a.transpose(1, 2), lora_b.transpose(1, 2), bias, present=present, ranks=ranks, branches=branches
    )
    for part, rows in parts:
        _copy_gates(joined, part, rows)
    return joined


def _copy_gates(joined: ModuleBank, part: ModuleBank, rows: list[int]) -> None:
    for kind, gates in part.gates.items():
        flags: Tensor = part.has_gate[kind]
        for e in rows:
            if flags[e]:
                joined.set_gate(kind, e, gates[e])
