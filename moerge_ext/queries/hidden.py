"""Texts to vectors by the base model itself: the mean of one layer's hidden states."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..models.pretrained import is_seq2seq
from .vectors import mean_pool

GENERIC = ("hf", "model", "snapshot", "base", "checkpoint")  # folder names that say nothing of the model in them


def base_name(path: str) -> str:
    """What to call the model of a folder or hub id: its last part, or the one before when that says nothing; of a
    folder from wherever it is named, and in the hub's cache the name of its repository.
    """
    parts = [part for part in (os.path.abspath(path) if os.path.isdir(path) else str(path)).split("/") if part]
    if cached := [part for part in parts if part.startswith("models--")]:
        return cached[-1].rpartition("--")[2]
    telling = [part for part in parts if part.lower() not in GENERIC]
    return (telling or parts or ["model"])[-1]


def hidden_states(model: nn.Module, tokenizer: Any, layer: int, max_length: int) -> Callable[[list[str]], Tensor]:
    """texts -> [N,G]: the mean over a text's tokens of hidden state `layer` (-1 the last, 0 the input embeddings).

    The encoder of an encoder-decoder. Experts that the model is patched with are left out. ValueError for a layer that
    it has not.
    """
    inner = model.get_encoder() if is_seq2seq(model.config) else model.base_model
    context = getattr(model.config, "max_position_embeddings", None)
    length = min(max_length, context) if context is not None else max_length

    def embed(texts: list[str]) -> Tensor:
        rows = [tokenizer(text, truncation=True, max_length=length).input_ids for text in texts]
        width = max(map(len, rows))
        ids, mask = (
            torch.zeros(len(rows), width, dtype=torch.long, device="cpu"),
            torch.zeros(len(rows), width, dtype=torch.long, device="cpu"),
        )
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, device="cpu"), 1
        device = next(model.parameters()).device
        handle = getattr(model, "_moerge_handle", None)
        with torch.no_grad(), handle.disabled() if handle is not None else nullcontext():
            states = inner(
                input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True
            ).hidden_states
        if not -len(states) <= layer < len(states):
            raise ValueError(f"layer must be in {-len(states)} .. {len(states) - 1} for this model, got {layer}")
        return mean_pool(states[layer].float(), mask.to(device))

    return embed
