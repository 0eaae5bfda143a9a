"""Scores of experts where every rank has a part of the input features, the same on all ranks.

The partial sums of x, x^2 and x . g over a rank's features are added over ranks in float64: the variance of features
far from zero is a small difference of large sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.options import ROUTE, filled

EPS, TINY = 1e-5, 1e-12  # of the standardization and of the unit length in `route`
Reduce = Callable[[Tensor], Tensor]  # the sum over ranks, the same bits on each


def partial_scores(
    x: Tensor, gates: Tensor, gate_sums: Tensor, whole: int, options: Mapping[str, Any], reduce: Reduce
) -> Tensor:
    """f(norm(x) . g) * scale, [T,E] float32, the same on every rank.

    x: [T,D/ranks]; gates: [D/ranks,E] float64; gate_sums: [E] float64, the sum of every gate over all D = `whole`
    features; options: those of `route`
    """
    wide = x.double()
    sums = torch.cat([wide.sum(1, True), wide.square().sum(1, True), wide @ gates], 1)
    total, squares, products = reduce(sums).split([1, 1, sums.shape[1] - 2], 1)
    scale = 1.0 if options["scale"] is None else options["scale"]
    if options["normalize"] == "standardize":
        mean = total / whole
        variance = (squares / whole - mean.square()).clamp_min(0.0)
        products = (products - mean * gate_sums) / (variance + EPS).sqrt()
        scale = whole**-0.5 if options["scale"] is None else scale
    elif options["normalize"] == "unit":
        products = products / squares.sqrt().clamp_min(TINY)
    return ((products.abs() if options["absolute"] else products) * scale).float()


def chosen(kernels: Any, scores: Tensor, options: Mapping[str, Any], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `route` makes of scores [T,E] with these options: weights [T,K], experts [T,K].

    kernels: `ops` or its reference; mask: [E] or [T,E]
    """
    tokens, experts = scores.shape
    nothing, no_gates = scores.new_zeros(tokens, 1), scores.new_zeros(experts, 1)
    rows = torch.arange(tokens, dtype=torch.int32, device=scores.device)
    kept = {key: options[key] for key in ("top_k", "top_p", "weighting")}
    asked = kept | {"normalize": "none", "scale": 1.0, "bias": scores, "rows": rows, "mask": mask}
    return kernels.route(nothing, no_gates, **filled(ROUTE, asked))
