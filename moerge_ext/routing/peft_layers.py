"""Layers that carry an adapter already: PEFT's, and those of this package's own training."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..files.listing import listed


@dataclass(frozen=True)
class PeftLayer:
    """One of PEFT's layers: its class, the adapters that its forward adds to the base layer, those it only keeps."""

    kind: str
    active: tuple[str, ...]
    idle: tuple[str, ...]  # disabled or not chosen


def is_peft_layer(module: object) -> bool:
    """Whether a module is one of PEFT's adapter layers, of any method (LoRA, LoHa, IA3, OFT, ...)."""
    peft = sys.modules.get("peft.tuners.tuners_utils")  # where nothing has imported it there are no such layers
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def peft_layers(model: nn.Module) -> dict[str, PeftLayer]:
    """{path: layer} of PEFT's layers that carry an adapter. One that is merged is part of the base weight."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_peft_layer(module) and (carried := _carried(module)):
            on = set() if module.disable_adapters or module.merged else set(module.active_adapters)
            idle = () if module.merged else tuple(name for name in carried if name not in on)
            found[path] = PeftLayer(_name(module), tuple(name for name in carried if name in on), idle)
    return found


def _carried(layer: nn.Module) -> list[str]:
    """The adapters of one layer, in their order."""
    names: dict[str, None] = {}
    for attribute in layer.adapter_layer_names:
        part = getattr(layer, attribute, None)
        names |= dict.fromkeys(part.keys() if hasattr(part, "keys") else ())
    return list(names)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"


def wrapper_problem(model: nn.Module, layer: nn.Module, carried: PeftLayer | None) -> str | None:
    """What is wrong with a branch on top of a layer that adds an adapter of its own."""
    if carried is not None and carried.active:
        names = ", ".join(map(repr, carried.active))
        return (
            f"carries the PEFT adapter {names} already ({carried.kind}), which would count beside the experts; "
            + how_to_take_off(model, carried.active)
        )
    if (
        not is_peft_layer(layer)
        and isinstance(getattr(layer, "base_layer", None), nn.Module)
        and hasattr(layer, "lora_A")
    ):
        return (
            f"is a {type(layer).__name__} with a LoRA of its own, which would count beside the experts; undo that first"
        )
    return None


def carrier_problem(model: nn.Module, path: str) -> str:
    """What is wrong with experts on what the PEFT layer at `path` holds."""
    layer, carried = model.get_submodule(path), peft_layers(model).get(path)
    if problem := wrapper_problem(model, layer, carried):
        return problem
    return f"is PEFT's {_name(layer)}; {how_to_take_off(model, carried.idle if carried is not None else ())}"


def how_to_take_off(model: nn.Module, names: Iterable[str]) -> str:
    """The call that leaves the model without PEFT's adapters."""
    if getattr(model, "_hf_peft_config_loaded", False):
        calls = ", ".join(f"model.delete_adapter({name!r})" for name in names)
    else:
        calls = "peft_model.unload(), which returns the base model (get_base_model() leaves the adapters on)"
    return f"take it off: {calls}. moerge_ext.load_experts(...) of the model before that makes an expert of it"


def idle_notes(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What is to be known of adapters that are no error: on the routed layers but idle, or active on others."""
    routed = set(names)
    idle: dict[str, list[str]] = {}
    beside: dict[str, list[str]] = {}
    for path, layer in peft_layers(model).items():
        for name in layer.idle if path in routed else ():
            idle.setdefault(name, []).append(path)
        for name in () if path in routed else layer.active:
            beside.setdefault(name, []).append(path)
    notes = [
        f"the PEFT adapter {name!r} is there but idle in {_some(paths)}: activating it would add it to the experts"
        for name, paths in idle.items()
    ]
    return notes + [
        f"the PEFT adapter {name!r} stays active beside the experts in {_some(paths)}; {how_to_take_off(model, [name])}"
        for name, paths in beside.items()
    ]


def _some(paths: list[str]) -> str:
    return listed(paths, "module")
