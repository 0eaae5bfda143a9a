"""Twin-Merging (arXiv 2406.15479): what the experts share, and per text what sets each apart, compressed.

With D_t = B_t A_t the update of expert t, in every module

    shared S = shared_scale sum_t D_t,      exclusive X_t = SVD_rank(D_t - S)
    y = W u + (S + sum_t w_t X_t) u,  w = softmax of a router, one row per text

As the w_t sum to 1, that is y = W u + sum_t w_t (S + X_t) u: every expert of the patched layer is S + X_t, whose rank
is at most that of all experts together (memory grows accordingly). A decomposition of the small cores that the experts'
own factors span is exact; no [O,D] matrix is formed. An expert without this module has D_t = 0, so X_t = SVD_rank(-S).

The default of shared_scale is 1/E, a mean: the survey has task arithmetic, the published code takes
the merge and the scale it is told. That code keeps the largest values of D_t - S for its classifiers instead of a
decomposition. Its router is an MLP over the mean last hidden state of the shared model; here it is a softmax regression
over any embedder's vectors, such as `Embedder.from_hidden_states` of the base (`queries/classifier.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.module_bank import kernel_copy
from .base import Method, Plan, Routing, is_finite_number, is_integer
from .given import WEIGHTS, as_given
from .survey import SURVEY


def twin_factors(lora_A: Tensor, lora_B: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A [E,R,D], lora_B [E,O,R] -> (A [E,R',D], B [E,O,R']) float64 with B_t A_t = S + SVD_rank(D_t - S).

    R' is min(E R, D, O). D_t = Q_B core_t Q_A^T with orthonormal Q of all factors side by side, so a truncated SVD of
    a difference of cores is one of the difference itself.
    """
    experts, inner, width = lora_A.shape
    q_a, r_a = torch.linalg.qr(lora_A.double().reshape(experts * inner, width).T)  # [D,P], [P,E R]
    q_b, r_b = torch.linalg.qr(lora_B.double().transpose(0, 1).reshape(-1, experts * inner))  # [O,Q], [Q,E R]
    r_a, r_b = r_a.T.reshape(experts, inner, -1), r_b.reshape(-1, experts, inner).transpose(0, 1)
    cores = r_b @ r_a  # [E,Q,P]
    shared = scale * cores.sum(0, keepdim=True)
    u, s, vh = torch.linalg.svd(cores - shared, full_matrices=False)
    s[:, rank:] = 0
    u, s, vh = torch.linalg.svd(shared + (u * s[:, None]) @ vh, full_matrices=False)
    root = s.sqrt()
    return (root[..., None] * vh) @ q_a.T, q_b @ (u * root[:, None])


def twin_plan(bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any]) -> Plan:
    """Experts S + X_t in the dtype of the bank; output biases stay each expert's own, as shared + exclusive is that."""
    scale = 1 / module_bank.num_experts if options["shared_scale"] is None else options["shared_scale"]
    lora_A, lora_B = twin_factors(module_bank.lora_A, module_bank.lora_B, scale, options["rank"])
    shape = (module_bank.num_experts, module_bank.in_features)
    return Plan(
        lora_A=kernel_copy(lora_A.to(module_bank.lora_A.dtype)),
        lora_B=kernel_copy(lora_B.to(module_bank.lora_B.dtype)),
        lora_bias=module_bank.lora_bias,
        gates=torch.zeros(shape, device=module_bank.device, dtype=torch.float32),
    )


def check(routing: Routing, options: Mapping[str, Any]) -> Routing:
    """`Method.finish`: ValueError listing every option that is out of range."""
    problems = []
    if not (is_integer(options["rank"]) and options["rank"] >= 1):
        problems.append(f"rank must be a positive integer, got {options['rank']!r}")
    if options["shared_scale"] is not None and not is_finite_number(options["shared_scale"]):
        problems.append(f"shared_scale must be a finite number or None (1 / E), got {options['shared_scale']!r}")
    if problems:
        raise ValueError("method 'twin_merging': " + "; ".join(problems))
    return routing


ROWS = (
    Method(
        name="twin_merging",
        summary="what all experts share, and per text what sets each apart, compressed",
        paper="Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging, arXiv 2406.15479, section 3",
        taxonomy=SURVEY[28].taxonomy,
        plan=twin_plan,
        together=True,
        lora_only=True,
        routing=replace(WEIGHTS, top_k=None),
        bias=as_given,
        options={"rank": 8, "shared_scale": None},
        finish=check,
        source="classifier",
        survey=28,
        differs="LoRA experts; the router is a softmax regression, theirs an MLP; what is shared is a mean, theirs is "
        "scaled by hand",
    ),
)
