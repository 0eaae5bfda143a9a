"""Experts join and leave a patched model by its spare slots (`slots.py`): in all layers, or in none."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..experts.bank import ExpertBank, load_experts
from ..files.listing import listed
from ..methods.base import Plan
from ..methods.gating import gate_notes
from .fitting import on_patched
from .in_place import check_in_place
from .planning import listing, plans_of
from .provenance import other_base_note
from .routed_linear import RoutedLinear
from .slots import STACKED, Slots, move_up, no_room, row_of, write_row

_CHANGING = threading.Lock()
Expert = str | os.PathLike | ExpertBank


def add(handle: Any, expert: Expert, name: str | None) -> tuple[str, list[str]]:
    """(the name it has, notes to say): writes an expert into the first free slot of every layer, or raises."""
    with _CHANGING:
        slots, layers = _changeable(handle, "add_expert")
        if not slots.free:
            raise ValueError(
                f"add_expert: all slots are taken, by {', '.join(handle.names)}: drop_expert(name) first, or patch "
                "with a larger spare="
            )
        bank = _bank(expert, name)
        name = bank.names[0] if name is None else name
        routing, options = slots.settings(len(handle.names) + 1)
        plans, notes = _plans(handle, bank, name, slots, options, layers)
        stacks = {path: _stacked(layer) for path, layer in layers.items()}
        written = {path: row_of(plans.get(path), slots.absent) for path in layers}
        problems = [
            f"module '{path}': {why}" for path, stacked in stacks.items() if (why := no_room(stacked, written[path]))
        ]
        if name in handle.names:
            problems.insert(0, f"there is an expert {name!r} already: pass name=, or drop_expert({name!r}) first")
        if problems:
            raise ValueError(listing(f"cannot add expert {name!r}", problems))
        slot = len(handle.names)
        for path, layer in layers.items():
            write_row(stacks[path], slot, written[path])
            layer.resize(slot + 1, routing)
        slots.free -= 1
        handle.names, handle.options = (*handle.names, name), options
        return name, notes


def drop(handle: Any, name: str) -> None:
    """Takes an expert out of every layer; those after it move up by one slot."""
    with _CHANGING:
        slots, layers = _changeable(handle, "drop_expert")
        if name not in handle.names:
            raise ValueError(f"drop_expert: no expert {name!r}; there are {', '.join(handle.names)}")
        count, slot = len(handle.names) - 1, handle.names.index(name)
        if not count:
            raise ValueError(
                f"drop_expert: {name!r} is the last expert: handle.disabled() or handle.remove() gives the base alone"
            )
        try:
            routing, options = slots.settings(count)
        except ValueError as error:
            raise ValueError(f"drop_expert({name!r}): {error}") from None
        for layer in layers.values():
            move_up(_stacked(layer), slot, count)
            layer.resize(count, routing)
        slots.free += 1
        handle.names, handle.options = tuple(other for other in handle.names if other != name), options


def _changeable(handle: Any, caller: str) -> tuple[Slots, dict[str, RoutedLinear]]:
    """The slots and layers of a handle; why its experts cannot be changed at present."""
    handle._check_alive()
    if handle._slots is None:
        raise ValueError(f"{caller}: this model was patched without spare slots: patch(..., spare=4) keeps room for 4")
    if handle._state.busy:
        raise RuntimeError(
            f"{caller}: a block of this handle is open (record, queries, affinities or disabled), which has the "
            "experts it began with: leave it first"
        )
    check_in_place(handle, caller)
    return handle._slots, {path: handle.model.get_submodule(path) for path in handle.modules}


def _bank(expert: Expert, name: str | None) -> ExpertBank:
    """One expert; the ValueError of `load_experts` for a folder that is none."""
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"add_expert: name must be a text, got {name!r}")
    if not isinstance(expert, ExpertBank):
        if not isinstance(expert, (str, os.PathLike)):
            raise ValueError(
                "add_expert takes a folder, a file, a hub id or an ExpertBank of one expert, got "
                f"{type(expert).__name__}"
            )
        expert = load_experts([expert] if name is None else {name: expert})
    if len(expert) != 1:
        raise ValueError(f"add_expert takes one expert, got a bank of {len(expert)}: {', '.join(expert.names)}")
    return expert


def _plans(
    handle: Any, bank: ExpertBank, name: str, slots: Slots, options: dict[str, Any], layers: Mapping[str, Any]
) -> tuple[dict[str, Plan], list[str]]:
    """What the method makes of the expert alone; it makes the same of it among others."""
    fitted = on_patched(handle.model, bank, slots.missing)
    problems = list(fitted.problems)
    others = [path for path in fitted.experts.modules if path not in layers]
    if others and not problems:
        problems.append(
            f"{listed([repr(path) for path in others], 'module')}: no expert had them when the model was patched, so "
            "that there is no room: remove() and patch again with this expert"
        )
    if unlike := [path for path, module in fitted.experts.modules.items() if module.branches]:
        problems.append(f"{listed(unlike, 'module')}: spare slots are for LoRA, and the expert has another kind")
    plans: dict[str, Plan] = {}
    if not problems:
        modules = {path: m.to(dtype=layers[path].lora_A.dtype) for path, m in fitted.experts.modules.items()}
        problems += [
            f"module '{path}': values do not fit {module.dtype}, the type of the layer's experts"
            for path, module in modules.items()
            if module.overflows(fitted.experts.modules[path])
        ]
        typed = fitted.experts.with_modules(modules, fitted.experts.stored_paths)
        plans = plans_of(slots.row, typed, options, slots.absent, problems)
    if problems:
        raise ValueError(listing(f"cannot add expert {name!r}", problems, fitted.made_for))
    note = other_base_note(handle.model, (name,), bank.bases)
    return plans, [*fitted.notes, *gate_notes(bank, slots.row.gate_kind), *([note] if note else [])]


def _stacked(layer: RoutedLinear) -> dict[str, Tensor]:
    return {key: tensor for key in STACKED if (tensor := getattr(layer, key)) is not None}
