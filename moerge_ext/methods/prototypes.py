"""Arrow prototypes: the input direction that a LoRA stretches most, from its factors alone.

The prototype of an expert is the top right singular vector of B A ([O, D], never formed): a unit vector [D].
It does not depend on the LoRA scaling, and it is unique up to sign (up to a rotation where the two largest
singular values are equal).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.full_precision import without_autocast

CHUNK_ELEMENTS = 1 << 23  # of float64 factors at a time: 64 MiB however large the bank is


def svd_prototypes(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Exact prototypes: lora_A [E, R, D], lora_B [E, O, R] -> (prototypes [E, D] float32, found [E] bool).

    A^T = Q_A R_A and B = Q_B R_B give B A = Q_B (R_B R_A^T) Q_A^T, so the top right singular vector is Q_A
    times that of the small middle factor. All in float64; the sign makes the largest entry positive.

    found is False, and the prototype zero, where B A is zero to rounding: such an expert has no direction.
    """
    experts, rank, width = lora_A.shape
    step = max(1, CHUNK_ELEMENTS // max(1, rank * (width + lora_B.shape[1])))
    parts = [_svd_chunk(lora_A[i : i + step].double(), lora_B[i : i + step].double()) for i in range(0, experts, step)]
    return torch.cat([p for p, _ in parts]), torch.cat([f for _, f in parts])


def _svd_chunk(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    q_a, r_a = torch.linalg.qr(a.transpose(-2, -1))
    r_b = torch.linalg.qr(b, mode="r").R
    # Both to unit size: the product of very small or large factors neither vanishes nor overflows.
    r_a, r_b = _unit_size(r_a), _unit_size(r_b)
    _, sigma, vh = torch.linalg.svd(r_b @ r_a.transpose(-2, -1), full_matrices=False)
    direction = (q_a @ vh[:, 0, :, None]).squeeze(-1)
    # Rounding leaves a product of norm ~ eps |A| |B| where the exact one is zero.
    size = torch.linalg.matrix_norm(r_a) * torch.linalg.matrix_norm(r_b)
    found = sigma[:, 0] > 16 * torch.finfo(torch.float64).eps * size
    return _finish(direction, found)


@without_autocast()
def power_iteration_prototypes(
    lora_A: Tensor, lora_B: Tensor, *, iterations: int = 15, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Prototypes as PEFT's Arrow finds them: `iterations` times v <- A^T B^T B A v / |.|, from a draw.

    Shapes as `svd_prototypes`, float32. Every expert starts from the same normal vector, drawn with `seed` on the
    device of the factors, as PEFT draws it: on another device the same seed is another vector. With few steps or a
    small gap between the singular values the result is not the singular vector but depends on that draw: |cos| to it
    as low as 0.97 has been seen.
    """
    device = lora_A.device
    start = torch.randn(
        lora_A.shape[-1], device=device, generator=torch.Generator(device).manual_seed(seed), dtype=torch.float32
    )
    vectors, found = [], []
    for a, b in zip(lora_A.float(), lora_B.float(), strict=True):
        gram = b.T @ b
        v = start / start.norm()
        for _ in range(iterations):
            v = a.T @ (gram @ (a @ v))
            v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
        vectors.append(v)
        found.append(v.norm() > 0.5)
    return _finish(torch.stack(vectors), torch.stack(found), fix_sign=False)


def _unit_size(factors: Tensor) -> Tensor:
    """[E, ., .] divided by each matrix's largest magnitude; zeros stay zeros."""
    return factors / factors.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(factors.dtype).tiny)


def _finish(direction: Tensor, found: Tensor, *, fix_sign: bool = True) -> tuple[Tensor, Tensor]:
    if fix_sign:
        largest = direction.gather(-1, direction.abs().argmax(-1, keepdim=True))
        direction = torch.where(largest < 0, -direction, direction)
    return torch.where(found[:, None], direction, 0.0).float(), found
