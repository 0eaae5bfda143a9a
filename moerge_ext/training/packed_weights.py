"""4-bit layers of bitsandbytes, held in the form that gradients pass.

On a CPU with AVX-512 BF16 their first forward in `.eval()` mode without gradients packs the weight anew, for good;
from then on no gradient reaches the layer's input, also in `.train()` mode (0.50.2). A loss that is measured between
two steps is such a forward, and so is every text that was generated before. What unpacks a weight, its `state_dict`,
leaves the scales of its blocks transposed (unless they are quantized as well), and with them other weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"  # of a layer: whether such a forward packs its weight


@contextmanager
def passing_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of `model` are unpacked and stay so."""
    layers = [module for module in model.modules() if vars(module).get(_PACKS)]
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            _unpack(layer)
        setattr(layer, _PACKS, False)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, _PACKS, True)


def _unpack(layer: nn.Module) -> None:
    scales = layer.weight.quant_state.absmax  # [blocks of a row, rows]
    layer.state_dict()
    state = layer.weight.quant_state
    if state.absmax.dim() == 2:
        state.absmax = scales.T.reshape(-1).float()
