"""A softmax regression that tells whose data a text is like: the router of Twin-Merging (arXiv 2406.15479).

w = softmax(W embed(x) + b),    trained by cross-entropy on examples of each expert's task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .linear_heads import L2, fit_classes
from .text_router import BASE, Stored, TextRouter, described_experts, embedded


def train_classifier_of_data(
    data: Mapping[str, Sequence[str]],
    experts: ExpertBank | Sequence[str],
    embedder: Embedder,
    output_dir: str | Path,
    *,
    c: float = L2,
) -> Path:
    """Fit the regression to texts of every expert's task, {name: texts}; returns the file.

    Every expert counts the same, however many texts it has. ValueError for other experts, and for one without texts.
    """
    marks = described_experts(experts, tuple(data))
    empty = [name for name, texts in data.items() if not texts]
    if empty or BASE in data:
        raise ValueError(f"expected texts for every expert and for no other; none for {', '.join(empty) or BASE}")
    names = tuple(data)
    texts = [text for name in names for text in data[name]]
    vectors, probe = embedded(embedder, texts)
    counts = torch.tensor([len(data[name]) for name in names], device="cpu")
    labels = torch.arange(len(names), device="cpu").repeat_interleave(counts)
    share = len(texts) / (len(names) * counts)
    targets = torch.nn.functional.one_hot(labels, len(names)) * share[labels][:, None]
    weight, bias = fit_classes(vectors, targets, c=c)
    tensors = {"weight": weight, "bias": bias, "probe": probe}
    return Stored("classifier", names, tensors, {"c": c}, marks, embedder.name, embedder.max_length).save(output_dir)


class DataRouter(TextRouter):
    """The weights [N,E] of all experts for every text."""

    kind = "classifier"

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        tensors = self.stored.tensors
        return (self.embed(texts) @ tensors["weight"].T + tensors["bias"]).softmax(1)[:, self.order]

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        return self.values([texts] if isinstance(texts, str) else list(texts), options)
