"""Linear layers of any kind: their sizes, also those of a model that is not loaded."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .pretrained import is_seq2seq, load_config, location


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in_features D, out_features O) of anything that acts as a linear layer, else None.

    nn.Linear and what quantizers make of it carry in_features and out_features; transformers' Conv1D carries nx and nf.
    """
    for d, o in (("in_features", "out_features"), ("nx", "nf")):
        if isinstance(getattr(module, d, None), int) and isinstance(getattr(module, o, None), int):
            return getattr(module, d), getattr(module, o)
    return None


def skeleton(base: Any) -> nn.Module:
    """The modules of a model without its weights: `base` itself when it is one, else built from its config.

    base: a model, a config of transformers, or the folder or hub id of either. No code of the folder is run. ValueError
    when there is no config, or when it names a class that transformers has not.
    """
    if isinstance(base, nn.Module):
        return base
    import transformers

    config = base
    if isinstance(base, (str, os.PathLike)):
        where, options = location(os.fspath(base))
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"{os.fspath(base)!r} has no config that transformers reads ({reason})") from None
    if not isinstance(config, transformers.PretrainedConfig):
        raise ValueError(f"expected a model, its config, or a folder or hub id of it, got {type(base).__name__}")
    name = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if name is not None and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"its config names {name!r}, which is no class of transformers")
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def skeleton_to_train(path: str) -> nn.Module | None:
    """The modules of what `load_model` makes of a path, without weights; None where it cannot be built without.

    Errors of a path without a model are those of `load_config`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = load_config(path)
    auto = AutoModelForSeq2SeqLM if is_seq2seq(config) else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(config)
    except Exception:  # whatever a model's own code does with values that are not there
        return None
