"""What torch wraps around a model: `torch.compile`, DistributedDataParallel, DataParallel, FSDP1."""

from __future__ import annotations

import sys

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, whose modules have the paths that adapters name; a bare model is itself.

    FSDP2 (`fully_shard`) changes a model in place and is no wrapper.
    """
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def trainable_inside(model: nn.Module) -> nn.Module:
    """`unwrapped(model)`, for training a part of it; ValueError where any part is FSDP1's, which flattens weights."""
    fsdp = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if fsdp is not None and any(isinstance(module, fsdp) for module in model.modules()):
        raise ValueError(
            "the model is wrapped by FullyShardedDataParallel, which flattens the weights: train without it, or shard "
            "with torch.distributed.fsdp.fully_shard"
        )
    return unwrapped(model)


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    compiled = _loaded("torch._dynamo.eval_frame", "OptimizedModule")
    if compiled is not None and isinstance(model, compiled):
        return model._orig_mod
    fsdp = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    return model.module if fsdp is not None and isinstance(model, fsdp) else None


def _loaded(module: str, name: str) -> type | None:
    """A class whose module costs seconds to import; without it there is no instance."""
    return getattr(sys.modules.get(module), name, None)
