"""The routers of a patched model as what an optimizer trains, and as what a file keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...experts.module_bank import kernel_copy
from ...methods.learned import EXPERTS, GATES
from ...routing.in_place import check_in_place
from ...routing.patch import Handle
from ...routing.routed_linear import RoutedLinear

FACTORS = ("lora_A", "lora_B")


def layers_of(handle: Handle) -> dict[str, RoutedLinear]:
    """{module path: the layer in its place}; RuntimeError when one was taken out since."""
    check_in_place(handle, "cannot find the routers")
    return {name: handle.model.get_submodule(name) for name in handle.modules}


def trainable(handle: Handle, train_experts: bool) -> dict[str, Tensor]:
    """What is trained: {"<path>/<name>": the tensor in use}, each a leaf that requires a gradient.

    Routers that layers share are there once. With `train_experts` the factors too, as "experts/<module>/lora_A".
    """
    found: dict[str, Tensor] = {}
    for path, layer in layers_of(handle).items():
        weigher = getattr(layer, "weigher", None)
        if weigher is None:
            found[f"{path}/{GATES}"] = layer.gates
        else:
            for part in weigher.modules():  # with what routers have in common
                found |= {f"{part.path}/{name}": t for name, t in _tensors(part) if name not in part.fixed}
        if train_experts:
            for name in FACTORS:
                setattr(layer, name, kernel_copy(getattr(layer, name)))  # what the bank holds must stay
                found[f"{EXPERTS}/{path}/{name}"] = getattr(layer, name)
    for tensor in found.values():
        tensor.requires_grad_(True)
    return found


def kept_as_begun(handle: Handle) -> dict[str, Tensor]:
    """What the routers' file holds beside `trainable`, under keys of that form."""
    weighers = [layer.weigher for layer in layers_of(handle).values() if getattr(layer, "weigher", None) is not None]
    parts = [part for weigher in weighers for part in weigher.modules()]
    return {f"{part.path}/{name}": t for part in parts for name, t in _tensors(part) if name in part.fixed}


def any_trainable(handle: Handle, train_experts: bool) -> bool:
    """Whether `trainable` would find anything."""
    weighers = [getattr(layer, "weigher", None) for layer in layers_of(handle).values()]
    return train_experts or any(weigher is None or next(_tensors(weigher), None) is not None for weigher in weighers)


def _tensors(weigher: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weigher._buffers.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            yield name, tensor


def by_place(trained: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"<path>/<name>": tensor} -> {path: {name: a copy on the CPU}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in trained.items():
        path, _, name = key.rpartition("/")
        found.setdefault(path, {})[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return found


class Dropped:
    """Experts that sit out a training step: each with a probability, at least one stays."""

    def __init__(self, handle: Handle, share: float):
        self.layers, self.share = layers_of(handle), share
        self.masks = {path: layer.mask for path, layer in self.layers.items()}
        self.weighers: dict[int, Any] = {}
        for layer in self.layers.values():
            weigher = getattr(layer, "weigher", None)
            if weigher is not None:
                self.weighers[id(weigher)] = (weigher, weigher.without)
        self.experts = len(handle.names)

    def draw(self) -> None:
        """Other experts sit out; from torch's generator of the CPU, which training seeds step by step."""
        kept = torch.rand(self.experts, dtype=torch.float32, device="cpu") >= self.share
        kept[torch.randint(self.experts, (1,), device="cpu")] = True
        for path, layer in self.layers.items():
            here = kept.to(layer.lora_A.device)
            layer.mask = here if self.masks[path] is None else self.masks[path] & here
        for weigher, without in self.weighers.values():
            if weigher.reads is not None:
                out = ~kept.to(next(iter(weigher.buffers())).device)
                weigher.without = out if without is None else without | out

    def restore(self) -> None:
        """Nobody sits out."""
        for path, layer in self.layers.items():
            layer.mask = self.masks[path]
        for weigher, without in self.weighers.values():
            weigher.without = without
