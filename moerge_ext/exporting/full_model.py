"""The base model with a merge of experts in its weights, as `save_pretrained` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.listing import grouped
from ..routing.layers import shared_parameters, values_problem
from ..routing.products import is_product
from .products import Product


def check_can_hold(model: nn.Module, modules: Mapping[str, bool]) -> None:
    """ValueError naming every layer whose weights cannot take a merge. modules: {path: whether it brings a bias}."""
    problems = [] if hasattr(model, "save_pretrained") else [f"{type(model).__name__} has no save_pretrained"]
    shared = shared_parameters(model)
    for path, biased in modules.items():
        if (why := _problem(model.get_submodule(path), biased)) is None and f"{path}.weight" in shared:
            why = f"its weight is shared with {shared[f'{path}.weight']}, which would change too"
        problems += [f"{path}: {why}"] if why else []
    if problems:
        raise ValueError(
            "the merge cannot be put into the weights of this model (without full=True (--full) it can be written as "
            "an adapter):\n- " + "\n- ".join(grouped(problems))
        )


def _problem(layer: nn.Module, biased: bool) -> str | None:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    inside = is_product(layer)
    if not isinstance(layer, nn.Linear) and not _is_conv1d(layer) and not inside:
        return f"it is a {kind}, no plain linear layer (quantized or patched)"
    if why := values_problem(layer.weight):
        return f"its weight cannot be changed: {why}"
    if not _is_conv1d(layer) and not inside and not _computes_as_linear(layer):
        return f"it is a {kind}, which does not compute x W^T + b with its weight (quantized, or a forward of its own)"
    if biased and getattr(layer, "bias", None) is None:
        return "the experts bring an output bias, and the layer has none"
    return None


@torch.no_grad()
def _computes_as_linear(layer: nn.Linear) -> bool:
    """Of a subclass (such as Falcon's): whether two tokens come out as from nn.Linear."""
    if type(layer) is nn.Linear:
        return True
    weight = layer.weight
    if type(weight) is not nn.Parameter:
        return False
    x = (
        torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=torch.float32)
        .view(2, -1)
        .to(weight.dtype)
    )
    want = F.linear(x, weight, layer.bias)
    try:
        got = layer(x)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    return torch.allclose(got.float(), want.float(), rtol=0.05, atol=0.01 * want.float().abs().max().item())


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(layer) is Conv1D  # its weight is [D,O]


def save_merged(model: nn.Module, products: Mapping[str, Product], folder: Path, tokenizer: Any) -> None:
    """Writes the model with the products in its weights; the model itself stays as it is."""
    state: dict[str, Tensor] = model.state_dict()
    for path, product in products.items():
        layer = model.get_submodule(path)
        weight = layer.weight.detach()
        state[f"{path}.weight"] = (
            product.added_to(weight.T).T.contiguous() if _is_conv1d(layer) else product.added_to(weight)
        )
        if product.bias is not None:
            bias = layer.bias.detach()
            delta = product.bias.to(bias.device).double() * product.scaling
            state[f"{path}.bias"] = (bias.double() + delta).to(bias.dtype)
    model.save_pretrained(folder, state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
