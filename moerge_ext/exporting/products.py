"""Experts of one linear layer merged into one LoRA: y = W u + s (B A u + b).

    merged           s B A = sum_e w_e B_e A_e         exact: the factors side by side along the rank, or of rank R, the
                                                       best in the Frobenius norm (Eckart and Young)
    merged_factors   A = sum_e w_e A_e,  B = sum_e w_e B_e,  s = 1

w_e is 1/E unless given; B_e holds its expert's scaling. Both are the methods of these names (`methods/merged.py`), to
which they are equal where w_e is 1/E. An expert without the module counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts.module_bank import ModuleBank
from ..methods.merged import used_ranks

METHODS = ("merged", "merged_factors")


@dataclass(frozen=True)
class Product:
    """One LoRA; lora_A [R,D], lora_B [O,R], bias [O] or None (times scaling, as PEFT has it)."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def added_to(self, weight: Tensor) -> Tensor:
        """weight [O,D] + s B A, computed in at least float32 and rounded once."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = self.lora_B.to(weight.device, wide) @ self.lora_A.to(weight.device, wide)
        return weight.to(wide).add(delta, alpha=self.scaling).to(weight.dtype)


def mean_of_products(module: ModuleBank, weights: Tensor | None) -> Product | None:
    """`merged`, exact. weights: [E], or None for 1/E; None where no expert with a weight has the module.

    1/E is the scaling, so that factors in 16 bits stay as they are; with other weights they become float32.
    """
    used, bias = used_ranks(module), module.lora_bias
    if weights is None:
        total = None if bias is None else bias.float().sum(0).to(bias.dtype)
        return _columns(module, used, 1.0 / module.num_experts, total)
    used &= (weights != 0).to(used.device)[:, None]
    wide = torch.promote_types(module.dtype, torch.float32)
    total = None if bias is None else weights.to(bias.device, wide) @ bias.to(wide)
    found = _columns(module, used, 1.0, total)
    if found is None:
        return None
    each = weights.to(module.device, wide)[:, None].expand(used.shape)[used]  # [sum of ranks]
    return Product(found.lora_A.to(wide), found.lora_B.to(wide) * each, 1.0, total)


def _columns(module: ModuleBank, used: Tensor, scaling: float, bias: Tensor | None) -> Product | None:
    lora_a = module.lora_A[used]
    return Product(lora_a, module.lora_B.transpose(1, 2)[used].T, scaling, bias) if len(lora_a) else None


def mean_of_factors(module: ModuleBank, weights: Tensor | None) -> Product | None:
    """`merged_factors`; as `mean_of_products`."""
    wide = torch.promote_types(module.dtype, torch.float32)
    if weights is None:
        parts = (module.lora_A, module.lora_B, module.lora_bias)
        a, b, bias = (None if part is None else part.mean(0, dtype=wide).to(part.dtype) for part in parts)
    else:
        if not (weights[module.present] != 0).any():
            return None
        each = weights.to(module.device, wide)
        parts = (module.lora_A, module.lora_B, module.lora_bias)
        a, b, bias = (None if part is None else torch.tensordot(each, part.to(wide), 1) for part in parts)
    return Product(a, b, 1.0, bias)


def truncated(product: Product, rank: int) -> tuple[Product, float, float]:
    """(the best product of at most `rank`, float32; the squared Frobenius norms of what is lost and of the whole).

    By QR of both factors and the singular values of the small matrix between them, in float64.
    """
    lora_a, lora_b = product.lora_A.double(), product.lora_B.double() * product.scaling
    left, small_b = torch.linalg.qr(lora_b)  # [O,S], [S,R]
    right, small_a = torch.linalg.qr(lora_a.T)
    u, values, v = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    whole, lost = values.square().sum().item(), values[rank:].square().sum().item()
    root = values[:rank].sqrt()
    bias = None if product.bias is None else product.bias.float() * product.scaling
    a, b = (root[:, None] * (v[:rank] @ right.T)).float(), ((left @ u[:, :rank]) * root).float()
    return Product(a, b, 1.0, bias), lost, whole
