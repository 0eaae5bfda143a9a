"""Linear layers of any kind inside a model: their sizes, where they compute, and putting another in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import torch
from torch import nn

from ..models.linear import linear_features as linear_features

_HOOKS = threading.Lock()


def execution_device(layer: nn.Module) -> torch.device:
    """Where the layer computes: the hook's device for a layer that accelerate offloads, else its weight's.

    "meta" for a layer whose weights were never loaded and that no hook will load.
    """
    hook = getattr(layer, "_hf_hook", None)
    # accelerate's SequentialHook holds several
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    first = next(layer.parameters(), None)
    if first is None:
        first = next(layer.buffers(), None)
    return torch.device("cpu") if first is None else first.device


def on_meta(layer: nn.Module) -> nn.Module:
    """The layer and its children with tensors that have shapes alone, to run its class's forward on: the layer itself,
    hooks and where its weights are stay out.
    """
    probe = object.__new__(type(layer))
    probe.__dict__.update(layer.__dict__)
    probe.__dict__.pop("forward", None)
    for name, value in layer.__dict__.items():
        if isinstance(value, torch.Tensor):
            probe.__dict__[name] = value.to("meta")
        elif name.endswith("_hooks") and isinstance(value, dict):
            probe.__dict__[name] = type(value)()
    for kind in ("_parameters", "_buffers"):
        probe.__dict__[kind] = {name: None if t is None else t.to("meta") for name, t in getattr(layer, kind).items()}
    probe.__dict__["_modules"] = {name: None if m is None else on_meta(m) for name, m in layer._modules.items()}
    return probe


def holder(layers: dict[str, nn.Module], name: str) -> tuple[str, str]:
    """(path of the module whose code holds the layer, its attribute there): containers have no code of their own."""
    parent, _, leaf = name.rpartition(".")
    while parent and is_container(layers[parent]):
        parent, _, leaf = parent.rpartition(".")
    return parent, leaf


def is_container(module: nn.Module) -> bool:
    """Whether a module, such as a ModuleList, only holds others and has no forward."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` at `path` ("model.layers.0.mlp.up_proj") of `model`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def add_pre_hook(module: nn.Module, hook: Callable) -> str:
    """`register_forward_pre_hook(hook, with_kwargs=True)`, under the first key of ours that is free; returns the key.

    torch's own keys count up, and a graph that torch 2.10 compiles holds for the key that it was made with alone.
    """
    with _HOOKS:
        key = next(key for i in count() if (key := f"moerge {i}") not in module._forward_pre_hooks)
        module._forward_pre_hooks_with_kwargs[key] = True
        module._forward_pre_hooks[key] = hook
    return key


def remove_pre_hook(module: nn.Module, key: str) -> None:
    """Takes off what `add_pre_hook` has put there."""
    with _HOOKS:
        module._forward_pre_hooks.pop(key, None)
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def drop_hooks(model: nn.Module, owners: tuple[type, ...]) -> None:
    """Takes off the forward hooks that are methods of `owners`: a copy of a model has those that were on it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), owners)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """{parameter path: another path of the same tensor}."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    return {path: next(o for o in same if o != path) for same in paths.values() if len(same) > 1 for path in same}


def values_problem(tensor: torch.Tensor) -> str:
    """Why the values of one of the model's tensors cannot be read, or ""."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__} (quantized or sharded)"
    if tensor.is_meta:
        return "it is on the meta device (offloaded, or not loaded)"
    plain = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or tensor.dim() == 0
    return "" if plain else f"it is stored as {tensor.dtype} (quantized)"
