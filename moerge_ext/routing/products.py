"""A module that multiplies by its weight inside of a forward of its own, as the routers of mixtures of experts do.

    logits = F.linear(x, weight); ... return logits, scores, indices

Whoever has an expert there adds it to that product: to y = F.linear(x, weight), before the rest of the forward reads y.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import linear_features, on_meta

# what routers do to a weight or its product's input before they multiply
_CASTS = frozenset([Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16])


class Products(TorchFunctionMode):
    """Inside of the block every y = F.linear(x, weight) becomes add(y, x); `found` counts them."""

    def __init__(self, weight: Tensor, add: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.weights, self.add, self.found = [weight], add, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            if any(given["weight"] is weight for weight in self.weights):
                self.found += 1
                return self.add(result, given["input"])
        elif func in _CASTS and any(args[0] is weight for weight in self.weights):
            self.weights.append(result)
        return result


def layer_features(layer: nn.Module) -> tuple[int, int] | None:
    """(D, O) of a linear layer of any kind, or of a module with one product by its weight; None for others."""
    return linear_features(layer) or product_features(layer)


def product_features(layer: nn.Module) -> tuple[int, int] | None:
    """(D, O) of a module whose forward multiplies hidden states once by its weight [O,D]."""
    return None if (run := _meta_run(layer)) is None else run[0]


def is_product(layer: nn.Module) -> bool:
    """Whether a layer has such a product in place of being a linear layer itself."""
    if linear_features(layer) is not None and (
        not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward
    ):
        return False
    if (run := _meta_run(layer)) is None:
        return False
    return linear_features(layer) is None or not isinstance(run[1], Tensor)


def _meta_run(layer: nn.Module) -> tuple[tuple[int, int], Any] | None:
    """((D, O), what the forward returns) for hidden states on the meta device: shapes, and no arithmetic.

    A forward that takes more is also given what routers take besides: a bias [O] of their choice, or the tokens' ids.
    """
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dim() != 2:
        return None
    probe, forward = on_meta(layer), type(layer).forward
    others: list[tuple[Tensor, ...]] = [()]
    if len(signature(forward).parameters) > 2:
        others += [(torch.empty(weight.shape[0], device="meta", dtype=torch.float32),)]
        others += [(torch.empty(1, 2, device="meta", dtype=torch.int64),)]
    for more in others:
        products = Products(probe.weight, lambda y, x: y)
        x = torch.empty(1, 2, weight.shape[1], device="meta", dtype=weight.dtype)
        try:
            with torch.no_grad(), products:
                result = forward(probe, x, *more)
        except Exception:  # whatever a forward that wants something else does
            continue
        if products.found == 1:
            return (weight.shape[1], weight.shape[0]), result
    return None
