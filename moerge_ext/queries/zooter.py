"""Zooter: a router that was taught by the rewards of all experts' answers.

Lu et al. 2023, arXiv 2311.08692. Rewards r_q [E] of the answers to question q are smoothed by its tags and distilled:

    r_t = mean of r_q over the questions with tag t;  r'_q = beta r_q + (1 - beta) mean over the tags t of q of r_t
    loss = sum_q KL(softmax(r'_q / T) || Z(q)),       Z(q) = softmax(W embed(q) + b)

A question without tags keeps its own rewards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .judged import Judged
from .linear_heads import L2, fit_classes
from .text_router import Stored, TextRouter, described_experts, embedded

BETA = 0.3


def smoothed_rewards(judged: Judged, beta: float) -> Tensor:
    """r' [M,E]."""
    members: dict[str, list[int]] = defaultdict(list)
    for number, tags in enumerate(judged.tags):
        for tag in dict.fromkeys(tags):
            members[tag].append(number)
    of_tag = {tag: judged.scores[rows].mean(0) for tag, rows in members.items()}
    smoothed = judged.scores.clone()
    for number, tags in enumerate(judged.tags):
        if tags:
            known = torch.stack([of_tag[tag] for tag in dict.fromkeys(tags)]).mean(0)
            smoothed[number] = beta * judged.scores[number] + (1 - beta) * known
    return smoothed


def train_zooter(
    judged: Judged,
    experts: ExpertBank | Sequence[str],
    embedder: Embedder,
    output_dir: str | Path,
    *,
    beta: float = BETA,
    temperature: float = 1.0,
    c: float = L2,
) -> Path:
    """Distil the rewards of `judged` into a softmax regression over the embedder's vectors; returns its file.

    beta: 1 leaves the rewards as they are; without `judged.tags` the tasks are the tags, if there are any. temperature:
    T, for rewards of another size; c: the inverse strength of the L2 penalty. ValueError for values out of range and
    for other experts.
    """
    if not 0 <= beta <= 1 or not temperature > 0 or not c > 0:
        raise ValueError(
            f"zooter: expected beta in 0 .. 1, temperature > 0 and c > 0, got {beta}, {temperature} and {c}"
        )
    marks = described_experts(experts, judged.names)
    judged.check_differing("zooter")
    if not judged.tags and judged.tasks:
        tags = tuple((task,) for task in judged.tasks)
        judged = Judged(judged.texts, judged.scores, judged.names, judged.tasks, tags)
    targets = (smoothed_rewards(judged, beta) / temperature).softmax(1)
    vectors, probe = embedded(embedder, judged.texts)
    weight, bias = fit_classes(vectors, targets, c=c)
    facts = {"beta": beta, "temperature": temperature, "c": c}
    tensors = {"weight": weight, "bias": bias, "probe": probe}
    return Stored("zooter", judged.names, tensors, facts, marks, embedder.name, embedder.max_length).save(output_dir)


class ZooterRouter(TextRouter):
    """The expert with the largest Z(q)."""

    kind = "zooter"

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        tensors = self.stored.tensors
        return (self.embed(texts) @ tensors["weight"].T + tensors["bias"]).softmax(1)[:, self.order]
