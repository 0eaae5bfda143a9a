"""Batches of rows of like length, padded on the left, whose loss needs the logits of the answers alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from moerge_ext.training.encoding import IGNORED

WINDOW = 16  # batches that are sorted by length together
Feature = dict[str, list[int]]


def batches(features: Sequence[Feature], batch_size: int, pad: int, seed: int = 0) -> list[dict[str, Any]]:
    """One epoch in random order, as batches; the last rows that fill none are left out."""
    rng = random.Random(seed)
    order = rng.sample(range(len(features)), len(features))
    made = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = sorted(order[start : start + WINDOW * batch_size], key=lambda i: len(features[i]["input_ids"]))
        parts = [window[i : i + batch_size] for i in range(0, len(window) - batch_size + 1, batch_size)]
        rng.shuffle(parts)
        made += [collate([features[i] for i in part], pad) for part in parts]
    return made


def collate(features: Sequence[Feature], pad: int) -> dict[str, Any]:
    """Answers end in the last column, so that the last `logits_to_keep` columns hold them all."""
    width = max(len(f["input_ids"]) for f in features)
    keep = 1 + max(sum(label != IGNORED for label in f["labels"]) for f in features)
    ids = torch.full((len(features), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, feature in enumerate(features):
        start = width - len(feature["input_ids"])
        ids[i, start:], mask[i, start:] = torch.tensor(feature["input_ids"]), 1
        labels[i, start:] = torch.tensor(feature["labels"])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "labels": labels[:, -keep:],
        "logits_to_keep": min(keep, width),
    }
