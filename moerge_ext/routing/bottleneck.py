"""Bottleneck adapters behind a linear layer: what they add to its output, and where they find the block's residual.

    up f(down z)      z = h, the layer's output; or h + r, the block's residual added; or LN(h + r) in BERT-like models

(`experts/formats/bottleneck.py` has the equation and its source.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "leakyrelu": functional.leaky_relu,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
_BERT, _LLAMA, _GPT2 = (
    {"output.dense": None},
    {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    {"attn.c_proj": "ln_1", "mlp.c_proj": "ln_2"},
)
# {model_type: {end of the layer's path: the norm of the same block whose input is the residual, None: the parent's
# second argument}}
_SOURCES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "llama": _LLAMA, "mistral": _LLAMA, "gpt2": _GPT2}


def bottleneck(z: Tensor, tensors: Mapping[str, Tensor], activation: str) -> Tensor:
    """up f(down z + down_bias) + up_bias of one expert, z [T,O] -> [T,O]."""
    inner = functional.linear(z, tensors["down"], tensors["down_bias"])
    return functional.linear(ACTIVATIONS[activation](inner), tensors["up"], tensors["up_bias"])


class Residual:
    """Keeps the residual of one block, by thread, from when it comes by until the layer at the block's end asks."""

    def __init__(self, argument: int, norm: nn.Module | None):
        self.argument, self.norm = argument, norm
        self._kept: dict[int, Tensor] = {}

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[self.argument] if len(args) > self.argument else kwargs.get("input_tensor")
        self._kept[threading.get_ident()] = value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def added_to(self, h: Tensor) -> Tensor:
        """z of h [..., O]. RuntimeError when the block did not run around the layer."""
        residual = self._kept.pop(threading.get_ident(), None)
        if residual is None or residual.shape != h.shape:
            raise RuntimeError("a bottleneck adapter needs its block's residual: call the model, not the layer alone")
        z = h + residual
        return z if self.norm is None else self.norm(z)


def watch_residual(model: nn.Module, path: str) -> Residual:
    """A `Residual` for the layer at `path`, hooked into the model. ValueError where no residual is known."""
    source, argument, norm = _source(model, path)
    residual = Residual(argument, norm)
    source.register_forward_pre_hook(residual, with_kwargs=True)
    return residual


def unwatch(model: nn.Module) -> None:
    """Takes off every residual's hook."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Residual)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def residual_problems(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Why adapters that act after the residual cannot be put behind the layers at `paths`."""
    problems = []
    for path in paths:
        try:
            _source(model, path)
        except ValueError as error:
            problems.append(f"module '{path}': {error}")
    return problems


def _source(model: nn.Module, path: str) -> tuple[nn.Module, int, nn.Module | None]:
    """(the module whose argument is the residual, which argument, the norm that follows)."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for end, norm in _SOURCES.get(kind, {}).items():
        if not path.endswith("." + end):
            continue
        if norm is None:
            parent = model.get_submodule(path.rpartition(".")[0])
            return parent, 1, parent.LayerNorm
        return model.get_submodule(f"{path.removesuffix(end)}{norm}"), 0, None
    raise ValueError(
        f"its bottleneck adapters act on the sum with the block's residual, which is known in {', '.join(_SOURCES)} "
        f"after attention and feedforward, not here (model_type {kind!r})"
    )
