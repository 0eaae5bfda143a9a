"""Quantized layers of a base, while something behind or beside them is trained: gradients have to pass them.

4-bit layers of bitsandbytes, on a CPU with AVX-512 BF16: their first forward in `.eval()` mode without gradients packs
the weight anew, for good; from then on no gradient reaches the layer's input, also in `.train()` mode (0.50.2). A loss
that is measured between two steps is such a forward, and so is every text that was generated before. What unpacks a
weight, its `state_dict`, leaves the scales of its blocks transposed (unless they are quantized as well), and with them
other weights.

Others have no gradient at all, such as torchao's with int8 activations (0.18), and say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.linear import linear_features

_PACKS = "support_avx512bf16_for_cpu"  # of a layer of bitsandbytes: whether such a forward packs its weight


@contextmanager
def passing_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, packed weights of `model` are unpacked and stay so, and a layer that keeps gradients back is a ValueError
    at its first forward with one.
    """
    packing = [module for module in model.modules() if vars(module).get(_PACKS)]
    for layer in packing:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            _unpack(layer)
        setattr(layer, _PACKS, False)
    hooks = [
        layer.register_forward_hook(_Watch(path), with_kwargs=True)
        for path, layer in model.named_modules()
        if _is_quantized(layer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in packing:
            setattr(layer, _PACKS, True)


def _unpack(layer: nn.Module) -> None:
    scales = layer.weight.quant_state.absmax  # [blocks of a row, rows]
    layer.state_dict()
    state = layer.weight.quant_state
    if state.absmax.dim() == 2:
        state.absmax = scales.T.reshape(-1).float()


def _is_quantized(layer: nn.Module) -> bool:
    """Whether it acts as a linear layer and is none of torch's, by its type or by that of its weight."""
    if linear_features(layer) is None or any(True for _ in layer.children()):
        return False
    weight = getattr(layer, "weight", None)
    return type(weight) is not nn.Parameter or type(weight.data) is not Tensor or not weight.is_floating_point()


class _Watch:
    """The forward hook of one layer."""

    def __init__(self, path: str):
        self.path = path

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        came = any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
        if torch.is_grad_enabled() and came and isinstance(y, Tensor) and not y.requires_grad:
            kind = type(getattr(layer, "weight", layer)).__name__
            raise ValueError(
                f"{self.path} ({type(layer).__name__} with a {kind}) lets no gradient pass, so that what lies before "
                "it would be trained without what lies behind it: load the base without this quantization, or with one "
                "that has a gradient (bitsandbytes' int8 and 4-bit, torchao's int8 and float8 weights)"
            )
