"""Affinities that a caller gives, as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def affinity_rows(scores: Any, names: Sequence[str]) -> Tensor:
    """[N,E] of numbers [N,E] or [E], or of {expert's name: number}, 0 for the others. ValueError for what is none."""
    if isinstance(scores, Mapping):
        if not scores:
            raise ValueError(f"affinities: {{}} names no expert; expected some of {', '.join(names)}")
        if unknown := [name for name in scores if name not in names]:
            raise ValueError(f"affinities: no expert {unknown[0]!r}; expected some of {', '.join(names)}")
        scores = [scores.get(name, 0.0) for name in names]
    sizes = f"[N, E={len(names)}] or [E={len(names)}]"
    try:
        scores = scores if isinstance(scores, Tensor) else torch.as_tensor(scores, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"affinities must be numbers {sizes}, or {{name: number}}, got {scores!r:.100}") from None
    rows = scores[None] if scores.dim() == 1 else scores
    if rows.dim() != 2 or rows.shape[1] != len(names) or rows.shape[0] == 0:
        raise ValueError(f"affinities must be {sizes}, got {list(scores.shape)}")
    if not rows.isfinite().all():
        raise ValueError("affinities must be finite")
    return rows
