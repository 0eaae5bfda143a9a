"""Small sums over vectors of texts."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden [N,T,G], mask [N,T] -> [N,G]: the mean over the tokens where mask is 1."""
    mask = mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


def unit(vectors: Tensor) -> Tensor:
    """[..., G] of length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=-1, eps=1e-12)
