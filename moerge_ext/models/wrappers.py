"""What is wrapped around a model: `torch.compile`, DataParallel and its kin, FSDP1, SentenceTransformer."""

from __future__ import annotations

import sys

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, whose modules have the paths that adapters name; a bare model is itself.

    ValueError for a model whose layers cannot be replaced, and for what is no model but has one.
    FSDP2 (`fully_shard`) changes a model in place and is no wrapper.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(_no_module(model))
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _no_module(model: object) -> str:
    held = [
        name for name in ("model", "module", "transformer", "unet") if isinstance(getattr(model, name, None), nn.Module)
    ]
    hint = f": pass its .{held[0]}" if held else ""
    return f"the model must be a torch module, got {type(model).__name__}{hint}"


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of `model` is wrapped by FullyShardedDataParallel, which flattens the weights."""
    fsdp = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    return fsdp is not None and any(isinstance(module, fsdp) for module in model.modules())


def trainable_inside(model: nn.Module) -> nn.Module:
    """`unwrapped(model)`, for training a part of it; ValueError where any part is FSDP1's."""
    inside = unwrapped(model)
    if is_fsdp1(model):
        raise ValueError(
            "the model is wrapped by FullyShardedDataParallel, which flattens the weights: train without it, or shard "
            "with torch.distributed.fsdp.fully_shard"
        )
    return inside


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "the model is compiled by TorchScript, whose layers cannot be replaced: pass the one it was made of"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    compiled = _loaded("torch._dynamo.eval_frame", "OptimizedModule")
    if compiled is not None and isinstance(model, compiled):
        return model._orig_mod
    fsdp = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if fsdp is not None and isinstance(model, fsdp):
        return model.module
    return _inside_sentence_transformer(model)


def _inside_sentence_transformer(model: nn.Module) -> nn.Module | None:
    """The transformers model of a SentenceTransformer, CrossEncoder or SparseEncoder."""
    base = _loaded("sentence_transformers", "SentenceTransformer")
    if base is None:
        return None
    if isinstance(getattr(type(model), "transformers_model", None), property):  # from version 5 on
        inside = model.transformers_model
    else:
        inside = getattr(model[0], "auto_model", None) if isinstance(model, base) else None
    return inside if isinstance(inside, nn.Module) else None  # else a model of ONNX or OpenVINO


def _loaded(module: str, name: str) -> type | None:
    """A class whose module costs seconds to import; without it there is no instance."""
    return getattr(sys.modules.get(module), name, None)
