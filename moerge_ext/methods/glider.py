"""GLIDER (arXiv 2410.07172): PHATGOOSE's gates plus a global affinity of the whole query to each expert.

s_glob [N, E] is the cosine between the query's embedding and each expert's, given as a tensor, one row per
sequence; u_bar and v_bar are the standardized token and gate.

    glider        (paper, section 4.2)   s_e = alpha * s_glob_e + cos(v_bar_e, u_bar) / sqrt(E)
                                             = alpha * s_glob_e + (v_bar_e . u_bar) / (D sqrt(E))
                  alpha = gamma * 1{max_e s_glob_e > threshold} + beta, per row
                  threshold 0.8 (chosen for the embedder nomic-embed-text-v1.5), gamma 100, beta 3
    glider_code   (published code)       s_e = alpha * s_glob_e + (v_bar_e . u_bar) / sqrt(D), alpha constant

then the two highest and their weights. The paper writes top-k(softmax(s)), a softmax over all E experts before the
top-k, and weights w_k that nothing divides by their sum; the code divides them, w / (sum w + 1e-6), which is a softmax
over the two up to that 1e-6. Both rows do the latter; `glider_softmax_all` is the letter: weighting="softmax_all". The
paper's local term is sqrt(D E) times smaller than the code's, and so small beside alpha s_glob (it lies within
+-1 / sqrt(E)) that the query decides nearly alone.

The paper gives two alphas for queries above the threshold: gamma + beta = 103 by section 4.2, 100 in section 5.4 and in
the row of Table 2 that equals the result of Table 1. The rows do the former; gamma=97 is the latter.

alpha of `glider_code`: the published evaluation script sets 3 for held-out tasks and BIG-bench, 100 for
held-in tasks and 1000 once; its configuration's default is 0, no global term. Here 3, the paper's beta. That
code has one affinity vector per task, and by its default drops the last number of every embedding before the
cosine; the row takes one vector per task as well and whole embeddings.

Option `threshold` of `glider`: None is the paper's 0.8 for affinities given as a tensor; for texts see `QueryRouter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..experts.kinds import SIGMOID_GATE
from .base import Method, Routing, is_finite_number
from .gating import InverseTemperature, gates_lacking, sigmoid_gate_plan
from .phatgoose import TAXONOMY as LOCAL_TAXONOMY

PAPER = "Glider: Global and Local Instruction-Driven Expert Router, arXiv 2410.07172"

PAPER_THRESHOLD = 0.8

# By the survey's definitions: token and query both steer; held-in and held-out tasks are evaluated.
TAXONOMY = replace(LOCAL_TAXONOMY, input_granularity="Multiple", generalization="Multiple")


def local_scale(in_features: int, num_experts: int) -> float:
    """1 / (D sqrt(E)): turns v_bar . u_bar into the paper's cos(v_bar, u_bar) / sqrt(E)."""
    return 1.0 / (in_features * math.sqrt(num_experts))


def threshold_bias(affinities: Tensor, options: Mapping[str, Any]) -> Tensor:
    """s_glob [N, E] -> alpha * s_glob [N, E] float32, alpha per row (the paper's indicator)."""
    affinities = affinities.float()
    threshold = PAPER_THRESHOLD if options["threshold"] is None else options["threshold"]
    sure = affinities.amax(-1, keepdim=True) > threshold
    return affinities * (sure * options["gamma"] + options["beta"])


def constant_bias(affinities: Tensor, options: Mapping[str, Any]) -> Tensor:
    """s_glob [N, E] -> alpha * s_glob [N, E] float32, one alpha for all."""
    return affinities.float() * options["alpha"]


def check_numbers(routing: Routing, options: Mapping[str, Any], *, method: str) -> Routing:
    """`Method.finish`: every option is a finite number (a threshold may be None), or a ValueError that lists those
    that are not.
    """
    bad = [
        f"{name} must be a finite number, got {value!r}"
        for name, value in options.items()
        if not is_finite_number(value) and not (name == "threshold" and value is None)
    ]
    if bad:
        raise ValueError(f"method '{method}': " + "; ".join(bad))
    return routing


GLIDER = Method(
    name="glider",
    summary="query affinity s and trained gates; alpha s + cos(u, v) / sqrt(E), alpha 3 or 103",
    differs="weights are renormalized after top-k, as in the code (glider_softmax_all: not); alpha 103 is that of "
    "section 4.2, gamma=97 is the 100 of section 5.4",
    paper=f"{PAPER}, section 4.2",
    taxonomy=TAXONOMY,
    plan=sigmoid_gate_plan,
    routing=Routing(top_k=2, normalize="standardize", scale=local_scale, weighting="softmax"),
    bias=threshold_bias,
    options={"threshold": None, "gamma": 100.0, "beta": 3.0},
    finish=partial(check_numbers, method="glider"),
    gate_kind=SIGMOID_GATE,
    lacks=partial(gates_lacking, kind=SIGMOID_GATE),
    source="instruction",
)

GLIDER_CODE = Method(
    name="glider_code",
    summary="as the authors' code runs it; 3 s + LN(u).LN(v) / sqrt(D)",
    paper=f"{PAPER}, published code",
    taxonomy=TAXONOMY,
    plan=sigmoid_gate_plan,
    routing=Routing(top_k=2, normalize="standardize", scale=InverseTemperature(by_width=True), weighting="softmax"),
    bias=constant_bias,
    options={"alpha": 3.0},
    differs="the code, not the paper: alpha is constant, the local term unscaled by E, one affinity vector per task",
    finish=partial(check_numbers, method="glider_code"),
    gate_kind=SIGMOID_GATE,
    lacks=partial(gates_lacking, kind=SIGMOID_GATE),
    source="instruction",
    per_task=True,
)

GLIDER_SOFTMAX_ALL = replace(
    GLIDER,
    name="glider_softmax_all",
    summary="glider with the softmax over all experts before top-k, not renormalized",
    routing=replace(GLIDER.routing, weighting="softmax_all"),
    finish=partial(check_numbers, method="glider_softmax_all"),
    differs="alpha 103 is that of section 4.2, gamma=97 is the 100 of section 5.4",
)

ROWS = (GLIDER, GLIDER_SOFTMAX_ALL, GLIDER_CODE)
