"""`compose_models`: an anchor and an augmenting model as one (CALM)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .pretrained import load_tokenizer, location
from .stored import model_folder
from .weights import tokens_differ


def compose_models(
    anchor: str | os.PathLike,
    augmenting: str | os.PathLike,
    *,
    connections: int | Sequence[Sequence[int]] = 4,
    heads: int = 8,
    seed: int = 0,
    dtype: str = "auto",
) -> Any:
    """A `CalmForCausalLM` of two decoders, to be trained by `train_calm`; until then it answers as the anchor does.

    Behind connected layers the anchor's hidden states attend to the augmenting model's (`cross_attention.py`, arXiv
    2401.02412); both models are frozen.

    anchor, augmenting: folders or hub ids with safetensors and one tokenizer, token by token; connections: how many,
    evenly over both models' layers, or pairs (anchor's layer, augmenting's layer); heads: of each, they divide the
    anchor's width; dtype: of both models ("auto": as stored), the cross attention is float32.

    ValueError for models that are no decoders or are not there, other tokenizers, connections or heads out of range.
    """
    from .calm import CalmForCausalLM

    paths = [os.fspath(path) for path in (anchor, augmenting)]
    for path in paths:
        location(path)
    folders = [str(model_folder(path)) for path in paths]
    named = [(role, load_tokenizer(folder)) for role, folder in zip(("anchor", "augmenting"), folders, strict=True)]
    if why := tokens_differ(named):
        raise ValueError(f"{paths[0]} and {paths[1]} cannot be composed: {why}")
    return CalmForCausalLM.compose(*paths, connections, heads, seed, dtype)
